"""Assignments: releases tell nothing, checks tell right from wrong, the grader is fair and tough.

Most tests of the grader use toy assignments, which need no torch, so that a kernel is up in a
second.
"""

import ast
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import ANY

import nbformat
import pytest
from PIL import Image
from wrong_answers import WRONG

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENTS = ROOT / "notebooks" / "assignments"
RELEASE = ASSIGNMENTS / "release"
sys.path.insert(0, str(ASSIGNMENTS))
from grading.source import (  # noqa: E402
    grader_data,
    is_hidden,
    is_picture,
    read_source,
    sources,
    student_version,
    without,
)
from grading.submission import Refused, read_assignments, tasks_of  # noqa: E402

sys.path.remove(str(ASSIGNMENTS))
SOURCES = {path.stem[:2]: path for path in sources()}
each = pytest.mark.parametrize("name", list(SOURCES))


def builder():
    """notebooks/assignments/build.py, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location("assignments_build", ASSIGNMENTS / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ASSIGNMENTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ASSIGNMENTS))
    return module


# Sources and releases


def test_there_are_four_assignments_of_twenty_points():
    assert list(SOURCES) == ["A1", "A2", "A3", "A4"]
    for path in SOURCES.values():
        data = [grader_data(cell) for cell in read_source(path).cells]
        assert sum(d.points for d in data if d and d.grade) == 20
        assert 1 <= sum(d.points for d in data if d and d.grade and d.solution) <= 2


@each
def test_every_exercise_says_what_a_student_must_know(name):
    notebook = read_source(SOURCES[name])
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    exercises = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    minutes = 0
    for number, exercise in enumerate(exercises, 1):
        title = exercise.splitlines()[0]
        minutes += int(re.search(r"\*\*Minutes:\*\* (\d+)", exercise)[1])
        points = int(re.search(r"\*\*Points:\*\* (\d+)", exercise)[1])
        cells = [grader_data(cell) for cell in notebook.cells]
        mine = [d for d in cells if d and d.grade and re.match(rf"{name}-{number}\b", d.grade_id)]
        assert sum(d.points for d in mine) == points, title
        if title.startswith("Exercise"):
            assert "**Difficulty:**" in exercise and "<details><summary>Hint" in exercise, title
            assert f"](figures/{name}-{number}.png)" in exercise, title
            assert {f"{name}-{number}{part}" for part in ("-check", "-hidden")} <= {
                d.grade_id for d in mine
            }, title
    assert 60 <= minutes <= 120


@each
def test_the_release_is_in_step_with_the_source(name, tmp_path):
    builder().write_release(SOURCES[name], tmp_path)
    released = f"{SOURCES[name].stem}.ipynb"
    made, kept = (folder / released for folder in (tmp_path, RELEASE))
    assert made.read_bytes() == kept.read_bytes(), "run make assignments"
    notebook = nbformat.read(kept, 4)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(
        not c.outputs and c.execution_count is None for c in notebook.cells if "outputs" in c
    )


@each
def test_pictures_are_small_and_described_in_the_source(name):
    source = SOURCES[name].read_text(encoding="utf-8")
    assert builder().described(source) == source, "run make assignments"
    for shown in re.findall(r"!\[[^\]]+\]\((figures/[^)]+)\)", source):
        with Image.open(RELEASE / shown) as image:
            assert len(image.info["Description"]) > 30 and max(image.size) <= 800
        assert (RELEASE / shown).stat().st_size < 50_000


@pytest.mark.parametrize("function", ["same", "own_work"])
def test_helpers_are_the_same_in_all_assignments(function):
    texts = set()
    for name in SOURCES:
        setup = cells_of(name)[f"{name}-setup"][0]
        nodes = [n for n in ast.parse(setup).body if getattr(n, "name", "") == function]
        texts.add(ast.get_source_segment(setup, nodes[0]))
    assert len(texts) == 1


def secret_lines(notebook):
    """The lines of solutions, of hidden tests and of model answers that stand nowhere else."""
    public = {line.strip() for cell in student_version(notebook).cells for line in lines_of(cell)}
    everything = {line.strip() for cell in notebook.cells for line in lines_of(cell)}
    return {line for line in everything - public if len(line) > 5}


def lines_of(cell):
    """The lines of a cell."""
    return cell.source.splitlines()


@each
def test_the_release_holds_no_line_of_a_solution_or_of_a_hidden_test(name):
    notebook, released = read_source(SOURCES[name]), RELEASE / f"{SOURCES[name].stem}.ipynb"
    secret, text = secret_lines(notebook), released.read_text(encoding="utf-8")
    assert len(secret) > 80
    sources_of = [cell.source for cell in nbformat.read(released, 4).cells]
    public = {line.strip() for source in sources_of for line in source.splitlines()}
    assert not secret & public
    for word in ("SOLUTION", "HIDDEN TESTS", "def check_", "Half a point"):
        assert word not in text
    hidden = [cell for cell in notebook.cells if is_hidden(cell)]
    assert hidden and all(grader_data(cell).locked for cell in hidden)


def test_regions_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="without an END"):
        without("### BEGIN SOLUTION\nx = 1", "SOLUTION")
    with pytest.raises(ValueError, match="inside of another"):
        without("### BEGIN SOLUTION\n### BEGIN SOLUTION", "SOLUTION")
    notebook = read_source(SOURCES["A1"])
    notebook.cells[1].source += "\n### BEGIN SOLUTION\n### END SOLUTION"
    with pytest.raises(ValueError, match="not marked"):
        student_version(notebook)


# Public checks: in this process, without a kernel


@cache
def cells_of(name):
    """The code cells of an assignment by grade_id, and of its student version."""
    notebook = read_source(SOURCES[name])
    pairs = zip(notebook.cells, student_version(notebook).cells)
    return {
        grader_data(full).grade_id: (full.source, student.source)
        for full, student in pairs
        if full.cell_type == "code" and not is_picture(full)
    }


@cache
def prepared(name):
    """What the cells of imports and helpers define."""
    space: dict = {"__name__": "__main__"}
    for grade_id, (source, _) in cells_of(name).items():
        if grade_id.endswith(("-setup", "-given")):
            exec(compile(source, grade_id, "exec"), space)
    return space


def check(exercise, solution, *parts):
    """Run the public check of an exercise on an answer, or other cells of tests."""
    space = dict(prepared(exercise[:2]))
    exec(compile(solution, exercise, "exec"), space)
    for part in parts or ("check",):
        exec(compile(cells_of(exercise[:2])[f"{exercise}-{part}"][0], part, "exec"), space)


EXERCISES = [f"A{a}-{e}" for a in range(1, 5) for e in range(1, 6)]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_public_checks_accept_the_solution_and_meet_the_stub_with_notimplementederror(exercise):
    full, stub = cells_of(exercise[:2])[exercise]
    check(exercise, full)
    with pytest.raises(NotImplementedError):
        check(exercise, stub)


CASES = [(exercise, *case) for exercise, cases in WRONG.items() for case in cases]


def test_every_typical_mistake_is_tried():
    assert list(WRONG) == EXERCISES and all(len(cases) >= 6 for cases in WRONG.values())
    kinds = {kind.split(":")[0] for _, kind, *_ in CASES}
    assert kinds >= {
        "off by one in the range",
        "wrong axis",
        "missing clamp",
        "biased rounding",
        "wrong normalisation",
        "test data in the fitness",
    }


@pytest.mark.parametrize(
    ("exercise", "kind", "right", "wrong"), CASES, ids=[f"{e}-{kind}" for e, kind, *_ in CASES]
)
def test_public_checks_reject_a_wrong_answer_and_say_why(exercise, kind, right, wrong):
    solution = cells_of(exercise[:2])[exercise][0]
    assert solution.count(right) == 1
    with pytest.raises(AssertionError) as failed:
        check(exercise, solution.replace(right, wrong))
    assert len(str(failed.value)) > 15


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if e not in ("A4-4", "A4-5")])
def test_hidden_tests_reject_a_wrong_answer_by_themselves(exercise):
    source, _ = cells_of(exercise[:2])[exercise]
    _, right, wrong = WRONG[exercise][0]
    if exercise != "A3-5":  # its hidden tests use a function of the public check
        check(exercise, source, "hidden")
        with pytest.raises(AssertionError):
            check(exercise, source.replace(right, wrong), "hidden")
    check(exercise, source, "check", "hidden")


def test_functions_that_are_to_be_written_are_not_accepted_from_the_library():
    with pytest.raises(AssertionError, match="write it yourself"):
        check(
            "A1-2",
            "def quantize_and_back(x, scale, zero_point, smallest, largest):\n"
            "    integers = eq.IntRange(4, smallest < 0)\n"
            "    return eq.fake_quantize(x, torch.tensor(scale), torch.tensor(0), integers)",
        )


# The grader, on toy assignments


def marked(grade_id, source, points=None, solution=False, markdown=False):
    """A cell of a source, with nbgrader's metadata."""
    data = {"grade": points is not None, "grade_id": grade_id, "locked": not solution}
    data |= {"schema_version": 3, "solution": solution, "task": False}
    if points is not None:
        data["points"] = points
    kind = " [markdown]" if markdown else ""
    return f"# %%{kind} nbgrader={json.dumps(data)}\n{source}\n"


