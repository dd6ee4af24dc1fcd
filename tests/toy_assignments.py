"""Two small assignments that need no torch, so a kernel is up in a second, and what students do.

For test_grading.py and benchmarks/grading.py.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENTS = ROOT / "notebooks" / "assignments"
sys.path.insert(0, str(ASSIGNMENTS))
from grading.assignment import grader_data, read_source, student_version  # noqa: E402

sys.path.remove(str(ASSIGNMENTS))


def marked(grade_id, source, points=None, solution=False, markdown=False, more=""):
    """A cell of a source, with nbgrader's metadata."""
    data = {"grade": points is not None, "grade_id": grade_id, "locked": not solution}
    data |= {"schema_version": 3, "solution": solution, "task": False}
    if points is not None:
        data["points"] = points
    if markdown:
        source = "\n".join(f"# {line}" for line in source.splitlines())
    kind = " [markdown]" if markdown else ""
    return f"# %%{kind} nbgrader={json.dumps(data)}{more}\n{source}\n"


def text(source):
    """A text cell of a source."""
    return "# %% [markdown]\n" + "\n".join(f"# {line}" for line in source.splitlines()) + "\n"


def solved(source):
    """A function whose last line is its solution."""
    head, _, last = source.rpartition("\n")
    return f"{head}\n    ### BEGIN SOLUTION\n{last}\n    ### END SOLUTION"


def hidden(source):
    """A cell of hidden tests."""
    return f"# Hidden.\n### BEGIN HIDDEN TESTS\n{source}\n### END HIDDEN TESTS"


DOUBLE, TOTAL, HALF = (
    "def double(x):\n    return 2 * x",
    "def total(values):\n    return sum(values)",
    "def half(x):\n    return x / 2",
)
ABOUT = (
    "## About you\n\nRelease {release}\n\n**Name:**\n\n**ID:**\n\n**Help received:** (who; or none)"
)
TOYS = {
    "T1": [
        text("# Toy 1\n\nTwo functions and a question."),
        text(ABOUT),
        marked("T1-setup", "import math"),
        text("## Exercise 1: twice\n\nReturn twice `x`."),
        marked("T1-1", solved(DOUBLE), solution=True),
        marked("T1-1-check", "assert double(2) == 4, f'twice 2 is 4, not {double(2)}'", 1),
        marked(
            "T1-1-hidden",
            hidden("for i in range(9):\n    assert double(i) == 2 * i, f'input {i}'"),
            2,
        ),
        text("## Exercise 2: the total\n\nReturn the total."),
        marked("T1-2", solved(TOTAL), solution=True),
        marked("T1-2-check", "assert total([1, 2]) == 3, 'a total of 3'", 1),
        marked(
            "T1-2-hidden",
            hidden("sum(total(list(range(n))) == n * (n - 1) // 2 for n in (0, 3, 5))"),
            3,
        ),
        text("## Question 1\n\nWhy does `sum` of nothing give 0?"),
        marked("T1-3", "Half a point: the neutral element.", 2, solution=True, markdown=True),
    ],
    "T2": [
        text("# Toy 2"),
        marked("T2-1", solved(HALF), solution=True),
        marked("T2-1-check", "assert half(4) == 2, 'half of 4 is 2'", 1),
        marked("T2-1-hidden", hidden("print(f'leaderboard: {half(3):+.2f} points')"), 3),
    ],
}


def write_toys(folder):
    """Write the sources of the toys."""
    for name, cells in TOYS.items():
        (folder / f"{name}.py").write_text("\n".join(cells))
    return folder


def answered(toys, name="T1", answers=(), **changes):
    """A release with some cells filled in (grade_id -> source)."""
    notebook = student_version(read_source(toys / f"{name}.py"))
    for cell in notebook.cells:
        grade_id = grader_data(cell).get("grade_id")
        cell.source = {**dict(answers), **changes}.get(grade_id, cell.source)
    return notebook


def right(**more):
    """Answers of T1 that are right, and others."""
    return {"T1-1": DOUBLE, "T1-2": TOTAL, **more}


def code(body):
    """T1-1 with another body."""
    return right(**{"T1-1": f"def double(x):\n    {body}"})


def data_of(notebook):
    """A notebook, or bytes, as the bytes of a file."""
    return notebook if isinstance(notebook, bytes) else json.dumps(notebook).encode()


def hand_in(folder, student, notebook, name="T1.ipynb"):
    """Write a notebook, or bytes, or nothing, as a student's."""
    (folder / student).mkdir(parents=True, exist_ok=True)
    if notebook is not None:
        (folder / student / name).write_bytes(data_of(notebook))


def index_of(cells, grade_id):
    """Where a marked cell stands."""
    return next(i for i, c in enumerate(cells) if grader_data(c).get("grade_id") == grade_id)


def insert(cells, after, *new):
    """The cells with others behind a marked one; texts begin with "text:"."""
    made = [
        nbformat.v4.new_markdown_cell(source.removeprefix("text:"))
        if source.startswith("text:")
        else nbformat.v4.new_code_cell(source)
        for source in new
    ]
    at = index_of(cells, after) + 1
    return [*cells[:at], *made, *cells[at:]]


def stripped(cells, deepnote=False):
    """The cells as Colab saves them, without ids and metadata; Deepnote cuts texts up as well."""
    out = []
    for cell in cells:
        texts = [cell.source]
        if deepnote and cell.cell_type == "markdown":
            texts = [part for part in cell.source.split("\n\n") if part.strip()]
        for source in texts:
            new = nbformat.from_dict({**cell, "source": source, "metadata": {}})
            new.pop("id", None)
            out.append(new)
    return out


def run_grader(folder, out, *options, status=0):
    """Call the grader as make grade does; returns what it prints and the rows of grades.csv."""
    command = [sys.executable, ASSIGNMENTS / "grade.py", folder, out, *options, "--jobs", 2]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status == 2:
        return done.stderr, []
    with (out / "grades.csv").open(newline="", encoding="utf-8") as file:
        return done.stdout, list(csv.DictReader(file))
