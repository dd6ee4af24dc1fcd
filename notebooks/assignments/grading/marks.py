"""Run a submission's cells and give points, by nbgrader's rule: a test cell that ends without an
error earns its points, or as many as its last expression says.
"""

from __future__ import annotations

import math
import re

from grading.kernel import Limits, Ran, run_cells
from grading.report import Result, Tested, number
from grading.submission import Assignment, Given, Theirs, looks, plan_of

# The last of its line: what stands before it was printed by the submission, not by the test.
LEADERBOARD = re.compile(r"^.*leaderboard: ([+-]?[0-9.]+) (.*)$", re.MULTILINE)


def earned(ran: Ran, given: Given) -> float:
    """The points of a test cell that ended so."""
    if ran.how != "ok":
        return 0.0
    try:
        points = float(ran.value)
    except ValueError:  # no last expression, or no number
        return given.points
    return min(max(points, 0.0), given.points) if math.isfinite(points) else 0.0


def says(ran: Ran, limits: Limits) -> str:
    """A sentence about a cell that did not end well."""
    if ran.how == "error" and ran.error.startswith("NotImplementedError"):
        return "not done yet (NotImplementedError)"
    return {
        "ok": "",
        "error": ran.error,
        "time": "it ran too long and was stopped",
        "memory": f"it used more than {limits.megabytes} MB of memory and was stopped",
        "died": "the kernel died in it",
        "not run": "not run",
    }[ran.how]


def grade_one(
    student: str, file: str, theirs: list[Theirs], assignment: Assignment, limits: Limits
) -> Result:
    """Run and mark one submission."""
    plan = plan_of(theirs, assignment)
    out = Result(student, assignment.name, file, written=plan.written, code=plan.code)
    out.notes, out.look = list(plan.notes), looks(plan, assignment)
    given = {cell.id: cell for cell in assignment.cells}
    ran = run_cells([cell for _, cell in plan.cells], limits)
    for (name, cell), how in zip(plan.cells, ran):
        if cell.test:
            test = given[name]
            points = earned(how, test)
            why = says(how, limits) or ("" if points == test.points else "passed in part")
            out.tests.append(Tested(name, points, test.points, why, test.hidden))
            board = LEADERBOARD.findall(how.text) if how.how == "ok" else []
            if board and "leaderboard:" in test.source:  # not what a student's cell may print
                out.gain, out.leaderboard = float(board[-1][0]), " ".join(board[-1])
        if how.how in ("time", "memory", "died") or (how.how == "error" and not cell.test):
            out.notes.append(f"Cell {name}: {says(how, limits)}.")
    if lost := [test for test in out.tests if test.says == "not run"]:
        why = next(how.error for how in ran if how.how == "not run")
        out.notes.append(
            f"Cut off, because {why}: {len(lost)} test cells from {lost[0].id} on were not run "
            f"({number(sum(test.out_of for test in lost))} points)."
        )
    return out


def nothing(student: str, assignment: Assignment, file: str, why: str) -> Result:
    """A submission in which there is nothing to run."""
    out = Result(student, assignment.name, file, notes=[why])
    for cell in assignment.cells:
        if cell.kind == "test":
            out.tests.append(Tested(cell.id, 0.0, cell.points, "not run", cell.hidden))
        elif cell.kind == "written":
            out.written[cell.id] = ""
    return out
