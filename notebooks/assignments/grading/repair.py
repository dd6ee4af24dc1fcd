"""Step 2, repair: from a student's cells to the assignment's, and nothing that was written is lost.

Cells are matched by nbgrader's `grade_id`, else by cell id, else (Colab and Deepnote keep neither)
by the functions that they define, by their text, or by their heading. What runs is the source, in
its own order, with the student's cells in their places; so changed, deleted, doubled or reordered
cells of tests do not matter. Whatever else a student wrote is kept: new cells, text under a
question, pictures, changes of cells that are not theirs. It is shown on the feedback page, and what
stands under a question is marked with it. Every oddity becomes a sentence.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from grading.assignment import DEFINED, STUBS, Assignment, Given, grader_data
from grading.ingest import HandedIn, Notebook, Roster, Theirs, about

Picture = tuple[str, str, str]  # name, media type, base64
PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp")
IN_TEXT = re.compile(r"data:(image/\w+);base64,([A-Za-z0-9+/=\s]+)")

# Names that an honest answer has no use for: worth a look, not worth fewer points. First files,
# processes and other code, then other people's names and frames, then answers that pretend to be
# equal to everything.
UNUSUAL = frozenset(
    re.findall(
        r"\w+",
        """
        open exec eval compile __import__ subprocess socket urllib requests http ctypes cffi
        importlib imp runpy pkgutil zipimport os sys io posix pathlib shutil glob tempfile
        fileinput linecache codecs pickle marshal shelve dill joblib zipfile tarfile gzip mmap
        multiprocessing concurrent threading _thread asyncio signal atexit platform pty resource
        site sysconfig jupytext nbformat psutil pandas fromfile genfromtxt loadtxt memmap
        from_file hub cpp_extension read_typefaces
        builtins __builtins__ globals locals vars dir getattr setattr delattr inspect traceback
        types gc weakref unittest mock patch breakpoint input exit quit get_ipython IPython
        ipykernel In Out _ih _oh _i __globals__ __dict__ __code__ __closure__ __defaults__
        __kwdefaults__ __class__ __bases__ __mro__ __subclasses__ __getattribute__ __wrapped__
        __traceback__ __context__ __loader__ __spec__ __file__ __main__ tb_frame tb_next f_back
        f_locals f_globals f_builtins f_code gi_frame cr_frame ag_frame settrace setprofile
        _getframe modules displayhook
        __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __torch_function__ __array__
        __torch_dispatch__ __instancecheck__ __int__ __index__ __float__ __set_name__
        __init_subclass__ __del__
        """,
    )
)


@dataclass(frozen=True)
class Step:
    """Code to run: of kind setup, own, extra or test."""

    name: str
    section: str
    kind: str
    code: str
    seconds: float | None = None
    hidden: bool = False


@dataclass
class Plan:
    """What runs for a submission, what is marked by hand, what is kept, and what was odd."""

    steps: list[Step] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)  # theirs, by where it runs
    written: dict[str, str] = field(default_factory=dict)  # answers by grade_id, "" if none
    pictures: dict[str, list[Picture]] = field(default_factory=dict)  # of answers and remarks
    remarks: dict[str, str] = field(default_factory=dict)  # other text of theirs, by section
    kept: dict[str, str] = field(default_factory=dict)  # our cells as they changed them, not run
    extras: dict[str, list[str]] = field(default_factory=dict)  # code cells behind ours
    help: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def touched(self) -> bool:
        """Whether the student has written anything into it."""
        texts = (*self.code.values(), *self.written.values(), *self.remarks.values())
        return any(texts) or bool(self.kept) or any(self.pictures.values())


# Matching


def bare(source: str) -> str:
    """A text without differences that do not count."""
    return "\n".join(line.rstrip() for line in source.strip().splitlines())


def line_key(line: str) -> str:
    """A line without what editors change in it: spaces and signs of Markdown."""
    return re.sub(r"[\s*_#>\\-]", "", line)


def heading(source: str) -> str:
    """The first line of a text if it is a heading, without its signs; else ""."""
    first = source.strip().partition("\n")[0]
    return line_key(first) if first.startswith("#") else ""


def match_one(cell: Theirs, assignment: Assignment, taken: Iterable[str] = ()) -> Given | None:
    """Which cell of an assignment this is; `taken` are the ids of those found before it.

    By grade_id, else by cell id; a cell that has lost both, by the functions that it defines, by
    its text, or by its heading, if no cell before has had the same.
    """
    for given in assignment.cells:
        if cell.grade_id and cell.grade_id == given.id:
            return given
    for given in assignment.cells:
        if cell.cell_id and cell.cell_id == given.cell_id:
            return given
    if cell.grade_id:
        return None
    free = [given for given in assignment.cells if given.id not in taken]
    if cell.code:
        defined = set(DEFINED.findall(cell.source))
        for given in assignment.cells:
            if given.defines & defined:
                return given
        for given in free:
            if given.code and bare(cell.source) == bare(given.release):
                return given
        return None
    for given in free:
        if not given.code and given.kind != "written" and bare(cell.source) == bare(given.release):
            return given
    for given in free:
        if given.kind in ("text", "about") and heading(cell.source) == heading(given.release) != "":
            return given
    return None


def match(cells: Sequence[Theirs], assignment: Assignment) -> list[tuple[Theirs, Given | None]]:
    """Each cell of a submission with the cell of the assignment that it is, if it is one."""
    out: list[tuple[Theirs, Given | None]] = []
    taken: set[str] = set()
    section = ""
    for cell in cells:
        given = match_one(cell, assignment, taken)
        if given is None and not cell.code and bare(cell.source) == STUBS["markdown"]:
            # An empty place for an answer that has lost its id is that of the question before it.
            places = [g for g in assignment.cells if g.kind == "written" and g.section == section]
            given = next((g for g in places if g.id not in taken), None)
        if given is not None:
            taken.add(given.id)
            section = given.section
        out.append((cell, given))
    return out


def likeness(notebook: Notebook, assignment: Assignment) -> int:
    """How many cells of an assignment a notebook holds."""
    found = (given for _, given in match(notebook.cells, assignment) if given is not None)
    return len({given.id for given in found if given.kind != "about"})


# The plan


class _Kept:
    """What a student wrote besides code for our cells, gathered section by section."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = defaultdict(list)
        self.pictures: dict[str, list[Picture]] = defaultdict(list)

    def add(self, section: str, text: str, attachments: Iterable[Picture]) -> None:
        """Keep a text and its pictures; pictures inside the text become pictures beside it."""
        for kind, base64 in IN_TEXT.findall(text):
            name = f"picture {len(self.pictures[section]) + 1}"
            self.pictures[section].append((name, kind, "".join(base64.split())))
        text = IN_TEXT.sub("(picture)", text).strip()
        if text:
            self.texts[section].append(text)
        self.pictures[section] += attachments


