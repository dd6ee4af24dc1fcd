"""Results, and what is written of them: grades.csv, by_hand.csv, a feedback page each."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from grading.submission import Assignment, Refused


@dataclass
class Tested:
    """A test cell and what it earned."""

    id: str
    points: float
    out_of: float
    says: str  # "" if it passed
    hidden: bool


@dataclass
class Result:
    """A submission, graded as far as it goes."""

    student: str
    assignment: str
    file: str
    tests: list[Tested] = field(default_factory=list)
    written: dict[str, str] = field(
        default_factory=dict
    )  # answers by grade_id, "" if there is none
    code: dict[str, str] = field(default_factory=dict)  # what the student wrote, by grade_id
    notes: list[str] = field(default_factory=list)
    look: list[str] = field(default_factory=list)
    leaderboard: str = ""
    gain: float | None = None

    @property
    def points(self) -> float:
        """What the tests gave."""
        return sum(test.points for test in self.tests)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    os.replace(part, path)


class Mark(NamedTuple):
    """What by_hand.csv says of a written answer; `answer` tells which answer was marked."""

    out_of: str
    points: str = ""
    comment: str = ""
    answer: str = ""


Marks = dict[tuple[str, str, str], Mark]  # by student, assignment, question
BY_HAND = ("student", "assignment", "question", "out_of", "points", "comment", "answer")


def read_by_hand(path: Path) -> Marks:
    """The points and comments that were filled in by hand; Refused for points that are none."""
    if not path.is_file():
        return {}
    marks: Marks = {}
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(f"{path} is not UTF-8; save it as CSV in UTF-8 and grade again") from None
    with io.StringIO(text, newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            missing = [name for name in BY_HAND[:-1] if row.get(name) is None]
            if missing:
                raise Refused(f"{path}, line {number}: there is no {missing[0]}")
            points = row["points"].strip()
            try:
                wrong = points and not 0 <= float(points) <= float(row["out_of"])
            except ValueError:
                wrong = True
            if wrong:
                raise Refused(
                    f"{path}, line {number}: points must be from 0 to {row['out_of']}, not {points}"
                )
            key = (row["student"], row["assignment"], row["question"])
            marks[key] = Mark(row["out_of"], points, row["comment"], row.get("answer") or "")
    return marks


def up_to_date(
    marks: Marks, results: Iterable[Result], assignments: Mapping[str, Assignment]
) -> Marks:
    """The marks with a line for each answer; one given for an earlier answer is asked for again."""
    out = dict(marks)
    for result in results:
        for cell in assignments[result.assignment].cells if result.assignment else ():
            answer = result.written.get(cell.id)
            if cell.kind != "written" or not answer:
                continue
            now = hashlib.sha256(answer.encode(errors="replace")).hexdigest()[:8]
            key = (result.student, result.assignment, cell.id)
            mark = marks.get(key, Mark(number(cell.points)))
            if mark.points and mark.answer not in ("", now):
                was = f"{mark.comment} ({mark.points} points were given to an earlier answer.)"
                mark = mark._replace(points="", comment=was.strip())
            out[key] = mark._replace(answer=now)
    return out


def table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Rows as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def number(value: float) -> str:
    """Points without needless digits."""
    return f"{round(value, 2):g}"


def by_exercise(result: Result) -> dict[str, tuple[float, float]]:
    """Points and how many were possible, by exercise."""
    out: dict[str, tuple[float, float]] = {}
    for test in result.tests:
        name = "-".join(test.id.split("-")[:2])  # A1-2-check and A1-2-hidden belong to A1-2
        points, out_of = out.get(name, (0.0, 0.0))
        out[name] = (points + test.points, out_of + test.out_of)
    return out


def hand_points(result: Result, marks: Marks) -> tuple[float, int]:
    """Points given by hand, and how many answers still wait for them."""
    points, waiting = 0.0, 0
    for question, answer in result.written.items():
        mark = marks.get((result.student, result.assignment, question))
        if answer and mark is not None:
            points += float(mark.points or 0)
            waiting += not mark.points
    return points, waiting


def grade_rows(
    results: list[Result], assignments: Mapping[str, Assignment], marks: Marks
) -> list[dict[str, str]]:
    """The lines of grades.csv."""
    places: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.gain is not None:
            places[result.assignment].append(result.gain)
    rows = []
    for result in results:
        assignment = assignments.get(result.assignment)
        by_hand, waiting = hand_points(result, marks)
        board = result.leaderboard
        if result.gain is not None:
            gains = places[result.assignment]
            place = 1 + sum(gain > result.gain for gain in gains)
            board = f"place {place} of {len(gains)}: {board}"
        rows.append(
            {
                "student": result.student,
                "assignment": result.assignment or "unknown",
                "points": number(result.points + by_hand),
                "out_of": number(assignment.points("test") + assignment.points("written"))
                if assignment
                else "",
                "tests": number(result.points),
                "by_hand": number(by_hand),
                "to_mark": str(waiting),
                "exercises": ", ".join(
                    f"{name} {number(points)}/{number(out_of)}"
                    for name, (points, out_of) in by_exercise(result).items()
                ),
                "leaderboard": board,
                "notes": " ".join(result.notes),
                "look": " ".join(result.look),
                "file": f"{result.student}/{result.file}".lstrip("/") if result.file else "",
            }
        )
    return rows


GRADES = (
    "student", "assignment", "points", "out_of", "tests", "by_hand", "to_mark", "exercises",
    "leaderboard", "notes", "look", "file",
)  # fmt: skip

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
  color: #1a1a1a; background: #fff }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border: 1px solid #888; padding: .3em .6em; text-align: left; vertical-align: top }}
pre {{ background: #f3f3f3; padding: .6em; overflow-x: auto; white-space: pre-wrap }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{body}
</body></html>
"""


