"""Lesson 5: seven searches and Adam race on one objective, at equal cost; a bet comes first.

Cost is counted as in C3: a candidate is one forward pass, a gradient three (`descent.py`).
"""

from collections import Counter
from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any, Protocol

import ipywidgets as W
import numpy as np

from evolq_lite.descent import COST_OF_GRADIENT, Descent, Differentiable
from evolq_lite.genome import Vector
from evolq_lite.landscape import JaggedBowl
from evolq_lite.objective import BlockObjective, Objective
from evolq_lite.panels.base import IntSlider, Panel, Values, control, small_button
from evolq_lite.panels.drawing import COLORS, DASHES, Drawing, Plot
from evolq_lite.panels.evolution import BLOCK, TOY, objective_of
from evolq_lite.panels.worker import Tick
from evolq_lite.search import (
    SPSA,
    CoordinateSearch,
    EvolQ,
    LogSpace,
    Optimizer,
    RandomSearch,
    SepCMA,
)

NO_BET = "place your bet"
Make = Callable[[Vector, float, int], Optimizer]  # from start, value, seed
# Steps are the paper's 0.001, or 1 % of each scale; one coordinate at a time goes ten times as far.
SEARCHES: dict[str, Make] = {
    "random search": lambda x, value, seed: RandomSearch(x, value, 1e-3, seed),
    "EvolQ (paper)": lambda x, value, seed: EvolQ(x, value, 1e-3, seed=seed),
    "EvolQ, relative": lambda x, value, seed: EvolQ(x, value, 0.01, seed=seed, relative=True),
    "EvolQ, adaptive": lambda x, value, seed: EvolQ(
        x, value, 0.01, population=1, tournament=1, seed=seed, relative=True, adapt=True
    ),
    "SPSA": lambda x, value, seed: LogSpace(x, lambda y: SPSA(y, value, 0.01, seed)),
    "coordinates": lambda x, value, seed: LogSpace(
        x, lambda y: CoordinateSearch(y, value, 0.1, seed)
    ),
    "separable CMA-ES": lambda x, value, seed: LogSpace(x, lambda y: SepCMA(y, value, 0.01, seed)),
}
ADAM, ADAM_STEP = "Adam (gradient)", 0.01  # of each scale, as the searches
RUNNERS = (*SEARCHES, ADAM)
OUTLINES = ("circle", "square", "diamond", "up", "down", "plus", "cross", "star")
SIMULATED = (
    "A gradient cannot pass through integers: Adam's passes simulate them in float, the others' "
    "compute with them, which gives the same values up to the noise floor."
)
SECONDS = 5.0  # a race lasts at least so long: an eye wants to follow
PICTURE = 0.15  # seconds between two pictures


class Runner(Protocol):
    """Who races: `spend` pays for one forward pass, and returns the best value known by then."""

    def spend(self) -> float:
        """Pay for one more forward pass."""
        ...


class Search:
    """A search: each forward pass is a candidate."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer

    def spend(self) -> float:
        """Ask, evaluate, tell."""
        asked = self.optimizer.ask(1)
        self.optimizer.tell(asked, self.objective(asked))
        return self.optimizer.best[1]


class Gradient:
    """Adam: a step, and the value where it began, once its three forward passes are paid for.

    It takes no random numbers, so every seed is the same.
    """

    def __init__(self, objective: Differentiable, first: float) -> None:
        self.descent = Descent(objective, "adam", ADAM_STEP)
        self.first, self.paid = first, 0

    def spend(self) -> float:
        """Save up; step when it is enough."""
        self.paid += 1
        if self.paid % COST_OF_GRADIENT == 0 and not self.descent.ended:
            self.descent.step()
        return min(self.first, self.descent.best[1])


class Race:
    """The best value of each runner after each candidate; all have had equally many."""

    def __init__(self, landscape: str, first: float, names: list[str]) -> None:
        self.landscape, self.first = landscape, first
        self.best: dict[str, list[float]] = {name: [first] for name in names}

    @property
    def cost(self) -> int:
        """Forward passes of each runner so far."""
        return len(next(iter(self.best.values()))) - 1

    def ranking(self) -> list[str]:
        """Names, the lowest value first."""
        return sorted(self.best, key=lambda name: self.best[name][-1])

    def shown(self, name: str) -> np.ndarray:
        """A runner's values for a picture: those of the block differ late in their digits."""
        values = np.array(self.best[name])
        return values if self.landscape == TOY else 1e3 * (values - self.first)

    @property
    def label(self) -> str:
        """What `shown` values are."""
        return "best fitness" if self.landscape == TOY else "best fitness minus start, 1e-3"


