"""Bit-widths as a genome: which layers deserve more bits than others? Read with lesson 8.

A network of 2.5-bit weights has no layer of 2.5 bits. Some layers have 2 and others 3, or 4 beside
more of 2, and which ones is a choice among 7^24 even for the small network embedded here. Bits are
whole numbers, so there is no gradient to follow: this is where a search by evolution is at home.

    genome    b = (b_1 ... b_L), the bits of each layer's weights
    budget    n_1 b_1 + ... + n_L b_L  <=  mean bits * (n_1 + ... + n_L),    n_l weights in layer l
    loss      the fitness of the whole network on calibration images, as in the search of scales

*A candidate must be cheap.* Rounding a layer well takes seconds (see `rounding`), so it is done
beforehand: the whole network is rounded once at each width, which fills a table of integers, scale
and bias for every (layer, bits). A candidate takes its rows from that table and costs one forward
of the calibration images. What this leaves out: a row was chosen for the inputs that a network of
*one* width makes, while in a mixed network earlier layers have other bits.

*A mutation must keep the budget.* One layer goes up, others go down until the network fits again,
and what is left over is spent. Layers differ in size, so a mutation may touch several of them; the
budget is never exceeded, and no layer could have one step more within it.

The start is as even as the budget allows. Layers with bits of their own (`edge_bits`), or whose
weights stay float, are no part of the genome, nor of the mean.

`evolve_both` goes on from the best bits with the block-wise search of scales: what can be counted
first, then what can be turned. The bits stay, so the budget does.

Rivals, at the same cost or less: the even start itself; `rank_layers`, which measures one layer at
a time and then decides all at once; and random walks from the start, whatever has been learned.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import torch
from torch import Tensor, nn

from evolq_lite.chain import Chain, chain_of
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import correct_biases, edge_layers, twin
from evolq_lite.evolve import Committed, Evaluated, Event, Visit, evaluate, evolve, recorded
from evolq_lite.fast import set_execution
from evolq_lite.fitness import Fitness, fitness_of, info_nce
from evolq_lite.genome import Vector
from evolq_lite.numerics import IntRange
from evolq_lite.objective import Population, Values, batches
from evolq_lite.rounding import (
    Layer,
    Rounded,
    integers_of,
    quant_layers,
    round_weights,
    set_integers,
)
from evolq_lite.search import EvolQ, RandomSearch

TRIES = 100  # moves that look for a genome which has not been tried


# The genome and its budget


@dataclass(frozen=True)
class BitsGenome:
    """The layers whose bits are searched, and what they may cost together.

    A vector (d,) holds a whole number for each layer, as float like all vectors of searches.
    `budget` is in bits of weights; `widths` are the bits that a layer may have, ascending.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # weights in each layer
    widths: tuple[int, ...]
    budget: int

    def __len__(self) -> int:
        return len(self.names)

    def cost(self, vector: Vector) -> int:
        """Bits that all weights take together."""
        return sum(n * int(b) for n, b in zip(self.sizes, vector.tolist(), strict=True))

    @property
    def base(self) -> int:
        """The widest width that all layers could have."""
        return max(b for b in self.widths if b * sum(self.sizes) <= self.budget)

    def unpack(self, vector: Vector) -> dict[str, int]:
        """Each layer's bits."""
        return {name: int(b) for name, b in zip(self.names, vector.tolist(), strict=True)}

    def read(self, model: nn.Module) -> Vector:
        """The bits that a network's layers have now."""
        layers = quant_layers(model)
        bits = [layers[name].weight_quant.integers.bits for name in self.names]
        return torch.tensor(bits, dtype=torch.float32)

    def step(self, bits: int, by: int) -> int | None:
        """The next wider (1) or narrower (-1) width, None at the end."""
        i = self.widths.index(bits) + by
        return self.widths[i] if 0 <= i < len(self.widths) else None


def mean_bits(genome: BitsGenome, vector: Vector) -> float:
    """Bits of a weight on average: a layer counts by its number of weights."""
    return genome.cost(vector) / sum(genome.sizes)


