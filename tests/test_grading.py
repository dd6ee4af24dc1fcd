"""The grader: no answer is lost, nobody pays for another's mistake, and it cannot be talked over.

On toy assignments, so that a kernel is up in a second; test_assignments.py has the real ones.
"""

import base64
import copy
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest.mock import ANY

import nbformat
import psutil
import pytest
from serving import chromium
from toy_assignments import (
    ASSIGNMENTS,
    DOUBLE,
    HALF,
    TOTAL,
    answered,
    code,
    data_of,
    grader_data,
    hand_in,
    hidden,
    index_of,
    insert,
    marked,
    right,
    run_grader,
    stripped,
    write_toys,
)

sys.path.insert(0, str(ASSIGNMENTS))
from grading.assignment import Refused, read_assignments, read_source, student_version
from grading.ingest import about, handed_in, join, read_notebook, read_roster
from grading.isolate import best, environment, places
from grading.pages import marking, shown
from grading.repair import choose, looks, match, plan_of, repaired
from grading.report import Mark, Result, Store, folder_name, read_by_hand, up_to_date
from grading.run import Limits, run
from grading.tables import read_table, table

sys.path.remove(str(ASSIGNMENTS))


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder of the toy assignments' sources."""
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def known(toys):
    """The toy assignments as the grader sees them."""
    return read_assignments(toys)


# Ingest: downloads as course systems make them


def zipped(files):
    """A zip file; names end in .zip for zips inside."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, (data, when) in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, when, 12, 0, 0)), data)
    return file.getvalue()


def tree(folder, files):
    """Write files below a folder, each a day newer than the one before."""
    for day, (name, data) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (1e9 + 86400 * day,) * 2)
    return folder


def whose(top, known, roster=None):
    """(student, assignment) -> (file, notes), of a folder or an archive."""
    chosen = choose(join(handed_in(top), roster), known, roster)
    return {(s.student, s.assignment): (s.file, " ".join(s.notes)) for s in chosen}


GRADESCOPE = """---
submission_98:
  :submitters:
  - :name: Jane Doe
    :sid: '0012'
    :email: jane@example.org
submission_99:
  :submitters:
  - :name: Bob Ray
    :sid:
    :email: bob@example.org
