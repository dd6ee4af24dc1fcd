"""Grade a folder of submissions: `make grade SUBMISSIONS=DIR OUT=DIR [OVERLAY=DIR]`.

`SUBMISSIONS/STUDENT/ASSIGNMENT.ipynb` goes in; `OUT/grades.csv`, a feedback page for each
submission and `OUT/by_hand.csv` for the written answers come out. Of a submission only the
student's own cells are taken: imports and tests come from the source, in the source's order. So it
does not matter if they were changed, deleted or doubled, and every oddity becomes a sentence, never
a stop. Fill in `by_hand.csv` and grade again to add its points: finished submissions are not run
twice.

The parts are in `grading/`: source, submission, kernel, marks, report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from grading.kernel import Limits, one_line
from grading.marks import grade_one, nothing
from grading.report import (
    BY_HAND,
    GRADES,
    Result,
    Tested,
    grade_rows,
    number,
    page,
    read_by_hand,
    table,
    up_to_date,
    write,
)
from grading.source import SOURCES
from grading.submission import Assignment, Refused, Task, read_assignments, tasks_of

HERE = Path(__file__).resolve().parent


def key_of(task: Task, assignment: Assignment, limits: Limits) -> str:
    """Changes with everything that a result depends on."""
    programs = [path.read_text() for path in sorted((HERE / "grading").glob("*.py"))]
    text = repr((task, assignment, limits, programs))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def graded(task: Task, assignment: Assignment, limits: Limits, out: Path) -> Result:
    """The result of a task, from an earlier run if there is one; never raises."""
    kept = out / "results" / task.student / f"{assignment.name}.json"
    key = key_of(task, assignment, limits)
    try:
        stored = json.loads(kept.read_text())
        if stored.pop("key") == key:
            stored["tests"] = [Tested(**test) for test in stored["tests"]]
            return Result(**stored)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is none, or not a whole one
    if task.theirs is None:
        result = nothing(task.student, assignment, task.file, "")
        result.notes = list(task.notes)
    else:
        try:
            result = grade_one(task.student, task.file, task.theirs, assignment, limits)
            result.notes = [*task.notes, *result.notes]
        except Exception as error:  # whatever it is, the others are graded
            why = one_line(f"{type(error).__name__}: {error}")
            result = nothing(task.student, assignment, task.file, f"Grading failed: {why}.")
            return result  # not kept: it will be tried again
    write(kept, json.dumps({"key": key, **asdict(result)}, indent=1))
    return result


def grade(
    submissions: Path,
    out: Path,
    folder: Path = SOURCES,
    overlay: Path | None = None,
    limits: Limits = Limits(),  # noqa: B008  (it is frozen)
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, str]]:
    """Grade all submissions into `out`; returns the rows of grades.csv.

    Refused if there is nothing to grade, or if the overlay or by_hand.csv is not in order.
    """
    assignments = read_assignments(folder, overlay)
    found = sorted(submissions.iterdir()) if submissions.is_dir() else []
    students = [path for path in found if path.is_dir() and not path.name.startswith(".")]
    loose = [path.name for path in found if path not in students and path.suffix == ".ipynb"]
    if not students:
        raise Refused(f"{submissions} holds no folder STUDENT with a file ASSIGNMENT.ipynb")
    marks = read_by_hand(out / "by_hand.csv")
    tasks = [task for path in students for task in tasks_of(path, assignments)]
    handed_in = {task.assignment for task in tasks if task.assignment}

    def do(task: Task) -> Result:
        if not task.assignment:
            return Result(task.student, "", task.file, notes=list(task.notes))
        result = graded(task, assignments[task.assignment], limits, out)
        say(f"{task.student} {task.assignment}: {number(result.points)} points from tests")
        return result

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        results = list(pool.map(do, tasks))
    there = {(result.student, result.assignment) for result in results}
    results += [
        nothing(path.name, assignments[name], "", "Nothing was handed in.")
        for path in students
        for name in handed_in
        if (path.name, name) not in there
    ]
    outside = "It lies outside of a student's folder; move it to STUDENT/ASSIGNMENT.ipynb."
    results += [Result("", "", name, notes=[outside]) for name in loose]
    results.sort(key=lambda result: (result.student, result.assignment))
    marks = up_to_date(marks, results, assignments)
    rows = grade_rows(results, assignments, marks)
    for result, row in zip(results, rows):
        if not result.assignment:
            continue
        assignment = assignments[result.assignment]
        write(
            out / "feedback" / result.student / f"{result.assignment}.html",
            page(result, row, assignment, marks),
        )
    waiting = [dict(zip(BY_HAND, (*key, *mark))) for key, mark in sorted(marks.items())]
    write(out / "by_hand.csv", table(waiting, BY_HAND))
    write(out / "grades.csv", table(rows, GRADES))
    return rows


def main() -> int:
    """Command line; returns the exit status, 2 if nothing could be graded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submissions", type=Path, help="folder of STUDENT/ASSIGNMENT.ipynb")
    parser.add_argument("out", type=Path, help="folder for grades.csv, by_hand.csv and feedback/")
    parser.add_argument("--overlay", type=Path, help="folder of .py files with other hidden tests")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="folder of the assignments")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="for one notebook")
    parser.add_argument("--megabytes", type=int, default=Limits.megabytes, help="for one notebook")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="notebooks at a time")
    options = parser.parse_args()
    limits = Limits(options.seconds, options.megabytes)
    for stream in (sys.stdout, sys.stderr):  # a folder's name may be no text of this terminal
        stream.reconfigure(errors="backslashreplace")
    try:
        rows = grade(
            options.submissions,
            options.out,
            options.sources,
            options.overlay,
            limits,
            options.jobs,
            lambda line: print(line, flush=True),
        )
    except (Refused, OSError) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    to_mark = sum(int(row["to_mark"]) for row in rows)
    print(f"{options.out / 'grades.csv'}: {len(rows)} lines; written answers to mark: {to_mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
