"""Try repaired notebooks with nbgrader, in an environment that has it (it is not in the lock).

    python -m venv ../nbg && ../nbg/bin/pip install nbgrader jupytext psutil matplotlib
    ../nbg/bin/python notebooks/assignments/try_nbgrader.py

Damaged notebooks are handed in for two small assignments: doubled cells, cells without metadata as
Colab and Deepnote save them, deleted and changed tests, answers in new cells. `grade.py --repaired`
writes clean ones; then nbgrader's own commands make the assignment, grade it, write feedback and
export the table of points.
Every submission must get the same points from nbgrader as from us. Exits with 1 if one does not.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import nbformat  # noqa: E402
import toy_assignments as toys  # noqa: E402
from grading.assignment import read_source  # noqa: E402

CONFIG = """c = get_config()
c.CourseDirectory.course_id = "toys"
c.ExecutePreprocessor.timeout = 60
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\\nraise NotImplementedError()"}
"""


def damaged(sources: Path) -> dict[str, nbformat.NotebookNode]:
    """Right notebooks of T1 that were damaged, and an untouched one, by student."""

    def made(change, **answers):
        notebook = toys.answered(sources, answers=toys.right(**answers))
        notebook.cells = change(notebook.cells)
        return notebook

    return {
        "whole": made(lambda cells: cells, **{"T1-3": "An answer."}),
        "half": made(lambda cells: cells, **{"T1-2": "def total(values):\n    return 0"}),
        "stub": toys.answered(sources),
        "doubled": made(lambda cells: [*cells, *cells]),
        "colab": made(toys.stripped),
        "deepnote": made(lambda cells: toys.stripped(cells, deepnote=True)),
        "deleted": made(lambda cells: [c for c in cells if "assert" not in c.source]),
        "new-cells": made(
            lambda cells: toys.insert(cells, "T1-3", "text:An answer.", "print('code')")
        ),
        "reversed": made(lambda cells: cells[::-1]),
    }


def main() -> int:
    """Returns 1 if nbgrader and the grader disagree."""
    from nbgrader import __version__
    from nbgrader.api import Gradebook

    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        sources = top / "sources"
        sources.mkdir()
        toys.write_toys(sources)
        for student, notebook in damaged(sources).items():
            toys.hand_in(top / "handed_in", student, notebook)
        options = ["--sources", sources, "--repaired", top / "course" / "submitted"]
        _, rows = toys.run_grader(top / "handed_in", top / "out", *options)
        course = top / "course"
        (course / "nbgrader_config.py").write_text(CONFIG)
        (course / "source" / "T1").mkdir(parents=True)
        nbformat.write(read_source(sources / "T1.py"), course / "source" / "T1" / "T1.ipynb")
        for command in (
            ["generate_assignment", "T1", "--create"],
            ["autograde", "T1", "--create"],
            ["generate_feedback", "T1"],
            ["export", "--to", "points.csv"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "nbgrader", *command],
                cwd=course,
                env=os.environ
                | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                print(done.stderr[-3000:])
                return 1
        with open(course / "points.csv", newline="") as file:
            exported = {line["student_id"]: float(line["score"]) for line in csv.DictReader(file)}
        wrong = 0
        with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
            for row in rows:
                student = row["student"].removeprefix("id:")
                theirs = book.find_submission("T1", student).code_score
                feedback = (course / "feedback" / student / "T1" / "T1.html").is_file()
                agree = f"{theirs:g}" == row["tests"] and feedback
                agree = agree and exported[student] == book.find_submission("T1", student).score
                wrong += not agree
                print(
                    f"{student:12} ours {row['tests']}, nbgrader's {theirs:g}", "" if agree else "!"
                )
    print(f"nbgrader {__version__}: {len(rows)} submissions, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