"""


@pytest.mark.parametrize(
    ("system", "files", "students"),
    [
        ("plain", ["jane/T1.ipynb", "bob/work/T1.ipynb"], ["bob", "jane"]),
        (
            "Canvas",
            ["doejane_1234_98765_T1.ipynb", "raybob_LATE_1235_98766_T1-1.ipynb"],
            ["doejane_1234", "raybob_1235"],
        ),
        (
            "Moodle",
            [
                "Jane Doe_12_assignsubmission_file_/T1.ipynb",
                "Bob Ray_13_assignsubmission_file_T1.ipynb",
            ],
            ["Bob Ray_13", "Jane Doe_12"],
        ),
        (
            "Blackboard",
            [
                "Toy 1_jane_attempt_2026-01-31-12-00-00_T1.ipynb",
                "Toy 1_jane_attempt_2026-01-31-12-00-00.txt",
                "Toy 1_bob_attempt_2026-01-30-12-00-00_T1.ipynb",
            ],
            ["bob", "jane"],
        ),
        (
            "Gradescope",
            [
                "assignment_5_export/submission_metadata.yml",
                "assignment_5_export/submission_98/T1.ipynb",
                "assignment_5_export/submission_99/T1.ipynb",
            ],
            ["0012", "bob@example.org"],
        ),
        (
            "endings",
            ["jane/T1.IPYNB", "bob/T1.ipynb.json", "cay/T1.ipynb.txt"],
            ["bob", "cay", "jane"],
        ),
        (
            "leftovers",
            ["jane/T1.ipynb", "__MACOSX/jane/._T1.ipynb", "jane/.DS_Store", "jane/._T1.ipynb",
             "jane/.ipynb_checkpoints/T1-checkpoint.ipynb"],
            ["jane"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_zip", [False, True])
def test_downloads_of_course_systems_are_read_as_they_are(
    toys, known, tmp_path, system, files, students, as_zip
):
    notebook = data_of(answered(toys, answers=right()))
    data = {name: GRADESCOPE.encode() if name.endswith("yml") else notebook for name in files}
    top = tree(tmp_path / "in", data)
    if as_zip:
        top = tmp_path / "download.zip"
        top.write_bytes(zipped({name: (content, 1) for name, content in data.items()}))
    found = whose(top, known)
    assert sorted(found) == [(student, "T1") for student in students]
    assert not any(notes for _, notes in found.values())


def test_zips_in_zips_are_read_and_bad_ones_become_a_sentence(toys, known, tmp_path):
    notebook = data_of(answered(toys, answers=right()))
    inner = zipped({"work/T1.ipynb": (notebook, 1), "__MACOSX/work/._T1.ipynb": (b"x", 1)})
    deep = inner
    for _ in range(3):
        deep = zipped({"in.zip": (deep, 1)})
    tree(
        tmp_path,
        {
            "doejane_12_34_T1.zip": inner,
            "raybob_13_35_T1.zip": zipped({"T1.zip": (inner, 1)}),
            "cut_14_36_T1.zip": inner[:200],
            "deep_15_37_T1.zip": deep,
            "rar_16_38_T1.rar": b"Rar!",
            "way_17_39_T1.zip": zipped({"../../T1.ipynb": (notebook, 1)}),
        },
    )
    found = whose(tmp_path, known)
    for student in ("doejane_12", "raybob_13", "way_17"):
        assert found[student, "T1"][1] == "", student
    assert "not a whole zip file" in found["cut_14", "T1"][1]
    assert "a zip inside 3 others" in found["deep_15", "T1"][1]
    assert "unpack it" in found["rar_16", "T1"][1]


def test_the_newest_copy_that_was_filled_in_wins_and_the_student_is_told(toys, known, tmp_path):
    old, new = (data_of(answered(toys, answers=code(f"return {x} * x"))) for x in (3, 2))
    stub = data_of(answered(toys))
    tree(tmp_path, {"ann/T1.ipynb": old, "ann/T1 (1).ipynb": new})
    tree(tmp_path, {"bob/T1 (1).ipynb": new, "bob/T1.ipynb": old})
    tree(tmp_path, {"cay/T1.ipynb": new, "cay/T1 (1).ipynb": stub})
    jane = "x_jane_attempt_2026-01-{}-12-00-00_T1.ipynb"
    tree(tmp_path, {jane.format(31): new, jane.format(30): old})  # the attempt's time counts
    same_time = tree(tmp_path, {"dan/T1.ipynb": old}) / "dan/T1 (2).ipynb"
    same_time.write_bytes(new)
    os.utime(same_time, (1e9, 1e9))
    found = whose(tmp_path, known)
    assert found["ann", "T1"] == (
        "ann/T1 (1).ipynb",
        "Not graded, because T1 (1).ipynb is newer: T1.ipynb.",
    )
    assert found["bob", "T1"][0] == "bob/T1.ipynb"
    assert found["cay", "T1"][0] == "cay/T1.ipynb"
    assert "T1 (1).ipynb is newer than T1.ipynb, but was not filled in" in found["cay", "T1"][1]
    assert found["jane", "T1"][0] == jane.format(31)
    assert found["dan", "T1"][0] == "dan/T1 (2).ipynb"


ROSTERS = {
    "plain": "id;name;email\n007;Doe, Jane;jane@example.org\n008;Bob Ray;ray@example.org\n",
    "Canvas": "Student,ID,SIS User ID,SIS Login ID,Section,T1 Toy (55)\n"
    '"    Points Possible",,,,,9\n"Doe, Jane",1234,007,jane,1,\n"Ray, Bob",1235,008,bob,1,\n',
    "Moodle": "First name,Last name,ID number,Email address\nJane,Doe,007,jane@example.org\n"
    "Bob,Ray,008,bob@example.org\n",
}


@pytest.mark.parametrize("kind", list(ROSTERS))
def test_a_roster_joins_what_was_found_with_ids_that_stay_text(toys, known, tmp_path, kind):
    (tmp_path / "roster.csv").write_text(ROSTERS[kind])
    roster = read_roster(tmp_path / "roster.csv")
    assert sorted(roster.by_id) == ["007", "008"]
    notebook = data_of(answered(toys, answers=right()))
    files = ["doejane_1234_98765_T1.ipynb", "Bob Ray_13_assignsubmission_file_/T1.ipynb"]
    found = whose(tree(tmp_path / "in", dict.fromkeys(files, notebook)), known, roster)
    assert sorted(found) == [("007", "T1"), ("008", "T1")]
    found = whose(tree(tmp_path / "other", {"eve/T1.ipynb": notebook}), known, roster)
    assert "Nobody of this name or id is on the roster" in found["eve", "T1"][1]


def test_rosters_that_cannot_be_right_are_refused(tmp_path):
    for text, why in (
        ("student number,phone\n1,2\n", "no column named"),
        ("id,name\n1.2E+05,Jane\n", "line 2: a spreadsheet has rounded the id 1.2E+05"),
        ("id,name\n1,Jane\n1,Bob\n", "line 3: the id 1 is there twice"),
        ("id,name\n", "no column named"),
    ):
        (tmp_path / "roster.csv").write_text(text)
        with pytest.raises(Refused, match=re.escape(why)):
            read_roster(tmp_path / "roster.csv")


def with_about(notebook, name="", identity="", help_received=""):
    """A notebook whose first cells say whose it is."""
    for cell in notebook.cells:
        if cell.source.startswith("## About you"):
            cell.source = cell.source.replace("**Name:**", f"**Name:** {name}")
            cell.source = cell.source.replace("**ID:**", f"**ID:** {identity}")
            cell.source += f"\n{help_received}"
    return notebook


def test_the_cell_on_the_student_is_read_and_empty_as_it_is_given_out(toys):
    assert about(read_notebook(data_of(answered(toys)))) == {}
    for path in (ASSIGNMENTS / "release").glob("*.ipynb"):
        notebook = read_notebook(path.read_bytes())
        assert about(notebook) == {} and notebook.release in str(notebook.cells)
    filled = with_about(answered(toys), "Jane Doe", "007", "my sister\nin A1-2")
    said = {"Name": "Jane Doe", "ID": "007", "Help received": "my sister in A1-2"}
    assert about(read_notebook(data_of(filled))) == said


def test_a_loose_notebook_is_known_by_its_cell_and_takes_nobodys_place(toys, known, tmp_path):
    (tmp_path / "roster.csv").write_text(ROSTERS["plain"])
    roster = read_roster(tmp_path / "roster.csv")
    jane = data_of(with_about(answered(toys, answers=right()), "Jane Doe", "007"))
    bob = data_of(with_about(answered(toys, answers=right()), "bob ray"))
    nobody = data_of(answered(toys, answers=right()))
    tree(tmp_path / "in", {"T1.ipynb": jane, "bobs.ipynb": bob, "x.ipynb": nobody})
    found = whose(tmp_path / "in", known, roster)
    assert {student for student, _ in found} == {"007", "008", "x"}
    assert "No folder and no file name says whose" in found["007", "T1"][1]
    tree(tmp_path / "in", {"008/T1.ipynb": nobody})
    assert whose(tmp_path / "in", known, roster)["008", "T1"][0] == "008/T1.ipynb"
    # A notebook that names somebody else than the one who handed it in is worth a look.
    tree(tmp_path / "swap", {"008/T1.ipynb": jane})
    [swapped] = choose(join(handed_in(tmp_path / "swap"), roster), known, roster)
    assert swapped.look == ("The notebook says that it is by Doe, Jane (007).",)


# Repair: whatever a student wrote is kept


def plan(known, notebook, name="T1"):
    """The plan of a notebook, read from its JSON as files are."""
    return plan_of(read_notebook(data_of(notebook)), known[name])


def changed_by(toys, change, **answers):
    """A right notebook whose cells were changed."""
    notebook = answered(toys, answers=right(**answers))
    notebook.cells = change(notebook.cells)
    return notebook


def edit(grade_id, make):
    """A change of one marked cell's source."""

    def change(cells):
        cell = cells[index_of(cells, grade_id)]
        cell.source = make(cell.source)
        return cells

    return change


def edit_text(beginning, make):
    """A change of the text cell that begins so."""

    def change(cells):
        [cell] = [c for c in cells if c.source.startswith(beginning)]
        cell.source = make(cell.source)
        return cells

    return change


def typed(grade_id, kind):
    """A change of a cell's type, as the menu of Jupyter does it."""

    def change(cells):
        cells[index_of(cells, grade_id)].cell_type = kind
        return cells

    return change