def bits_genome(
    qmodel: nn.Module, widths: Iterable[int], mean: float | None = None, size: int | None = None
) -> BitsGenome:
    """The genome of a quantized network, with a budget of `mean` bits a weight or `size` bytes.

    ValueError for a budget that no genome meets, that no choice is left with, or for a network
    without weights to search.
    """
    layers = {
        name: layer.weight.numel()
        for name, layer in quant_layers(qmodel).items()
        if not layer.weight_quant.stays_float and name not in fixed_layers(qmodel)
    }
    if not layers:
        raise ValueError(
            "no layer's bits can be searched: weights stay float, or edge_bits sets all of them"
        )
    weights, ordered = sum(layers.values()), tuple(sorted(widths))
    budget = int(mean * weights) if mean is not None else 8 * cast(int, size)
    least, most = ordered[0] * weights, ordered[-1] * weights
    first = (ordered[1] - ordered[0]) * min(layers.values())  # the least that a choice can cost
    if not least + first <= budget < most:
        told = f"{size} bytes" if mean is None else f"a mean of {mean:g} bits"
        raise ValueError(
            f"{told} leaves no choice: the {len(layers)} layers whose bits are searched take "
            f"{least // 8} bytes at {ordered[0]} bits and {most // 8} at {ordered[-1]}; "
            "give a budget between them"
        )
    return BitsGenome(tuple(layers), tuple(layers.values()), ordered, budget)


def fixed_layers(qmodel: nn.Module) -> list[str]:
    """Layers whose bits are set by `edge_bits`."""
    config = cast(QuantConfig, qmodel.quant_config)
    return [] if config.edge_bits is None else edge_layers(qmodel)


def fill_budget(
    genome: BitsGenome, vector: Vector, generator: torch.Generator | None = None
) -> Vector:
    """Spend what is left: layers go up one step at a time while one fits; in order, or at random.

    Returns a new vector, which no single step up would keep within the budget.
    """
    bits = [int(b) for b in vector.tolist()]
    left = genome.budget - genome.cost(vector)
    while True:
        fits = []
        for i, b in enumerate(bits):
            up = genome.step(b, 1)
            if up is not None and (up - b) * genome.sizes[i] <= left:
                fits.append(i)
        if not fits:
            return torch.tensor(bits, dtype=torch.float32)
        # In order: the least wide first, so that widths stay even.
        i = min(fits, key=lambda i: bits[i]) if generator is None else draw(fits, generator)
        up = cast(int, genome.step(bits[i], 1))
        left -= (up - bits[i]) * genome.sizes[i]
        bits[i] = up


def spread_bits(genome: BitsGenome) -> Vector:
    """The genome that is as even as the budget allows: one width, or two in turn along the network.

    From input to output, a layer gets the wider one when what was saved so far pays for it.
    """
    low = genome.base
    high = genome.step(low, 1) or low
    share = genome.budget / sum(genome.sizes) - low  # to spend, bits a weight
    bits, saved = [], 0.0
    for size in genome.sizes:
        saved += share * size
        wide = saved >= (high - low) * size > 0
        saved -= (high - low) * size * wide
        bits.append(high if wide else low)
    return fill_budget(genome, torch.tensor(bits, dtype=torch.float32))


def mutate_bits(genome: BitsGenome, parent: Vector, generator: torch.Generator) -> Vector:
    """A child within the budget: one layer a step up, others down until it fits, the rest spent."""
    for i in shuffle(range(len(genome)), generator):
        bits = [int(b) for b in parent.tolist()]
        up = genome.step(bits[i], 1)
        if up is None:
            continue
        bits[i] = up
        child = torch.tensor(bits, dtype=torch.float32)
        for j in shuffle((j for j in range(len(genome)) if j != i), generator):
            if genome.cost(child) <= genome.budget:
                break
            down = genome.step(bits[j], -1)
            if down is not None:
                child[j] = down
        if genome.cost(child) <= genome.budget:
            return fill_budget(genome, child, generator)
    return parent.clone()  # no layer can go up, whatever the others save


def shuffle(items: Iterable[int], generator: torch.Generator) -> list[int]:
    """The items in random order."""
    known = list(items)
    return [known[i] for i in torch.randperm(len(known), generator=generator).tolist()]


def draw(items: list[int], generator: torch.Generator) -> int:
    """One of the items."""
    return items[int(torch.randint(len(items), (1,), generator=generator))]


# The table: every layer at every width


