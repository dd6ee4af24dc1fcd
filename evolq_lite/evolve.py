"""The paper's outer loop: passes over the blocks, last to first, a short search at each, a commit.

One visit searches the scales of one block with the loss at the network's output; the best vector is
written into the model before the next block is visited. Going last to first means that, within a
pass, nothing before the visited block has changed yet: one forward pass at its start gives the
inputs of all blocks.

A visit's random numbers depend on the seed and the visit's number only, so a run that goes on from
visit n ends exactly like one that was never stopped. Read with lesson 6.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from evolq_lite.chain import Chain
from evolq_lite.config import SearchConfig
from evolq_lite.fitness import fitness_of
from evolq_lite.genome import Genome, Vector, genome_of
from evolq_lite.objective import BlockObjective, Objective, batches
from evolq_lite.search import EvolQ, RandomSearch, minimize

# Bytes of block inputs to keep; above it they are computed anew at each visit.
TRACE_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: a line of history.jsonl.

    `cycle` 0 is the start of the run, before any mutation. `seconds` counts from the evaluation
    before, so that their sum is the time of the search.
    """

    visit: int
    pass_: int
    block: str
    cycle: int
    fitness: float
    accepted: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields, `pass_` under its plain name."""
        return {key.rstrip("_"): value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Visit:
    """What one visit searches: a label, the segments whose scales it touches, and the genome."""

    label: str
    blocks: tuple[str, ...]
    genome: Genome


def visits_of(chain: Chain, config: SearchConfig) -> list[Visit]:
    """The visits of one pass, in order: blocks, single layers, or everything at once."""
    blocks = chain.searchable if config.order == "first_last" else chain.searchable[::-1]
    if config.granularity == "global":
        return [Visit("all", tuple(blocks), genome_of(chain.model, blocks, config.scales))]
    out = []
    for block in blocks:
        genome = genome_of(chain.model, [block], config.scales)
        if config.granularity == "block":
            out.append(Visit(block, (block,), genome))
            continue
        layers = [
            Visit(n, (block,), Genome((n,), (s,))) for n, s in zip(genome.names, genome.shapes)
        ]
        out += layers if config.order == "first_last" else layers[::-1]
    return out


def evaluations_of(chain: Chain, config: SearchConfig) -> int:
    """How many evaluations a whole run takes: every candidate, and the start once."""
    return config.passes * len(visits_of(chain, config)) * config.cycles + 1


class Searchable(Objective, Protocol):
    """An objective whose best vector can be written into the model."""

    def commit(self, vector: Vector) -> None:
        """Write a vector into the model."""
        ...


class Inputs:
    """The batches that enter a segment, kept for a pass where that is exact and memory allows."""

    def __init__(self, chain: Chain, images: Tensor, batch: int, keep: bool) -> None:
        self.chain, self.images, self.batch, self.keep = chain, images, batch, keep
        self.traces: list[list[Tensor | None]] = []

    def sweep(self) -> None:
        """Start a pass: one forward of all images."""
        self.traces = []
        for x in batches(self.images, self.batch) if self.keep else ():
            searched = [searchable for _, _, searchable in self.chain.segments]
            trace = self.chain.trace(x)
            self.traces.append([t if s else None for t, s in zip(trace, searched)])
            size = sum(t.numel() * t.element_size() for t in self.traces[0] if t is not None)
            if size * len(self.images) / len(x) > TRACE_LIMIT:
                self.keep, self.traces = False, []
                return

    def of(self, segment: int) -> list[Tensor] | None:
        """Inputs of a segment, None if they must be computed; those of later ones are let go."""
        for trace in self.traces:
            trace[segment + 1 :] = [None] * (len(trace) - segment - 1)
        found = [trace[segment] for trace in self.traces]
        return [x for x in found if x is not None] or None


class Notes:
    """Turns what `minimize` reports of one visit into lines of the history."""

    def __init__(
        self,
        visit: tuple[int, int, str],
        best: float | None,
        began: float,
        on_evaluation: Callable[[Evaluation], None],
    ) -> None:
        self.visit, self.best, self.began, self.on_evaluation = visit, best, began, on_evaluation
        self.cycle = 0 if best is None else 1

    def __call__(self, vector: Vector, value: float) -> None:
        """Hear of one candidate, or of the start if its fitness was not known."""
        now, accepted = perf_counter(), self.best is None or value < self.best
        self.on_evaluation(Evaluation(*self.visit, self.cycle, value, accepted, now - self.began))
        self.best, self.cycle = value if accepted else self.best, self.cycle + 1
        self.began = perf_counter()  # what the listener took, a pause maybe, is not the search's


def evolve(
    chain: Chain,
    images: Tensor,
    targets: Tensor,
    config: SearchConfig,
    step: float,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
    on_visit: Callable[[int, float], None] = lambda visits, fitness: None,
    done: int = 0,
    fitness: float | None = None,
    elsewhere: Callable[[Visit], Searchable] | None = None,
) -> float:
    """Search the scales of a calibrated chain, in place; returns the final fitness on `images`.

    `images` (n, channels, height, width) and `targets` (n, classes) are calibration data: the float
    network's logits, no labels. `step` is the mutation width. `on_evaluation` hears of every
    evaluation, and may raise to stop; `on_visit(visits done, fitness)` is called when the model
    holds a finished visit, the moment to save. To go on from there, pass `done` and `fitness`, and
    as `step` what `width_after` says. `elsewhere` makes the objective of a visit, if candidates are
    not to be evaluated here (see `parallel`).
    """
    loss = fitness_of(config.fitness, config.temperature)
    visits = visits_of(chain, config)
    keep = config.order == "last_first" and elsewhere is None
    inputs = Inputs(chain, images, config.batch, keep)
    for number in range(done, config.passes * len(visits)):
        visit, began = visits[number % len(visits)], perf_counter()
        if number == done or number % len(visits) == 0:
            inputs.sweep()
        objective: Searchable = (
            elsewhere(visit)
            if elsewhere is not None
            else BlockObjective(
                chain,
                visit.blocks,
                images,
                targets,
                loss,
                config.batch,
                genome=visit.genome,
                inputs=inputs.of(min(chain.index(block) for block in visit.blocks)),
            )
        )
        start = objective.start
        label = (number, number // len(visits), visit.label)
        note = Notes(label, fitness, began, on_evaluation)
        if fitness is None:
            fitness = float(objective(start[None])[0])
            note(start, fitness)
        search = optimizer_of(config, start, fitness, step, number)
        vector, fitness = minimize(objective, search, config.cycles, note, config.parallel)
        step = search.step  # an adaptive one goes on where the last visit left it
        objective.commit(vector)
        on_visit(number + 1, fitness)
    assert fitness is not None
    return fitness


def optimizer_of(
    config: SearchConfig, start: Vector, value: float, step: float, visit: int
) -> RandomSearch:
    """The optimiser of one visit; its seed comes from the run's seed and the visit's number."""
    seed, relative = 1_000_003 * config.seed + visit, config.mutation != "absolute"
    if config.algorithm == "random":
        return RandomSearch(start, value, step, seed, relative)
    adapt = config.mutation == "adaptive"
    return EvolQ(start, value, step, config.population, config.tournament, seed, relative, adapt)


def width_after(config: SearchConfig, step: float, accepted: Iterable[bool]) -> float:
    """The mutation width after candidates that were accepted or not, the start left out."""
    for success in accepted if config.mutation == "adaptive" else ():
        step = EvolQ.adapted(step, success)
    return step