def picture_in(grade_id):
    """A change that pastes a picture into a cell."""

    def change(cells):
        cell = cells[index_of(cells, grade_id)]
        cell.source += "\n![p.png](attachment:p.png)"
        cell.attachments = {"p.png": {"image/png": base64.b64encode(b"\x89PNG").decode()}}
        return cells

    return change


def moved(grade_id, into):
    """A change that writes an answer into another cell and leaves its own as a stub."""

    def change(cells):
        place = cells[index_of(cells, into)]
        own = cells[index_of(cells, grade_id)]
        place.source = f"{own.source}\n\n{place.source}"
        own.source = "# YOUR CODE HERE\nraise NotImplementedError()"
        return cells

    return change


def emptied(cells):
    """The cells, T1-1 as it was given out."""
    cells[index_of(cells, "T1-1")].source = "# YOUR CODE HERE\nraise NotImplementedError()"
    return cells


def colab(cells, **keep):
    """The cells as Colab saves them, the answer written."""
    cells[index_of(cells, "T1-3")].source = ANSWER
    return stripped(cells, **keep)


ANSWER = "Nothing added changes nothing. ∞"
DAMAGED = {
    "answer in its place": (edit("T1-3", lambda s: ANSWER), ""),
    "answer beside the stub": (edit("T1-3", lambda s: f"{s}\n{ANSWER}"), ""),
    "new text cell below": (
        lambda cells: insert(cells, "T1-3", f"text:{ANSWER}"),
        "",
    ),
    "new text cell below, its own deleted": (
        lambda cells: [
            c
            for c in insert(cells, "T1-3", f"text:{ANSWER}")
            if grader_data(c).get("grade_id") != "T1-3"
        ],
        "was read from the cells under its question",
    ),
    "text in the question": (edit_text("## Question", lambda s: f"{s}\n\n{ANSWER}"), ""),
    "a code cell": (lambda cells: insert(cells, "T1-3", f"# {ANSWER}"), ""),
    "its own cell as code": (
        lambda cells: typed("T1-3", "code")(edit("T1-3", lambda s: f"# {ANSWER}")(cells)),
        "",
    ),
    "its own cell as raw": (
        lambda cells: typed("T1-3", "raw")(edit("T1-3", lambda s: ANSWER)(cells)),
        "",
    ),
    "split": (
        lambda cells: insert(
            edit("T1-3", lambda s: ANSWER[:7])(cells), "T1-3", f"text:{ANSWER[7:]}"
        ),
        "put together from 2 parts",
    ),
    "Colab": (colab, "was read from the cells under its question"),
    "Deepnote": (lambda cells: colab(cells, deepnote=True), "was read from the cells"),
    "under another exercise": (
        lambda cells: insert(cells, "T1-2-hidden", f"text:{ANSWER}"),
        "Text of your own in T1-2 was kept",
    ),
    "in the title": (edit_text("# Toy 1", lambda s: f"{s}\n{ANSWER}"), "Text of your own"),
    "in a test cell": (edit("T1-2-check", lambda s: f'"""{ANSWER}"""'), "was changed"),
}


@pytest.mark.parametrize("kind", list(DAMAGED))
def test_a_written_answer_is_never_lost(toys, known, kind):
    change, note = DAMAGED[kind]
    found = plan(known, changed_by(toys, change))
    result = Result("ann", "T1", "", written=found.written, remarks=found.remarks)
    words = re.findall(r"\w+|∞", ANSWER)
    marked_by_hand = kind != "in a test cell"
    text = result.to_mark("T1-3") if marked_by_hand else str(found.kept)
    assert re.findall(r"\w+|∞", text)[-len(words) :] == words or ANSWER in text
    assert note in " ".join(found.notes)
    clean = repaired(found, known["T1"], student_version(read_source(toys / "T1.py")))
    nbformat.validate(clean)
    assert all(word in json.dumps(clean, ensure_ascii=False) for word in words)
    assert [c.source for c in clean.cells if c.cell_type == "code"][1:2] == [DOUBLE]
    # What is repaired once needs no repair.
    again = plan(known, clean)
    assert again.code == found.code and not {n for n in again.notes if "missing" in n}


def test_pictures_are_kept_and_only_those_that_cannot_run_are_shown(toys, known):
    found = plan(known, changed_by(toys, picture_in("T1-3")))
    assert found.pictures["T1-3"] == [("p.png", "image/png", "iVBORw==")]
    inline = edit("T1-3", lambda s: "![](data:image/png;base64,iVBORw==) see")
    found = plan(known, changed_by(toys, inline))
    assert found.pictures["T1-3"] == [("picture 1", "image/png", "iVBORw==")]
    assert found.written["T1-3"] == "![]((picture)) see"
    clean = repaired(found, known["T1"], student_version(read_source(toys / "T1.py")))
    assert clean.cells[-1].attachments["picture 1"] == {"image/png": "iVBORw=="}
    assert "<img" in shown([("p", "image/png", "iVBORw==")])
    assert "<img" not in shown([("p", "image/svg+xml", "iVBORw=="), ("q", "image/png", "'><b")])


@pytest.mark.parametrize(
    ("kind", "change", "note"),
    [
        ("in a new cell", lambda cells: insert(emptied(cells), "T1-1", DOUBLE), "2 times"),
        (
            "in the next section",
            lambda cells: insert(emptied(cells), "T1-2-hidden", DOUBLE),
            "2 times",
        ),
        ("in the public check", moved("T1-1", "T1-1-check"), "was found in cell T1-1-check"),
        ("in the setup", moved("T1-1", "T1-setup"), "was found in cell T1-setup"),
        ("in the next exercise", moved("T1-1", "T1-2"), "was found in cell T1-2"),
        ("as text", typed("T1-1", "markdown"), "not a code cell any more"),
        ("by Colab", stripped, ""),
        ("by Deepnote", lambda cells: stripped(cells, deepnote=True), ""),
        ("in reverse", lambda cells: cells[::-1], ""),
        ("twice", lambda cells: [*cells, *[c for c in cells if grader_data(c)]], "2 times"),
        ("before a stub", lambda cells: [*cells, emptied(copy.deepcopy(cells))[4]], "2 times"),
    ],
)
def test_code_is_found_wherever_it_was_written(toys, known, kind, change, note):
    found = plan(known, changed_by(toys, change))
    assert note in " ".join(found.notes)
    space, ran = {}, []
    for step in found.steps:
        if step.kind == "test":
            ran.append(step.name)
        try:
            exec(step.code, space)
        except NotImplementedError:
            assert step.kind != "test", f"{step.name} fails"
    assert ran == ["T1-1-check", "T1-1-hidden", "T1-2-check", "T1-2-hidden"]


