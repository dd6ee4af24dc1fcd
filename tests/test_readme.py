"""What the pages tell is what the files hold, what they point to is there, and their code runs."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import timm
from conftest import toy, toy_images
from markdown_it import MarkdownIt  # needed by jupytext
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def load_build() -> ModuleType:
    """docs/build.py, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()
PAGES = [
    *build.PAGES,
    ROOT / "data" / "results" / "README.md",
    *sorted((ROOT / "notebooks" / "assignments").glob("*.md")),
]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def walk(tokens: list[Token]) -> Iterator[Token]:
    """All tokens of a page, those inside lines too."""
    for token in tokens:
        yield token
        yield from walk(token.children or [])


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    tokens = MARKDOWN.parse(page)
    titles = [
        "".join(part.content for part in inline.children or [])
        for heading, inline in pairwise(tokens)
        if heading.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def link_problems(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere; addresses on the web are not followed."""
    problems = []
    for token in walk(MARKDOWN.parse(text)):
        target = str(token.attrs.get("href", token.attrs.get("src", "")))
        if not target or target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if path and not file.exists():
            problems.append(f"{target} is not there")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8") if path else text):
            problems.append(f"{target} has no such heading")
    return problems


def table_problems(text: str) -> list[str]:
    """Rows with more or fewer cells than their header, and rows that Markdown takes for text."""
    lines, problems, inside = text.split("\n"), [], set()
    for token in MARKDOWN.parse(text):
        if token.type == "fence" and token.map:
            inside |= set(range(*token.map))
        if token.type == "table_open" and token.map:
            inside |= set(range(*token.map))
            rows = [lines[i] for i in range(*token.map)]
            counts = [len(re.findall(r"(?<!\\)\|", row.strip())) for row in rows]
            problems += [row for row, n in zip(rows, counts, strict=True) if n != counts[0]]
    return problems + [row for i, row in enumerate(lines) if row[:1] == "|" and i not in inside]


@pytest.mark.parametrize("page", build.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert build.rewrite(text) == text, "run: make docs"


def test_every_part_stands_in_some_page() -> None:
    told = {name for page in build.PAGES for name in build.START.findall(page.read_text("utf-8"))}
    assert told == set(build.PARTS)


def test_a_stale_part_is_noticed_and_rewritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = (ROOT / "README.md").read_text(encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(fresh.replace("90.23 %", "99.23 %"), encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PAGES", [page])
    assert build.main(["--check"]) == 1 and "README.md" in capsys.readouterr().out
    assert "99.23 %" in page.read_text(encoding="utf-8")  # --check writes nothing
    assert build.main([]) == 0
    assert page.read_text(encoding="utf-8") == fresh
    assert build.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [("<!-- clams -->\n<!-- end clams -->\n", "clams"), ("<!-- demo -->\n", "end demo")],
)
def test_a_wrong_marker_is_refused(
    text: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PAGES", [page])
    assert build.main([]) == 2
    assert problem in capsys.readouterr().err and page.read_text() == text


def test_modules_stand_above_what_they_import() -> None:
    height = build.levels(
        {"top": {"left", "right"}, "left": {"base"}, "right": set(), "base": set()}
    )
    assert height == {"base": 1, "right": 1, "left": 2, "top": 3}
    with pytest.raises(ValueError, match="circle: one, two"):
        build.levels({"base": set(), "one": {"two"}, "two": {"one"}})


@ALL_PAGES
def test_links_lead_somewhere(page: Path) -> None:
    assert link_problems(page, page.read_text(encoding="utf-8")) == []


@ALL_PAGES
def test_tables_are_whole(page: Path) -> None:
    assert table_problems(page.read_text(encoding="utf-8")) == []


@ALL_PAGES
def test_every_picture_is_described(page: Path) -> None:
    for token in walk(MARKDOWN.parse(page.read_text(encoding="utf-8"))):
        assert token.type != "image" or token.content.strip(), token.attrs["src"]


@pytest.mark.parametrize(
    ("text", "find", "problems"),
    [
        ("[a](nowhere.md)", link_problems, 1),
        ("![a](nowhere.png)", link_problems, 1),
        ("# One title\n[a](#another-title)", link_problems, 1),
        ("# One `code` title!\n[a](#one-code-title) [b](README.md#two-commands)", link_problems, 0),
        ("`[a](nowhere.md)` and [b](https://example.org)", link_problems, 0),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n", table_problems, 0),
        ("| a | b |\n|---|---|\n| 1 | 2 | 3 |\n", table_problems, 1),
        ("| a | b |\n|---|---|\n| `x|y` | 2 |\n", table_problems, 1),
        ("| a | b |\n|---|---|\n| `x\\|y` | 2 |\n", table_problems, 0),
        ("| a | b |\n| 1 | 2 |\n", table_problems, 2),
    ],
)
def test_damage_is_found(text: str, find: Callable[..., list[str]], problems: int) -> None:
    found = find(ROOT / "page.md", text) if find is link_problems else find(text)
    assert len(found) == problems


def test_the_readme_leads_to_every_lesson_and_page() -> None:
    tokens = walk(MARKDOWN.parse((ROOT / "README.md").read_text(encoding="utf-8")))
    linked = {str(token.attrs["href"]) for token in tokens if "href" in token.attrs}
    lessons = {f"notebooks/{path.stem}.ipynb" for path in (ROOT / "notebooks/src").glob("*.py")}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert lessons and pages and lessons | pages <= linked


def test_every_promise_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and "`test_" in line]
    assert len(rows) > 15
    for row in rows:
        for file, name in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row):
            path = ROOT / "tests" / file
            assert path.is_file(), row
            assert not name or f"def {name}(" in path.read_text(encoding="utf-8"), row


def python_of(page: str) -> str:
    """The Python code of a page."""
    tokens = MARKDOWN.parse((ROOT / page).read_text(encoding="utf-8"))
    return "\n".join(t.content for t in tokens if t.type == "fence" and t.info == "python")


def test_the_ten_lines_of_the_readme_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small random network: the lines themselves ask for pretrained weights."""
    network, code = toy("vit"), python_of("README.md")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: network)
    exec(compile(code, "README.md", "exec"), {"images": toy_images("vit")})
    told = capsys.readouterr().out
    assert "attn.qkv" in told  # what is quantized
    assert "Evaluated(" in told and "Committed(" in told


@pytest.mark.slow
def test_the_code_for_one_block_runs() -> None:
    names: dict[str, object] = {}
    exec(compile(python_of("docs/own-network.md"), "docs/own-network.md", "exec"), names)
    first, fitness = names["first"], names["fitness"]
    assert isinstance(first, float) and isinstance(fitness, float) and fitness <= first


def test_the_commands_of_the_pages_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `python -m evolq_lite` line names a command and options that exist."""
    from evolq_lite.cli import main

    told: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(r"python -m evolq_lite (\w+)([^\n`|;#]*)", text):
            told.setdefault(command, set()).update(re.findall(r"--[a-z][\w-]*", rest))
    assert {"demo", "run", "reproduce", "check"} <= told.keys()
    for command, options in told.items():
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0, command
        known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
        assert options <= known, f"{command}: {options - known}"


def test_the_targets_of_the_pages_are_known() -> None:
    """Every `make TARGET` of a page is a target, and `make help` lists all targets."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony and set(phony[1].split()) == listed
    for page in PAGES:
        for token in walk(MARKDOWN.parse(page.read_text(encoding="utf-8"))):
            if token.type in ("fence", "code_inline"):
                told = re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z]+)\b", token.content, re.MULTILINE)
                assert set(told) <= listed, page
