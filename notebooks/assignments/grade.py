"""Grade a folder of submissions: `make grade SUBMISSIONS=DIR OUT=DIR [ROSTER=FILE] [OVERLAY=DIR]`.

Downloads of a course system go in; `OUT/grades.csv`, a feedback page for each submission, a marking
page for each written question and tables for the course system come out. Four steps, each a module
in `grading/`: ingest (whose is which notebook), repair (which cell is which, and nothing is lost),
run (in a kernel, within limits, apart from your files), report. Every oddity of a submission
becomes a sentence, never a stop. Give points on the marking pages or in `by_hand.csv` and grade
again to add them: finished submissions are not run twice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from grading.assignment import (
    SOURCES,
    Assignment,
    Refused,
    read_assignments,
    read_source,
    student_version,
)
from grading.ingest import Roster, handed_in, join, read_roster
from grading.isolate import WAYS, Isolation, best
from grading.pages import feedback, marking
from grading.repair import Submission, choose, looks, repaired
from grading.report import (
    GRADES,
    Marks,
    Result,
    Store,
    by_hand_table,
    exports,
    folder_name,
    grade_rows,
    read_by_hand,
    up_to_date,
)
from grading.run import GraderFailed, Limits, Tested, one_line, run
from grading.tables import points_text, table, write

HERE = Path(__file__).resolve().parent


def state_of(submission: Submission, assignment: Assignment, limits: Limits, way: Isolation) -> str:
    """Changes with everything that a result depends on."""
    programs = [path.read_text() for path in sorted((HERE / "grading").glob("*.py"))]
    text = repr((submission, assignment, limits, way.way, way.other_user, programs))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def grade_one(
    submission: Submission,
    assignment: Assignment,
    limits: Limits,
    isolation: Isolation,
    base: Path,
) -> Result:
    """Run and mark one submission; what fails on our side is said in `failed`."""
    plan = submission.plan
    result = Result(submission.student, assignment.name, submission.file)
    result.notes, result.look = list(submission.notes), list(submission.look)
    if plan is None:
        result.tests = [
            Tested(cell.id, 0.0, cell.points, "not run", cell.hidden)
            for cell in assignment.cells
            if cell.kind == "test"
        ]
        result.written = {c.id: "" for c in assignment.cells if c.kind == "written"}
        return result
    result.written, result.pictures = plan.written, plan.pictures
    result.remarks, result.kept, result.code = plan.remarks, plan.kept, plan.code
    result.help = plan.help
    result.notes += plan.notes
    result.look += looks(plan, assignment)
    try:
        marked = run(plan, assignment, limits, isolation, base)
    except GraderFailed as error:
        result.failed = f"NOT GRADED, the grader failed: {error}. Grade again."
    except Exception as error:  # whatever it is, the others are graded
        why = one_line(f"{type(error).__name__}: {error}")
        result.failed = f"NOT GRADED, the grader failed: {why}. Grade again."
    else:
        result.tests, result.gain = marked.tests, marked.gain
        result.leaderboard = marked.leaderboard
        result.notes += marked.notes
    return result


def read_all(
    submissions: Path, assignments: dict[str, Assignment], roster: Roster | None
) -> list[Submission]:
    """Everything that was handed in, and for each student what was not."""
    if not submissions.exists():
        raise Refused(f"{submissions} does not exist")
    found = join(handed_in(submissions), roster)
    if not found:
        raise Refused(f"{submissions} holds no file")
    chosen = choose(found, assignments, roster)
    there = {(given.student, given.assignment) for given in chosen}
    names = sorted({given.assignment for given in chosen if given.assignment})
    students = {given.student for given in found if not given.loose or given.notebook}
    if submissions.is_dir():  # a folder without a file is a student, too
        students |= {p.name for p in submissions.iterdir() if p.is_dir() and _is_empty(p)}
    if roster:
        students |= set(roster.by_id)
    for student in sorted(students):
        for name in names:
            if (student, name) not in there:
                chosen.append(Submission(student, name, "", notes=("Nothing was handed in.",)))
    return sorted(chosen, key=lambda given: (given.student, given.assignment))


def _is_empty(folder: Path) -> bool:
    """Whether a folder that could be a student's holds nothing."""
    return not folder.name.startswith(".") and not any(folder.iterdir())


def read_marks(
    out: Path, assignments: dict[str, Assignment], students: Sequence[str]
) -> tuple[Marks, list[Path]]:
    """The marks of by_hand.csv and of files saved from marking pages, and which files these were.

    The pages count for more, because they were saved later: what was read is moved away.
    """
    marks = read_by_hand(out / "by_hand.csv", assignments, students)
    pages = sorted(out.glob("marks-*.csv"), key=lambda path: path.stat().st_mtime)
    for path in pages:
        marks |= read_by_hand(path, assignments, students)
    return marks, pages