class RacePanel(Panel):
    """A landscape, a budget, a seed and a bet; Race sends all optimizers off side by side."""

    slow = True
    again = "Press Race to try again."
    presets = {"Toy": {"landscape": TOY}, "Real block": {"landscape": BLOCK}}

    def __init__(self, name: str | None = None, **values: Any) -> None:
        self.wins: Counter[tuple[str, str]] = Counter()  # by landscape and name
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """Four controls."""
        return {
            "landscape": control(
                W.Dropdown,
                "Landscape",
                "The function that is minimized",
                options=[TOY, BLOCK],
                value=TOY,
            ),
            "bet": control(
                W.Dropdown,
                "Your bet",
                "Who will have the lowest fitness when the budget is spent?",
                options=[NO_BET, *RUNNERS],
            ),
            "budget": control(
                IntSlider,
                "Budget",
                "Forward passes that each may spend",
                value=60,
                min=10,
                max=200,
            ),
            "seed": control(IntSlider, "Seed", "Seed of the random draws", value=0, min=0, max=99),
        }

    def buttons(self) -> list[W.Widget]:
        """Race and Cancel before the rest."""
        self.race_button = small_button("Race", "Send all optimizers off", self.race)
        self.race_button.add_class("evolq-race")
        return [self.row(self.race_button, self.cancel_button)]

    def open(self) -> None:
        """The starting line."""
        self.changed(None)

    def changed(self, change: Any) -> None:
        """Other values are another race, which waits for its start."""
        note, self.note = self.note, ""
        if change is None or change.owner is not self.controls["bet"]:
            self.worker.forget()
            self.busy(False)
            start = Race(self.values["landscape"], self.first_value(), list(RUNNERS))
            self.view.value = self.draw(start, **self.values)[0].html()
        asked = (
            "Press Race." if self.values["bet"] != NO_BET else "Bet on a winner, then press Race."
        )
        self.say(f"{note}{asked}")

    def first_value(self) -> float:
        """Where all start, which is 0 where a picture shows changes."""
        toy = JaggedBowl()
        return float(toy(toy.start[None])[0]) if self.values["landscape"] == TOY else 0.0

    def race(self) -> None:
        """Start, if there is a bet."""
        if self.values["bet"] == NO_BET:
            self.say("Bet on a winner first: whoever has guessed sees more.")
            return
        self.say("They are off …")
        self.worker.request(self.job())

    def busy(self, yes: bool) -> None:
        """No second start, and no other bet, while they run."""
        super().busy(yes)
        self.race_button.disabled = self.controls["bet"].disabled = yes

    def compute(self, tick: Tick, **values: Any) -> Race:
        """Let each spend a forward pass in turn, with pictures in between."""
        objective = objective_of(values["landscape"], tick)
        first = float(objective(objective.start[None])[0])
        runners = line_up(objective, first, values["seed"])
        race = Race(values["landscape"], first, list(runners))
        drawn = perf_counter()
        for cost in range(1, values["budget"] + 1):
            began = perf_counter()
            for name, runner in runners.items():
                race.best[name].append(runner.spend())
                tick(cost / values["budget"])
            if perf_counter() - drawn > PICTURE:
                drawn = perf_counter()
                self.view.value = self.draw(race, **values)[0].html()
            sleep(max(0.0, SECONDS / values["budget"] - (perf_counter() - began)))
        self.wins[values["landscape"], race.ranking()[0]] += 1
        return race

    def draw(self, result: Race, **values: Any) -> tuple[Drawing, str]:
        """Values over cost, and the ranking."""
        order = result.ranking()
        leader = order[0]
        standing = ", ".join(f"{name} {result.shown(name)[-1]:.3g}" for name in order[:3])
        if result.cost == 0:
            alt = f"The starting line of a race of {len(order)} optimizers over their cost."
        else:
            alt = (
                f"Race on the {result.landscape.partition(':')[0]} after {result.cost} forward "
                f"passes each, {result.label}: {standing}."
            )
        said = f"{leader} wins, seed {values['seed']}: {result.label} {standing}. "
        if (bet := values["bet"]) in order:
            place = order.index(bet) + 1
            said += "You won your bet." if place == 1 else f"Your bet, {bet}, is number {place}."
        wins = {name: n for (where, name), n in self.wins.items() if where == result.landscape}
        if sum(wins.values()) > 1:
            tally = ", ".join(f"{name} {n}" for name, n in sorted(wins.items()))
            said += f" Wins on this landscape so far: {tally}."
        if result.landscape == BLOCK:
            said += f" {SIMULATED}"
        if absent := [name for name in RUNNERS if name not in result.best]:
            said += f" Not at the start, for lack of a package: {', '.join(absent)}."
        return Drawing(alt, draw_race(result, values), draw_ranking(result)), said


