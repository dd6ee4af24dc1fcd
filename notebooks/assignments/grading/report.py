"""Step 4, report: results and their tables: grades.csv, by_hand.csv, those for course systems.

A result is stored with a seal: a digest that needs the key in OUT, which kernels cannot read. So
what a process of a student's may write into the results later is not believed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from grading.assignment import Assignment, Refused
from grading.ingest import Roster
from grading.repair import Picture, named_in
from grading.run import Tested
from grading.tables import DIGEST, ID, number_of, plain, points_text, read_table, table, write


@dataclass
class Result:
    """A submission, graded as far as it goes."""

    student: str
    assignment: str
    file: str
    tests: list[Tested] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)  # by grade_id, "" if there is none
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)  # what the student wrote, by grade_id
    help: str = ""
    notes: list[str] = field(default_factory=list)
    look: list[str] = field(default_factory=list)
    leaderboard: str = ""
    gain: float | None = None
    failed: str = ""  # why the grader could not grade it

    @property
    def points(self) -> float:
        """What the tests gave."""
        return sum(test.points for test in self.tests)

    def to_mark(self, question: str) -> str:
        """What is marked for a question: the answer, or else all text that stands elsewhere."""
        answer = self.written.get(question, "")
        if answer or self.pictures.get(question):
            return answer or "(A picture.)"
        elsewhere = [
            f"Under {name}:\n{text or '(a picture)'}" for name, text in self.remarks.items()
        ]
        return "\n\n".join(["(Nothing in its place. Elsewhere:)", *elsewhere]) if elsewhere else ""


# Stored results


class Store:
    """The results of earlier runs in OUT/results, each sealed with the key of this OUT."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "results"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = out / "seal.key"
        if not path.is_file():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
        self.key = path.read_text().strip().encode()

    def _path(self, student: str, assignment: str) -> Path:
        return self.folder / folder_name(student) / f"{assignment}.json"

    def _seal(self, state: str, result: Mapping[str, Any]) -> str:
        text = json.dumps([state, result], sort_keys=True)
        return hmac.new(self.key, text.encode(), "sha256").hexdigest()

    def read(self, student: str, assignment: str, state: str) -> Result | None:
        """The result of the same state of everything, unless there is none or it was changed."""
        try:
            stored = json.loads(self._path(student, assignment).read_text(encoding="utf-8"))
            result = stored["result"]
            mine = (result["student"], result["assignment"]) == (student, assignment)
            sealed = hmac.compare_digest(stored["seal"], self._seal(state, result))
            if stored["state"] != state or not sealed or not mine:
                return None
            tests = [Tested(**test) for test in result["tests"]]
            pictures = {k: [tuple(p) for p in v] for k, v in result["pictures"].items()}
            return Result(**{**result, "tests": tests, "pictures": pictures})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, result: Result, state: str) -> None:
        """Keep a result."""
        data = json.loads(json.dumps(asdict(result)))  # as it will be read: lists, not tuples
        text = json.dumps(
            {"state": state, "seal": self._seal(state, data), "result": data}, indent=1
        )
        write(self._path(result.student, result.assignment), text)


def folder_name(student: str) -> str:
    """A student's name as the name of a folder that every system takes."""
    safe = "".join(c if c.isalnum() or c in " ._-@+(),'" else "_" for c in student).strip(" .")
    if safe and safe == student:
        return student
    digest = hashlib.sha256(student.encode(errors="surrogatepass")).hexdigest()[:6]
    return f"{safe or 'student'}-{digest}"


# Marks by hand


class Mark(NamedTuple):
    """What by_hand.csv says of a written answer; `answer` tells which answer was marked."""

    out_of: str
    points: str = ""
    comment: str = ""
    answer: str = ""


Marks = dict[tuple[str, str, str], Mark]  # by student, assignment, question
BY_HAND = ("student", "assignment", "question", "out_of", "points", "comment", "answer")


