"""An assignment's source as a notebook, and the version of it that students get.

`src/AN_name.py` is py:percent with nbgrader's cell metadata. The rules of cutting are nbgrader's:
regions `### BEGIN SOLUTION ... ### END SOLUTION` become stubs, solution cells without a region are
replaced whole, regions `### BEGIN HIDDEN TESTS ... ### END HIDDEN TESTS` vanish.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

SOURCES = Path(__file__).resolve().parents[1] / "src"

STUBS = {"code": "# YOUR CODE HERE\nraise NotImplementedError()", "markdown": "YOUR ANSWER HERE"}


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
        data = grader_data(cell)
        name = f"{path.stem}-{data.get('grade_id', i)}"
        cell.id = hashlib.sha256(name.encode()).hexdigest()[:12]
        cell.metadata = NotebookNode(nbgrader=data) if data else NotebookNode()
        if data:  # as nbgrader's LockCells does
            cell.metadata.deletable = False
            if data.locked:
                cell.metadata.editable = False
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
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
                raise ValueError(f"BEGIN {region} inside of another")
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
    """What students get: stubs for solutions, nothing for hidden tests."""
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
    return student