def added(source: str, release: str) -> str:
    """The lines of a text that the release does not have."""
    lines = difflib.ndiff(release.splitlines(), source.splitlines())
    return "\n".join(line[2:] for line in lines if line.startswith("+ ")).strip()


def without_stub(text: str) -> str:
    """An answer without the line that stood in its place."""
    return "\n".join(s for s in text.splitlines() if s.strip() != STUBS["markdown"]).strip()


def definitions(code: str, wanted: frozenset[str]) -> str:
    """The functions and classes of these names that some code defines at its top level."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    lines = code.splitlines()
    parts = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n".join(parts)


def plan_of(notebook: Notebook, assignment: Assignment) -> Plan:
    """The source's cells in the source's order, with the student's in their places.

    Code cells of the student's own stay behind the cell that they follow.
    """
    copies: dict[str, list[str]] = defaultdict(list)
    extras: dict[str, list[str]] = defaultdict(list)
    kept, plan = _Kept(), Plan(help=about(notebook).get("Help received", ""))
    ours = {line_key(line) for cell in assignment.cells for line in cell.release.splitlines()}
    questions = {cell.section for cell in assignment.cells if cell.kind == "written"}
    last, section = "", assignment.cells[0].section if assignment.cells else ""
    for cell, given in match(notebook.cells, assignment):
        if given is not None:
            last, section = given.id, given.section
            if given.kind == "written":
                source = cell.source if not cell.code else f"```\n{cell.source}\n```"
                if cell.code and bare(cell.source) == STUBS["markdown"]:
                    source = ""
                kept.add(section, without_stub(source), cell.attachments)
                copies[given.id].append(source)
            elif given.kind == "text":
                kept.add(section, added(cell.source, given.release), cell.attachments)
            elif given.kind != "about":
                copies[given.id].append(cell.source)
                if not cell.code:
                    plan.notes.append(f"Cell {given.id} is not a code cell any more; it was read.")
            continue
        if not cell.source.strip() and not cell.attachments:
            continue
        if cell.code:
            if section in questions:
                kept.add(section, f"```\n{cell.source}\n```", ())
            extras[last].append(cell.source)
        elif {line_key(line) for line in cell.source.splitlines()} - ours - {
            ""
        } or cell.attachments:
            kept.add(section, without_stub(cell.source), cell.attachments)
    _place(plan, assignment, copies, extras)
    _answers(plan, assignment, kept, copies)
    if notebook.release and notebook.release != assignment.release:
        plan.notes.append(
            f"It was made from release {notebook.release}; {assignment.release} was graded."
        )
    return plan


def _place(
    plan: Plan,
    assignment: Assignment,
    copies: Mapping[str, list[str]],
    extras: dict[str, list[str]],
) -> None:
    """Put code in order: the source's cells, theirs in between, each behind what it followed."""
    first = next((c.id for c in assignment.cells if c.kind == "setup"), assignment.cells[0].id)
    before = extras.pop("", [])  # a setup that fails must be ours to blame, so it runs first
    for given in assignment.cells:
        if given.id == first:
            break
        before += extras.pop(given.id, [])
    extras[first] = before + extras.get(first, [])
    changed = {
        given.id: [s for s in copies.get(given.id, ()) if bare(s) != bare(given.release)]
        for given in assignment.cells
    }
    for given in assignment.cells:
        if given.kind == "own":
            _find_elsewhere(plan, given, assignment, changed, extras)
    for given in assignment.cells:
        found = copies.get(given.id, [])
        if given.kind in ("setup", "test"):
            if not found:
                plan.notes.append(f"Cell {given.id} was missing; it was put back.")
            step = (given.id, given.section, given.kind, given.source, given.seconds, given.hidden)
            plan.steps.append(Step(*step))
        elif given.kind == "own":
            if not found and not changed[given.id]:
                plan.notes.append(f"Cell {given.id} is missing.")
            elif not changed[given.id]:
                plan.notes.append(f"Cell {given.id} was left as it was given.")
            elif len(found) > 1:
                plan.notes.append(f"Cell {given.id} is there {len(found)} times; all were read.")
            # A copy that was never filled in must not undo one that was.
            for source in changed[given.id] or found[:1]:
                plan.steps.append(Step(given.id, given.section, "own", source, given.seconds))
            plan.code[given.id] = "\n\n".join(changed[given.id])
        if given.kind in ("setup", "test", "picture") and changed[given.id]:
            how = "the original was used" if given.kind != "picture" else "pictures are not graded"
            plan.notes.append(f"Cell {given.id} was changed; {how}.")
            plan.kept[given.id] = "\n\n".join(changed[given.id])
        behind = extras.get(given.id, [])
        for source in behind:
            plan.steps.append(Step(f"a cell after {given.id}", given.section, "extra", source))
        if behind:
            plan.code[f"after {given.id}"] = "\n\n".join(behind)
            plan.extras[given.id] = behind


