"""Lessons: made from their sources, with outputs, in one form, and as quick as they say."""

import ast
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from lessons import IN_LAB, MARGIN, stated_seconds
from serving import find_chromium

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
from build import SOURCES, execute, keep_outputs, read_source  # noqa: E402

LESSONS = [
    "00_start_here",
    "01_uniform_quantization",
    "02_quantizing_a_vit",
    "03_non_smooth_landscapes",
    "04_infonce_loss",
    "05_evolutionary_search",
    "06_blockwise_evolq",
    "07_reproducing_the_paper",
    "08_rounding",
    "09_ship_it",
]
MOST_BYTES = 600_000
MOST_WORDS = 40  # of an alt text
MOST_MINUTES = 3  # to run

each_lesson = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def stored(source: Path) -> nbformat.NotebookNode:
    """The notebook that was made from a source."""
    return nbformat.read(NOTEBOOKS / f"{source.stem}.ipynb", 4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """All outputs of a notebook."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_all_lessons_are_there_and_made_from_their_sources():
    assert [path.stem for path in SOURCES] == LESSONS
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == LESSONS


@each_lesson
def test_a_notebook_is_in_step_with_its_source(source):
    made, kept = read_source(source), stored(source)
    assert [(c.id, c.cell_type, c.source, c.metadata) for c in kept.cells] == [
        (c.id, c.cell_type, c.source, c.metadata) for c in made.cells
    ], "run make notebooks"
    assert (NOTEBOOKS / f"{source.stem}.ipynb").stat().st_size < MOST_BYTES


def test_new_words_keep_the_outputs_and_new_code_does_not():
    source = SOURCES[0]
    built, words, code = stored(source), read_source(source), read_source(source)
    words.cells[0].source += " More words."
    kept = keep_outputs(words, built)
    assert kept.cells[0].source.endswith("More words.")
    assert outputs(kept) == outputs(built) and [c.id for c in kept.cells] == [
        c.id for c in built.cells
    ]
    next(cell for cell in code.cells if cell.cell_type == "code").source += "  # other code"
    with pytest.raises(ValueError, match="omit --words"):
        keep_outputs(code, built)


@each_lesson
def test_imports_and_questions_open_with_their_code_folded_away(source):
    code = [cell for cell in read_source(source).cells if cell.cell_type == "code"]
    asked = [cell for cell in code if cell.source.startswith(("Quiz(", "Guess("))]
    assert asked and code[0].source.startswith("import evolq_lite")
    for cell in (code[0], *asked):
        assert cell.metadata == {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}


@each_lesson
def test_a_notebook_has_run_from_top_to_bottom_without_an_error(source):
    code = [cell for cell in stored(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]


@each_lesson
def test_every_picture_has_alt_text(source):
    shown = [output.get("data", {}) for output in outputs(stored(source))]
    assert not [kind for data in shown for kind in data if kind.startswith("image/")]
    html = "".join("".join(data.get("text/html", "")) for data in shown)
    alts = re.findall(r'<img alt="([^"]{40,})" src="data:', html)
    assert html.count("<img") == len(alts) > 0
    assert max(len(alt.split()) for alt in alts) <= MOST_WORDS
    for cell in stored(source).cells:
        if cell.cell_type == "markdown":
            assert "![](" not in cell.source and "<img" not in cell.source


# The form of a lesson


def form_problems(notebook: nbformat.NotebookNode, number: int) -> list[str]:
    """What is missing in a lesson, each in a few words."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [
        *header_problems(texts[0], number),
        *question_problems("\n".join(texts)),
        *quiz_problems(notebook),
        *([] if any(map(makes_a_panel, code)) else ["no cell ends with a panel"]),
    ]


def header_problems(header: str, number: int) -> list[str]:
    """The first cell: title, objectives, needs, times, offline, module."""
    problems = []
    if not re.match(rf"# {number}\. \w", header):
        problems.append(f"the title does not begin with '# {number}. '")
    fields = {
        "objectives": r"\*\*After this lesson you can\*\* (.+?)\.\n\n",
        "prerequisites": r"\*\*Prerequisites:\*\* .+",
        "time": r"\*\*Time:\*\* \d+ minutes? to read, (\d+) minutes? to run",
        "offline": r"\*\*Works offline:\*\* yes",
        "module": r"\*\*Read alongside:\*\* (.+)",
    }
    found = {name: re.search(pattern, header, re.DOTALL) for name, pattern in fields.items()}
    problems += [f"the header has no {name}" for name, match in found.items() if not match]
    if match := found["objectives"]:
        count = len(match[1].split(";"))
        problems += [] if 3 <= count <= 5 else [f"{count} objectives instead of 3 to 5"]
    if (match := found["time"]) and not 1 <= int(match[1]) <= MOST_MINUTES:
        problems.append(f"{match[1]} minutes to run, at most {MOST_MINUTES} are allowed")
    for path in re.findall(r"`([^`]+)`", found["module"][1]) if found["module"] else []:
        if not any((folder / path).exists() for folder in (ROOT, ROOT / "evolq_lite")):
            problems.append(f"the module {path} does not exist")
    return problems


def question_problems(text: str) -> list[str]:
    """Predict, then try: two or three numbered questions, and an answer that unfolds."""
    pattern = r"\*\*Predict, then try\.\*\*(.+?)(<details>.*?</details>|$)"
    match = re.search(pattern, text, re.DOTALL)
    if not match:
        return ["no 'Predict, then try'"]
    count = len(re.findall(r"^\d\. ", match[1], re.MULTILINE))
    problems = [] if count in (2, 3) else [f"{count} questions to predict instead of 2 or 3"]
    return problems if match[2] else [*problems, "no answer to the predictions"]


