"""Lesson 5: the paper's search at work, a candidate at a time, on a toy and on one real block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter, sleep
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import nn

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize, twin
from evolq_lite.data import Demo, load_demo
from evolq_lite.genome import Vector
from evolq_lite.landscape import JaggedBowl
from evolq_lite.objective import BlockObjective, Objective
from evolq_lite.panels.base import IntSlider, LogSlider, Panel, control, small_button
from evolq_lite.panels.drawing import BLUE, DASHES, GRAY, ORANGE, RED, Drawing, Plot
from evolq_lite.panels.worker import Tick
from evolq_lite.search import EvolQ

TOY, BLOCK = "toy: 2 scales", "blocks.5 of the ViT: 192 scales"
IMAGES = 100  # calibration images of the real block
PLAY = 100  # candidates that Play makes
PACE = 0.1  # seconds for a candidate while playing: an eye wants to follow
PICTURE = 0.1  # seconds between two pictures while playing
ANNOUNCED = 10  # candidates between two sentences while playing: a screen reader reads them


@cache
def relief() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The toy within its reach of the centre: scales 1, scales 2, values."""
    return relief_around(JaggedBowl.centre, JaggedBowl.reach, 241)


def relief_around(
    middle: Vector, half: float, points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The toy within `half` of a place (2,): scales 1, scales 2, values (points, points)."""
    toy = JaggedBowl()
    xs, ys = (middle[:, None] + torch.linspace(-half, half, points)).unbind()
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


def objective_of(landscape: str, tick: Tick) -> JaggedBowl | BlockObjective:
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
        return "fitness (lower is better)" if self.toy else "fitness minus start, 1e-3"

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
    presets = {
        "Narrow": {"landscape": TOY, "mutation": 1e-4},
        "Wide": {"landscape": TOY, "mutation": 0.03},
        "Any parent": {"landscape": TOY, "mutation": 1e-3, "tournament": 1},
        "Real block": {"landscape": BLOCK, "mutation": 1e-3, "tournament": 10, "seed": 0},
    }

    def __init__(self, name: str | None = None, made: int = 0, **values: Any) -> None:
        if isinstance(made, bool) or not isinstance(made, int) or made < 0:
            raise ValueError(f"made is {made!r}; give a whole number of candidates, 0 or more")
        self.running: Run | None = None  # made by the worker; None: begin anew
        self.target = made  # candidates wanted; the worker only reads it
        self.playing = False
        self.landscape = values.get("landscape", TOY)  # of the picture
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
        """Step, Play, Pause, Restart and Cancel before the rest."""
        named = []
        for word, tooltip, on_click in (
            ("Step", "Make one candidate", self.step),
            ("Play", f"Make {PLAY} candidates, one after another", self.play),
            ("Pause", "Stop after the current candidate", self.pause),
            ("Restart", "Start over from the first scales", self.restart),
        ):
            button = small_button(word, tooltip, on_click)
            button.add_class(f"evolq-{word.lower()}")
            named.append(button)
        self.cancel_button.on_click(lambda _: self.pause())
        return [self.row(*named, self.cancel_button)]

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
        """Other values are another search; another landscape clears the picture at once."""
        self.playing, self.target, self.running = False, 0, None
        super().changed(change)
        if (landscape := self.values["landscape"]) != self.landscape:
            self.landscape = landscape
            self.view.value = draw_waiting(landscape).html()

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
        announced = begun // ANNOUNCED
        while (made := len(run.children)) < (target := self.target):
            before = perf_counter()
            run.step()
            share = (made + 1 - begun) / (target - begun)
            tick(share)
            if made + 1 < target and self.playing:
                if perf_counter() - shown > PICTURE:
                    shown = perf_counter()
                    picture, words = self.draw(run)
                    self.view.value = picture.html()
                    if len(run.children) // ANNOUNCED > announced:
                        announced = len(run.children) // ANNOUNCED
                        self.say(words)
                sleep(max(0.0, PACE - (perf_counter() - before)))
                tick(share)
        return run

    def draw(self, result: Run, **values: Any) -> tuple[Drawing, str]:
        """The population on its landscape, and the fitness of all candidates."""
        said = result.words()
        where = "a jagged bowl of two scales" if result.toy else "the attention scales of blocks.5"
        best = ", ".join(f"{copies} with {value:.5f}" for _, value, copies in result.members()[:3])
        alt = (
            f"Evolution on {where} after {len(result.children)} candidates. Best fitness "
            f"{result.search.best[1]:.5f}. Members, best first: {best}."
        )
        shown = [draw_toy(result), draw_zoom(result)] if result.toy else [draw_block(result)]
        return Drawing(alt, *shown, draw_fitness(result)), said


def draw_waiting(landscape: str) -> Drawing:
    """Empty axes, until the first value of a landscape is there."""
    title = f"Preparing {landscape.partition(':')[0]} …"
    plot = Plot(title, (-1, 1), (-1, 16), "fitness", "copies", width=440, height=400, rows=2)
    return Drawing(f"Empty axes: {landscape.partition(':')[0]} is being prepared.", plot)


def draw_toy(run: Run) -> Plot:
    """A map, the trails, the members with their numbers of copies, the last parent and its child.

    A child that has left the map is drawn at its edge.
    """
    xs, ys, values = relief()
    ends = (float(xs[0]), float(xs[-1])), (float(ys[0]), float(ys[-1]))
    plot = Plot("The toy, dark is low", *ends, "scale 1", "scale 2", width=358, height=400, rows=2)
    plot.cells(values, (float(values.min()), 1.6), xs, ys)
    low, high = (torch.tensor(side) for side in zip(*ends))
    draw_trails(plot, run, low, high)
    draw_members(plot, [(*vector.tolist(), value, n) for vector, value, n in run.members()])
    if run.children:
        last = run.children[-1]
        inside = last.vector.clamp(low, high)
        draw_family(plot, last.parent.tolist(), inside.tolist(), last)
        if not torch.equal(inside, last.vector):
            where = "end" if inside[0] > run.objective.start[0] else "start"
            x, y = inside.tolist()
            plot.words(x, y, "outside the map", where)
    return plot


def draw_trails(plot: Plot, run: Run, low: Vector, high: Vector) -> None:
    """From parent to child, for all that joined the population; a dot where a child was dropped."""
    for child in run.children[:-1]:
        place = child.vector.clamp(low, high).tolist()
        if child.entered:
            xs, ys = zip(child.parent.tolist(), place)
            look = (ORANGE, 1.8) if child.best else ("#fff", 0.9)
            plot.line(xs, ys, look[0], width=look[1], edge="#000")
        else:
            plot.points(place[:1], place[1:], RED, "cross", 1.8)
    if any(child.best for child in run.children[:-1]):
        plot.line([], [], ORANGE, label="trail of the best", width=1.8, edge="#000")


def draw_zoom(run: Run) -> Plot:
    """The map around the best member, as wide as a mutation reaches: the pits can be seen."""
    best, step = run.search.best[0], float(run.values["mutation"])
    half = min(max(1.5 * step, 1e-5), JaggedBowl.reach)
    xs, ys, values = relief_around(best, half, 101)
    ends = (float(xs[0]), float(xs[-1])), (float(ys[0]), float(ys[-1]))
    title = f"Around the best, {JaggedBowl.reach / half:.0f} times larger"
    ticks = [[(float(a[k]), f"{a[k]:.6g}") for k in (20, 80)] for a in (xs, ys)]
    plot = Plot(
        title,
        *ends,
        "scale 1",
        "scale 2",
        width=346,
        height=400,
        rows=2,
        left=78,
        xticks=ticks[0],
        yticks=ticks[1],
    )
    plot.cells(values, (float(values.min()), float(values.max())), xs, ys)
    corner = float(xs[50]) - step, float(ys[50]) - step
    square = [corner[0], corner[0] + 2 * step, corner[0] + 2 * step, corner[0], corner[0]]
    rise = [corner[1], corner[1], corner[1] + 2 * step, corner[1] + 2 * step, corner[1]]
    plot.line(square, rise, "#fff", DASHES[1], "where its children can be", 1.4, "#000")
    everywhere = torch.full((2,), torch.inf)
    draw_trails(plot, run, -everywhere, everywhere)  # what lies outside is cut off
    draw_members(plot, [(*vector.tolist(), value, n) for vector, value, n in run.members()])
    return plot


def draw_block(run: Run) -> Plot:
    """The members by fitness and number of copies, the last parent and its child."""
    members = [(float(run.scaled(value)), n, value, n) for _, value, n in run.members()]
    seen = [x for x, *_ in members if np.isfinite(x)]
    last = run.children[-1] if run.children else None
    family = [float(run.scaled(v)) for v in (last.parent_value, last.value)] if last else []
    seen += [x for x in family if np.isfinite(x)]
    limits = min(*seen, -1) - 1, max(*seen, 1) + 1  # room for words
    high = 1.15 * len(run.search.members) + 1
    title = "The population by fitness"
    plot = Plot(title, limits, (-1, high), run.label, "copies", width=440, height=400, rows=2)
    plot.uprights([0], GRAY, DASHES[1], "the start")
    draw_members(plot, members)
    if last and np.isfinite(family).all():
        draw_family(plot, [family[0], 0], [family[1], 0], last)
    return plot


def draw_members(plot: Plot, members: Sequence[tuple[float, float, float, int]]) -> None:
    """Members (x, y, value, copies) as circles, with the number of copies where it is not 1."""
    for x, y, value, copies in members:
        words = f"fitness {value:.5f}, {copies} {'copy' if copies == 1 else 'copies'}"
        plot.points([x], [y], "#fff", size=5, titles=[words], edge="#000")
        if copies > 1:
            plot.words(x, y, f"{copies} copies")
    plot.points([], [], "#fff", label="member", edge="#000")


def draw_family(plot: Plot, parent: list[float], child: list[float], last: Child) -> None:
    """A parent (x, y), its child (x, y), and a line between them."""
    xs, ys = zip(parent, child)
    plot.line(xs, ys, "#000", width=3)
    plot.line(xs, ys, "#fff", width=1.2)
    plot.points(xs[:1], ys[:1], "#fff", "square", 6, label="parent", edge="#000")
    if last.best:
        words, color, shape = "child, accepted", ORANGE, "diamond"
    elif last.entered:
        words, color, shape = "child, joined", BLUE, "up"
    else:
        words, color, shape = "child, dropped", RED, "plus"
    plot.points(xs[1:], ys[1:], color, shape, 7, titles=[words], label=words, edge="#000")


def draw_fitness(run: Run) -> Plot:
    """The fitness of each candidate by what became of it, and the best so far."""
    values = run.scaled(np.array([run.first, *(child.value for child in run.children)]))
    best, numbers = np.fmin.accumulate(values), np.arange(len(values))
    finite = np.isfinite(values)
    top = max(values[0], np.quantile(values[finite], 0.9))
    room = max(0.08 * (top - best[-1]), 0.02)
    plot = Plot(
        "Fitness of all candidates",
        (-0.5 - len(values) / 60, max(10, len(values))),
        (best[-1] - room, top + room),
        "candidate",
        run.label,
        width=346,
        height=400,
        rows=2,
    )
    fates = np.array([0, *(1 if c.best else 2 if c.entered else 3 for c in run.children)])
    looks = {
        "start": ("square", GRAY),
        "accepted: best so far": ("diamond", ORANGE),
        "joined the population": ("circle", BLUE),
        "dropped": ("cross", RED),
    }
    plot.steps(numbers, best, color="currentColor", width=1.2)
    for fate, (word, (shape, color)) in enumerate(looks.items()):
        here = (fates == fate) & finite
        shown = np.minimum(values[here], top + 0.7 * room)  # what is far above is at the top
        titles = [f"candidate {i}: {value:.5f}" for i, value in zip(numbers[here], values[here])]
        plot.points(numbers[here], shown, color, shape, 4, titles=titles, label=word)
    return plot