def _find_elsewhere(
    plan: Plan,
    given: Given,
    assignment: Assignment,
    changed: dict[str, list[str]],
    extras: dict[str, list[str]],
) -> None:
    """Take an answer from where it was written if it is not in its own cell."""
    missing = given.defines - set(DEFINED.findall("\n".join(changed[given.id])))
    if not missing:
        return
    for place, sources in [*extras.items(), *changed.items()]:
        for source in list(sources) if place != given.id or sources is extras.get(place) else ():
            code = definitions(source, missing)
            if not code:
                continue
            if sources is extras.get(place):  # a cell of their own moves as a whole
                sources.remove(source)
                code, where = source, f"a cell after {place}"
            else:
                where = f"cell {place}"
            changed[given.id].append(code)
            missing -= set(DEFINED.findall(code))
            plan.notes.append(f"The answer of {given.id} was found in {where}.")


def _answers(
    plan: Plan, assignment: Assignment, kept: _Kept, copies: Mapping[str, list[str]]
) -> None:
    """What is marked by hand, and what else was written."""
    names = {cell.section: cell.id for cell in assignment.cells if cell.kind == "written"}
    for section, name in names.items():
        parts = kept.texts.pop(section, [])
        pictures = kept.pictures.pop(section, [])
        plan.written[name] = "\n\n".join(parts)
        if pictures:
            plan.pictures[name] = pictures
        if not parts and not pictures:
            plan.notes.append(f"Question {name} has no answer.")
        elif name not in copies:
            plan.notes.append(f"The answer of {name} was read from the cells under its question.")
        elif len(parts) > 1:
            plan.notes.append(f"The answer of {name} was put together from {len(parts)} parts.")
    for section in dict.fromkeys(cell.section for cell in assignment.cells):
        parts, pictures = kept.texts.pop(section, []), kept.pictures.pop(section, [])
        if parts or pictures:
            plan.remarks[section] = "\n\n".join(parts)
            plan.notes.append(f"Text of your own in {section} was kept; it is shown below.")
        if pictures:
            plan.pictures[section] = pictures