def quiz_problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Check yourself: three numbered questions, whose cells hide their answers; then sources."""
    texts = [cell.source for cell in notebook.cells]
    starts = [i for i, text in enumerate(texts) if "## Check yourself\n" in text]
    ends = [i for i, text in enumerate(texts) if re.match(r"## Sources\n+\S", text)]
    if len(starts) != 1 or len(ends) != 1 or starts[0] > ends[0]:
        return ["no 'Check yourself' followed by 'Sources'"]
    cells = notebook.cells[starts[0] + 1 : ends[0]]
    asked = [quiz for cell in cells if (quiz := quiz_of(cell)) is not None]
    problems = [] if len(asked) >= 3 else [f"{len(asked)} questions in the quiz"]
    numbers = [question.partition(". ")[0] for question, _, _ in asked]
    if numbers != [str(i + 1) for i in range(len(numbers))]:
        problems.append(f"questions numbered {numbers}")
    for number, (_, options, answer) in zip(numbers, asked):
        if not all(len(why.strip()) >= 6 for why in options.values()):
            problems.append(f"question {number} has an option that does not explain itself")
        right = [i for i, why in enumerate(options.values(), 1) if why.startswith("Right")]
        if right != [answer]:
            problems.append(f"question {number}: options {right} say Right, the answer is {answer}")
    if not all(cell.metadata.get("jupyter", {}).get("source_hidden") for cell in cells):
        problems.append("a question shows its answers in its code")
    return problems


def quiz_of(cell: nbformat.NotebookNode) -> tuple[str, dict[str, str], int] | None:
    """The question, options and answer of a cell that is a quiz."""
    body = ast.parse(cell.source).body if cell.cell_type == "code" else []
    call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "Quiz":
        return None
    question, options = map(ast.literal_eval, call.args)
    return question, options, ast.literal_eval(call.keywords[0].value)


def makes_a_panel(code: str) -> bool:
    """Whether the last expression of a cell is a new panel."""
    last = ast.parse(code).body[-1:]
    call = last[0].value if last and isinstance(last[0], ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "").endswith("Panel")


@each_lesson
def test_a_lesson_has_the_form_of_a_lesson(source):
    assert form_problems(read_source(source), int(source.stem[:2])) == []


@each_lesson
def test_every_panel_leaves_its_picture_and_words_in_the_notebook(source):
    cells = [c for c in stored(source).cells if c.cell_type == "code" and makes_a_panel(c.source)]
    for cell in cells:
        html = "".join(o.get("data", {}).get("text/html", "") for o in cell.outputs)
        assert '<img alt="' in html and 'role="status"' in html, cell.source
        assert "Error" not in html and "Computing" not in html, cell.source


GOOD = SOURCES[[path.stem for path in SOURCES].index("01_uniform_quantization")]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# 1. Uniform", "# Uniform", "the title does not begin with '# 1. '"),
        ("**After this lesson you can**", "You can", "no objectives"),
        ("; predict what one more bit buys", "; a; b; c", "6 objectives instead of 3 to 5"),
        ("**Prerequisites:**", "Needed:", "no prerequisites"),
        ("1 minute to run", "some minutes to run", "no time"),
        ("1 minute to run", "4 minutes to run", "4 minutes to run, at most 3"),
        ("**Works offline:** yes", "**Works offline:** no", "no offline"),
        ("`evolq_lite/numerics.py`", "`evolq_lite/numeric.py`", "evolq_lite/numeric.py does not"),
        ("**Predict, then try.**", "Try.", "no 'Predict, then try'"),
        ("\n2. Take the input", "\n2. Or\n2. Take", "4 questions to predict instead of 2 or 3"),
        ("## Check yourself", "## Check", "no 'Check yourself'"),
        ('Quiz(\n    "3. A layer', 'print(\n    "3. A layer', "2 questions in the quiz"),
        ("3. A layer sums", "4. A layer sums", "questions numbered"),
        ('"Right. Choosing the scale means trading one for the other."', '""', "does not explain"),
        ("Right. Choosing the", "Choosing the", "options [] say Right, the answer is 2"),
        ("## Sources", "## Where from", "no 'Check yourself' followed by 'Sources'"),
        ("QuantizerPanel()", "panel = QuantizerPanel()", "no cell ends with a panel"),
    ],
)
def test_a_missing_part_of_a_lesson_is_reported(old, new, problem):
    notebook = read_source(GOOD)
    assert sum(cell.source.count(old) for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    assert any(problem in line for line in form_problems(notebook, 1))


@pytest.mark.long
@pytest.mark.parametrize(
    "source",
    [path for path in SOURCES if find_chromium() is None or path.stem not in IN_LAB],
    ids=lambda path: path.stem,
)
def test_a_lesson_runs_in_the_time_that_it_states(
    source, record_property: Callable[[str, object], None]
):
    notebook = read_source(source)
    stated, began = stated_seconds(notebook), time.perf_counter()
    execute(notebook)
    seconds = time.perf_counter() - began
    record_property("lesson", f"{source.stem[:2]} {seconds:.0f} s of {stated} s stated")
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert seconds <= MARGIN * stated