def grade(
    submissions: Path,
    out: Path,
    folder: Path = SOURCES,
    overlay: Path | None = None,
    roster_file: Path | None = None,
    limits: Limits = Limits(),  # noqa: B008  (it is frozen)
    isolation: str = "auto",
    jobs: int = 1,
    repaired_into: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, str]]:
    """Grade all submissions into `out`; returns the rows of grades.csv.

    Refused if there is nothing to grade, or if roster, overlay or by_hand.csv are not in order.
    """
    assignments = read_assignments(folder, overlay)
    roster = read_roster(roster_file) if roster_file else None
    chosen = read_all(submissions, assignments, roster)
    marks, pages = read_marks(out, assignments, [given.student for given in chosen])
    secret = [submissions, out, folder, *([overlay] if overlay else [])]
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o700)
    try:
        apart = best(isolation, [str(path) for path in secret if path.is_dir()])
    except ValueError as error:
        raise Refused(str(error)) from None
    store = Store(out)
    base = Path(tempfile.mkdtemp(prefix="evolq-grading-"))
    base.chmod(0o711)

    def do(given: Submission) -> Result:
        if not given.assignment:
            return Result(given.student, "", given.file, notes=list(given.notes))
        assignment = assignments[given.assignment]
        state = state_of(given, assignment, limits, apart)
        result = store.read(given.student, given.assignment, state)
        if result is None:
            result = grade_one(given, assignment, limits, apart, base)
            if not result.failed and given.plan is not None:
                store.write(result, state)
        points = result.failed or f"{points_text(result.points)} points from tests"
        say(f"{given.student} {given.assignment}: {points}")
        return result

    try:
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            results = list(pool.map(do, chosen))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    marks = up_to_date(marks, results, assignments)
    rows = grade_rows(results, assignments, marks, roster)
    write_report(out, results, rows, assignments, marks, roster)
    for path in pages:
        (out / "marks-read").mkdir(exist_ok=True)
        os.replace(path, out / "marks-read" / path.name)
    if repaired_into:
        write_repaired(chosen, assignments, folder, repaired_into)
    say(apart.says())
    return rows


def write_report(
    out: Path,
    results: list[Result],
    rows: list[dict[str, str]],
    assignments: dict[str, Assignment],
    marks: Marks,
    roster: Roster | None,
) -> None:
    """All pages, then the tables."""
    for result, row in zip(results, rows):
        if result.assignment:
            page = feedback(result, row, assignments[result.assignment], marks)
            write(
                out / "feedback" / folder_name(result.student) / f"{result.assignment}.html", page
            )
    for name in sorted({result.assignment for result in results if result.assignment}):
        for cell in assignments[name].cells:
            if cell.kind == "written":
                page = marking(cell, assignments[name], results, marks)
                write(out / "marking" / f"{cell.id}.html", page)
    for name, text in exports(rows, assignments, roster).items():
        write(out / "lms" / name, text)
    write(out / "by_hand.csv", by_hand_table(marks))
    write(out / "grades.csv", table(rows, GRADES))


def write_repaired(
    chosen: list[Submission], assignments: dict[str, Assignment], folder: Path, into: Path
) -> None:
    """Clean notebooks in nbgrader's layout, `into`/STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb."""
    releases = {name: student_version(read_source(folder / f"{name}.py")) for name in assignments}
    for given in chosen:
        if given.plan is not None:
            name = given.assignment
            notebook = repaired(given.plan, assignments[name], releases[name])
            path = into / folder_name(given.student) / name / f"{name}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, path)


def main() -> int:
    """Command line; returns 2 if nothing could be graded, 1 if something was not graded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submissions", type=Path, help="folder or zip file of downloads")
    parser.add_argument("out", type=Path, help="folder for grades.csv, feedback/ and marking/")
    parser.add_argument("--roster", type=Path, help="CSV of the course: ids, names")
    parser.add_argument("--overlay", type=Path, help="folder of .py files with other hidden tests")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="folder of the assignments")
    parser.add_argument("--repaired", type=Path, help="write clean notebooks for nbgrader here")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="for one cell")
    parser.add_argument("--megabytes", type=int, default=Limits.megabytes, help="for one notebook")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="notebooks at a time")
    parser.add_argument("--isolation", choices=["auto", *WAYS], default="auto")
    options = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):  # a folder's name may be no text of this terminal
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that kernels' folders are removed
    try:
        rows = grade(
            options.submissions,
            options.out,
            folder=options.sources,
            overlay=options.overlay,
            roster_file=options.roster,
            limits=Limits(options.seconds, options.megabytes),
            isolation=options.isolation,
            jobs=options.jobs,
            repaired_into=options.repaired,
            say=lambda line: print(line, flush=True),
        )
    except (Refused, OSError) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    to_mark = sum(int(row["to_mark"]) for row in rows)
    failed = sum(row["points"] == "" for row in rows)
    print(f"{options.out / 'grades.csv'}: {len(rows)} lines; written answers to mark: {to_mark}")
    if failed:
        print(f"grade: {failed} submissions were not graded; see notes", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
