"""Step 1, ingest: from a folder or an archive of downloads to notebooks with a student's name.

Downloads are read as course systems make them: Canvas (`doejane_12_345_A1.ipynb`, all in one
folder), Moodle (`Jane Doe_123_assignsubmission_file_/`), Blackboard
(`A1_jdoe_attempt_2026-01-31-12-00-00_A1.ipynb`), Gradescope (`submission_123/` and a file of
metadata), or simply `STUDENT/ASSIGNMENT.ipynb`; as folders, as zip files, and as zips in zips.
A roster joins what was found with the course's own ids. Nothing here raises for what a student
did: what cannot be read becomes a sentence.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from grading.assignment import ABOUT, Refused
from grading.tables import ROUNDED, plain, read_table

LARGEST = 50 * 2**20  # bytes of a file
ARCHIVE = 500 * 2**20  # bytes that are unpacked of one archive
ENTRIES = 5000  # files of an archive
DEPTH = 3  # zips in zips in zips
NOTEBOOK = re.compile(r"\.ipynb(\.json|\.txt)?$", re.IGNORECASE)
UNREAD = re.compile(r"\.(rar|7z|tar|tgz|gz|bz2|xz)$", re.IGNORECASE)
COPY = re.compile(r"(?: ?\((\d+)\)|[- ]?copy ?(\d*)|-(\d+))$", re.IGNORECASE)

CANVAS = re.compile(r"^([^_A-Z]+)(?:_LATE)?_(\d{2,})_(\d{2,})_(.+)$")
MOODLE = re.compile(r"^(.+)_(\d+)_assignsubmission_\w+?_(.*)$")
BLACKBOARD = re.compile(r"^.+_([^_]+)_attempt_(\d{4}(?:-\d\d){5})(?:_(.+))?$")
GRADESCOPE = re.compile(r"^submission_(\d+)$")
METADATA = "submission_metadata.yml"


@dataclass(frozen=True)
class Theirs:
    """A cell of a submission; attachments are (name, media type, base64)."""

    code: bool
    source: str
    grade_id: str = ""
    cell_id: str = ""
    attachments: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Notebook:
    """What a file holds: its cells, and the release that it was made from, if it says so."""

    cells: tuple[Theirs, ...]
    release: str = ""


@dataclass(frozen=True)
class HandedIn:
    """A file that a student handed in; `notebook` is None if it is none, and `problem` says why."""

    student: str
    file: str
    notebook: Notebook | None = None
    problem: str = ""
    when: float = 0.0  # by the system's own time
    copy: int = 0  # 2 for "A1 (2).ipynb"
    names: tuple[str, ...] = ()  # by which the student may be on the roster
    numbers: tuple[str, ...] = ()  # of the course system, which may be on the roster
    loose: bool = False  # neither its folder nor its name tells whose it is


# Files and archives


@dataclass(frozen=True)
class Item:
    """A file, in a folder or in an archive."""

    parts: tuple[str, ...]  # its path from the top; an archive counts as a folder
    when: float
    data: bytes | None
    problem: str = ""


def is_leftover(parts: tuple[str, ...]) -> bool:
    """Whether a system put it there by itself: hidden files, macOS's shadows, Jupyter's copies."""
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def items_in(top: Path) -> Iterator[Item]:
    """All files of a folder or an archive, in order of their paths."""
    if top.is_file():
        archive = Item((), top.stat().st_mtime, top.read_bytes())
        unpacked = list(_unpacked(archive, DEPTH))
        # An archive of a folder holds that folder, not the students, at its top.
        heads = {item.parts[0] for item in unpacked if item.parts}
        if len(heads) == 1 and all(len(item.parts) > 2 for item in unpacked):
            unpacked = [replace(item, parts=item.parts[1:]) for item in unpacked]
        yield from unpacked
        return
    for folder, folders, names in os.walk(top):
        folders.sort()
        here = Path(folder).relative_to(top).parts
        for name in sorted(names):
            if not is_leftover((*here, name)):
                yield from _unpacked(_item(Path(folder) / name, (*here, name)), DEPTH)


def _item(path: Path, parts: tuple[str, ...]) -> Item:
    """One file of a folder; of links and pipes nothing is read: they may lead anywhere."""
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            return Item(parts, 0.0, None, "it is a link or not a plain file, so it was not read")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError:
        return Item(parts, 0.0, None, "it cannot be opened")
    return _sized(Item(parts, about.st_mtime, data))


def _sized(item: Item) -> Item:
    """The item, or what is wrong with it if it is too large."""
    if item.data is not None and len(item.data) > LARGEST:
        return replace(item, data=None, problem=f"it has more than {LARGEST // 2**20} MB")
    return item


def _unpacked(item: Item, depth: int) -> Iterator[Item]:
    """The files of an archive, or the file itself if it is none."""
    is_zip = not item.parts or item.parts[-1].lower().endswith(".zip")
    if item.data is None or not is_zip:
        yield item
        return
    if depth == 0:
        yield replace(item, data=None, problem=f"it is a zip inside {DEPTH} others")
        return
    try:
        archive = zipfile.ZipFile(io.BytesIO(item.data))
        entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
    except (zipfile.BadZipFile, ValueError, OSError):
        yield replace(item, data=None, problem="it is not a whole zip file")
        return
    left = ARCHIVE
    for count, entry in enumerate(entries):
        parts = tuple(part for part in re.split(r"[/\\]", entry.filename) if part not in ("", ".."))
        if entry.is_dir() or not parts or is_leftover(parts):
            continue
        if left <= 0 or count > ENTRIES:
            yield replace(item, data=None, problem="it unpacks to too much and was read in part")
            return
        try:
            when = datetime(*entry.date_time).timestamp()
            with archive.open(entry) as file:
                data = file.read(LARGEST + 1)
        except (RuntimeError, ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as bad:
            why = "it is protected by a password" if "password" in str(bad) else "it is damaged"
            yield Item((*item.parts, *parts), item.when, None, why)
            continue
        left -= len(data)
        yield from _unpacked(_sized(Item((*item.parts, *parts), when, data)), depth - 1)


# Notebooks


def read_notebook(data: bytes) -> Notebook:
    """The cells of a notebook, read with patience; ValueError says why a file is none."""
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(notebook, dict):
        raise ValueError("it holds no list of cells")
    cells = notebook.get("cells")
    if not isinstance(cells, list) and isinstance(notebook.get("worksheets"), list):
        sheets = [s for s in notebook["worksheets"] if isinstance(s, dict)]  # format 3
        cells = [c for s in sheets for c in s.get("cells") or [] if isinstance(c, dict)]
    if not isinstance(cells, list):
        raise ValueError("it holds no list of cells")
    metadata = notebook.get("metadata")
    ours = metadata.get("evolq") if isinstance(metadata, dict) else None
    release = str(ours.get("release", "")) if isinstance(ours, dict) else ""
    return Notebook(tuple(_theirs(cell) for cell in cells if isinstance(cell, dict)), release)


def _theirs(cell: dict[str, Any]) -> Theirs:
    """One cell."""
    source = cell.get("source", cell.get("input", ""))
    source = "".join(map(str, source)) if isinstance(source, list) else str(source)
    source = source.encode("utf-8", "replace").decode()  # half an emoji, which no kernel takes
    metadata = cell.get("metadata")
    data = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = str(data.get("grade_id", "")) if isinstance(data, dict) else ""
    attachments = []
    held = cell.get("attachments")
    for name, kinds in held.items() if isinstance(held, dict) else ():
        for kind, data in kinds.items() if isinstance(kinds, dict) else ():
            whole = "".join(map(str, data)) if isinstance(data, list) else str(data)
            attachments.append((str(name), str(kind), "".join(whole.split())))
    code = cell.get("cell_type") == "code"
    return Theirs(code, source, grade_id, str(cell.get("id", "")), tuple(attachments))


ABOUT_FIELDS = ("Name", "ID", "Help received")
INSTRUCTION = re.compile(r"^\s*\([^)]*\)")  # what stands behind a field in the release


def about(notebook: Notebook) -> dict[str, str]:
    """What the cell on the student says: name, id and help, as far as they were filled in."""
    found = {}
    for cell in notebook.cells:
        if cell.code or not cell.source.lstrip().startswith(ABOUT):
            continue
        for key in ABOUT_FIELDS:
            # The answer stands on the line, or below it up to the next bold word.
            match = re.search(rf"\*\*{key}:?\*\*:?((?:(?!\*\*).)*)", cell.source, re.DOTALL)
            text = " ".join(INSTRUCTION.sub("", match[1]).split()).strip("_ ") if match else ""
            if text:
                found[key] = text
    return found


# Whose it is


def handed_in(top: Path) -> list[HandedIn]:
    """Everything that was handed in, with the name that the course system gave to its student."""
    items = list(items_in(top))
    submitters = _gradescope(items)
    return [
        _handed_in(item, submitters)
        for item in items
        if item.parts[-1:] != (METADATA,) and not _is_message(item)
    ]


def _is_message(item: Item) -> bool:
    """Whether it is Blackboard's own text about an attempt."""
    match = BLACKBOARD.match(Path(item.parts[-1]).stem) if item.parts else None
    return match is not None and match[3] is None