def read_by_hand(
    path: Path, assignments: Mapping[str, Assignment], students: Iterable[str]
) -> Marks:
    """Points and comments that were given by hand.

    Refused for points that are none, and for lines that belong to no answer.
    """
    if not path.is_file():
        return {}
    marks: Marks = {}
    known = set(students)
    for line, row in enumerate(read_table(path), 2):
        where = f"{path}, line {line}"
        missing = [name for name in BY_HAND[:-1] if name not in row and name != "out_of"]
        if missing:
            raise Refused(f"{where}: the column {missing[0]} is missing")
        student = plain(row["student"], ID)
        assignment, question = row["assignment"].strip(), row["question"].strip()
        if not any((student, assignment, question)):
            continue  # an empty line
        if student not in known:
            raise Refused(
                f"{where}: nothing was handed in by {student!r}; restore or delete the line"
            )
        cells = assignments[assignment].cells if assignment in assignments else ()
        given = [cell for cell in cells if cell.kind == "written" and cell.id == question]
        if not given:
            raise Refused(f"{where}: {assignment!r} has no written question {question!r}")
        out_of, points = points_text(given[0].points), row["points"].strip()
        try:
            wrong = points and not 0 <= number_of(points) <= given[0].points
        except ValueError:
            wrong = True
        if wrong:
            raise Refused(f"{where}: points must be from 0 to {out_of}, not {points}")
        points = points_text(number_of(points)) if points else ""
        comment, answer = plain(row["comment"]), plain(row.get("answer", ""), DIGEST)
        marks[student, assignment, question] = Mark(out_of, points, comment, answer)
    return marks


def digest_of(result: Result, question: str) -> str:
    """Which answer it is: a digest of all that is marked."""
    pictures = result.pictures.get(question, [])
    text = repr((result.to_mark(question), pictures)) if pictures else result.to_mark(question)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]


def up_to_date(
    marks: Marks, results: Iterable[Result], assignments: Mapping[str, Assignment]
) -> Marks:
    """The marks with a line for each answer; one given for an earlier answer is asked for again."""
    out = dict(marks)
    for result in results:
        for cell in assignments[result.assignment].cells if result.assignment else ():
            if cell.kind != "written" or not result.to_mark(cell.id):
                continue
            now = digest_of(result, cell.id)
            key = (result.student, result.assignment, cell.id)
            mark = marks.get(key, Mark(points_text(cell.points)))
            if mark.points and mark.answer not in ("", now):
                was = f"{mark.comment} ({mark.points} points were given to an earlier answer.)"
                mark = mark._replace(points="", comment=was.strip())
            out[key] = mark._replace(answer=now)
    return out


def by_hand_table(marks: Marks) -> str:
    """by_hand.csv."""
    rows = []
    for (student, assignment, question), mark in sorted(marks.items()):
        row = dict(zip(BY_HAND, (ID + student, assignment, question, *mark)))
        rows.append({**row, "answer": DIGEST + mark.answer})
    return table(rows, BY_HAND)


def hand_points(result: Result, marks: Marks) -> tuple[float, int]:
    """Points given by hand, and how many answers still wait for them."""
    points, waiting = 0.0, 0
    for question in result.written:
        mark = marks.get((result.student, result.assignment, question))
        if result.to_mark(question) and mark is not None:
            points += float(mark.points or 0)
            waiting += not mark.points
    return points, waiting


# grades.csv


def by_exercise(result: Result) -> dict[str, tuple[float, float]]:
    """Points and how many were possible, by exercise."""
    out: dict[str, tuple[float, float]] = {}
    for test in result.tests:
        name = "-".join(test.id.split("-")[:2])  # A1-2-check and A1-2-hidden belong to A1-2
        points, out_of = out.get(name, (0.0, 0.0))
        out[name] = (points + test.points, out_of + test.out_of)
    return out


