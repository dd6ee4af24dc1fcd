"""Rewrite the generated parts of the pages: `make docs`, or `python docs/build.py [--check]`.

A page marks such a part with a pair of comments, each alone on its line:

    <!-- claims -->
    whatever stands here is replaced
    <!-- end claims -->

The function of that name in PARTS says what goes between them, and reads nothing but committed
files, so that a page can never tell another story than the results. `tests/test_readme.py` fails
when a page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "evolq_lite"
RESULTS = ROOT / "data" / "results"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "data" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
ROOF = "cli"  # calls everything and is called by nothing, so it stands above all levels
START = re.compile(r"^<!-- (\w+) -->\n", re.MULTILINE)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo() -> str:
    """What `make demo` gave when it ran for data/results: its figure and its table."""
    from evolq_lite.evaluate import Accuracy, Comparison, unpacked

    told = json.loads((RESULTS / "demo-summary.json").read_text(encoding="utf-8"))
    names = {
        "float": "float",
        "before": f"{told['setting']} before the search",
        "evolved": f"{told['setting']} after the search",
        "GPTQ": f"{told['setting']} rounded by GPTQ, not searched",
    }
    right = {name: unpacked(told["correct"][name], told["images"]) for name in names}
    rows = [
        (
            title,
            str(Accuracy(int(right[name].sum()), told["images"])),
            str(Comparison.of(right["before"], right[name])) if name in ("evolved", "GPTQ") else "",
        )
        for name, title in names.items()
    ]
    alt = (
        f"The loss over the {told['evaluations']} evaluations of the demo: it falls in small steps "
        f"from {told['fitness_before']:.3f} to {told['fitness_after']:.3f}."
    )
    header = (f"{told['images']:,} test images", "top-1 [95 % interval]", "gain over before")
    return "\n".join(
        [f"![{alt}](data/results/demo-fitness.png)", "", table(header, rows)],
    )


def claims() -> str:
    """Each claim with its verdict."""
    from evolq_lite.experiments import report

    return report.claims_table()


def source_files(name: str) -> list[Path]:
    """The files of a module, or of a package within ours."""
    folder = PACKAGE / name
    # A folder left over from another branch holds no more than __pycache__.
    return sorted(folder.rglob("*.py")) or [PACKAGE / f"{name}.py"]


def imports_of(name: str, names: set[str]) -> set[str]:
    """Which of our modules a module imports, wherever in the file."""
    found = set()
    for path in source_files(name):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evolq_lite"):
                inner = (node.module or "").split(".")[1:2]
                found |= set(inner) or {alias.name for alias in node.names}
    return found & names - {name, ROOF}


def levels(imports: dict[str, set[str]]) -> dict[str, int]:
    """How high each module stands: 1 with no imports of ours, else above all that it imports."""
    height: dict[str, int] = {}
    while len(height) < len(imports):
        ready = [n for n, below in imports.items() if n not in height and below <= height.keys()]
        if not ready:
            circle = ", ".join(sorted(imports.keys() - height.keys()))
            raise ValueError(f"modules import each other in a circle: {circle}")
        height |= {n: 1 + max((height[b] for b in imports[n]), default=0) for n in ready}
    return height


def modules() -> str:
    """Every module in the order of its imports, with the first sentence of its docstring."""
    names = {path.stem for path in PACKAGE.glob("*.py")}
    names |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    names = {name for name in names if not name.startswith("_")}
    height = levels({name: imports_of(name, names) for name in names - {ROOF}})
    height[ROOF] = max(height.values()) + 1
    rows = []
    for name in sorted(names, key=lambda name: (height[name], name)):
        package = (PACKAGE / name / "__init__.py").is_file()
        file = f"{name}/__init__.py" if package else f"{name}.py"
        lecture = ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))) or ""
        sentence = re.split(r"(?<=[.?!])\s", " ".join(lecture.split()))[0]
        lesson = re.search(r"lesson (\d+)", lecture)
        shown, target = (f"{name}/", name) if package else (file, file)
        link = f"[`{shown}`](../evolq_lite/{target})"
        is_for = sentence.replace("|", "\\|")
        rows.append((str(height[name]), link, is_for, lesson[1] if lesson else ""))
    return table(("level", "module", "what it holds", "lesson"), rows)


def trial() -> str:
    """What `reproduce PAPER` gave for two networks, with one pass, one seed and few images."""
    from evolq_lite.experiments.paper_grid import CALIBRATION, NETWORKS, Grid

    networks = (NETWORKS["DeiT-T"], "vit_tiny_patch16_224")
    nowhere = ""  # images and weights are not in this repo, and nothing is computed here
    grid = Grid(
        nowhere,
        nowhere,
        None,
        nowhere,
        out=str(RESULTS),
        calibration_images=CALIBRATION,
        test_images=1000,
        networks=networks,
        passes=1,
        seeds=1,
    )
    return grid.tell(heading="###")


PARTS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "claims": claims,
    "modules": modules,
    "trial": trial,
}


def rewrite(page: str) -> str:
    """A page with all its generated parts made anew; ValueError for markers that are wrong."""
    done, rest = "", page
    while match := START.search(rest):
        name = match[1]
        if name not in PARTS:
            raise ValueError(f"no part is named {name!r}; there are {', '.join(PARTS)}")
        _, end, after = rest[match.end() :].partition(f"<!-- end {name} -->")
        if not end:
            raise ValueError(f"<!-- {name} --> has no <!-- end {name} -->")
        # The blank lines make Markdown read a table as one, right behind a comment.
        done += f"{rest[: match.start()]}<!-- {name} -->\n\n{PARTS[name]()}\n\n{end}"
        rest = after
    return done + rest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite the generated parts of the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of date")
    check = parser.parse_args(argv).check
    stale = {}
    for path in PAGES:  # all are made before the first is written
        page = path.read_text(encoding="utf-8")
        try:
            new = rewrite(page)
        except ValueError as error:
            print(f"{path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if new != page:
            stale[path] = new
    for path, new in stale.items():
        print(
            f"{path.relative_to(ROOT)} {'is out of date; run: make docs' if check else 'rewritten'}"
        )
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