def solved(source):
    """A function whose last line is its solution."""
    head, _, last = source.rpartition("\n")
    return f"{head}\n    ### BEGIN SOLUTION\n{last}\n    ### END SOLUTION"


def hidden(source):
    """A cell of hidden tests."""
    return f"# Hidden.\n### BEGIN HIDDEN TESTS\n{source}\n### END HIDDEN TESTS"


DOUBLE, TOTAL, HALF = (
    "def double(x):\n    return 2 * x",
    "def total(values):\n    return sum(values)",
    "def half(x):\n    return x / 2",
)
TOYS = {
    "T1": [
        marked("T1-setup", "import math"),
        marked("T1-1", solved(DOUBLE), solution=True),
        marked("T1-1-check", "assert double(2) == 4, f'twice 2 is 4, not {double(2)}'", 1),
        marked("T1-1-hidden", hidden("for i in range(9):\n    assert double(i) == 2 * i, i"), 2),
        marked("T1-2", solved(TOTAL), solution=True),
        marked("T1-2-check", "assert total([1, 2]) == 3, 'a total of 3'", 1),
        marked(
            "T1-2-hidden",
            hidden("sum(total(list(range(n))) == n * (n - 1) // 2 for n in (0, 3, 5))"),
            3,
        ),
        marked("T1-3", "# The model answer.", 2, solution=True, markdown=True),
    ],
    "T2": [
        marked("T2-1", solved(HALF), solution=True),
        marked("T2-1-check", "assert half(4) == 2, 'half of 4 is 2'", 1),
        marked("T2-1-hidden", hidden("print(f'leaderboard: {half(3):+.2f} points')"), 3),
    ],
}


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder of the toy assignments' sources."""
    folder = tmp_path_factory.mktemp("toys")
    for name, cells in TOYS.items():
        (folder / f"{name}.py").write_text("\n".join(cells))
    return folder


