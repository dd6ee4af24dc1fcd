"""What was handed in, matched with what was given out.

Cells are matched by nbgrader's `grade_id`, else by cell id, else by their text or the functions
that they define. What runs is the source, in its own order, with the student's cells in their
places; so changed, deleted, doubled or reordered cells of tests do not matter, and every oddity
becomes a sentence.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from grading.kernel import Cell
from grading.source import (
    SOURCES,
    STUBS,
    grader_data,
    is_hidden,
    is_picture,
    read_source,
    sources,
    student_version,
)

LARGEST = 50 * 2**20  # bytes of a notebook
DEFINED = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)
# Names that an honest answer has no use for: worth a look, not worth fewer points.
UNUSUAL = {
    "open", "exec", "eval", "compile", "__import__", "subprocess", "socket", "urllib", "requests",
    "ctypes", "inspect", "importlib", "builtins", "globals", "get_ipython", "setattr", "os", "gc",
}  # fmt: skip


class Refused(Exception):
    """The instructor's side is not in order: nothing is graded."""


@dataclass(frozen=True)
class Given:
    """A marked cell of an assignment's source: kind setup, picture, own, written or test."""

    id: str  # grade_id
    cell_id: str
    kind: str
    source: str  # with solution or hidden tests
    release: str  # as students get it
    points: float = 0.0
    hidden: bool = False

    @property
    def defines(self) -> frozenset[str]:
        """The functions and classes that a solution cell defines: by these it is known, too."""
        return frozenset(DEFINED.findall(self.release)) if self.kind == "own" else frozenset()


@dataclass(frozen=True)
class Assignment:
    """What is graded: a name and its cells, in order."""

    name: str
    cells: tuple[Given, ...]

    def points(self, kind: str) -> float:
        """All points of the cells of one kind: test or written."""
        return sum(cell.points for cell in self.cells if cell.kind == kind)


# The instructor's side


def read_assignment(path: Path, replaced: Mapping[str, str] | None = None) -> Assignment:
    """An assignment from its source, some hidden tests replaced; Refused if an id is used twice."""
    full = read_source(path)
    students = student_version(full).cells  # of the original: an overlay changes no release
    for cell in full.cells:
        name = grader_data(cell).get("grade_id", "")
        if replaced and name in replaced:
            if not is_hidden(cell):
                raise Refused(f"overlay: {name} of {path.stem} holds no hidden tests")
            cell.source = replaced[name]
    cells: dict[str, Given] = {}
    for cell, student in zip(full.cells, students):
        data = grader_data(cell)
        if not data:
            continue
        kind = {
            (True, True): "written",
            (False, True): "own",
            (True, False): "test",
            (False, False): "setup",
        }[bool(data.grade), bool(data.solution)]
        if data.grade_id in cells:
            raise Refused(f"{path.name}: the grade_id {data.grade_id} is there twice")
        kind = "picture" if is_picture(cell) else kind
        hidden, points = is_hidden(cell), float(data.get("points", 0))
        cells[data.grade_id] = Given(
            data.grade_id, cell.id, kind, cell.source, student.source, points, hidden
        )
    if replaced and (unknown := replaced.keys() - cells.keys()):
        raise Refused(f"overlay: {path.stem} has no cell {min(unknown)}")
    return Assignment(path.stem, tuple(cells.values()))


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


# A submission


@dataclass(frozen=True)
class Theirs:
    """A cell of a submission."""

    code: bool
    source: str
    grade_id: str
    cell_id: str