@dataclass(frozen=True, eq=False)
class Width:
    """A layer's weights at some bits: what is put into the layer."""

    range: IntRange
    scale: Tensor
    zero_point: Tensor
    bias: nn.Parameter | None
    integers: Tensor | None  # int16, counted from the zero point; None: the float weight's nearest

    def put(self, layer: Layer) -> None:
        """Make a layer hold it, but for the integers, which `set_integers` puts."""
        layer.forget_rounding()
        point = layer.weight_quant
        point.integers, point.zero_point = self.range, self.zero_point
        point.scale = self.scale.clone()  # a search of scales writes into it
        layer.bias = self.bias


def read_widths(network: nn.Module) -> dict[str, Width]:
    """What the layers of a rounded network hold."""
    chosen, found = integers_of(network), {}
    for name, layer in quant_layers(network).items():
        point = layer.weight_quant
        found[name] = Width(
            point.integers,
            point.scale,
            point.zero_point,
            layer.bias,
            chosen.get(f"{name}.integers"),
        )
    return found


def put_widths(network: nn.Module, widths: Mapping[str, Width]) -> None:
    """Make the layers of a network hold these."""
    layers = quant_layers(network)
    integers: dict[str, Tensor] = {}
    for name, width in widths.items():
        width.put(layers[name])
        if width.integers is not None:
            integers |= {f"{name}.integers": width.integers, f"{name}.scale": width.scale}
    set_integers(network, integers)


BitsTable = Mapping[int, Mapping[str, Width]]  # by bits, then by layer


def bits_table(
    qmodel: nn.Module,
    images: Tensor,
    genome: BitsGenome,
    batch: int = 100,
    on_rounded: Callable[[Rounded], None] = lambda event: None,
) -> BitsTable:
    """Round a calibrated network once at each width of its genome; the network stays as it is.

    By the config's `rounding`, on calibration images (n, channels, height, width). Layers that are
    no part of the genome are in the table too: their bits are fixed, their integers are not.
    """
    config = cast(QuantConfig, qmodel.quant_config)
    table: dict[int, dict[str, Width]] = {}
    for bits in genome.widths:
        network = twin(qmodel)
        layers = quant_layers(network)
        for name, layer in layers.items():
            layer.forget_rounding()
            if name in genome.names:
                set_range(layer, bits)
        set_execution(network, config.execution)
        if config.bias_correction:
            with torch.no_grad():
                correct_biases(network, images, batch)
        for event in round_weights(network, images, config.rounding):
            on_rounded(event)
        table[bits] = read_widths(network)
    return table


@torch.no_grad()
def set_range(layer: Layer, bits: int) -> None:
    """Give a layer's weights other bits, and the first scales that the observer finds for them."""
    point = layer.weight_quant
    point.integers = IntRange(bits, signed=point.integers.signed)
    point.observe()
    point(layer.weight)
    point.freeze()


PARTS = ("integers", "scale", "zero_point", "bias")  # of a `Width`, tensors or None


def tensors_of(table: BitsTable) -> dict[str, Tensor]:
    """All tensors of a table by name, to tell it from another, or to send it."""
    return {
        f"{bits}.{name}.{part}": value
        for bits, layers in table.items()
        for name, width in layers.items()
        for part in PARTS
        if (value := getattr(width, part)) is not None
    }


def table_of(tensors: Mapping[str, Tensor], qmodel: nn.Module, genome: BitsGenome) -> BitsTable:
    """The rows of a genome's layers out of what `tensors_of` says, for the same network."""
    layers = quant_layers(qmodel)
    table: dict[int, dict[str, Width]] = {}
    for bits in genome.widths:
        table[bits] = {}
        for name in genome.names:
            parts = {part: tensors.get(f"{bits}.{name}.{part}") for part in PARTS}
            bias = parts["bias"]
            table[bits][name] = Width(
                IntRange(bits, signed=layers[name].weight_quant.integers.signed),
                cast(Tensor, parts["scale"]),
                cast(Tensor, parts["zero_point"]),
                None if bias is None else nn.Parameter(bias, requires_grad=False),
                parts["integers"],
            )
    return table


def write_bits(
    model: nn.Module,
    genome: BitsGenome,
    table: BitsTable,
    vector: Vector,
    held: Vector | None = None,
) -> None:
    """Put the table's integers for these bits into a network; `held` is what it holds already."""
    before = genome.unpack(held) if held is not None else {}
    wanted = genome.unpack(vector)
    put_widths(model, {n: table[b][n] for n, b in wanted.items() if before.get(n) != b})


