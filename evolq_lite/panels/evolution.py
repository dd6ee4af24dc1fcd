"""Lesson 5: the paper's search at work, a candidate at a time, on a toy and on one real block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter, sleep
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import nn

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize, twin
from evolq_lite.data import Demo, load_demo
from evolq_lite.figures import PETROFF, Picture, new_figure
from evolq_lite.genome import Vector
from evolq_lite.landscape import JaggedBowl
from evolq_lite.objective import BlockObjective, Objective
from evolq_lite.panels.base import DRAWING, IntSlider, LogSlider, Panel, control
from evolq_lite.panels.worker import Tick
from evolq_lite.search import EvolQ

TOY, BLOCK = "toy: 2 scales", "blocks.5 of the ViT: 192 scales"
IMAGES = 100  # calibration images of the real block
PLAY = 100  # candidates that Play makes
PACE = 0.1  # seconds for a candidate while playing: an eye wants to follow
PICTURE = 0.2  # seconds between two pictures while playing


@cache
def relief(points: int = 121) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The toy within its reach of the centre: scales 1, scales 2, values (points, points)."""
    toy = JaggedBowl()
    reach = torch.linspace(-toy.reach, toy.reach, points)
    xs, ys = (toy.centre[:, None] + reach).unbind()
    values = toy(torch.cartesian_prod(ys, xs).flip(1)).view(points, points)
    return xs.numpy(), ys.numpy(), values.numpy()


@cache
def network() -> Demo:
    """The embedded ViT with calibration images."""
    return load_demo("vit", IMAGES)


@cache
def calibrated() -> nn.Module:
    """The embedded ViT with weights in 3 bits."""
    demo = network()
    qmodel = quantize(demo.model, QuantConfig(weight_bits=3, act_bits=8))
    calibrate(qmodel, demo.calibration)
    return qmodel


def block() -> BlockObjective:
    """Attention scales of the last block, of a network that no other panel changes meanwhile."""
    demo = network()
    return BlockObjective(chain_of(twin(calibrated())), "blocks.5", demo.calibration, demo.targets)


def objective_of(landscape: str, tick: Tick) -> Objective:
    """The objective of a landscape; the real block takes a second or two the first time."""
    if landscape == TOY:
        return JaggedBowl()
    tick(0.1)
    network()
    tick(0.4)
    return block()


class Watched(EvolQ):
    """The paper's search, which remembers the parent that it drew last."""

    drawn: Vector

    def parent(self) -> Vector:
        """The winner of a tournament."""
        self.drawn = super().parent()
        return self.drawn


@dataclass(frozen=True)
class Child:
    """A candidate (d,) and its parent (d,), both with their values, and what became of it.

    `entered`: it took a place in the population; `best`: none before it was as good.
    """

    vector: Vector
    value: float
    parent: Vector
    parent_value: float
    entered: bool
    best: bool

    @property
    def verdict(self) -> str:
        """What became of it, in words."""
        if not np.isfinite(self.value):
            return "dropped: its evaluation failed"
        if self.best:
            return "accepted: the best so far"
        if self.entered:
            return "not accepted, but it joins the population"
        return "dropped: no better than the worst member"


class Run:
    """A search under way: `values` of the controls, an objective, the optimizer, all children."""

    def __init__(self, values: dict[str, Any], objective: Objective) -> None:
        self.values, self.objective = values, objective
        self.start = objective.start
        self.first = float(objective(self.start[None])[0])
        self.search = Watched(
            self.start,
            self.first,
            values["mutation"],
            values["population"],
            values["tournament"],
            values["seed"],
        )
        self.children: list[Child] = []

    def step(self) -> None:
        """Ask for a child, evaluate it, tell what it is worth."""
        search = self.search
        asked = search.ask(1)
        parent_value = next(value for value, vector in search.members if vector is search.drawn)
        found = self.objective(asked)
        best, (vector, value) = search.best[1], (asked[0], float(found[0]))
        search.tell(asked, found)
        entered = any(torch.equal(member, vector) for _, member in search.members)
        self.children.append(
            Child(vector, value, search.drawn, parent_value, entered, value < best)
        )

    def members(self) -> list[tuple[Vector, float, int]]:
        """The members that differ, their values and numbers of copies, best first."""
        found: dict[tuple[float, ...], tuple[Vector, float, int]] = {}
        for value, vector in self.search.members:
            key = tuple(vector.tolist())
            found[key] = vector, value, found[key][2] + 1 if key in found else 1
        return list(found.values())

    @property
    def toy(self) -> bool:
        """Whether this is the toy."""
        return isinstance(self.objective, JaggedBowl)

    @property
    def label(self) -> str:
        """What `scaled` values are."""
        return "fitness (lower is better)" if self.toy else "fitness against the start, 1e-3"

    def scaled(self, value: Any) -> Any:
        """Values as a picture shows them; those of the block differ late in their digits."""
        return value if self.toy else 1e3 * (value - self.first)

    def words(self) -> str:
        """What has happened so far."""
        size = len(self.search.members)
        copies = sum(torch.equal(vector, self.start) for _, vector in self.search.members)
        state = f"Copies of the start in the population: {copies} of {size}."
        if not self.children:
            return f"No candidate yet. The start has fitness {self.first:.5f}. {state}"
        entered = sum(child.entered for child in self.children)
        bests = sum(child.best for child in self.children)
        last = self.children[-1]
        return (
            f"Candidate {len(self.children)} has fitness {last.value:.5f}: {last.verdict}. "
            f"Best so far {self.search.best[1]:.5f}, start {self.first:.5f}. Accepted: {bests}. "
            f"Joined the population: {entered}. {state}"
        )


