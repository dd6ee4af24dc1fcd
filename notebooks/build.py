"""Make the notebooks from their sources: `make notebooks`, or `python notebooks/build.py NAME`.

With `--words` nothing is run: the outputs that are there are kept, which needs the same code.

`notebooks/src/NN_name.py` (py:percent) is what people edit; `notebooks/NN_name.ipynb` is made from
it and run from top to bottom, with its outputs. Cell ids are hashes of name and position, and
nothing that differs between two runs of the same code is kept beside the outputs, so that a diff
shows what changed. A cell tagged `hide-input` opens with its code folded away, in JupyterLab and on
pages: imports, plots, and questions, whose answers a reader should not meet first.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "src").glob("*.py"))
CELL_SECONDS = 600
HIDDEN = "hide-input"  # the tag that Jupyter Book knows; JupyterLab has a field of its own


def read_source(path: Path) -> NotebookNode:
    """A source as a notebook without outputs, with deterministic cell ids."""
    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        cell.id = hashlib.sha256(f"{path.stem}-{i}".encode()).hexdigest()[:12]
        cell.metadata = metadata_of(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def metadata_of(cell: NotebookNode) -> NotebookNode:
    """What is kept of a cell's metadata: whether its code is folded away."""
    if HIDDEN not in cell.metadata.get("tags", []):
        return NotebookNode()
    return NotebookNode(tags=[HIDDEN], jupyter=NotebookNode(source_hidden=True))


def kept(output: NotebookNode) -> NotebookNode | None:
    """An output without its live widgets: a panel leaves its picture, a progress bar nothing."""
    data = output.get("data", {})
    if data.pop("application/vnd.jupyter.widget-view+json", None) and "text/html" not in data:
        return None
    return None if output.get("name") == "stderr" else output


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring pieces of printed text as one: a kernel cuts it where it likes."""
    out: list[NotebookNode] = []
    for output in outputs:
        if out and output.get("name") == "stdout" == out[-1].get("name"):
            out[-1].text += output.text
        else:
            out.append(output)
    return out


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run a notebook from top to bottom in `notebooks/`; raises at the first error."""
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        store_widget_state=False,  # of no use without a kernel, and large
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs = [output for output in map(kept, cell.outputs) if output is not None]
            cell.outputs = joined(outputs)
    notebook.metadata.language_info = NotebookNode(name="python")
    return notebook


def keep_outputs(notebook: NotebookNode, built: NotebookNode) -> NotebookNode:
    """A notebook with the outputs of one that was built; ValueError if its code is another."""
    new, old = ([c for c in n.cells if c.cell_type == "code"] for n in (notebook, built))
    if [cell.source for cell in new] != [cell.source for cell in old]:
        raise ValueError("not only words have changed; omit --words, and it is run")
    for cell, known in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = known.outputs, known.execution_count
    return notebook


def main() -> int:
    """Command line: names of sources, without ending."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [path.stem for path in SOURCES]
    parser.add_argument("names", nargs="*", choices=[[], *known], help="default: all")
    parser.add_argument(
        "--words", action="store_true", help="only words have changed: run nothing, keep outputs"
    )
    arguments = parser.parse_args()
    for path in SOURCES:
        if arguments.names and path.stem not in arguments.names:
            continue
        began, target = time.perf_counter(), HERE / f"{path.stem}.ipynb"
        notebook = read_source(path)
        if arguments.words:
            try:
                notebook = keep_outputs(notebook, nbformat.read(target, 4))
            except (OSError, ValueError) as error:
                print(f"{path.stem}: {error}", file=sys.stderr)
                return 2
        else:
            notebook = execute(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, target)
        print(f"{path.stem}: {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