def test_notebooks_of_format_3_are_read(toys, known):
    cells = [
        {"cell_type": c.cell_type, "input" if c.cell_type == "code" else "source": c.source}
        for c in answered(toys, answers=right()).cells
    ]
    old = json.dumps({"nbformat": 3, "worksheets": [{"cells": cells}]}).encode()
    assert plan_of(read_notebook(old), known["T1"]).code["T1-1"] == DOUBLE


def test_what_was_not_touched_is_noted_and_releases_that_differ(toys, known):
    found = plan(known, answered(toys))
    assert found.notes == [
        "Cell T1-1 was left as it was given.",
        "Cell T1-2 was left as it was given.",
        "Question T1-3 has no answer.",
    ]
    assert not found.touched
    notebook = answered(toys, answers=right())
    notebook.metadata.evolq.release = "r0000000"
    release = known["T1"].release
    assert (
        f"It was made from release r0000000; {release} was graded." in plan(known, notebook).notes
    )
    assert any(release in cell.source for cell in notebook.cells)
    assert plan(known, with_about(answered(toys), help_received="my sister\n")).help == "my sister"


def test_matching_is_one_to_one_for_what_was_given_out(toys, known):
    for change in (lambda cells: cells, stripped):
        notebook = read_notebook(data_of(changed_by(toys, change)))
        found = [given.id for _, given in match(notebook.cells, known["T1"])]
        assert found == [cell.id for cell in known["T1"].cells]


# Looks: no cheat without a mark

CHEATS = {
    "shadow a builtin": "def sum(values): return 0",
    "shadow by import": "from math import pow as sum",
    "star import": "from mymodule import *",
    "read the solution": "print(open('src.py').read())",
    "read by pathlib": "import pathlib\npathlib.Path('x').read_text()",
    "read by numpy": "import numpy as np\nnp.fromfile('x')",
    "run the solution": "import runpy\nrunpy.run_path('x')",
    "import it": "import importlib",
    "copy it": "from shutil import copy",
    "a frame": "import sys\nsys._getframe(1).f_locals",
    "a frame by an exception": "try: 1/0\nexcept Exception as e: e.__traceback__.tb_frame.f_back",
    "a frame by a generator": "(x for x in ()).gi_frame",
    "the globals of a helper": "double.__globals__['same'] = print",
    "code of a helper": "same.__code__ = print.__code__",
    "by getattr": "getattr(double, '__glo' + 'bals__')",
    "the history": "In[-1]",
    "the shell": "get_ipython()",
    "a magic": "%run solution.py",
    "a command": "!cat solution.py",
    "patch a module": "import math\nmath.isnan = print",
    "by setattr": "setattr(math, 'isnan', print)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True",
    "a tensor that lies": "class T:\n    def __torch_function__(self, *a): return True",
    "a child": "import subprocess",
    "a thread": "from threading import Thread",
    "at the end": "import atexit",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "modules": "import math as m\nm.__loader__",
    "globals": "globals()['sum'] = print",
    "eval": "eval('1')",
    "global in a function": "def f():\n    global sum\n    sum = print",
    "torch's hub": "torch.hub.load('x')",
    "other data": "data.read_typefaces('test')",
}


AT_THE_TOP = {"shadow a builtin", "shadow by import", "star import", "a magic", "a command"}


@pytest.mark.parametrize("kind", list(CHEATS))
def test_every_cheat_that_is_known_is_marked_for_a_look(toys, known, kind):
    def inside(source):
        lines = "\n        ".join(CHEATS[kind].splitlines())
        return source.replace("    return", f"    if x > 3:\n        {lines}\n    return")

    changes = [
        lambda cells: insert(cells, "T1-1", CHEATS[kind]),
        edit("T1-1", lambda source: f"{CHEATS[kind]}\n{source}"),
    ]
    if kind not in AT_THE_TOP:  # in a function, these bind nothing or cannot stand
        changes.append(edit("T1-1", inside))
    for change in changes:
        assert looks(plan(known, changed_by(toys, change)), known["T1"])


def test_honest_answers_need_no_look(toys, known):
    honest = "import math\nimport numpy as np\n" + DOUBLE.replace("x", "values")
    assert looks(plan(known, answered(toys, answers=right())), known["T1"]) == []
    found = looks(plan(known, answered(toys, answers=right(**{"T1-1": honest}))), known["T1"])
    assert found == ["T1-1 binds math anew, which the tests use."]


# Run: all kinds of submissions at once