def read_submission(path: Path) -> list[Theirs]:
    """The cells of a notebook, read with patience; ValueError says why a file is none."""
    with path.open("rb") as file:
        read = file.read(LARGEST + 1)
    if len(read) > LARGEST:
        raise ValueError(f"it has more than {LARGEST // 2**20} MB")
    try:
        notebook = json.loads(read.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError("it holds no list of cells")
    out = []
    for cell in cells:
        if not isinstance(cell, dict):
            continue
        source = cell.get("source", "")
        source = "".join(map(str, source)) if isinstance(source, list) else str(source)
        source = source.encode("utf-8", "replace").decode()  # half an emoji, which no kernel takes
        metadata = cell.get("metadata")
        data = metadata.get("nbgrader") if isinstance(metadata, dict) else None
        grade_id = str(data.get("grade_id", "")) if isinstance(data, dict) else ""
        code = cell.get("cell_type") == "code"
        out.append(Theirs(code, source, grade_id, str(cell.get("id", ""))))
    return out


def known(cell: Theirs, assignment: Assignment, taken: Iterable[str] = ()) -> Given | None:
    """Which cell of an assignment this is.

    By grade_id, else by cell id; a notebook that has lost both, by the functions that it defines,
    or by its text, if no cell before (`taken`, by grade_id) has had the same.
    """
    for given in assignment.cells:
        if cell.grade_id == given.id:
            return given
    for given in assignment.cells:
        if cell.cell_id and cell.cell_id == given.cell_id:
            return given
    if cell.code and not cell.grade_id:
        defined = set(DEFINED.findall(cell.source))
        for given in assignment.cells:
            if given.defines & defined:
                return given
        for given in assignment.cells:
            if plain(cell.source) == plain(given.release) and given.id not in taken:
                return given
    return None


def cells_known(cells: Iterable[Theirs], assignment: Assignment) -> int:
    """How many cells of a submission belong to an assignment."""
    return sum(known(cell, assignment) is not None for cell in cells)


def plain(source: str) -> str:
    """A text without differences that do not count."""
    return "\n".join(line.rstrip() for line in source.strip().splitlines())


@dataclass
class Plan:
    """What runs for a submission: cells with their names; and what was odd about it."""

    cells: list[tuple[str, Cell]] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_of(theirs: list[Theirs], assignment: Assignment) -> Plan:
    """The source's cells in the source's order, with the student's in their places.

    Cells of the student's own stay behind the cell that they follow.
    """
    copies: dict[str, list[str]] = defaultdict(list)
    extras: dict[str, list[str]] = defaultdict(list)
    last = ""
    for cell in theirs:
        given = known(cell, assignment, copies)
        if given is not None:
            copies[given.id].append(cell.source)
            last = given.id
        elif cell.code and cell.source.strip():
            extras[last].append(cell.source)
    plan = Plan()
    plan.cells += [("a cell before the first", Cell(source)) for source in extras[""]]
    for given in assignment.cells:
        found = copies[given.id]
        changed = [source for source in found if plain(source) != plain(given.release)]
        if given.kind == "picture":
            continue
        if given.kind in ("setup", "test"):
            test = given.kind == "test"
            if not found:
                plan.notes.append(f"Cell {given.id} was missing; it was put back.")
            elif changed:
                plan.notes.append(f"Cell {given.id} was changed; the original was used.")
            plan.cells.append((given.id, Cell(given.source, test)))
        else:
            if not found:
                plan.notes.append(f"Cell {given.id} is missing.")
            elif len(found) > 1:
                plan.notes.append(f"Cell {given.id} is there {len(found)} times; all were read.")
            if given.kind == "own":
                # A copy that was never filled in must not undo one that was.
                plan.cells += [(given.id, Cell(source)) for source in changed or found[:1]]
                plan.code[given.id] = "\n\n".join(changed)
            else:
                answers = [source for source in changed if source.strip() not in STUBS.values()]
                plan.written[given.id] = "\n\n".join(answers).strip()
        behind = extras[given.id]
        plan.cells += [(f"a cell after {given.id}", Cell(source)) for source in behind]
        if behind:
            plan.code[f"after {given.id}"] = "\n\n".join(behind)
    return plan


def names_of(code: str) -> tuple[set[str], set[str]]:
    """The names that code binds at its top level (for torch.rand = ..., torch), and all it uses."""
    bound: set[str] = set()
    used: set[str] = set()
    try:
        tree = ast.parse(TransformerManager().transform_cell(code))
        stored_names(tree, bound, used)
    except Exception:  # advice for the instructor only: no code, however odd, may stop a grading
        pass
    return bound, used


def stored_names(tree: ast.Module, bound: set[str], used: set[str]) -> None:
    """Adds the names that a module binds at its top level, and those that it uses."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            bound.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        else:
            stored = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            bound |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound.add(ast.unparse(node).split(".")[0])


def looks(plan: Plan, assignment: Assignment) -> list[str]:
    """What an instructor should look at: names that tests rely on, tools no answer needs."""
    given = {cell.id: cell for cell in assignment.cells}
    setup = [names_of(cell.source)[0] for cell in given.values() if cell.kind == "setup"]
    relied, out = set(dir(builtins)).union(*setup), []
    for name, code in plan.code.items():
        bound, used = names_of(code)
        offered = names_of(given[name].source) if name in given else (set(), set())
        if unusual := sorted((used - offered[1]) & UNUSUAL):
            out.append(f"{name} uses {', '.join(unusual)}.")
        if anew := sorted((bound - offered[0]) & relied):
            out.append(f"{name} binds {', '.join(anew)} anew, which the tests use.")
    return out


@dataclass(frozen=True)
class Task:
    """A file that is graded as an assignment; `theirs` is None if it cannot be read."""

    student: str
    file: str
    assignment: str
    theirs: list[Theirs] | None
    notes: tuple[str, ...]


def is_plain(path: Path) -> bool:
    """Whether it is a file that may be looked at."""
    try:
        return path.is_file()
    except OSError:  # in a folder that is closed to us
        return False


def tasks_of(folder: Path, assignments: Mapping[str, Assignment]) -> list[Task]:
    """What a student handed in: at most one file for each assignment, and what is odd about it."""
    student = folder.name
    found: dict[str, list[tuple[bool, str, list[Theirs] | None, list[str]]]] = defaultdict(list)
    lost: list[str] = []
    files = sorted(p for p in folder.rglob("*.ipynb") if not p.parent.name.startswith("."))
    # A link would hand in what lies elsewhere, another's work maybe; a pipe would never end.
    own = folder.resolve()
    plain_files = [p for p in files if is_plain(p) and p.resolve() == own / p.relative_to(folder)]
    lost += [
        f"{p.relative_to(folder).as_posix()} is a link, no plain file, or in a closed folder; "
        "it was not read."
        for p in files
        if p not in plain_files
    ]
    files = plain_files
    for path in files:
        file, notes = path.relative_to(folder).as_posix(), []
        named = path.stem if path.stem in assignments else None
        theirs: list[Theirs] | None = None
        try:
            theirs = read_submission(path)
        except (OSError, ValueError) as error:
            why = str(error) if isinstance(error, ValueError) else "it cannot be opened"
            notes.append(f"{file} is not a notebook: {why}.")
        counts = {name: cells_known(theirs or [], a) for name, a in assignments.items()}
        best = max(counts, key=lambda name: (counts[name], name == named))
        if theirs is not None and counts[best] == 0:
            notes.append(f"{file} holds no cell of an assignment.")
            theirs = None
        if theirs is None:
            best = named or ""
        if not best:
            lost += notes
            continue
        if best != path.stem:
            notes.append(f"By its cells, {file} is {best}.")
        found[best].append((named == best and theirs is not None, file, theirs, notes))
    out = []
    for name, versions in sorted(found.items()):
        versions.sort(key=lambda version: not version[0])  # stable: the well-named one first
        _, file, theirs, notes = versions[0]
        others = [version[1] for version in versions[1:]]
        if others:
            notes.append(f"Not graded, as there is {file}: {', '.join(others)}.")
        out.append(Task(student, file, name, theirs, tuple(notes)))
    if not files:
        others = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if is_plain(p))
        lost.append(f"No notebook; found: {', '.join(others[:5]) or 'nothing'}.")
    if lost:
        out.append(Task(student, "", "", None, tuple(lost)))
    return out
