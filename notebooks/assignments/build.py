"""Make the student releases of the assignments: `make assignments`.

`src/AN_name.py` (py:percent, with nbgrader's cell metadata) is an assignment with its solutions and
hidden tests. From it come `release/AN_name.ipynb`, where both are cut out, and the pictures of the
expected results, which are what the solution draws: so the solution is run from top to bottom, and
a solution that fails a test of its own makes no release. What a picture says of itself becomes its
alt text, in the source as well. Neither needs nbgrader; the metadata and the rules of cutting are
nbgrader's, so its own tools take the same files.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
import time
from base64 import b64decode
from pathlib import Path

import nbformat
from grading.assignment import grader_data, is_picture, read_source, sources, student_version
from grading.isolate import FIXED
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

RELEASE = Path(__file__).resolve().parent / "release"
CELL_SECONDS = 900

EMBEDDED = re.compile(r'src="data:image/png;base64,([^"]+)"')
SHOWN = re.compile(r"!\[([^\]]*)\]\((figures/[^)]+)\)")


def run(notebook: NotebookNode) -> None:
    """Run a notebook with its solutions from top to bottom; raises at the first error."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        ).execute(env=os.environ | FIXED)


def pictures(notebook: NotebookNode) -> dict[str, bytes]:
    """The PNG of every picture cell of a notebook that was run, by file name."""
    found = {}
    for cell in filter(is_picture, notebook.cells):
        html = "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
        match = EMBEDDED.search(html)
        if match is None:
            raise ValueError(f"{grader_data(cell).grade_id} draws no picture")
        found[grader_data(cell).grade_id.removesuffix("-picture") + ".png"] = b64decode(match[1])
    return found


def described(source: str, release: Path = RELEASE) -> str:
    """A text with the alt text of every picture as it stands inside the PNG."""

    def alt(match: re.Match[str]) -> str:
        with Image.open(release / match[2]) as image:
            return f"![{image.info['Description']}]({match[2]})"

    return SHOWN.sub(alt, source)


def write_release(path: Path, release: Path = RELEASE) -> None:
    """Write the student version of one source."""
    student = student_version(read_source(path))
    nbformat.validate(student)
    release.mkdir(parents=True, exist_ok=True)
    nbformat.write(student, release / f"{path.stem}.ipynb")


def write_solution(path: Path, folder: Path) -> None:
    """Write the notebook with solutions and hidden tests to folder/NAME/NAME.ipynb.

    This is nbgrader's layout of a `source` folder.
    """
    into = folder / path.stem
    into.mkdir(parents=True, exist_ok=True)
    notebook = read_source(path)
    nbformat.write(notebook, into / f"{path.stem}.ipynb")
    for _, name in SHOWN.findall("\n".join(cell.source for cell in notebook.cells)):
        (into / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(RELEASE / name, into / name)


def main() -> None:
    """Command line: names of sources, without ending."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [path.stem for path in sources()]
    parser.add_argument("names", nargs="*", choices=[[], *known], help="default: all")
    parser.add_argument(
        "--keep-pictures", action="store_true", help="do not run the solutions, only cut them out"
    )
    parser.add_argument(
        "--solutions", type=Path, metavar="DIR", help="write DIR/NAME/NAME.ipynb with solutions"
    )
    options = parser.parse_args()
    for path in sources():
        if options.names and path.stem not in options.names:
            continue
        if options.solutions:
            write_solution(path, options.solutions)
            continue
        began, notebook = time.perf_counter(), read_source(path)
        if not options.keep_pictures:
            run(notebook)
            (RELEASE / "figures").mkdir(parents=True, exist_ok=True)
            for name, png in pictures(notebook).items():
                (RELEASE / "figures" / name).write_bytes(png)
            path.write_text(described(path.read_text(encoding="utf-8")), encoding="utf-8")
        write_release(path)
        print(f"{path.stem}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