# What an instructor should look at


UNREADABLE = "code that no program can read"


def names_of(code: str) -> tuple[set[str], set[str]]:
    """The names that code binds at its top level (for torch.rand = ..., torch), and all it uses."""
    bound: set[str] = set()
    used: set[str] = set()
    try:
        tree = ast.parse(TransformerManager().transform_cell(code))
        _names(tree, bound, used)
    except SyntaxError:
        pass  # it will not run either
    except Exception:  # advice for the instructor only: no code, however odd, may stop a grading
        used.add(UNREADABLE)
    return bound, used


def _names(tree: ast.Module, bound: set[str], used: set[str]) -> None:
    """Add the names that a module binds at its top level, and those that it uses anywhere."""
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
            used |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            if any(alias.name == "*" for alias in node.names):
                bound.add("*")
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store | ast.Del):
                bound.add(ast.unparse(node).split(".")[0])
        elif isinstance(node, ast.FunctionDef):
            used.add(node.name)  # __eq__ and its kin
        elif isinstance(node, ast.Global):
            bound |= set(node.names)


def looks(plan: Plan, assignment: Assignment) -> list[str]:
    """What an instructor should look at: names that tests rely on, tools no answer needs."""
    given = {cell.id: cell for cell in assignment.cells}
    ours = [names_of(c.source)[0] for c in given.values() if c.kind in ("setup", "test")]
    relied, out = set(dir(builtins)).union({"*"}, *ours), []
    for name, code in plan.code.items():
        bound, used = names_of(code)
        offered = names_of(given[name].source) if name in given else (set(), set())
        if unusual := sorted((used - offered[1]) & (UNUSUAL | {UNREADABLE})):
            out.append(f"{name} uses {', '.join(unusual)}.")
        if anew := sorted((bound - offered[0]) & relied):
            out.append(f"{name} binds {', '.join(anew)} anew, which the tests use.")
    return out


# Which file is which assignment


@dataclass(frozen=True)
class Submission:
    """A file that is graded as an assignment; `plan` is None if there is nothing to run.

    Without an assignment, only the notes say something.
    """

    student: str
    assignment: str
    file: str
    plan: Plan | None = None
    notes: tuple[str, ...] = ()
    look: tuple[str, ...] = ()


def named_in(file: str, assignments: Iterable[str]) -> str:
    """The assignment that a file's name speaks of, "" if it is none or several."""
    names = list(assignments)
    for part in reversed(file.split("/")):
        whole = [name for name in names if name in part]
        alone = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])"  # A1, but not in BA1 or A12
        short = [n for n in names if re.search(alone.format(re.escape(n.split("_")[0])), part)]
        found = whole or short
        if len(found) == 1:
            return found[0]
    return ""


@dataclass
class _Version:
    """One of the files in which a student may have handed in an assignment."""

    given: HandedIn
    plan: Plan | None
    notes: list[str]
    named: bool

    @property
    def rank(self) -> tuple[bool, bool, float, int, bool]:
        """The newest that was filled in comes last; then the higher copy, then the better name."""
        touched = self.plan is not None and self.plan.touched
        return (self.plan is not None, touched, self.given.when, self.given.copy, self.named)


def choose(
    found: Sequence[HandedIn], assignments: Mapping[str, Assignment], roster: Roster | None = None
) -> list[Submission]:
    """What each student handed in: one file for each assignment, and what is odd about the rest."""
    students: dict[str, list[HandedIn]] = defaultdict(list)
    for given in found:
        students[given.student].append(given)
    out = []
    for student, files in sorted(students.items()):
        out += _choose_of(student, files, assignments, roster)
    return out


