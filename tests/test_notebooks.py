"""Every notebook is made from its source, runs from top to bottom, and describes its pictures."""

import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
from build import SOURCES, execute, read_source  # noqa: E402


def test_sources_and_notebooks_belong_together():
    assert SOURCES
    assert {p.stem for p in NOTEBOOKS.glob("*.ipynb")} == {p.stem for p in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_is_in_step_with_its_source_and_has_outputs(source):
    made, kept = read_source(source), nbformat.read(NOTEBOOKS / f"{source.stem}.ipynb", 4)
    assert [(c.id, c.cell_type, c.source) for c in kept.cells] == [
        (c.id, c.cell_type, c.source) for c in made.cells
    ], "run make notebooks"
    assert not any(o.output_type == "error" for c in kept.cells for o in c.get("outputs", []))
    pictures = [
        o["data"]["text/html"]
        for c in kept.cells
        for o in c.get("outputs", [])
        if "<img" in o.get("data", {}).get("text/html", "")
    ]
    assert pictures and all('alt="' in text and 'alt=""' not in text for text in pictures)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(source):
    notebook = execute(read_source(source))
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
