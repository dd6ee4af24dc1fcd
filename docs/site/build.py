"""Build the course as a web site: `make site`, or `python docs/site/build.py [--out DIR]`.

Sphinx wants all sources in one folder. So pages and lessons are first copied to `OUT/source`, in
the folders in which they lie here, which keeps their links right; API pages are written, the
embedded ViT is exported for the live page, and what the page `play` plays is computed. Then Sphinx
makes `OUT/html`. No notebook is executed and nothing is fetched. Any warning is an error.

Open `build/site/html/index.html`, or put that folder on any web server. With SITE_REPOSITORY (the
address of the repository on the web), links to source files lead there; without, they are plain
text.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from api import pages as api_pages  # noqa: E402

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks" / "assignments").glob("*.md")),
    ROOT / "notebooks" / "assignments" / "course" / "notes.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "data" / "README.md",
    ROOT / "data" / "results" / "README.md",
]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
HERE_IT_IS_STORED = """\
:::{{admonition}} You are reading stored outputs
:class: tip
Panels are pictures here. To move their sliders, run `make lab` and open this lesson, or
{{download}}`download the notebook <{name}>`. A network that runs in this page, without any
installation, is on [](../try.md).
:::
"""


def staged(path: Path) -> Path | None:
    """Where a file of the repository is on the site, relative to its top; None if nowhere."""
    if path == ROOT / "README.md" or path == ROOT:
        return Path("index.md")
    if path in PAGES or path in LESSONS:
        return path.relative_to(ROOT)
    if path.is_relative_to(ROOT / "evolq_lite") and path != ROOT / "evolq_lite":
        return Path("api", path.relative_to(ROOT / "evolq_lite").parts[0]).with_suffix(".md")
    return None


def relink(text: str, page: Path, out: Path, repository: str) -> str:
    """Links of a page as they must be on the site; pictures are copied."""

    def replace(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        address, _, anchor = target.partition("#")
        if not address or re.match(r"[a-z]+:", address):
            return match[0]
        path = (page.parent / address).resolve()
        if picture:
            copy = out / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            return match[0]
        place = staged(path)
        if place is not None:
            folder = page.relative_to(ROOT).parent
            kept = f"#{anchor}" if anchor and place == path.relative_to(ROOT) else ""
            return f"[{words}]({os.path.relpath(place, folder)}{kept})"
        return (
            f"[{words}]({repository}/blob/main/{path.relative_to(ROOT)})" if repository else words
        )

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)  # odd ones are code
    return "".join(p if i % 2 else LINK.sub(replace, p) for i, p in enumerate(parts))


def stage_lesson(path: Path, out: Path, repository: str) -> None:
    """A notebook with links that work here, and a note on what is live."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, path, out, repository)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "Verbatim" in data.get("text/latex", ""):  # `Code`, in colors for a white page only
                output.data = {"text/markdown": f"```python\n{data['text/plain']}\n```"}
    title, _, rest = notebook.cells[0].source.partition("\n")
    note = HERE_IT_IS_STORED.format(name=path.name)
    notebook.cells[0].source = f"{title}\n\n{note}\n{rest}"
    place = out / path.relative_to(ROOT)
    place.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, place)


def stage(out: Path, repository: str) -> None:
    """Everything that Sphinx reads, but for the network of the live page."""
    shutil.copytree(HERE / "pages", out)
    shutil.copy(HERE / "conf.py", out)
    shutil.copytree(HERE / "static", out / "_static")
    for path in PAGES:
        place = out / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        text = relink(path.read_text(encoding="utf-8"), path, out, repository)
        place.write_text(text, encoding="utf-8")
    for path in LESSONS:
        stage_lesson(path, out, repository)
    (out / "api").mkdir()
    for name, text in api_pages(ROOT / "evolq_lite").items():
        (out / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    with (out / "docs" / "modules.md").open("a", encoding="utf-8") as file:
        file.write("\n```{toctree}\n:hidden:\n:glob:\n\n../api/*\n```\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, header in (("lessons", "| lesson |"), ("claims", "| claim |")):  # tables
        table = header + readme.partition(header)[2].partition("\n\n")[0]
        text = relink(table, ROOT / "README.md", out, repository)
        (out / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def run(*command: str) -> None:
    """Run a script of this Python; its failure is ours."""
    if status := subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        sys.exit(status)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--images", default="256", help="calibration images of the live page")
    parser.add_argument("--network", type=Path, help="an exported network, instead of a new one")
    parser.add_argument("--points", default="21", help="of each side of a landscape, odd")
    parser.add_argument("--passes", default="10", help="of the search that is played")
    options = parser.parse_args()
    source, html = options.out / "source", options.out / "html"
    for folder in (source, html):
        shutil.rmtree(folder, ignore_errors=True)
    stage(source, os.environ.get("SITE_REPOSITORY", "").rstrip("/"))
    data = source / "_static" / "vit-data.js"
    if options.network:
        shutil.copy(options.network, data)
    else:
        run(str(HERE / "export.py"), str(data), "--images", options.images)
    played = source / "_static" / "play-data.js"
    sizes = ["--images", options.images, "--points", options.points, "--passes", options.passes]
    run(str(HERE / "play.py"), str(played), *sizes)
    doctrees = str(options.out / "doctrees")
    # -W --keep-going: report all warnings, then fail.
    run("-m", "sphinx", "-W", "--keep-going", "-q", "-d", doctrees, str(source), str(html))
    print(f"Open {html / 'index.html'}")


if __name__ == "__main__":
    main()
