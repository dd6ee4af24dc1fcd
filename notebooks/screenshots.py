"""Pictures of all panels as a browser shows them: `make screenshots`, or with names of panels.

Writes `notebooks/images/NAME.png`, a panel as it opens, NAME in small letters. Fonts are those of
the machine, so two machines make two pictures; nothing compares them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from serving import chromium, notebook_of, settled, voila  # noqa: E402

from evolq_lite import panels  # noqa: E402

# GalleryPanel needs a file that somebody has exported.
OTHERS = ("Panel", "GalleryPanel")
NAMES = [name for name in panels.__all__ if name.endswith("Panel") and name not in OTHERS]
ARGUMENTS = {"EvolutionPanel": "made=40"}  # it would open before the first candidate
SIZE = {"width": 1060, "height": 1600}  # a panel that is not as wide stands under its controls
SECONDS = 600  # for a panel that is not shipped with a first picture


def take(names: list[str], folder: Path) -> None:
    """Show panels in Voila, one below the other, and take a picture of each."""
    cells = [f"{name}({ARGUMENTS.get(name, '')})" for name in names]
    served = notebook_of(folder / "panels.ipynb", "from evolq_lite.panels import *", *cells)
    with voila(served) as address, chromium() as browser:
        page = browser.new_page(viewport=SIZE)
        page.goto(address, timeout=1000 * SECONDS)
        for name in names:
            kind = f"evolq-{name.lower()}"
            settled(page, kind, SECONDS)
            path = HERE / "images" / f"{name.lower()}.png"
            page.locator(f".{kind}").screenshot(path=path)
            print(path.relative_to(HERE.parent))


def main() -> None:
    """Command line: names of panels."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="default: all")
    names = parser.parse_args().names or NAMES
    (HERE / "images").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        take(names, Path(folder))


if __name__ == "__main__":
    main()