def submissions(toys, folder):
    """Every kind of submission; returns what grades.csv must say: tests, exercises, notes, look."""
    expected = {}

    def student(name, notebook, says, file="T1.ipynb"):
        hand_in(folder, name, notebook, file)
        expected[name] = says

    def with_cells(change, **answers):
        return changed_by(toys, change, **answers)

    good = "T1-1 3/3, T1-2 4/4"
    none, rest = "T1-1 0/3, T1-2 0/4", "T1-1 0/3, T1-2 4/4"
    no_answer = "Question T1-3 has no answer."
    left = "Cell T1-1 was left as it was given. Cell T1-2 was left as it was given."
    late = f"{no_answer} Cell {{}}: {{}}."
    long, large = (
        "it ran too long and was stopped",
        "it used more than 300 MB of memory and was stopped",
    )
    fine = ("7", good, no_answer, "")
    student("good", answered(toys, answers=right(**{"T1-3": "-"})), ("7", good, "", ""))
    student(
        "half",
        answered(toys, answers=right(**{"T1-2": "def total(values):\n    return 0"})),
        ("4", "T1-1 3/3, T1-2 1/4", no_answer, ""),
    )
    student(
        "bad",
        answered(toys, answers=right(**{"T1-1": "def double(x):\n    return x", "T1-2": "x"})),
        ("0", none, late.format("T1-2", "NameError: name 'x' is not defined"), ""),
    )
    student("stub", answered(toys), ("0", none, f"{left} {no_answer}", ""))
    student(
        "tampered",
        answered(toys, **{"T1-1-check": "pass", "T1-1-hidden": "3", "T1-setup": "import os"}),
        ("0", none, ANY, ""),
    )
    student(
        "endless",
        answered(toys, answers=code("while True: pass")),
        ("4", rest, late.format("T1-1-check", long), ""),
    )
    student(
        "stubborn",
        answered(
            toys,
            answers=code(
                "while True:\n        try:\n            while True: pass\n"
                "        except BaseException: pass"
            ),
        ),
        ("4", rest, late.format("T1-1-check", long), ""),
    )
    student(
        "hog",
        answered(toys, answers=code("return bytearray(10**9)")),
        ("4", rest, late.format("T1-1-check", large), ""),
    )
    student(
        "glutton",
        answered(toys, answers=code("kept = []\n    while True: kept.append(bytearray(10**6))")),
        ("4", rest, late.format("T1-1-check", large), ""),
    )
    student(
        "dead",
        answered(toys, answers=code("import os; os._exit(1)")),
        (
            "4",
            rest,
            late.format("T1-1-check", "the kernel died in it"),
            "T1-1 uses os.",
        ),
    )
    student(
        "leaves", answered(toys, answers=code("exit()")), ("4", rest, no_answer, "T1-1 uses exit.")
    )
    student(
        "quits",
        answered(toys, answers=code("raise SystemExit(0)")),
        ("4", rest, no_answer, ""),
    )
    student(
        "syntax",
        answered(toys, answers=right(**{"T1-1": "def double(x:\n    return 2 * x"})),
        ("4", rest, late.format("T1-1", "SyntaxError: '(' was never closed (line 1)"), ""),
    )
    slow = ["while True: pass"] * 6
    student(
        "slow cells",
        with_cells(lambda cells: insert(cells, "T1-1", *slow)),
        ("4", rest, ANY, ""),
    )
    student(
        "not-a-notebook",
        b"%PDF-1.4",
        ("0", none, "T1.ipynb was not read: it is not JSON.", ""),
    )
    student("list", b"[1, 2]", ("0", none, "T1.ipynb was not read: it holds no list of cells.", ""))
    student(
        "strange",
        json.dumps(
            {"cells": [1, {"source": 3}, {"cell_type": "code", "metadata": 4, "source": [DOUBLE]}]}
        ).encode(),
        ("3", "T1-1 3/3, T1-2 0/4", ANY, ""),
    )
    student(
        "renamed",
        answered(toys, answers=right()),
        ("7", good, f"By its cells, homework.ipynb is T1. {no_answer}", ""),
        "homework.ipynb",
    )
    student(
        "deleted",
        with_cells(
            lambda cells: [
                c for c in cells if grader_data(c).get("grade_id") not in ("T1-1", "T1-2-check")
            ]
        ),
        (
            "4",
            rest,
            f"Cell T1-1 is missing. Cell T1-2-check was missing; it was put back. {no_answer}",
            "",
        ),
    )
    student(
        "half-emoji",
        answered(toys, answers=right(**{"T1-1": DOUBLE + "  # \ud83d"})),
        fine,
    )
    student(
        "magic",
        answered(toys, answers=right(**{"T1-2": "%time 1\n" * 600})),
        ("3", "T1-1 3/3, T1-2 0/4", ANY, "T1-2 uses code that no program can read."),
    )
    student(
        "latin", "ä".encode("latin-1"), ("0", none, "T1.ipynb was not read: it is not UTF-8.", "")
    )
    not_plain = "T1.ipynb was not read: it is a link or not a plain file, so it was not read."
    for name in ("thief", "pipe", "endless-file"):
        student(name, None, ("0", none, not_plain, ""))
    (folder / "thief" / "T1.ipynb").symlink_to(folder / "good" / "T1.ipynb")
    (folder / "endless-file" / "T1.ipynb").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe" / "T1.ipynb")
    student("reversed", with_cells(lambda cells: cells[::-1]), fine)
    student("colab", with_cells(stripped), fine)
    student(
        "curious",
        with_cells(
            lambda cells: insert(
                cells, "T1-setup", "def sum(values): return 0", "open('/dev/null')"
            ),
            **{"T1-2": "import math as m\nmath.pi = 3\n" + TOTAL},
        ),
        (
            "3",
            "T1-1 3/3, T1-2 0/4",
            no_answer,
            "after T1-setup uses open. after T1-setup binds sum anew, which the tests use. "
            "T1-2 binds math anew, which the tests use.",
        ),
    )
    student(
        "breaks the setup",
        with_cells(lambda cells: insert(cells, "T1-1", "1 / 0")),
        (
            "7",
            good,
            f"{no_answer} Cell a cell after T1-1: ZeroDivisionError: division by zero.",
            "",
        ),
    )
    student(
        "before the first",
        with_cells(
            lambda cells: [
                nbformat.v4.new_code_cell("import builtins; del builtins.__import__"),
                *cells,
            ]
        ),
        (ANY, ANY, ANY, ANY),
    )
    student("twice", answered(toys, answers=right()), (*fine[:2], ANY, ""))
    hand_in(folder, "twice", answered(toys), "old.ipynb")
    return expected


@pytest.fixture(scope="session")
def graded_toys(toys, tmp_path_factory):
    """All kinds of submissions, graded: what was expected, the rows by student, the folder."""
    folder, out = tmp_path_factory.mktemp("submissions"), tmp_path_factory.mktemp("graded")
    expected = submissions(toys, folder)
    limits = ("--sources", toys, "--seconds", 2, "--megabytes", 300)
    _, rows = run_grader(folder, out, *limits)
    return expected, {row["student"].removeprefix("id:"): row for row in rows}, out


@pytest.mark.slow
def test_every_kind_of_submission_gets_its_marks_and_its_sentence(graded_toys):
    expected, rows, out = graded_toys
    found = {
        name: (row["tests"], row["exercises"], row["notes"], row["look"])
        for name, row in rows.items()
    }
    assert found == expected
    assert {row["out_of"] for row in rows.values()} == {"9"}
    pages = {path.parent.name for path in out.glob("feedback/*/T1.html")}
    assert pages == set(expected)


@pytest.mark.slow
def test_slow_answers_cost_no_other_exercise(graded_toys):
    _, rows, _ = graded_toys
    assert (
        "Cell a cell after T1-1 was not run, because T1-1 had used up its 8 s."
        in (rows["slow cells"]["notes"])
    )