def _handed_in(item: Item, submitters: dict[tuple[str, ...], tuple[str, ...]]) -> HandedIn:
    """One file, its notebook read."""
    who = _whose(item.parts, submitters)
    name = item.parts[-1] if item.parts else "the archive"
    when = who.when or item.when
    stem = NOTEBOOK.sub("", name)
    match = COPY.search(stem)
    copy = int(next((n for n in match.groups() if n), "1")) if match else 0
    base = replace(who, file="/".join(item.parts) or name, when=when, copy=copy)
    if item.problem:
        return replace(base, problem=item.problem)
    if not NOTEBOOK.search(name):
        unread = UNREAD.search(name) is not None
        return replace(base, problem="unpack it: such archives are not read" if unread else "other")
    try:
        return replace(base, notebook=read_notebook(item.data or b""))
    except ValueError as error:
        return replace(base, problem=str(error))


def _whose(parts: tuple[str, ...], submitters: dict[tuple[str, ...], tuple[str, ...]]) -> HandedIn:
    """The student, from the path of a file; no other field is filled."""
    for i, part in enumerate(parts):
        stem = re.sub(r"\.zip$", "", part, flags=re.IGNORECASE)
        if match := MOODLE.match(stem):
            return HandedIn(f"{match[1]}_{match[2]}", "", names=(match[1],), numbers=(match[2],))
        if match := BLACKBOARD.match(stem):
            when = datetime.strptime(match[2], "%Y-%m-%d-%H-%M-%S").timestamp()
            return HandedIn(match[1], "", names=(match[1],), when=when)
        if match := GRADESCOPE.match(stem):
            names = submitters.get(parts[: i + 1], ())
            return HandedIn(names[0] if names else stem, "", names=names)
        if match := CANVAS.match(stem):
            return HandedIn(f"{match[1]}_{match[2]}", "", names=(match[1],), numbers=(match[2],))
    if len(parts) > 1:
        student = re.sub(r"\.zip$", "", parts[0], flags=re.IGNORECASE)
        return HandedIn(student, "", names=(student,))
    return HandedIn(NOTEBOOK.sub("", parts[0]) if parts else "", "", loose=True)


