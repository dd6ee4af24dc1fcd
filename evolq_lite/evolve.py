"""The paper's outer loop: passes over the blocks, last to first, a short search at each, a commit.

    for each pass
        for each block, last to first
            search the block's scales, a few candidates; the loss is that of the whole network
            write the best vector into the model

Going last to first means that, within a pass, nothing before the visited block has changed yet: one
forward pass at its start gives the inputs of all blocks.

`evolve` is a generator: it yields what has happened, and whoever iterates prints, draws, writes to
disk, or stops with `break`.

A visit's random numbers depend on the seed and the visit's number only, and an optimizer learns
nothing but candidates and their values. So a run's history is the run: with the values of an
earlier, stopped run as `past`, the same candidates are drawn and told the same values, without one
forward pass, and the search continues from there as if it had never been stopped. Read with
lesson 6.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from evolq_lite.chain import Chain
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.fitness import fitness_of
from evolq_lite.genome import Genome, Vector, genome_of
from evolq_lite.objective import BlockObjective, Population, Values, batches
from evolq_lite.racing import Race, check_batches
from evolq_lite.rounding import freeze_integers
from evolq_lite.search import EvolQ, RandomSearch

# Bytes of block inputs to keep; above it they are computed anew at each visit.
TRACE_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Evaluated:
    """An event: a vector of scales was evaluated; one line of history.jsonl.

    `cycle` 0 is the start of the run, before any mutation. `seconds` counts from the event before,
    so that their sum is the time of the search. `share` is the part of the calibration batches that
    was computed: below 1 where racing dropped the candidate, whose `fitness` is then a forecast.
    """

    visit: int
    pass_: int
    block: str
    cycle: int
    fitness: float
    accepted: bool
    seconds: float
    share: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The fields, `pass_` under its plain name; a share only where it is not the whole."""
        named = {key.rstrip("_"): value for key, value in asdict(self).items()}
        return named if self.share < 1 else {k: v for k, v in named.items() if k != "share"}


@dataclass(frozen=True)
class Committed:
    """An event: the model holds the best vector of a visit; `visits` are done, `fitness` is its."""

    visits: int
    fitness: float


Event = Evaluated | Committed


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


class Inputs:
    """The batches that enter a segment, kept from pass to pass where memory allows.

    They are exact: a commit to a segment changes what enters the later ones, and only that is
    computed again, when it is asked for.
    """

    def __init__(self, chain: Chain, images: Tensor, batch: int, keep: bool) -> None:
        self.chain, self.images, self.batch, self.keep = chain, images, batch, keep
        self.last = chain.index(chain.searchable[-1])  # what follows it is nobody's input
        self.traces: list[list[Tensor | None]] = []  # per batch, the input of each segment
        self.valid = 0  # inputs of the segments up to this one are those of the present model

    def change(self, segment: int) -> None:
        """Other scales were written into a segment."""
        self.valid = min(self.valid, segment)

    def sweep(self) -> None:
        """One forward of all images, from the first changed segment to the last that is searched.

        What enters segments that are not searched is not kept.
        """
        searched = [searchable for _, _, searchable in self.chain.segments]
        for i, x in enumerate(batches(self.images, self.batch)):
            before = self.traces[i] if self.traces[i:] else [x]
            # the first segment's input is the images, whether it is kept or not
            entry = before[self.valid] if self.valid else x
            assert entry is not None
            after = self.chain.trace(entry, self.last, self.valid)
            kept = [t if s else None for t, s in zip(after, searched[self.valid :])]
            self.traces[i : i + 1] = [[*before[: self.valid], *kept]]
            size = sum(t.numel() * t.element_size() for t in self.traces[0] if t is not None)
            if size * len(self.images) / len(x) > TRACE_LIMIT:
                self.keep, self.traces = False, []
                return
        self.valid = self.last

    def of(self, segment: int) -> list[Tensor] | None:
        """Inputs of a segment, None if they must be computed."""
        if self.keep and (not self.traces or segment > self.valid):
            self.sweep()
        found = [trace[segment] for trace in self.traces]
        return [x for x in found if x is not None] or None


