"""An assignment as its author wrote it, as students get it, and as the grader sees it.

`src/AN_name.py` is py:percent with nbgrader's cell metadata. The rules of cutting are nbgrader's:
regions `### BEGIN SOLUTION ... ### END SOLUTION` become stubs, solution cells without a region are
replaced whole, regions `### BEGIN HIDDEN TESTS ... ### END HIDDEN TESTS` vanish. A cell that needs
more time than others says so in its header: `seconds=240`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

SOURCES = Path(__file__).resolve().parents[1] / "src"

STUBS = {"code": "# YOUR CODE HERE\nraise NotImplementedError()", "markdown": "YOUR ANSWER HERE"}
ABOUT = "## About you"  # the first line of the cell for name, ID and help received
RELEASE = "{release}"  # stands in the sources where the release says which one it is
DEFINED = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)


class Refused(Exception):
    """The instructor's side is not in order: nothing is graded."""


# Sources and releases


def sources(folder: Path = SOURCES) -> list[Path]:
    """The sources of all assignments, in order."""
    return sorted(folder.glob("*.py"))


def grader_data(cell: NotebookNode) -> NotebookNode:
    """The nbgrader metadata of a cell; empty for cells that nbgrader does not know."""
    return cell.metadata.get("nbgrader", NotebookNode())


def is_hidden(cell: NotebookNode) -> bool:
    """Whether a cell holds hidden tests."""
    return "BEGIN HIDDEN TESTS" in cell.source


def is_picture(cell: NotebookNode) -> bool:
    """Whether a cell draws the result of an exercise; its grade_id ends in -picture."""
    return str(grader_data(cell).get("grade_id", "")).endswith("-picture")


def read_source(path: Path) -> NotebookNode:
    """A source as a notebook with solutions and hidden tests, and with deterministic cell ids.

    A graded cell's id comes from its grade_id, any other's from its position.
    """
    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        data, seconds = grader_data(cell), cell.metadata.get("seconds")
        name = f"{path.stem}-{data.get('grade_id', i)}"
        cell.id = hashlib.sha256(name.encode()).hexdigest()[:12]
        cell.metadata = NotebookNode(nbgrader=data) if data else NotebookNode()
        if seconds is not None:
            cell.metadata.seconds = seconds
        if data:  # as nbgrader's LockCells does
            cell.metadata.deletable = False
            if data.locked:
                cell.metadata.editable = False
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(
        kernelspec=kernel,
        language_info={"name": "python"},
        evolq={"assignment": path.stem},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def without(source: str, region: str, stub: str = "") -> tuple[str, bool]:
    """A text without its regions BEGIN ... END, a stub in place of each; and whether it had any.

    ValueError for a region that is nested, or that does not end.
    """
    lines: list[str] = []
    inside = found = False
    for line in source.split("\n"):
        if f"BEGIN {region}" in line:
            if inside:
                raise ValueError(f"BEGIN {region} inside another")
            inside = found = True
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in stub.split("\n") if stub]
        elif f"END {region}" in line:
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"BEGIN {region} without an END")
    return "\n".join(lines), found


def student_version(notebook: NotebookNode) -> NotebookNode:
    """What students get: stubs for solutions, nothing for hidden tests, and the release's number.

    The number is a digest of all texts, so no change of a release can keep the number of another.
    """
    student = nbformat.from_dict(notebook)
    for cell in student.cells:
        stub = STUBS.get(cell.cell_type, "")
        cell.source, cut = without(cell.source, "SOLUTION", stub)
        solution = bool(grader_data(cell).get("solution"))
        if cut and not solution:
            raise ValueError(f"a solution in a cell that is not marked as one: {cell.source[:60]}")
        if solution and not cut:
            cell.source = stub
        cell.source, _ = without(cell.source, "HIDDEN TESTS")
    text = "\0".join(cell.source for cell in student.cells)
    number = "r" + hashlib.sha256(text.encode()).hexdigest()[:7]
    for cell in student.cells:
        cell.source = cell.source.replace(RELEASE, number)
    student.metadata.setdefault("evolq", NotebookNode()).release = number
    return student


# What the grader knows of an assignment