def line_up(objective: JaggedBowl | BlockObjective, first: float, seed: int) -> dict[str, Runner]:
    """All runners at the start, but those whose package is missing."""
    runners: dict[str, Runner] = {}
    for name, make in SEARCHES.items():
        try:
            runners[name] = Search(objective, make(objective.start, first, seed))
        except ValueError:  # `draw` says so
            continue
    runners[ADAM] = Gradient(objective, first)
    return runners


def look_of(name: str) -> tuple[str, str, str]:
    """A runner's color, dash and shape, in every picture the same."""
    i = RUNNERS.index(name)
    return COLORS[i % len(COLORS)], DASHES[i % len(DASHES)], OUTLINES[i % len(OUTLINES)]


def limits_of(result: Race) -> tuple[float, float]:
    """The range of all values, with some room."""
    every = np.concatenate([result.shown(name) for name in result.best])
    low, high = float(every.min()), float(every.max())
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def draw_race(result: Race, values: Values) -> Plot:
    """The best value of each runner over its cost."""
    plot = Plot(
        "Best value so far",
        (-0.02 * values["budget"], 1.03 * values["budget"]),
        limits_of(result),
        "cost in forward passes",
        result.label,
        width=560,
        height=400,
        rows=3,
        left=64,
    )
    numbers = np.arange(result.cost + 1)
    for name in result.best:
        color, dash, shape = look_of(name)
        ys = result.shown(name)
        plot.steps(numbers, ys, color=color, dash=dash, width=2)
        titles = [f"{name}: {ys[-1]:.4g}"]
        plot.points(numbers[-1:], ys[-1:], color, shape, 6, titles=titles, label=name)
    return plot


def draw_ranking(result: Race) -> Plot:
    """Where each stands now."""
    order = result.ranking()
    plot = Plot(
        "Now, best on top",
        limits_of(result),
        (len(order) - 0.5, -0.7),
        result.label,
        width=400,
        height=400,
        rows=3,
        left=130,
        yticks=list(enumerate(order)),
    )
    for place, name in enumerate(order):
        color, _, shape = look_of(name)
        end = float(result.shown(name)[-1])
        plot.points([end], [place], color, shape, 6, titles=[f"{name}: {end:.4g}"])
    return plot
