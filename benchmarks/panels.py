"""How soon each panel answers: `python benchmarks/panels.py [PANEL …]`, needs Chromium.

Two numbers a panel, for a move of one control there and back, again and again:

- `cpu`: processor time of the callback alone (compute, draw, SVG), in this process, in one thread;
- `browser`: from the key on the slider's handle to the drawn picture, in JupyterLab in Chromium,
  with the pause in which another move may replace the first (`Panel.wait`; none where `live`).

`new` is the first visit to a setting, `known` any later one: panels keep what they have computed.
Processor time can be compared between machines that are busy and idle, the other cannot.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import torch

from evolq_lite import panels
from evolq_lite.panels.evolution import BLOCK
from evolq_lite.panels.landscape import PLANE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from serving import DELAYS, chromium, jupyterlab, notebook_of

VISITS = 4  # to each of two settings; the first is new
SECONDS = 600  # until all panels have opened


@dataclass(frozen=True)
class Move:
    """A panel, how it opens, a control, and a second value for it."""

    kind: str
    control: str
    other: Any
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is measured."""
        what = "".join(f", {value}" for value in self.values.values())
        return f"{self.kind}{what}: {self.control}"


MOVES = [
    Move("ReadingPanel", "bits", 7),
    Move("QuantizerPanel", "clip", 0.95),
    Move("InfoNCEPanel", "temperature", 2.67),
    Move("InfoNCEPanel", "batch", 31),
    Move("BlockPanel", "block", 1),
    Move("ViTPanel", "weight_bits", 2),
    Move("LandscapePanel", "radius", 0.00794),
    Move("LandscapePanel", "turn", 40, {"what": PLANE}),
    Move("EvolutionPanel", "population", 14),
    Move("EvolutionPanel", "population", 14, {"landscape": BLOCK}),
    Move("RacePanel", "budget", 59),
    Move("RoundingPanel", "bits", 2),
]


def measure_callback(move: Move) -> list[float]:
    """Milliseconds of processor time of each callback, to the other value and back."""
    panel = getattr(panels, move.kind)(**move.values)
    if move.control == "turn":
        steps = [(panel.turn_surface, (None,))] * 2
        return [timed(act, *args) for _ in range(VISITS) for act, args in steps]
    control, found = panel.controls[move.control], []
    values = move.other, control.value
    panel.setting = True  # the control tells nobody, the callback is called here
    for _ in range(VISITS):
        for value in values:
            control.value = value
            found.append(timed(answer, panel))
    panel.close()
    return found


def answer(panel: panels.Panel) -> None:
    """What a panel does when a control has moved."""
    if isinstance(panel, panels.RacePanel):  # it waits for its start
        panel.changed(None)
    else:
        panel.job()(lambda fraction: None)


def timed(act: Any, *args: Any) -> float:
    """Milliseconds of processor time."""
    began = process_time()
    act(*args)
    return 1000 * (process_time() - began)


def measure_browser(moves: list[Move]) -> list[list[float]]:
    """Milliseconds from the key to the picture, for each move."""
    cells = ["from evolq_lite.panels import *"]
    for i, move in enumerate(moves):
        options = ", ".join(f"{name}={value!r}" for name, value in move.values.items())
        cells.append(f"panel = {move.kind}({options})\npanel.ui.add_class('move-{i}')\npanel")
    end = "MARK-END"
    with tempfile.TemporaryDirectory() as folder:
        notebook_of(Path(folder) / "panels.ipynb", *cells, f"print({end!r})")
        with jupyterlab(Path(folder)) as address, chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(1000 * SECONDS)
            page.goto(address.format(path="tree/panels.ipynb") + "&reset")
            page.locator("#jupyterlab-splash").wait_for(state="detached")
            page.locator("#jp-main-statusbar").get_by_text("Idle").wait_for()
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.locator(".jp-OutputArea-output", has_text=end).wait_for()
            keys = ["ArrowLeft", "ArrowRight"] * VISITS
            return [
                page.evaluate(DELAYS, [f".move-{i}", move.control.replace("_", "-"), keys])
                for i, move in enumerate(moves)
            ]


def row(move: Move, callback: list[float], browser: list[float]) -> str:
    """A line of the table: milliseconds, new and known."""
    cells = [f"{part:6.0f}" for times in (callback, browser) if times for part in split(times)]
    return f"| {move.name:58} | {' | '.join(cells)} |"


def split(times: list[float]) -> tuple[float, float, float]:
    """The slowest of the first visits; the median and the quickest of the others."""
    return max(times[:2]), median(times[2:]), min(times[2:])


def main() -> None:
    """Command line: names of panels."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="panels; default: all")
    parser.add_argument("--no-browser", action="store_true", help="processor time only")
    args = parser.parse_args()
    known = sorted({move.kind for move in MOVES})
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no panel {unknown[0]!r} is measured; known: {', '.join(known)}")
    moves = [move for move in MOVES if not args.names or move.kind in args.names]
    torch.set_num_threads(1)
    print(f"evolq_lite {eq.__version__}. Milliseconds: new, known (median), known (quickest).")
    callbacks = [measure_callback(move) for move in moves]
    delays = [[] for _ in moves] if args.no_browser else measure_browser(moves)
    for move, callback, browser in zip(moves, callbacks, delays):
        print(row(move, callback, browser))


if __name__ == "__main__":
    main()