def answered(toys, name="T1", answers=(), **changes):
    """A release with some cells filled in (grade_id -> source), as plain JSON."""
    notebook = student_version(read_source(toys / f"{name}.py"))
    for cell in notebook.cells:
        grade_id = grader_data(cell).get("grade_id")
        cell.source = {**dict(answers), **changes}.get(grade_id, cell.source)
    return notebook


def right(**more):
    """Answers of T1 that are right, and others."""
    return {"T1-1": DOUBLE, "T1-2": TOTAL, **more}


def hand_in(folder, student, notebook, name="T1.ipynb"):
    """Write a notebook, or bytes, or nothing, as a student's."""
    (folder / student).mkdir(parents=True, exist_ok=True)
    if notebook is not None:
        data = notebook if isinstance(notebook, bytes) else json.dumps(notebook).encode()
        (folder / student / name).write_bytes(data)


def grade(folder, out, *options, status=0):
    """Call the grader as make grade does; returns what it prints and the rows of grades.csv."""
    command = [sys.executable, ASSIGNMENTS / "grade.py", folder, out, *options, "--jobs", 2]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        return done.stderr, []
    with (out / "grades.csv").open(newline="", encoding="utf-8") as file:
        return done.stdout, list(csv.DictReader(file))


def code(body):
    """T1-1 with another body."""
    return right(**{"T1-1": f"def double(x):\n    {body}"})