class EvolutionPanel(Panel):
    """Evol-Q a candidate at a time: population, tournament, mutation width; Step, Play, Pause.

    `made` candidates are there when it opens.
    """

    slow = True
    again = "Press Step, or change a control, to try again."

    def __init__(self, name: str | None = None, made: int = 0, **values: Any) -> None:
        self.running: Run | None = None  # made by the worker; None: begin anew
        self.target = made  # candidates wanted; the worker only reads it
        self.playing = False
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """Five controls."""
        return {
            "landscape": control(
                W.Dropdown,
                "Landscape",
                "The function that is minimized",
                options=[TOY, BLOCK],
                value=TOY,
            ),
            "population": control(
                IntSlider,
                "Population",
                "Number of members; the paper uses 15",
                value=15,
                min=1,
                max=60,
            ),
            "tournament": control(
                IntSlider,
                "Tournament",
                "Members drawn with replacement; the best becomes the parent. The paper draws 10",
                value=10,
                min=1,
                max=60,
            ),
            "mutation": control(
                LogSlider,
                "Mutation width",
                "How far a scale may move; the paper uses 0.001 for 3-bit and 4-bit weights",
                value=1e-3,
                low=1e-5,
                high=0.1,
                step=0.1,
                readout_format=".1e",
            ),
            "seed": control(IntSlider, "Seed", "Seed of the random draws", value=0, min=0, max=99),
        }

    def buttons(self) -> list[W.Widget]:
        """Step, Play, Pause, Restart and Cancel above the progress bar."""
        row = []
        for word, tooltip, on_click in (
            ("Step", "Make one candidate", self.step),
            ("Play", f"Make {PLAY} candidates, one after another", self.play),
            ("Pause", "Stop after the current candidate", self.pause),
            ("Restart", "Start over from the first scales", self.restart),
        ):
            button = W.Button(description=word, tooltip=tooltip, layout={"width": "90px"})
            button.add_class(f"evolq-{word.lower()}")
            button.on_click(lambda _, act=on_click: act())
            row.append(button)
        self.cancel_button.on_click(lambda _: self.pause())
        return [W.HBox([*row, self.cancel_button]), self.bar]

    @property
    def generation(self) -> int:
        """How many candidates have been made."""
        return len(self.running.children) if self.running is not None else 0

    def step(self) -> None:
        """Make one more candidate; clicks that come fast add up."""
        if self.playing:
            self.pause()
        self.target = max(self.target, self.generation) + 1
        self.worker.request(self.job())

    def play(self) -> None:
        """Make many candidates, with pictures in between."""
        self.playing, self.target = True, self.generation + PLAY
        self.say("Playing …")
        self.worker.request(self.job())

    def pause(self) -> None:
        """Stop after the present candidate, and show it."""
        self.playing, self.target = False, self.generation

    def restart(self) -> None:
        """Begin anew from the start."""
        self.changed(None)

    def changed(self, change: Any) -> None:
        """Other values are another search."""
        self.playing, self.target, self.running = False, 0, None
        super().changed(change)

    def ended(self, error: BaseException | None) -> None:
        """What was stopped or failed is not taken up again."""
        if error is not None:
            self.pause()
        super().ended(error)

    def compute(self, tick: Tick, **values: Any) -> Run:
        """Begin, if nothing is under way; then make the candidates that are wanted."""
        run = self.running
        if run is None or run.values != values:
            run = Run(values, objective_of(values["landscape"], tick))
            tick(0.0)
            self.running = run
        begun, shown = len(run.children), perf_counter()
        while (made := len(run.children)) < (target := self.target):
            before = perf_counter()
            run.step()
            share = (made + 1 - begun) / (target - begun)
            tick(share)
            if made + 1 < target and self.playing:
                if perf_counter() - shown > PICTURE:
                    shown = perf_counter()
                    with DRAWING:
                        self.view.value = self.draw(run)[0]._repr_html_()
                sleep(max(0.0, PACE - (perf_counter() - before)))
                tick(share)
        return run

    def draw(self, result: Run, **values: Any) -> tuple[Picture, str]:
        """The population on its landscape, and the fitness of all candidates."""
        said = result.words()
        where = "a jagged bowl of two scales" if result.toy else "the attention scales of blocks.5"
        best = "; ".join(f"{copies} with {value:.5f}" for _, value, copies in result.members()[:5])
        alt = f"Evolution on {where}. {said} Members, best first: {best}."
        figure = new_figure(9.6, 4.0, alt)
        figure.set_layout_engine(None)  # fixed places: nothing jumps from picture to picture
        figure.subplots_adjust(left=0.085, right=0.985, bottom=0.28, top=0.92, wspace=0.3)
        left, right = figure.subplots(1, 2)
        (draw_toy if result.toy else draw_block)(left, result)
        draw_fitness(right, result)
        for axes in (left, right):
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=9, frameon=False
            )
        return figure, said