def evolve(
    chain: Chain,
    images: Tensor,
    targets: Tensor,
    config: SearchConfig,
    step: float | None = None,
    past: Iterable[Evaluated] = (),
    elsewhere: Callable[[Visit], Callable[[Population], Values]] | None = None,
    visits_done: int = 0,
    fitness: float | None = None,
) -> Iterator[Event]:
    """Search the scales of a calibrated chain, in place; yields each evaluation and each commit.

    `images` (n, channels, height, width) and `targets` (n, classes) are calibration data: the float
    network's logits, no labels. `step` is the mutation width; None is the config's for the
    network's weight bits. `past` holds the evaluations of a stopped run with the same arguments,
    from its start: they are replayed, and yielded again as they were; ValueError if they belong to
    another run. `elsewhere` makes what evaluates the candidates of a visit, if that is not to be
    done here (see `runs.workers`). After a search of something else, `visits_done` are its visits,
    which are not counted again, and `fitness` is what the scales are known to be worth.
    """
    if step is None:
        step = config.width(cast(QuantConfig, chain.model.quant_config).weight_bits)
    if config.racing:
        check_batches(len(images), config.batch)
    if config.integers == "frozen":
        freeze_integers(chain.model)
    visits, known = visits_of(chain, config), deque(past)
    inputs = Inputs(chain, images, config.batch, config.order == "last_first" and elsewhere is None)
    make = elsewhere or partial(objective_of, chain, images, targets, config, inputs)
    race = Race() if config.racing else None
    for pass_ in range(config.passes):
        for number, visit in enumerate(visits, visits_done + pass_ * len(visits)):
            began = perf_counter()
            replayed = len(known) >= config.cycles + (fitness is None)
            objective = None if replayed else make(visit)
            start = visit.genome.read(chain.model)
            if fitness is None:
                fitness = float(evaluate(known, objective, start[None])[0])
                seconds = perf_counter() - began
                event = Evaluated(number, pass_, visit.label, 0, fitness, True, seconds)
                yield recorded(known, event)
                began = perf_counter()  # what the caller took, a pause maybe, is not the search's
            optimizer = optimizer_of(config, start, fitness, step, number)
            if race is not None and isinstance(objective, BlockObjective):
                objective = race.among(objective, optimizer)
            cycle = 0
            while cycle < config.cycles:
                population = optimizer.ask(min(config.parallel, config.cycles - cycle))
                values = evaluate(known, objective, population)
                optimizer.tell(population, values)
                shares = race.take_shares(len(values)) if race else [1.0] * len(values)
                for value, share in zip(values.tolist(), shares):
                    cycle, accepted = cycle + 1, value < fitness
                    fitness = value if accepted else fitness
                    seconds = perf_counter() - began
                    event = Evaluated(
                        number, pass_, visit.label, cycle, value, accepted, seconds, share
                    )
                    yield recorded(known, event)
                    began = perf_counter()
            best, fitness = optimizer.best
            step = optimizer.step  # an adaptive width continues where the last visit left it
            visit.genome.write(chain.model, best)
            if not torch.equal(best, start):
                inputs.change(first_of(chain, visit))
            yield Committed(number + 1, fitness)


def evaluate(
    known: deque[Evaluated],
    objective: Callable[[Population], Values] | None,
    population: Population,
) -> Values:
    """Values (p,) of candidates (p, d): what a stopped run recorded first, then new ones."""
    values = torch.tensor([event.fitness for event in islice(known, len(population))])
    if len(values) == len(population):
        return values
    assert objective is not None
    return torch.cat([values, objective(population[len(values) :])])


def recorded(known: deque[Evaluated], event: Evaluated) -> Evaluated:
    """The event as a stopped run recorded it, or the new one; ValueError if the two differ."""
    if not known:
        return event
    old = known.popleft()
    same = replace(old, seconds=0.0, share=1.0) == replace(event, seconds=0.0, share=1.0)
    if not same and event.fitness == event.fitness:
        raise ValueError(
            f"the history belongs to another run: it has {old.block}, cycle {old.cycle} where this "
            f"run has {event.block}, cycle {event.cycle}"
        )
    return old


def first_of(chain: Chain, visit: Visit) -> int:
    """The first segment that a visit may change."""
    return min(chain.index(block) for block in visit.blocks)


def objective_of(
    chain: Chain,
    images: Tensor,
    targets: Tensor,
    config: SearchConfig,
    inputs: Inputs,
    visit: Visit,
) -> BlockObjective:
    """What a visit minimizes, on kept inputs where there are any."""
    return BlockObjective(
        chain,
        visit.blocks,
        images,
        targets,
        fitness_of(config.fitness, config.temperature),
        config.batch,
        genome=visit.genome,
        inputs=inputs.of(first_of(chain, visit)),
    )


def optimizer_of(
    config: SearchConfig, start: Vector, value: float, step: float, visit: int
) -> RandomSearch:
    """The optimizer of one visit; its seed comes from the run's seed and the visit's number."""
    seed, relative = 1_000_003 * config.seed + visit, config.mutation != "absolute"
    if config.algorithm == "random":
        return RandomSearch(start, value, step, seed, relative)
    adapt = config.mutation == "adaptive"
    return EvolQ(start, value, step, config.population, config.tournament, seed, relative, adapt)