GRADES = (
    "student", "name", "assignment", "points", "out_of", "tests", "by_hand", "to_mark", "exercises",
    "leaderboard", "notes", "help", "look", "file",
)  # fmt: skip


def grade_rows(
    results: Sequence[Result],
    assignments: Mapping[str, Assignment],
    marks: Marks,
    roster: Roster | None = None,
) -> list[dict[str, str]]:
    """The lines of grades.csv; what the grader could not grade has no points, not 0."""
    gains: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.gain is not None:
            gains[result.assignment].append(result.gain)
    rows = []
    for result in results:
        assignment = assignments.get(result.assignment)
        by_hand, waiting = hand_points(result, marks)
        board, out_of = result.leaderboard, ""
        if assignment:
            out_of = points_text(assignment.points("test") + assignment.points("written"))
        if result.gain is not None:
            others = gains[result.assignment]
            place = 1 + sum(gain > result.gain for gain in others)
            board = f"place {place} of {len(others)}: {board}"
        person = roster.by_id.get(result.student) if roster else None
        exercises = [
            f"{name} {points_text(points)}/{points_text(most)}"
            for name, (points, most) in by_exercise(result).items()
        ]
        row = {
            "student": ID + result.student if result.student else "",
            "name": person.name if person else "",
            "assignment": result.assignment or "unknown",
            "points": points_text(result.points + by_hand),
            "out_of": out_of,
            "tests": points_text(result.points),
            "by_hand": points_text(by_hand),
            "to_mark": str(waiting),
            "exercises": ", ".join(exercises),
            "leaderboard": board,
            "notes": " ".join(result.notes),
            "help": result.help,
            "look": " ".join(result.look),
            "file": result.file,
        }
        if result.failed:
            row |= {"points": "", "tests": "", "exercises": "", "notes": result.failed}
        rows.append(row)
    return rows


# For course systems


def exports(
    rows: Sequence[Mapping[str, str]], assignments: Mapping[str, Assignment], roster: Roster | None
) -> dict[str, str]:
    """Tables for Canvas's and Moodle's gradebooks, and a plain one, by file name.

    Only whole grades are in them: where something still waits for marks, the place is empty.
    """
    grades: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row["assignment"] in assignments:
            done = row["to_mark"] == "0"
            grades[row["student"].removeprefix(ID)][row["assignment"]] = (
                row["points"] if done else ""
            )
    names = sorted({name for given in grades.values() for name in given})
    people = {person.id: person for person in roster.people} if roster else {}
    canvas, moodle, simple = [], [], []
    titles = _titles(names, roster)
    for student in dict.fromkeys([*people, *grades]):
        person, given = people.get(student), grades.get(student, {})
        name = person.name if person else ""
        row = {key.lower(): value for key, value in person.row.items()} if person else {}
        simple.append({"id": ID + student, "name": name, **given})
        canvas.append(
            {
                "Student": row.get("student", name),
                "ID": row.get("id", "") if "sis user id" in row else "",
                "SIS User ID": row.get("sis user id", student),
                "SIS Login ID": row.get("sis login id", ""),
                "Section": row.get("section", ""),
                **{titles[key]: points for key, points in given.items()},
            }
        )
        email = row.get("email address", row.get("email", ""))
        moodle.append({"ID number": student, "Full name": name, "Email address": email, **given})
    return {
        "canvas.csv": table(
            canvas,
            ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *titles.values()],
        ),
        "moodle.csv": table(moodle, ["ID number", "Full name", "Email address", *names]),
        "plain.csv": table(simple, ["id", "name", *names]),
    }


def _titles(names: Sequence[str], roster: Roster | None) -> dict[str, str]:
    """Canvas's own titles of the assignments, where its export is the roster."""
    columns = list(roster.people[0].row) if roster else []
    titles = {}
    for name in names:
        own = [column for column in columns if named_in(column, [name])]
        titles[name] = own[0] if len(own) == 1 else name
    return titles