@torch.no_grad()
def start_bits(qmodel: nn.Module, genome: BitsGenome, table: BitsTable) -> str:
    """Put the even start into a network, and choose how it computes at any width.

    Layers that are no part of the genome come from the network that was rounded at the base width.
    Returns the execution, which must not change with a candidate.
    """
    config = cast(QuantConfig, qmodel.quant_config)
    put_widths(qmodel, table[genome.widths[-1]])
    # The widest width decides: 8-bit weights need more of a processor.
    execution = set_execution(qmodel, config.execution)
    put_widths(qmodel, table[genome.base])
    write_bits(qmodel, genome, table, spread_bits(genome))
    return execution


def prepare_bits(
    qmodel: nn.Module,
    images: Tensor,
    config: SearchConfig,
    on_rounded: Callable[[Rounded], None] = lambda event: None,
) -> tuple[BitsGenome, BitsTable, str]:
    """Genome and table of a config's search, and the execution of the network, which has the start.

    The network must be calibrated on these images.
    """
    genome = bits_genome(qmodel, config.bit_widths, config.mean_bits, config.budget_bytes)
    table = bits_table(qmodel, images, genome, config.batch, on_rounded)
    return genome, table, start_bits(qmodel, genome, table)


# The search


class TrialNetwork:
    """A copy of a network in which candidates are tried; it shares the float weights."""

    def __init__(self, chain: Chain, genome: BitsGenome, table: BitsTable) -> None:
        self.genome, self.table = genome, table
        self.chain = chain_of(twin(chain.model))
        self.chain.chunk = chain.chunk
        self.held: Vector | None = None  # what the copy holds

    def hold(self, vector: Vector) -> Chain:
        """The network with these bits."""
        write_bits(self.chain.model, self.genome, self.table, vector, self.held)
        self.held = vector
        return self.chain


class BitsObjective:
    """Mean fitness over calibration batches, as a function of each layer's bits.

    Candidates are tried in a copy of the network, so the network stays as it is. A genome that was
    seen before costs nothing. `evaluations` counts forwards.
    """

    def __init__(
        self,
        chain: Chain,
        genome: BitsGenome,
        table: BitsTable,
        images: Tensor,
        targets: Tensor,
        fitness: Fitness = info_nce,
        batch: int = 100,
    ) -> None:
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images but {len(targets)} targets")
        self.genome, self.fitness = genome, fitness
        self.start, self.trial = genome.read(chain.model), TrialNetwork(chain, genome, table)
        self.images, self.targets = batches(images, batch), batches(targets, batch)
        self.values: dict[tuple[float, ...], Tensor] = {}

    @property
    def evaluations(self) -> int:
        """How many genomes were evaluated."""
        return len(self.values)

    @torch.no_grad()
    def __call__(self, population: Population) -> Values:
        """Evaluate candidates (p, d), one after another."""
        return torch.stack([self.value(vector) for vector in population])

    def value(self, vector: Vector) -> Tensor:
        """The fitness of one genome, remembered."""
        key = tuple(vector.tolist())
        if key not in self.values:
            chain, parts = self.trial.hold(vector), zip(self.images, self.targets, strict=True)
            losses = [self.fitness(chain(x), t) for x, t in parts]
            self.values[key] = torch.stack(losses).mean().cpu()
        return self.values[key]


