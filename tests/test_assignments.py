"""Assignments: releases tell nothing, checks and hidden tests tell right from wrong."""

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from wrong_answers import WRONG

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENTS = ROOT / "notebooks" / "assignments"
RELEASE = ASSIGNMENTS / "release"
sys.path.insert(0, str(ASSIGNMENTS))
from grading.assignment import (  # noqa: E402
    grader_data,
    is_hidden,
    is_picture,
    read_source,
    sources,
    student_version,
    without,
)

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
    with pytest.raises(ValueError, match="inside another"):
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
