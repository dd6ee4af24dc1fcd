"""Which lessons run from end to end where, and how long they may take."""

import re

import nbformat

# JupyterLab in a browser runs these; where there is a browser, nothing else does.
IN_LAB = ["01_uniform_quantization", "03_non_smooth_landscapes", "06_blockwise_evolq"]
MARGIN = 2  # on the stated time, for slower machines


def stated_seconds(notebook: nbformat.NotebookNode) -> int:
    """How long a lesson says that it runs."""
    minutes = re.search(r"(\d+) minutes? to run", notebook.cells[0].source)
    assert minutes
    return 60 * int(minutes[1])