@pytest.mark.slow
def test_feedback_says_what_failed_and_shows_no_hidden_test(graded_toys):
    _, _, out = graded_toys
    page = (out / "feedback" / "bad" / "T1.html").read_text(encoding="utf-8")
    assert "AssertionError: twice 2 is 4, not 2" in page and "range(9)" not in page
    assert "AssertionError: input 1" in page
    assert "not done yet" in (out / "feedback" / "stub" / "T1.html").read_text(encoding="utf-8")
    page = (out / "feedback" / "half" / "T1.html").read_text(encoding="utf-8")
    assert "1 of 3" in page and "passed in part" in page
    page = (out / "feedback" / "endless" / "T1.html").read_text(encoding="utf-8")
    assert "not run, because the public check of T1-1 had to be stopped" in page


def run_code(toys, known, body, tmp_path, limits=Limits(5)):  # noqa: B008  (it is frozen)
    """What the tests of T1-1 say of a body of its function, in the best isolation there is."""
    (tmp_path / "secret").mkdir(exist_ok=True)
    (tmp_path / "secret" / "key").write_text("key")
    apart = best("auto", [str(tmp_path / "secret")])
    found = plan(known, answered(toys, answers=code(body)))
    with tempfile.TemporaryDirectory() as base:  # pytest's own folder is closed to other users
        Path(base).chmod(0o711)
        tests = run(found, known["T1"], limits, apart, Path(base)).tests
    return apart, {test.id: test.says for test in tests}


@pytest.mark.slow
def test_exceptions_of_students_carry_nothing_out_of_hidden_tests(toys, known, tmp_path):
    for error, said in (
        ("ValueError(f'secret {x}')", "your code raised ValueError"),
        ("AssertionError(f'secret {x}')", "your code raised AssertionError"),
        ("type(f'Secret{x}', (Exception,), {})()", "your code raised an exception of its own"),
    ):
        body = f"if x == 8:\n        raise {error}\n    return 2 * x"
        _, says = run_code(toys, known, body, tmp_path)
        assert says["T1-1-check"] == "" and says["T1-1-hidden"] == said
    _, says = run_code(toys, known, "raise ValueError('mine, 2')", tmp_path)
    assert says["T1-1-check"] == "ValueError: mine, 2"  # public checks say everything