class EvolveBits(EvolQ):
    """The paper's population and tournaments on bits: a child is its parent after one mutation.

    A child that was tried before is mutated again, so that no evaluation is spent twice.
    """

    def __init__(
        self,
        genome: BitsGenome,
        start: Vector,
        value: float,
        population: int = 15,
        tournament: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(start, value, 0.0, population, tournament, seed)
        self.genome, self.seen = genome, {tuple(start.tolist())}

    def mutate(self, parent: Vector) -> Vector:
        """A new genome within the budget, as near to the parent as chance has it."""
        return walk(self.genome, parent, 1, self.seen, self.generator)


class WalkBits(RandomSearch):
    """The baseline at equal cost: walks of random length from the start, whatever was learned."""

    def __init__(self, genome: BitsGenome, start: Vector, value: float, seed: int = 0) -> None:
        super().__init__(start, value, 0.0, seed)
        self.genome, self.seen = genome, {tuple(start.tolist())}

    def mutate(self, parent: Vector) -> Vector:
        """The end of a walk of 1 to d mutations."""
        steps = 1 + int(torch.randint(len(parent), (1,), generator=self.generator))
        return walk(self.genome, parent, steps, self.seen, self.generator)


def walk(
    genome: BitsGenome,
    vector: Vector,
    steps: int,
    seen: set[tuple[float, ...]],
    generator: torch.Generator,
) -> Vector:
    """So many mutations, and more until the genome is not in `seen`, where it is added."""
    for step in range(steps + TRIES):
        vector = mutate_bits(genome, vector, generator)
        if step >= steps - 1 and tuple(vector.tolist()) not in seen:
            break
    seen.add(tuple(vector.tolist()))
    return vector


def bits_optimizer(
    genome: BitsGenome, config: SearchConfig, start: Vector, value: float
) -> EvolveBits | WalkBits:
    """The optimizer that a config asks for."""
    if config.algorithm == "random":
        return WalkBits(genome, start, value, config.seed)
    return EvolveBits(genome, start, value, config.population, config.tournament, config.seed)


def evolve_bits(
    chain: Chain,
    images: Tensor,
    targets: Tensor,
    config: SearchConfig,
    genome: BitsGenome,
    table: BitsTable,
    past: Iterable[Evaluated] = (),
    elsewhere: Callable[[Population], Values] | None = None,
) -> Iterator[Event]:
    """Search the bits of a chain that `start_bits` has prepared; like `evolve` in all else.

    Bits belong to the whole network, so there is one visit, of `config.evaluations` candidates; its
    end is the only commit. `past` is replayed without a forward pass. `elsewhere` evaluates
    candidates, if that is not to be done here (see `runs.workers`).
    """
    known, start, began = deque(past), genome.read(chain.model), perf_counter()
    replayed, objective = len(known) > config.evaluations, elsewhere
    if objective is None and not replayed:
        fitness_on = fitness_of(config.fitness, config.temperature)
        objective = BitsObjective(chain, genome, table, images, targets, fitness_on, config.batch)
    fitness = float(evaluate(known, objective, start[None])[0])
    event = Evaluated(0, 0, "bits", 0, fitness, True, perf_counter() - began)
    yield recorded(known, event)
    optimizer, cycle = bits_optimizer(genome, config, start, fitness), 0
    began = perf_counter()
    while cycle < config.evaluations:
        population = optimizer.ask(min(config.parallel, config.evaluations - cycle))
        values = evaluate(known, objective, population)
        optimizer.tell(population, values)
        for value in values.tolist():
            cycle, accepted = cycle + 1, value < fitness
            fitness = value if accepted else fitness
            event = Evaluated(0, 0, "bits", cycle, value, accepted, perf_counter() - began)
            yield recorded(known, event)
            began = perf_counter()
    best, fitness = optimizer.best
    write_bits(chain.model, genome, table, best)
    yield Committed(1, fitness)


def evolve_both(
    chain: Chain,
    images: Tensor,
    targets: Tensor,
    config: SearchConfig,
    genome: BitsGenome,
    table: BitsTable,
    past: Iterable[Evaluated] = (),
    elsewhere: Callable[[Population], Values] | None = None,
    scales_elsewhere: Callable[[Visit], Callable[[Population], Values]] | None = None,
) -> Iterator[Event]:
    """Bits first, then the scales of the network that was found: one history of both.

    The second part is `evolve` from there, visits 1 and on. Its start was evaluated as a candidate
    of bits, so it is not evaluated again. `elsewhere` and `scales_elsewhere` are those of the two.
    """
    known, fitness = list(past), 0.0
    first, rest = known[: config.evaluations + 1], known[config.evaluations + 1 :]
    for event in evolve_bits(chain, images, targets, config, genome, table, first, elsewhere):
        fitness = event.fitness
        yield event
    step = config.width(mean_bits(genome, genome.read(chain.model)))
    yield from evolve(
        chain, images, targets, config, step, rest, scales_elsewhere, visits_done=1, fitness=fitness
    )


# The rival that measures one layer at a time


def rank_layers(objective: BitsObjective) -> Vector:
    """Bits by sensitivity: one layer at a time is narrowed in a network of the widest width.

    Assuming that losses add up, layers are then narrowed where a saved bit costs least, until the
    budget holds. It takes d (widths - 1) + 1 evaluations, and never looks at a mixed network.
    """
    genome = objective.genome
    widest = genome.widths[-1]
    whole = torch.full((len(genome),), float(widest))
    lost: dict[tuple[int, int], float] = {}  # by layer and bits
    start = float(objective(whole[None])[0])
    for i in range(len(genome)):
        for bits in genome.widths[:-1]:
            one = whole.clone()
            one[i] = bits
            lost[i, bits] = float(objective(one[None])[0]) - start
        lost[i, widest] = 0.0
    return narrow(genome, lost)


def narrow(genome: BitsGenome, lost: Mapping[tuple[int, int], float]) -> Vector:
    """From the widest width, narrow the layer whose loss rises least for each bit saved.

    `lost` is the loss of layer i at some bits, by (i, bits). A step may skip widths, so that a
    layer whose loss falls again at fewer bits does not stop there.
    """
    bits = [genome.widths[-1]] * len(genome)
    vector = torch.tensor(bits, dtype=torch.float32)
    while genome.cost(vector) > genome.budget:
        steps = [
            ((lost[i, fewer] - lost[i, b]) / ((b - fewer) * genome.sizes[i]), i, fewer)
            for i, b in enumerate(bits)
            for fewer in genome.widths
            if fewer < b
        ]
        _, i, fewer = min(steps)
        bits[i], vector[i] = fewer, fewer
    return fill_by_loss(genome, vector, lost)


def fill_by_loss(
    genome: BitsGenome, vector: Vector, lost: Mapping[tuple[int, int], float]
) -> Vector:
    """Spend what the last step left over where it lowers the loss most for each bit."""
    vector = vector.clone()
    while True:
        left = genome.budget - genome.cost(vector)
        steps = []
        for i, b in enumerate(int(b) for b in vector.tolist()):
            up = genome.step(b, 1)
            if up is not None and (up - b) * genome.sizes[i] <= left:
                gain = (lost[i, b] - lost[i, up]) / ((up - b) * genome.sizes[i])
                steps.append((-gain, i, up))
        if not steps:
            return vector
        _, i, up = min(steps)
        vector[i] = up


# What was chosen


def layer_bits(qmodel: nn.Module) -> dict[str, int]:
    """The bits of every layer's weights, layers of fixed bits included."""
    return {name: x.weight_quant.integers.bits for name, x in quant_layers(qmodel).items()}


def config_bits(qmodel: nn.Module) -> dict[str, int]:
    """The bits of every layer's weights as the config has them, before any search."""
    config, fixed = cast(QuantConfig, qmodel.quant_config), fixed_layers(qmodel)
    edges = config.edge_bits or config.weight_bits
    return {n: edges if n in fixed else config.weight_bits for n in quant_layers(qmodel)}


def mixed_bits(qmodel: nn.Module) -> dict[str, int]:
    """The bits of layers whose bits are not the config's."""
    usual = config_bits(qmodel)
    return {name: bits for name, bits in layer_bits(qmodel).items() if bits != usual[name]}


def fits_layers(qmodel: nn.Module, bits: object) -> bool:
    """Whether something that was read from a file says bits of layers that this network has."""
    names = quant_layers(qmodel)
    return isinstance(bits, dict) and all(
        name in names and type(b) is int and 2 <= b <= 8 for name, b in bits.items()
    )


def set_mixed_bits(qmodel: nn.Module, bits: Mapping[str, int]) -> None:
    """Give layers the ranges that `mixed_bits` told; scales and integers must follow."""
    layers = quant_layers(qmodel)
    for name, b in {**config_bits(qmodel), **bits}.items():
        point = layers[name].weight_quant
        point.integers = IntRange(b, point.integers.signed)


def tell_bits(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """A table of text: each layer's bits before a search and after."""
    width = max(map(len, before))
    rows = [f"{name:{width}}  {b:>6}  {after[name]:>7}" for name, b in before.items()]
    return "\n".join([f"{'layer':{width}}  {'before':>6}  {'evolved':>7}", *rows])


def sum_up_bits(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """What a search has made of each layer's bits, in a few words for an alt text."""
    most, least = max(after, key=after.__getitem__), min(after, key=after.__getitem__)
    return (
        f"{after[most]} in {most}, {after[least]} in {least}; "
        f"{sum(after[n] > b for n, b in before.items())} went up, "
        f"{sum(after[n] < b for n, b in before.items())} down"
    )