def _choose_of(
    student: str,
    files: Sequence[HandedIn],
    assignments: Mapping[str, Assignment],
    roster: Roster | None,
) -> list[Submission]:
    """The submissions of one student."""
    versions: dict[str, list[_Version]] = defaultdict(list)
    lost: list[str] = []
    others: list[str] = []
    for given in files:
        named, notes, plan = named_in(given.file, assignments), [], None
        name = given.file.removeprefix(f"{student}/")
        if given.problem == "other":
            others.append(name)
            continue
        best = named
        if given.notebook is None:
            notes.append(f"{name} was not read: {given.problem}.")
        else:
            counts = {key: likeness(given.notebook, a) for key, a in assignments.items()}
            best = max(counts, key=lambda key: (counts[key], key == named))
            if counts[best] == 0:
                notes.append(f"{name} holds no cell of an assignment.")
                best = named
            else:
                plan = plan_of(given.notebook, assignments[best])
                if named != best:
                    notes.append(f"By its cells, {name} is {best}.")
        if best:
            versions[best].append(_Version(given, plan, notes, named == best))
        else:
            lost += notes
    out = []
    for assignment, candidates in sorted(versions.items()):
        candidates.sort(key=lambda version: version.rank)
        out.append(_submission(student, assignment, candidates, roster))
    if others and out:
        lost.append(f"Also handed in, and not read: {', '.join(others[:5])}.")
    elif not any(given.problem != "other" for given in files):
        lost.append(f"No notebook; found: {', '.join(others[:5]) or 'nothing'}.")
    if lost and out:  # where the student sees it
        out[0] = Submission(**{**vars(out[0]), "notes": (*out[0].notes, *lost)})
    elif lost:
        out.append(Submission(student, "", "", notes=tuple(lost)))
    return out


def _submission(
    student: str, assignment: str, candidates: list[_Version], roster: Roster | None
) -> Submission:
    """The last of some versions, and what became of the others."""
    *others, chosen = candidates
    notes, look = list(chosen.notes), []
    names = [version.given.file.removeprefix(f"{student}/") for version in candidates]
    *rest, name = names
    for version, other in zip(others, rest):
        if version.plan is None:
            notes += version.notes
        elif not version.plan.touched and version.given.when > chosen.given.when:
            notes.append(f"{other} is newer than {name}, but was not filled in; {name} was graded.")
        else:
            notes.append(f"Not graded, because {name} is newer: {other}.")
    given = chosen.given
    if given.notebook is not None:
        said = about(given.notebook)
        person = roster.by_id.get(student) if roster else None
        writer = roster.find(_as(given, said)) if roster else None
        if person and writer and writer.id != person.id:
            look.append(f"The notebook says that it is by {writer.name} ({writer.id}).")
    if roster and student not in roster.by_id:
        notes.append("Nobody of this name or id is on the roster.")
    if given.loose:
        notes.append(f"No folder and no file name says whose {name} is.")
    return Submission(student, assignment, given.file, chosen.plan, tuple(notes), tuple(look))


def _as(given: HandedIn, said: Mapping[str, str]) -> HandedIn:
    """As if it had been handed in by the one whom the notebook names."""
    names = tuple(said[key] for key in ("ID", "Name") if key in said)
    return HandedIn("", given.file, names=names)


# Notebooks that other tools can take


def repaired(plan: Plan, assignment: Assignment, student: NotebookNode) -> NotebookNode:
    """A clean notebook with nbgrader's metadata that holds all that was written.

    `student` is the release: its cells, the answers in their places, everything else behind them.
    """
    notebook = nbformat.from_dict(student)
    cells = []
    shown: set[str] = set()
    for given, cell in zip(assignment.cells, notebook.cells):
        if given.kind == "own" and plan.code.get(given.id):
            cell.source = plan.code[given.id]
        elif given.kind == "written" and plan.written.get(given.id):
            cell.source = plan.written[given.id]
        _attach(cell, plan.pictures.get(given.id, []) if given.kind == "written" else [])
        cells.append(cell)
        for source in plan.extras.get(given.id, []):
            cells.append(nbformat.v4.new_code_cell(source))
        if given.section in plan.remarks and given.section not in shown:
            shown.add(given.section)
            more = nbformat.v4.new_markdown_cell(plan.remarks[given.section])
            _attach(more, plan.pictures.get(given.section, []))
            cells.append(more)
        if given.id in plan.kept:
            text = f"Cell {given.id} as it was handed in:\n\n```python\n{plan.kept[given.id]}\n```"
            cells.append(nbformat.v4.new_markdown_cell(text))
    for number, cell in enumerate(cells):
        if not grader_data(cell) and "id" in cell:
            cell.id = (
                f"kept-{number}"
                if cell.id not in {c.cell_id for c in assignment.cells}
                else cell.id
            )
    notebook.cells = cells
    return notebook


def _attach(cell: NotebookNode, pictures: Iterable[Picture]) -> None:
    """Put pictures into a cell, and a reference to each that its text does not name."""
    for name, kind, base64 in pictures:
        cell.setdefault("attachments", NotebookNode())[name] = {kind: base64}
        if f"attachment:{name}" not in cell.source:
            cell.source += f"\n\n![{name}](attachment:{name})"