@pytest.mark.slow
def test_a_kernel_sees_no_secret_no_variable_and_no_network(toys, known, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLQ_SECRET", "mine")
    secret = tmp_path / "secret" / "key"
    body = (
        "import os, socket\n    said = [n for n in os.environ if 'SECRET' in n]\n"
        f"    said += [p for p in {[str(secret), str(ASSIGNMENTS)]} if os.path.exists(p)]\n"
        "    said += [os.environ['GOMP_SPINCOUNT'], os.environ['KMP_BLOCKTIME']]\n"
        "    try:\n        socket.create_connection(('127.0.0.1', 9), 1)\n"
        "    except OSError as e: said.append(e.errno)\n"
        "    raise ValueError(said)"
    )
    apart, says = run_code(toys, known, body, tmp_path)
    if apart.way == "namespace":
        assert says["T1-1-check"] == "ValueError: ['2000', '1', 101]"  # the network is unreachable
    else:  # where the system allows no more
        assert "SECRET" not in says["T1-1-check"] and "'2000', '1'" in says["T1-1-check"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["namespace", "user", "none"])
def test_kernels_end_with_a_grader_that_is_killed(toys, tmp_path, way):
    try:
        best(way)
    except ValueError:  # this system has no such isolation, so nothing can be left behind in it
        return
    hand_in(tmp_path / "in", "ann", answered(toys, answers=code("while True: pass")))
    command = [sys.executable, ASSIGNMENTS / "grade.py", tmp_path / "in", tmp_path / "out"]
    options = ["--sources", toys, "--isolation", way, "--seconds", "300"]
    with subprocess.Popen([*map(str, [*command, *options])]) as grader:
        try:
            wait_for(lambda: kernels_of(grader.pid))
            kernels = kernels_of(grader.pid)
        finally:
            grader.kill()
    wait_for(lambda: not any(map(runs_a_kernel, kernels)))


def kernels_of(pid):
    """The processes below a grader that run a kernel."""
    return [*filter(runs_a_kernel, psutil.Process(pid).children(recursive=True))]


def runs_a_kernel(process):
    """Whether this process is a kernel that lives; it may end while one asks."""
    try:
        return "ipykernel_launcher" in process.cmdline() and process.name() != "unshare"
    except psutil.NoSuchProcess:  # a zombie is one, too
        return False


def wait_for(state, seconds=120):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_folders_of_the_instructor_are_covered_and_what_python_needs_is_kept(tmp_path):
    (tmp_path / "base" / "kernel").mkdir(parents=True)
    covered, kept, _ = places([str(tmp_path / "out")], str(tmp_path / "base" / "kernel"))
    assert str(tmp_path / "out") in covered and str(tmp_path / "base") in covered
    assert any(ASSIGNMENTS.is_relative_to(path) for path in covered)
    assert str(tmp_path / "base" / "kernel") in kept
    assert not any(ASSIGNMENTS.is_relative_to(path) for path in kept)
    assert not any("SECRET" in name for name in environment("x"))


@pytest.mark.slow
def test_a_setup_that_fails_is_the_graders_failure(toys, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    source = (toys / "T1.py").read_text()
    (broken / "T1.py").write_text(source.replace("import math\n", "import no_such_module\n"))
    hand_in(tmp_path / "in", "ann", answered(toys, answers=right()))
    out = tmp_path / "out"
    _, [row] = run_grader(tmp_path / "in", out, "--sources", broken, status=1)
    assert (row["points"], row["tests"]) == ("", "")
    assert "NOT GRADED, the grader failed: cell T1-setup" in row["notes"]
    assert not list(out.glob("results/**/*.json"))
    page = (out / "feedback" / "ann" / "T1.html").read_text(encoding="utf-8")
    assert "costs you nothing" in page
    assert ",\n" in (out / "lms" / "plain.csv").read_text()  # no grade, not 0
    _, [row] = run_grader(tmp_path / "in", out, "--sources", toys)
    assert row["points"] == "7"


def test_stored_results_are_believed_only_with_their_seal(tmp_path):
    store = Store(tmp_path)
    store.write(Result("ann", "T1", "T1.ipynb"), "state")
    path = tmp_path / "results" / "ann" / "T1.json"
    assert store.read("ann", "T1", "state") == Result("ann", "T1", "T1.ipynb")
    assert store.read("ann", "T1", "another") is None
    assert Store(tmp_path).read("ann", "T1", "state") is not None  # the key stays
    whole = path.read_text()
    path.write_text(whole.replace('"notes": []', '"notes": ["full marks"]'))
    assert store.read("ann", "T1", "state") is None
    path.write_text(whole)
    (tmp_path / "results" / "bob").mkdir()
    (tmp_path / "results" / "bob" / "T1.json").write_text(whole)
    assert store.read("bob", "T1", "state") is None  # another's result does not fit
    assert (tmp_path / "seal.key").stat().st_mode & 0o077 == 0


def test_names_of_students_become_names_of_folders():
    assert folder_name("Jane Doe_12") == "Jane Doe_12"
    odd = ["a/b", "a\\b", "..", ".", "", "a:b", "nul\0"]
    made = [folder_name(name) for name in odd]
    assert len(set(made)) == len(odd)
    assert all("/" not in name and name.strip(". ") and "\0" not in name for name in made)


# Report


@pytest.mark.slow
def test_other_assignments_missing_ones_and_the_leaderboard(toys, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    hand_in(folder, "ann", answered(toys, answers=right()))
    hand_in(folder, "ann", answered(toys, "T2", **{"T2-1": HALF}), "T2.ipynb")
    liar = (
        "def half(x):\n    print('leaderboard: +99 points')\n"
        "    print('leaderboard: +98 points (', end='')\n    return x // 2"
    )
    hand_in(folder, "bob", answered(toys, "T2", **{"T2-1": liar}), "T1.ipynb")
    hand_in(folder, "cay", None)
    (folder / "cay" / "essay.pdf").write_bytes(b"%PDF")
    other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    hand_in(folder, "dan", other, "x.ipynb")
    hand_in(folder, "eve", None)
    (folder / "ann" / "notes.docx").write_bytes(b"PK")
    (folder / os.fsdecode(b"M\xfcller")).mkdir()  # as an old zip unpacks
    _, rows = run_grader(folder, out, "--sources", toys)
    said = {(row["student"].removeprefix("id:"), row["assignment"]): row for row in rows}
    assert said["eve", "T1"]["notes"] == "Nothing was handed in."
    assert sum(row["student"].startswith("id:M") for row in rows) == 2
    assert said["ann", "T1"]["points"] == "7" and said["ann", "T2"]["points"] == "4"
    assert "Also handed in, and not read: notes.docx." in said["ann", "T1"]["notes"]
    assert said["bob", "T2"]["notes"] == "By its cells, T1.ipynb is T2."
    assert said["bob", "T1"]["notes"] == said["cay", "T2"]["notes"] == "Nothing was handed in."
    assert said["ann", "T2"]["leaderboard"] == "place 1 of 2: +1.50 points"
    assert said["bob", "T2"]["leaderboard"] == "place 2 of 2: +1.00 points"
    assert said["cay", "unknown"]["notes"] == "No notebook; found: essay.pdf."
    assert said["dan", "unknown"]["notes"] == "x.ipynb holds no cell of an assignment."


@pytest.mark.slow
def test_marks_by_hand_are_added_and_nothing_is_run_twice(toys, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    answer = "Because <b>scales</b> differ."
    hand_in(folder, "0012", answered(toys, answers=right(**{"T1-3": answer})))
    _, [row] = run_grader(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("7", "0", "1")
    kept = out / "results" / "0012" / "T1.json"
    before = kept.stat().st_mtime_ns
    sheet = (out / "by_hand.csv").read_text()
    assert re.fullmatch("id:0012,T1,T1-3,2,,,sha:[0-9a-f]{8}", sheet.splitlines()[1])
    # As a spreadsheet in Europe saves it.
    mine = sheet.replace(",", ";").replace("T1-3;2;;", "T1-3;2;1,5;Name the sum.")
    (out / "by_hand.csv").write_bytes(b"\xef\xbb\xbf" + mine.replace("\n", "\r\n").encode())
    _, [row] = run_grader(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("8.5", "1.5", "0")
    assert kept.stat().st_mtime_ns == before
    page = (out / "feedback" / "0012" / "T1.html").read_text(encoding="utf-8")
    assert "Name the sum." in page and "<b>scales" not in page and "&lt;b&gt;scales" in page
    page = (out / "marking" / "T1-3.html").read_text(encoding="utf-8")
    assert "the neutral element" in page and 'value="1.5"' in page and "&lt;b&gt;scales" in page
    assert (out / "lms" / "moodle.csv").read_text().splitlines()[1] == "0012,,,8.5"
    marked_sheet = (out / "by_hand.csv").read_text()
    # Another answer is marked anew, and what was given to the first is not lost.
    hand_in(folder, "0012", answered(toys, answers=right(**{"T1-3": "It depends."})))
    _, [row] = run_grader(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("7", "0", "1")
    again = (out / "by_hand.csv").read_text()
    assert "Name the sum. (1.5 points were given to an earlier answer.)" in again
    # A file saved from the marking page counts, and is moved away.
    digest = re.search("sha:[0-9a-f]+", again)[0]
    saved = (
        'student,assignment,question,points,comment,answer\n"id:0012","T1","T1-3","2","Yes","{}"\n'
    )
    (out / "marks-T1-3.csv").write_text(saved.format(digest))
    _, [row] = run_grader(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("9", "2", "0")
    assert not (out / "marks-T1-3.csv").exists() and "Yes" in (out / "by_hand.csv").read_text()
    hand_in(folder, "0012", answered(toys, answers=right()))
    (out / "by_hand.csv").write_text(marked_sheet)
    _, [row] = run_grader(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("7", "0", "0")  # no answer
    assert (out / "by_hand.csv").read_text() == marked_sheet


@pytest.mark.browser
def test_points_given_on_a_marking_page_come_back(known, tmp_path):
    results = [Result(name, "T1", "T1.ipynb", written={"T1-3": text}) for name, text in ANSWERS]
    marks = up_to_date({("ann", "T1", "T1-3"): Mark("2", "1")}, results, known)
    page_file = tmp_path / "T1-3.html"
    page_file.write_text(marking(known["T1"].cell("T1-3"), known["T1"], results, marks))
    with chromium() as browser:
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert page.get_by_role("status").inner_text() == "1 of 3 marked. "
        page.get_by_role("article").nth(1).get_by_role("button", name="1.5").click()
        page.get_by_label("Comment on answer 2").fill('=Say "why", please')
        page.get_by_label("Points of answer 3").fill("0.5")
        assert page.get_by_role("status").inner_text() == "3 of 3 marked. "
        with page.expect_download() as download:
            page.get_by_role("button", name="Save marks").click()
        saved = tmp_path / download.value.suggested_filename
        download.value.save_as(saved)
        page.get_by_label("Points of answer 3").fill("7")
        page.get_by_role("button", name="Save marks").click()
        wrong = page.locator("input:invalid").count()
    assert wrong == 1 and asked == [page_file.as_uri()]
    assert saved.name == "marks-T1-3.csv"
    read = read_by_hand(saved, known, [name for name, _ in ANSWERS])
    given = {student: (mark.points, mark.comment) for (student, _, _), mark in read.items()}
    assert given == {"ann": ("1", ""), "0012": ("1.5", '=Say "why", please'), "cay": ("0.5", "")}
    assert {mark.answer for mark in read.values()} == {mark.answer for mark in marks.values()}


ANSWERS = [("ann", "One."), ("0012", "<img src=x onerror=alert(1)>"), ("cay", "Three.")]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("id:ann,T1,T1-3,2,3,,sha:1", "line 2: points must be from 0 to 2, not 3"),
        ("id:ann,T1,T1-3,2,much,,sha:1", "points must be from 0 to 2, not much"),
        ("id:bob,T1,T1-3,2,1,,sha:1", "nothing was handed in by 'bob'"),
        ("id:ann,T1,T1-9,2,1,,sha:1", "'T1' has no written question 'T1-9'"),
        ("id:ann,T9,T1-3,2,1,,sha:1", "'T9' has no written question"),
    ],
)
def test_lines_of_marks_that_match_nothing_are_refused_by_name(known, tmp_path, line, why):
    head = "student,assignment,question,out_of,points,comment,answer\n"
    (tmp_path / "by_hand.csv").write_text(f"{head}{line}\n")
    with pytest.raises(Refused, match=re.escape(why)):
        read_by_hand(tmp_path / "by_hand.csv", known, ["ann"])
    (tmp_path / "by_hand.csv").write_text("student,points\nann,1\n")
    with pytest.raises(Refused, match="the column assignment is missing"):
        read_by_hand(tmp_path / "by_hand.csv", known, ["ann"])
    (tmp_path / "by_hand.csv").write_bytes((head + "schön").encode("cp1252"))
    with pytest.raises(Refused, match="is not UTF-8; save it as CSV in UTF-8"):
        read_by_hand(tmp_path / "by_hand.csv", known, ["ann"])


def test_tables_survive_a_spreadsheet_and_run_nothing(tmp_path):
    rows = [{"a": "=1+1", "b": "-x"}, {"a": "+3", "b": "@SUM(1)"}, {"a": "\t=1", "b": "fine, ; \n"}]
    text = table(rows, ["a", "b"])
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in cells)
    path = tmp_path / "t.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("sep=;\na;b\n1;é\n".encode(encoding))
        assert read_table(path) == [{"a": "1", "b": "é"}]
        path.write_bytes("a\tb\n1\té\n".encode(encoding))
        assert read_table(path) == [{"a": "1", "b": "é"}]


@pytest.mark.slow
def test_grades_go_back_into_canvas_under_its_own_columns(toys, tmp_path):
    (tmp_path / "roster.csv").write_text(ROSTERS["Canvas"])
    notebook = data_of(answered(toys, answers=right()))
    tree(tmp_path / "in", {"doejane_1234_98765_T1.ipynb": notebook})
    options = ("--sources", toys, "--roster", tmp_path / "roster.csv")
    _, rows = run_grader(tmp_path / "in", tmp_path / "out", *options)
    assert [(row["student"], row["name"], row["points"]) for row in rows] == [
        ("id:007", "Doe, Jane", "7"),
        ("id:008", "Ray, Bob", "0"),
    ]
    canvas = (tmp_path / "out" / "lms" / "canvas.csv").read_text().splitlines()
    assert canvas[0] == "Student,ID,SIS User ID,SIS Login ID,Section,T1 Toy (55)"
    assert canvas[1] == '"Doe, Jane",1234,007,jane,1,7'


@pytest.mark.slow
def test_an_overlay_replaces_hidden_tests_and_nothing_else(toys, tmp_path):
    folder, overlay = tmp_path / "in", tmp_path / "overlay"
    hand_in(folder, "ann", answered(toys, answers=right()))
    overlay.mkdir()
    sharper = marked("T1-1-hidden", hidden("assert double('a') == 'a', 'text stays'"), 2)
    (overlay / "T1.py").write_text(sharper)
    _, [row] = run_grader(folder, tmp_path / "out", "--sources", toys, "--overlay", overlay)
    assert row["exercises"] == "T1-1 1/3, T1-2 4/4"
    (overlay / "T1.py").write_text(sharper.replace("T1-1-hidden", "T1-7"))
    none = tmp_path / "none"
    error, _ = run_grader(folder, none, "--sources", toys, "--overlay", overlay, status=2)
    assert error == "grade: overlay: T1 has no cell T1-7\n" and not none.exists()


def test_an_overlay_that_replaces_nothing_is_refused(toys, tmp_path):
    with pytest.raises(Refused, match=r"holds no file such as T1\.py"):
        read_assignments(toys, tmp_path)
    with pytest.raises(Refused, match="holds no file such as"):
        read_assignments(toys, tmp_path / "nowhere")
    (tmp_path / "T1.py").write_text(marked("T1-1-check", "pass", 1))
    with pytest.raises(Refused, match="T1-1-check of T1 holds no hidden tests"):
        read_assignments(toys, tmp_path)
    (tmp_path / "T1.py").rename(tmp_path / "T7.py")
    with pytest.raises(Refused, match="there is no assignment T7"):
        read_assignments(toys, tmp_path)
    with pytest.raises(Refused, match="holds no assignment"):
        read_assignments(tmp_path / "nowhere")


@pytest.mark.slow
def test_submissions_graded_twice_give_the_same_tables(toys, tmp_path):
    folder = tmp_path / "in"
    chance = "import random\ndef double(x):\n    return 2 * x if random.random() < 0.9 else {}"
    for i in range(12):
        answers = [right(), {}, right(**{"T1-1": chance.format(i)})][i % 3]
        hand_in(folder, f"student{i:02}", answered(toys, answers=answers))
    for out in ("one", "two"):
        run_grader(folder, tmp_path / out, "--sources", toys)
    one, two = ((tmp_path / out / "grades.csv").read_bytes() for out in ("one", "two"))
    assert one == two and one.count(b"\n") == 13