def submissions(toys, folder):
    """Every kind of submission; returns what grades.csv must say: tests, exercises, notes, look."""
    expected = {}

    def student(name, notebook, says, file="T1.ipynb"):
        hand_in(folder, name, notebook, file)
        expected[name] = says

    def with_cells(change, **answers):
        notebook = answered(toys, answers=right(**answers))
        notebook.cells = change(notebook.cells)
        return notebook

    def without_metadata(cells):
        for cell in cells:
            cell.metadata = {}
            del cell["id"]
        return cells

    def extra(*sources, after):
        def change(cells):
            at = next(i for i, c in enumerate(cells) if grader_data(c).grade_id == after)
            more = [nbformat.v4.new_code_cell(source) for source in sources]
            return cells[: at + 1] + more + cells[at + 1 :]

        return change

    good = "T1-1 3/3, T1-2 4/4"
    none, rest = "T1-1 0/3, T1-2 0/4", "T1-1 0/3, T1-2 4/4"
    late = "Cell {0}-check: {1}. Cell {0}-hidden: {1}."
    long, large = (
        "it ran too long and was stopped",
        "it used more than 300 MB of memory and was stopped",
    )
    student("good", answered(toys, answers=right()), ("7", good, "", ""))
    student(
        "half",
        answered(toys, answers=right(**{"T1-2": "def total(values):\n    return 0"})),
        ("4", "T1-1 3/3, T1-2 1/4", "", ""),
    )
    student(
        "bad",
        answered(toys, answers=right(**{"T1-1": "def double(x):\n    return x", "T1-2": "x"})),
        ("0", none, "Cell T1-2: NameError: name 'x' is not defined.", ""),
    )
    student("stub", answered(toys), ("0", none, "", ""))
    student(
        "tampered",
        answered(toys, **{"T1-1-check": "pass", "T1-1-hidden": "3", "T1-setup": "import os"}),
        (
            "0",
            none,
            " ".join(
                f"Cell T1-{cell} was changed; the original was used."
                for cell in ("setup", "1-check", "1-hidden")
            ),
            "",
        ),
    )
    student(
        "endless",
        answered(toys, answers=code("while True: pass")),
        ("4", rest, late.format("T1-1", long), ""),
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
        ("4", rest, late.format("T1-1", long), ""),
    )
    student(
        "hog",
        answered(toys, answers=code("return bytearray(10**9)")),
        ("4", rest, late.format("T1-1", large), ""),
    )
    student(
        "glutton",
        answered(toys, answers=code("kept = []\n    while True: kept.append(bytearray(10**6))")),
        ("4", rest, late.format("T1-1", large), ""),
    )
    student(
        "dead",
        answered(toys, answers=code("import os; os._exit(1)")),
        ("4", rest, late.format("T1-1", "the kernel died in it"), "T1-1 uses os."),
    )
    student(
        "leaves",
        answered(toys, answers=code("exit()")),
        ("4", rest, "", ""),
    )
    student(
        "syntax",
        answered(toys, answers=right(**{"T1-1": "def double(x:\n    return 2 * x"})),
        ("4", rest, "Cell T1-1: SyntaxError: '(' was never closed (line 1).", ""),
    )
    student(
        "cut-off",
        with_cells(extra(*["while True: pass"] * 5, after="T1-1-hidden")),
        (
            "3",
            "T1-1 3/3, T1-2 0/4",
            " ".join(4 * [f"Cell a cell after T1-1-hidden: {long}."])
            + " Cut off, because the limit of 12 s was reached: 2 test cells from T1-2-check on "
            "were not run (4 points).",
            "",
        ),
    )
    student(
        "not-a-notebook",
        b"%PDF-1.4",
        ("0", none, "T1.ipynb is not a notebook: it is not JSON.", ""),
    )
    student(
        "list",
        b"[1, 2]",
        (
            "0",
            none,
            "T1.ipynb is not a notebook: it holds no list of cells.",
            "",
        ),
    )
    student(
        "strange",
        json.dumps(
            {"cells": [1, {"source": 3}, {"cell_type": "code", "metadata": 4, "source": [DOUBLE]}]}
        ).encode(),
        (
            "3",
            "T1-1 3/3, T1-2 0/4",
            " ".join(
                f"Cell T1-{cell} was missing; it was put back."
                if cell not in ("2", "3")
                else f"Cell T1-{cell} is missing."
                for cell in ("setup", "1-check", "1-hidden", "2", "2-check", "2-hidden", "3")
            ),
            "",
        ),
    )
    student(
        "renamed",
        answered(toys, answers=right()),
        ("7", good, "By its cells, homework.ipynb is T1.", ""),
        "homework.ipynb",
    )
    student(
        "deleted",
        with_cells(
            lambda cells: [
                c for c in cells if grader_data(c).grade_id not in ("T1-1", "T1-2-check")
            ]
        ),
        ("4", rest, "Cell T1-1 is missing. Cell T1-2-check was missing; it was put back.", ""),
    )
    student(
        "doubled",
        with_cells(lambda cells: cells[:3] + cells[1:3] + cells[3:]),
        ("7", good, "Cell T1-1 is there 2 times; all were read.", ""),
    )
    student(
        "half-emoji",
        answered(toys, answers=right(**{"T1-1": DOUBLE + "  # \ud83d"})),
        ("7", good, "", ""),
    )
    student(
        "magic",
        answered(toys, answers=right(**{"T1-2": "%time 1\n" * 600})),
        ("3", "T1-1 3/3, T1-2 0/4", ANY, ""),
    )
    student(
        "latin",
        "ä".encode("latin-1"),
        ("0", none, "T1.ipynb is not a notebook: it is not UTF-8.", ""),
    )
    for name in ("thief", "pipe", "endless-file"):
        student(name, None, ("0", none, "Nothing was handed in.", ""))
    (folder / "thief" / "T1.ipynb").symlink_to(folder / "good" / "T1.ipynb")
    (folder / "endless-file" / "T1.ipynb").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe" / "T1.ipynb")
    student("reversed", with_cells(lambda cells: cells[::-1]), ("7", good, "", ""))
    student("stripped", with_cells(without_metadata), ("7", good, "Cell T1-3 is missing.", ""))
    student(
        "curious",
        with_cells(
            extra("def sum(values): return 0", "open('/dev/null')", after="T1-setup"),
            **{"T1-2": "import math as m\nmath.pi = 3\n" + TOTAL},
        ),
        (
            "3",
            "T1-1 3/3, T1-2 0/4",
            "",
            "after T1-setup uses open. after T1-setup binds sum anew, which the tests use. "
            "T1-2 binds math anew, which the tests use.",
        ),
    )
    student(
        "twice",
        answered(toys, answers=right()),
        ("7", good, "Not graded, as there is T1.ipynb: old.ipynb.", ""),
    )
    hand_in(folder, "twice", answered(toys), "old.ipynb")
    return expected