@dataclass(frozen=True)
class Given:
    """A cell of an assignment: its kind is about, text, setup, picture, own, written or test."""

    id: str  # grade_id; text cells have none, and get one from their position
    cell_id: str
    kind: str
    source: str  # with solution or hidden tests
    release: str  # as students get it
    section: str  # the exercise or question it belongs to: A1-2
    points: float = 0.0
    hidden: bool = False
    seconds: float | None = None  # None: the limit that all cells have

    @property
    def code(self) -> bool:
        """Whether it is a code cell."""
        return self.kind in ("setup", "picture", "own", "test")

    @property
    def defines(self) -> frozenset[str]:
        """The functions and classes that a solution cell defines: it is known by these, too."""
        return frozenset(DEFINED.findall(self.release)) if self.kind == "own" else frozenset()


@dataclass(frozen=True)
class Assignment:
    """What is graded: a name, the release's number and the cells, in order."""

    name: str
    release: str
    cells: tuple[Given, ...]

    def points(self, kind: str) -> float:
        """All points of the cells of one kind: test or written."""
        return sum(cell.points for cell in self.cells if cell.kind == kind)

    def cell(self, name: str) -> Given:
        """The cell of one id."""
        return next(cell for cell in self.cells if cell.id == name)

    def question(self, section: str) -> str:
        """The text of a section, as students read it."""
        texts = [c.release for c in self.cells if c.section == section and c.kind == "text"]
        return "\n\n".join(texts)


KINDS = {
    (True, True): "written",
    (False, True): "own",
    (True, False): "test",
    (False, False): "setup",
}  # by (grade, solution)


def read_assignment(path: Path, replaced: Mapping[str, str] | None = None) -> Assignment:
    """An assignment from its source, some hidden tests replaced; Refused if an id is used twice."""
    full = read_source(path)
    students = student_version(full)  # of the original: an overlay changes no release
    cells: dict[str, Given] = {}
    section = ""
    for i, (cell, student) in enumerate(zip(full.cells, students.cells)):
        data = grader_data(cell)
        name = data.get("grade_id") or f"text {i}"
        if name in cells:
            raise Refused(f"{path.name}: the grade_id {name} is used twice")
        if replaced and name in replaced:
            if not is_hidden(cell):
                raise Refused(f"overlay: {name} of {path.stem} holds no hidden tests")
            cell.source = replaced[name]
        if not data:
            kind = "about" if cell.source.startswith(ABOUT) else "text"
            section = _section_after(full.cells[i:])
        else:
            kind = "picture" if is_picture(cell) else KINDS[bool(data.grade), bool(data.solution)]
            section = "-".join(name.split("-")[:2])
        cells[name] = Given(
            id=name,
            cell_id=cell.id,
            kind=kind,
            source=cell.source,
            release=student.source,
            section=section,
            points=float(data.get("points", 0)),
            hidden=is_hidden(cell),
            seconds=cell.metadata.get("seconds"),
        )
    if replaced and (unknown := replaced.keys() - cells.keys()):
        raise Refused(f"overlay: {path.stem} has no cell {min(unknown)}")
    return Assignment(path.stem, students.metadata.evolq.release, tuple(cells.values()))


def _section_after(cells: list[NotebookNode]) -> str:
    """The section of a text cell is that of the first marked cell behind it."""
    names = (grader_data(cell).get("grade_id") for cell in cells)
    return "-".join(next((name for name in names if name), "").split("-")[:2])


def read_assignments(folder: Path = SOURCES, overlay: Path | None = None) -> dict[str, Assignment]:
    """All assignments of a folder, with the hidden tests of an overlay of files of the same names.

    Refused for files or cells of the overlay that replace nothing.
    """
    paths = {path.stem: path for path in sources(folder)}
    if not paths:
        raise Refused(f"{folder} holds no assignment")
    replaced: dict[str, dict[str, str]] = {}
    if overlay is not None:
        files = sources(overlay) if overlay.is_dir() else []
        if not files:
            raise Refused(f"overlay: {overlay} holds no file such as {min(paths)}.py")
        for path in files:
            if path.stem not in paths:
                raise Refused(f"overlay: there is no assignment {path.stem}")
            cells = read_source(path).cells
            replaced[path.stem] = {
                grader_data(cell).grade_id: cell.source for cell in cells if grader_data(cell)
            }
    return {name: read_assignment(path, replaced.get(name)) for name, path in paths.items()}
