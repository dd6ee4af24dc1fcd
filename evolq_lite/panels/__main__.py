"""Store what panels show without computing: `python -m evolq_lite.panels [NAME …]`."""

import sys
from tempfile import TemporaryDirectory

from evolq_lite import panels
from evolq_lite.panels.base import Panel, store_view, view_path
from evolq_lite.panels.reading import STORED, store_readings
from evolq_lite.panels.search import SearchPanel


def main() -> None:
    """Compute and store; the panels' defaults decide what."""
    every = [getattr(panels, name) for name in panels.__all__]
    kinds = [kind for kind in every if issubclass(kind, Panel) and kind.shipped]
    names = [*(kind.__name__ for kind in kinds), STORED.stem]
    if unknown := [name for name in sys.argv[1:] if name not in names]:
        sys.exit(f"no panel {unknown[0]!r} has a stored view; known: {', '.join(names)}")
    if not sys.argv[1:] or STORED.stem in sys.argv[1:]:
        print(f"{STORED}: {store_readings()}")
    for kind in kinds:
        if sys.argv[1:] and kind.__name__ not in sys.argv[1:]:
            continue
        kind.shipped = False  # compute it, whatever is stored
        with TemporaryDirectory() as folder:
            panel: Panel = kind(out=f"{folder}/run") if kind is SearchPanel else kind()
            if isinstance(panel, SearchPanel):
                panel.start(resume=False)
                panel.worker.wait_until_done()
        store_view(panel)
        panel.close()
        print(f"{view_path(kind.__name__)}: {panel.words}")


if __name__ == "__main__":
    main()