def draw_toy(axes: Axes, run: Run) -> None:
    """Contours, the members with their numbers of copies, the last parent and its child."""
    xs, ys, values = relief()
    filled = axes.contourf(xs, ys, values, 14, cmap="cividis")
    axes.figure.colorbar(filled, ax=axes, label=run.label)
    draw_population(axes, [(*vector.tolist(), copies) for vector, _, copies in run.members()])
    if run.children:
        last = run.children[-1]
        draw_family(axes, last.parent.tolist(), last.vector.tolist(), last.entered)
    axes.set(xlim=(xs[0], xs[-1]), ylim=(ys[0], ys[-1]), xlabel="scale 1", ylabel="scale 2")
    axes.set_title("The toy, and the population on it")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def draw_block(axes: Axes, run: Run) -> None:
    """The members by fitness and number of copies, the last parent and its child."""
    points = [(float(run.scaled(value)), copies, copies) for _, value, copies in run.members()]
    seen = [x for x, *_ in points if np.isfinite(x)]
    draw_population(axes, points)
    if run.children and np.isfinite(run.children[-1].value):
        last = run.children[-1]
        ends = [float(run.scaled(value)) for value in (last.parent_value, last.value)]
        draw_family(axes, [ends[0], 0], [ends[1], 0], last.entered)
        seen += ends
    axes.axvline(0, ls=":", color="0.5", label="the start")
    axes.set(xlabel=run.label, ylabel="copies", title="The population by fitness")
    axes.set_xlim(min(*seen, -1) - 1, max(*seen, 1) + 1)  # room for words
    axes.set_ylim(-1, 1.15 * len(run.search.members) + 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_population(axes: Axes, points: Sequence[tuple[float, float, int]]) -> None:
    """Members as circles (x, y, copies), with the number of copies where there are several."""
    xs, ys, _ = zip(*points)
    axes.plot(xs, ys, "o", color="white", mec="black", ms=7, label="member", zorder=3)
    for x, y, copies in points:
        if copies > 1:
            axes.annotate(
                f"{copies} copies",
                (x, y),
                xytext=(9, 9),
                textcoords="offset points",
                bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85},
                annotation_clip=True,
            )


def draw_family(axes: Axes, parent: list[float], child: list[float], accepted: bool) -> None:
    """A parent (x, y), its child (x, y), and a line between them."""
    style: dict[str, Any] = {"color": "white", "mec": "black", "ls": "", "ms": 8}
    axes.plot(*zip(parent, child), "-", color="black", lw=1.2, zorder=4)
    axes.plot(*parent, "s", **style, label="parent", zorder=5)
    style |= {"color": PETROFF[1]} if accepted else {}
    word = "child, accepted" if accepted else "child, rejected"
    axes.plot(*child, "D" if accepted else "X", **style, label=word, zorder=6)


def draw_fitness(axes: Axes, run: Run) -> None:
    """The fitness of each candidate by what became of it, and the best so far."""
    values = run.scaled(np.array([run.first, *(child.value for child in run.children)]))
    best, numbers = np.fmin.accumulate(values), np.arange(len(values))
    finite = np.isfinite(values)
    top = max(values[0], np.quantile(values[finite], 0.9))
    room = max(0.08 * (top - best[-1]), 0.02)
    fates = np.array([0, *(1 if c.best else 2 if c.entered else 3 for c in run.children)])
    looks = {
        "start": ("s", "0.25"),
        "best so far": ("D", PETROFF[1]),
        "accepted": ("o", PETROFF[0]),
        "rejected": ("x", PETROFF[3]),
    }
    for fate, (word, (marker, color)) in enumerate(looks.items()):
        here = (fates == fate) & finite
        shown = np.minimum(values[here], top + room)  # what is far above stands at the upper edge
        axes.plot(
            numbers[here], shown, marker, color=color, ms=5, label=word, clip_on=False, zorder=3
        )
    axes.step(numbers, best, where="post", color="0.25", zorder=1)
    axes.set(xlim=(-0.5, max(10, len(values))), ylim=(best[-1] - room, top + room))
    axes.set(xlabel="candidate", ylabel=run.label, title="Fitness of all candidates")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