def page(result: Result, row: Mapping[str, str], assignment: Assignment, marks: Marks) -> str:
    """The feedback page of a submission; hidden tests show their message, not their code."""
    tests = "".join(
        f"<tr><td>{escape(test.id)}{' (hidden tests)' if test.hidden else ''}</td>"
        f"<td>{number(test.points)} of {number(test.out_of)}</td>"
        f"<td>{escape(test.says) or 'passed'}</td></tr>"
        for test in result.tests
    )
    parts = [
        "<h2>Tests</h2><table><thead><tr><th scope='col'>cell</th><th scope='col'>points</th>"
        f"<th scope='col'>what happened</th></tr></thead><tbody>{tests}</tbody></table>"
    ]
    if result.leaderboard:
        parts.append(f"<p>Leaderboard: {escape(row['leaderboard'])}</p>")
    if result.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
        parts.append(f"<h2>Notes</h2><ul>{notes}</ul>")
    if result.written:
        parts.append("<h2>Written answers, marked by hand</h2>")
    possible = {cell.id: cell.points for cell in assignment.cells}
    for question, answer in result.written.items():
        key = (result.student, result.assignment, question)
        mark = marks.get(key, Mark(""))
        points = (mark.points or "not marked yet:") if answer else "0"
        said = f"<p>{escape(mark.comment)}</p>" if mark.comment else ""
        parts.append(
            f"<h3>{escape(question)}: {escape(points)} of {number(possible[question])}</h3>"
            f"<pre>{escape(answer) or 'No answer.'}</pre>{said}"
        )
    parts.append("<h2>Your code, as it was read</h2>")
    for name, code in result.code.items():
        shown = escape(code) or "Not changed."
        parts.append(f"<h3>{escape(name)}</h3><pre>{shown}</pre>")
    summary = f"{row['points']} of {row['out_of']} points"
    if row["to_mark"] != "0":
        summary += f"; {row['to_mark']} written answers are not marked yet"
    title = f"{result.assignment}: {result.student}"
    return PAGE.format(title=escape(title), summary=escape(summary + "."), body="\n".join(parts))