def _gradescope(items: list[Item]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """From Gradescope's metadata: id, name and email of the first submitter, by folder."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for item in items:
        if item.parts[-1:] != (METADATA,) or item.data is None:
            continue
        try:
            told = yaml.safe_load(item.data.decode("utf-8", "replace"))
        except yaml.YAMLError:
            continue
        for folder, data in told.items() if isinstance(told, dict) else ():
            people = data.get(":submitters") if isinstance(data, dict) else None
            if isinstance(people, list) and people and isinstance(people[0], dict):
                names = (people[0].get(key) for key in (":sid", ":email", ":name"))
                found[(*item.parts[:-1], str(folder))] = tuple(str(n) for n in names if n)
    return found


# The roster


@dataclass(frozen=True)
class Person:
    """A line of the roster; `row` keeps what its course system wants to see again."""

    id: str
    name: str
    row: dict[str, str] = field(default_factory=dict)


IDS = ("student id", "sis user id", "id number", "id", "username", "sis login id", "login id")
NAMES = ("name", "full name", "student", "student name")


def key_of(text: str) -> str:
    """A name or an id without what systems change in it: case, spaces, signs."""
    return "".join(sign for sign in text.casefold() if sign.isalnum())


class Roster:
    """The people of a course, and the names and numbers by which they are known."""

    def __init__(self, people: list[Person]) -> None:
        self.people = people
        keys: dict[str, set[str]] = defaultdict(set)
        for person in people:
            words = re.split(r"[\s,]+", person.name.strip())
            turns = ["".join(words[i:] + words[:i]) for i in range(len(words))]
            for text in (person.id, *person.row.values(), *turns):
                if key_of(text):
                    keys[key_of(text)].add(person.id)
            for text in person.row.values():
                if "@" in text:
                    keys[key_of(text.partition("@")[0])].add(person.id)
        self.keys = {key: next(iter(ids)) for key, ids in keys.items() if len(ids) == 1}
        self.by_id = {person.id: person for person in people}

    def find(self, given: HandedIn) -> Person | None:
        """Who handed something in: by name, else by number; None if that is not certain."""
        for words in (given.names, given.numbers):
            found = {self.keys[key_of(word)] for word in words if key_of(word) in self.keys}
            if len(found) == 1:
                return self.by_id[found.pop()]
        return None


def read_roster(path: Path) -> Roster:
    """A roster from a CSV file; an export of Canvas's or Moodle's gradebook is one."""
    rows = read_table(path)
    columns = [name.lower() for name in rows[0]] if rows else []
    id_columns = [name for name in IDS if name in columns]
    if not id_columns:
        raise Refused(f"{path} has no column named {', '.join(IDS[:-1])} or {IDS[-1]}")
    people, seen = [], set()
    for line, whole in enumerate(rows, 2):
        row = {key.lower(): value for key, value in whole.items()}
        name = next((row[key].strip() for key in NAMES if row.get(key, "").strip()), "")
        if not name:
            parts = (row.get("first name", ""), row.get("last name", row.get("surname", "")))
            name = " ".join(part.strip() for part in parts if part.strip())
        identity = next((plain(row[key], "id:") for key in id_columns if row[key].strip()), "")
        if not identity or name.casefold() == "points possible":  # Canvas's second line
            continue
        if ROUNDED.fullmatch(identity):
            raise Refused(f"{path}, line {line}: a spreadsheet has rounded the id {identity}")
        if identity in seen:
            raise Refused(f"{path}, line {line}: the id {identity} is there twice")
        seen.add(identity)
        people.append(Person(identity, name, whole))
    if not people:
        raise Refused(f"{path} lists nobody")
    return Roster(people)


def join(found: list[HandedIn], roster: Roster | None) -> list[HandedIn]:
    """What was handed in, under the ids of the roster, and loose files under what they say inside.

    A loose notebook may not take the place of what came under a student's own name.
    """
    out, taken = [], {given.student for given in found if not given.loose}
    for given in found:
        student = given.student
        if given.loose and given.notebook is not None:
            said = about(given.notebook)
            names = tuple(said[key] for key in ("ID", "Name") if key in said)
            person = roster.find(replace(given, names=names)) if roster else None
            claimed = person.id if person else names[0] if names else student
            student = student if claimed in taken else claimed
        elif roster and (person := roster.find(given)):
            student = person.id
        out.append(replace(given, student=student))
    return out