@pytest.fixture(scope="session")
def graded_toys(toys, tmp_path_factory):
    """All kinds of submissions, graded: what was expected, the rows by student, the folder."""
    folder, out = tmp_path_factory.mktemp("submissions"), tmp_path_factory.mktemp("graded")
    expected = submissions(toys, folder)
    limits = ("--sources", toys, "--seconds", 12, "--megabytes", 300)
    _, rows = grade(folder, out, *limits)
    return expected, {row["student"]: row for row in rows}, out


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
def test_feedback_says_what_failed_and_shows_no_hidden_test(graded_toys):
    _, _, out = graded_toys
    page = (out / "feedback" / "bad" / "T1.html").read_text(encoding="utf-8")
    assert "AssertionError: twice 2 is 4, not 2" in page and "range(9)" not in page
    assert "not done yet" in (out / "feedback" / "stub" / "T1.html").read_text(encoding="utf-8")
    page = (out / "feedback" / "half" / "T1.html").read_text(encoding="utf-8")
    assert "1 of 3" in page and "passed in part" in page


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
    hand_in(
        folder, "dan", nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), "x.ipynb"
    )
    hand_in(folder, "eve", None)
    (folder / "eve" / "T1.ipynb").symlink_to(folder / "ann" / "T1.ipynb")
    (folder / "fay_T1.ipynb").write_text("{}")
    (folder / os.fsdecode(b"M\xfcller")).mkdir()  # as an old zip unpacks
    _, rows = grade(folder, out, "--sources", toys)
    said = {(row["student"], row["assignment"]): row for row in rows}
    assert "is a link, no plain file, or in a closed" in said["eve", "unknown"]["notes"]
    assert said["", "unknown"]["file"] == "fay_T1.ipynb"
    assert "outside of a student's folder" in said["", "unknown"]["notes"]
    assert sum(row["student"].startswith("M") for row in rows) == 3
    assert said["ann", "T1"]["points"] == "7" and said["ann", "T2"]["points"] == "4"
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
    hand_in(folder, "ann", answered(toys, answers=right(**{"T1-3": answer})))
    _, [row] = grade(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("7", "0", "1")
    kept = out / "results" / "ann" / "T1.json"
    before = kept.stat().st_mtime_ns
    sheet = (out / "by_hand.csv").read_text()
    assert re.fullmatch("ann,T1,T1-3,2,,,[0-9a-f]{8}", sheet.splitlines()[1])
    (out / "by_hand.csv").write_text(sheet.replace("T1-3,2,,", "T1-3,2,1.5,Name the sum."))
    _, [row] = grade(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("8.5", "1.5", "0")
    assert kept.stat().st_mtime_ns == before
    page = (out / "feedback" / "ann" / "T1.html").read_text(encoding="utf-8")
    assert "Name the sum." in page and "<b>scales" not in page and "&lt;b&gt;scales" in page
    marked_sheet = (out / "by_hand.csv").read_text()
    # Another answer is marked anew, and what was given to the first is not lost.
    hand_in(folder, "ann", answered(toys, answers=right(**{"T1-3": "It depends."})))
    _, [row] = grade(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("7", "0", "1")
    again = (out / "by_hand.csv").read_text()
    assert "Name the sum. (1.5 points were given to an earlier answer.)" in again
    hand_in(folder, "ann", answered(toys, answers=right()))
    (out / "by_hand.csv").write_text(marked_sheet)
    _, [row] = grade(folder, out, "--sources", toys)
    assert (row["points"], row["by_hand"], row["to_mark"]) == ("7", "0", "0")  # no answer
    assert (out / "by_hand.csv").read_text() == marked_sheet
    (out / "by_hand.csv").write_text(sheet.replace("T1-3,2,,", "T1-3,2,3,"))
    error, _ = grade(folder, out, "--sources", toys, status=2)
    assert "points must be from 0 to 2, not 3" in error
    (out / "by_hand.csv").write_bytes(sheet.replace("2,,", "2,1,schön").encode("cp1252"))
    error, _ = grade(folder, out, "--sources", toys, status=2)
    assert "by_hand.csv is not UTF-8; save it as CSV in UTF-8" in error


def test_a_folder_that_is_closed_to_the_grader_stops_nothing(toys, tmp_path, monkeypatch):
    hand_in(tmp_path, "ann", answered(toys, answers=right()))
    real = Path.is_file

    def closed(path):
        if path.suffix == ".ipynb":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "is_file", closed)
    [task] = tasks_of(tmp_path / "ann", read_assignments(toys, None))
    assert "T1.ipynb is a link, no plain file, or in a closed folder" in task.notes[0]
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", lambda *a, **k: (_ for _ in ()).throw(PermissionError()))
    [task] = tasks_of(tmp_path / "ann", read_assignments(toys, None))
    assert task.notes == ("T1.ipynb is not a notebook: it cannot be opened.",)


@pytest.mark.slow
def test_an_overlay_replaces_hidden_tests_and_nothing_else(toys, tmp_path):
    folder, overlay = tmp_path / "in", tmp_path / "overlay"
    hand_in(folder, "ann", answered(toys, answers=right()))
    overlay.mkdir()
    sharper = marked("T1-1-hidden", hidden("assert double('a') == 'a', 'text stays'"), 2)
    (overlay / "T1.py").write_text(sharper)
    _, [row] = grade(folder, tmp_path / "out", "--sources", toys, "--overlay", overlay)
    assert (row["exercises"], row["notes"]) == ("T1-1 1/3, T1-2 4/4", "")
    (overlay / "T1.py").write_text(sharper.replace("T1-1-hidden", "T1-7"))
    none = tmp_path / "none"
    error, _ = grade(folder, none, "--sources", toys, "--overlay", overlay, status=2)
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
def test_thirty_submissions_graded_twice_give_the_same_table(toys, tmp_path):
    folder = tmp_path / "in"
    chance = "import random\ndef double(x):\n    return 2 * x if random.random() < 0.9 else {}"
    for i in range(30):
        answers = [right(), {}, right(**{"T1-1": chance.format(i)})][i % 3]
        hand_in(folder, f"student{i:02}", answered(toys, answers=answers))
    for out in ("one", "two"):
        grade(folder, tmp_path / out, "--sources", toys)
    one, two = ((tmp_path / out / "grades.csv").read_bytes() for out in ("one", "two"))
    assert one == two and one.count(b"\n") == 31


# The grader, on the real assignments


@pytest.fixture(scope="session")
def graded(tmp_path_factory):
    """Solutions of all four, and four other submissions of A1: rows by student and assignment."""
    folder, out = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("real-graded")
    a1 = SOURCES["A1"]
    for path in SOURCES.values():
        full = read_source(path)
        notebook = student_version(full)
        for cell, solution in zip(notebook.cells, full.cells):
            if grader_data(cell).get("solution"):
                cell.source = solution.source
        hand_in(folder, "solution", notebook, f"{path.stem}.ipynb")

    def change(student, wrong, cells=lambda cells: cells):
        notebook = student_version(read_source(a1))
        for cell in notebook.cells:
            exercise = grader_data(cell).get("grade_id")
            if exercise in wrong:
                kind, right, instead = wrong[exercise]
                source = cells_of("A1")[exercise][0]
                cell.source = source.replace(right, instead) if kind else source
        notebook.cells = cells(notebook.cells)
        hand_in(folder, student, notebook, f"{a1.stem}.ipynb")

    fine = ("", "", "")
    change("half", {"A1-1": fine, "A1-2": fine, "A1-5": fine})
    change("bad", {exercise: WRONG[exercise][0] for exercise in EXERCISES[:5]})
    change("stub", {})

    def tampered(cells):
        for cell in cells:
            if grader_data(cell).get("grade"):
                cell.source = "pass"
        return cells

    change("tampered", {"A1-1": fine}, tampered)
    _, rows = grade(folder, out)
    return {(row["student"], row["assignment"][:2]): row for row in rows}


@pytest.mark.slow
@each
def test_solutions_get_full_marks(graded, name):
    row = graded["solution", name]
    tests = {c.split()[1].split("/")[1] for c in row["exercises"].split(", ")}
    assert row["tests"] == "18" and row["out_of"] == "20" and row["notes"] == row["look"] == ""
    assert all(c.split()[1].split("/")[0] in tests for c in row["exercises"].split(", "))
    assert row["to_mark"] == "1"
    assert (name == "A4") == row["leaderboard"].startswith("place 1 of 1: +")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "exercises"),
    [
        ("half", "A1-1 4/4, A1-2 3/3, A1-3 0/4, A1-4 0/5, A1-5 2/2"),
        ("bad", "A1-1 0/4, A1-2 0/3, A1-3 0/4, A1-4 0/5, A1-5 0/2"),
        ("stub", "A1-1 0/4, A1-2 0/3, A1-3 0/4, A1-4 0/5, A1-5 0/2"),
        ("tampered", "A1-1 4/4, A1-2 0/3, A1-3 0/4, A1-4 0/5, A1-5 0/2"),
    ],
)
def test_other_submissions_of_the_first_assignment_get_their_marks(graded, student, exercises):
    row = graded[student, "A1"]
    assert row["exercises"] == exercises
    changed = row["notes"].count("was changed; the original was used.")
    assert changed == (10 if student == "tampered" else 0)
