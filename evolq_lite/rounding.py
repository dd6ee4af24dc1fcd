"""Rounding a whole network: to nearest, by GPTQ, or learned. Read with lesson 8.

A calibrated network rounds each weight to the nearest integer, anew in every forward pass.
`round_weights` chooses the integers by what they do to the network's numbers instead:

| method | chooses a weight's integer |
|---|---|
| `nearest` | by the weight alone |
| `gptq` | so that its layer's output stays, layer by layer (see `gptq.py`) |
| `learned` | so that its block's output stays, by gradient, block by block (see `learned.py`) |

Both go from the images to the logits, so that each layer is rounded for inputs that earlier
rounding has disturbed. Two things from the float network guide them:

- *Weights of inputs.* Not all tokens matter alike: a class token decides more than a patch of sky.
  A token counts by the squared gradient of the network's prediction there (Fisher information), and
  so does each token that a block puts out.
- *Means.* An error that is the same for all inputs costs nothing, because the bias can take it. So
  GPTQ sees inputs minus their mean, and then the bias restores the mean output.

A rounded layer holds integers times scale as a weight of its own. So points, searches and integer
execution need nothing else, and the float network stays as it is. While a search moves the scales,
an integer may still flip; `freeze_integers` holds all of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.convert import Point, twin
from evolq_lite.gptq import Elimination, round_rows, squared_error
from evolq_lite.layers import QuantConv2d, QuantLinear
from evolq_lite.learned import COST_OF_GRADIENT, Block, learn
from evolq_lite.numerics import along
from evolq_lite.quantizer import FixedIntegers

Layer = QuantLinear | QuantConv2d


@dataclass(frozen=True)
class Rounded:
    """An event: the weights of a layer are integers now.

    The errors are shares of the output's own energy, `before` with rounding to nearest, `after`
    with these. Where rounding is learned, it is the output of the layer's block, and `before` what
    learning started from. `notes` tells what had to be done about the inputs, and what failed.
    """

    name: str
    before: float
    after: float
    notes: tuple[str, ...]
    seconds: float


def round_weights(
    qmodel: nn.Module,
    images: Tensor,
    method: str = "gptq",
    done: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Iterator[Rounded]:
    """Choose the integers of a calibrated network's weights, in place; yields an event per layer.

    `images` (n, channels, height, width) are calibration images; no labels are used. `options` are
    those of `gptq` and `learned` below; `nearest` takes none, and goes back to the float weights,
    which the points round. `done`, what `integers_of` says of an earlier call that was stopped, is
    put in place first: layers in it are not rounded again. ValueError for an unknown method, no
    images, a network that is not calibrated, integers that do not fit it, a budget of nothing, or a
    layer whose inputs are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown rounding {method!r}; known: {', '.join(METHODS)}")
    if len(images) == 0:
        raise ValueError("no images to round weights for; give at least one")
    require_calibrated(qmodel, integers=method != "nearest")
    if method != "nearest":
        refuse_moments(
            qmodel, f"would rescale the weights that {method} has fitted to their inputs"
        )
    for layer in quant_layers(qmodel).values():
        if layer.rounded:
            layer.forget_rounding()
    teacher = twin(qmodel)
    if done is not None:
        set_integers(qmodel, done)
    return METHODS[method](qmodel, teacher, images, **options)


def quant_layers(qmodel: nn.Module) -> dict[str, Layer]:
    """The layers with quantized weights, by name."""
    return {name: m for name, m in qmodel.named_modules() if isinstance(m, Layer)}


def require_calibrated(qmodel: nn.Module, integers: bool = True) -> None:
    """ValueError for weights without scales; with `integers`, for those that stay float too."""
    for name, layer in quant_layers(qmodel).items():
        point = layer.weight_quant
        if point.stays_float and integers:
            raise ValueError(
                f"the weight of {name} stays float, so there are no integers to choose or freeze; "
                "let weights be quantized, or give rounding nearest and integers free"
            )
        if not (point.frozen or point.stays_float):
            raise ValueError(f"{name} is not calibrated; call calibrate(qmodel, images) first")


def refuse_moments(qmodel: nn.Module, why: str) -> None:
    """ValueError where weights are rescaled to the float weights' moments, which says why."""
    if any(layer.moment_correction for layer in quant_layers(qmodel).values()):
        raise ValueError(f"moment_correction {why}; quantize the network without it")


def integers_of(qmodel: nn.Module) -> dict[str, Tensor]:
    """Integers, scale and bias of each layer whose integers were chosen or frozen, by name.

    They are as they were then: a search moves the point's scale, and leaves these. Integers are
    int16, counted from the zero point.
    """
    tensors = {}
    for name, layer in quant_layers(qmodel).items():
        if layer.chosen is not None:
            tensors[f"{name}.integers"], tensors[f"{name}.scale"] = layer.chosen
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def check_integers(qmodel: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """ValueError if `set_integers` could not put these into a network that is calibrated."""
    layers = quant_layers(qmodel)
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        whole = all(f"{name}.{part}" in tensors for part in ("integers", "scale"))
        if name not in layers or not whole or kind not in ("integers", "scale", "bias"):
            raise ValueError(f"{key}: these integers belong to another network")
        weight, point = layers[name].weight, layers[name].weight_quant
        if tensor.shape != (weight.shape if kind == "integers" else weight.shape[:1]):
            raise ValueError(f"{key}: these integers belong to another network")
        if kind == "integers":
            q = tensor.to(point.zero_point.device) + along(point.zero_point, tensor.ndim, 0)
            if q.min() < point.integers.lo or q.max() > point.integers.hi:
                raise ValueError(f"{key}: these integers do not fit {point.integers.bits} bits")


def set_integers(qmodel: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `integers_of` says into a network that is quantized and calibrated in the same way.

    ValueError if it does not fit; the network is then as it was.
    """
    check_integers(qmodel, tensors)
    for name, layer in quant_layers(qmodel).items():
        if f"{name}.integers" in tensors:
            device = layer.weight.device
            scale = tensors[f"{name}.scale"].to(device)
            layer.set_integers(tensors[f"{name}.integers"].to(device), scale)
            if f"{name}.bias" in tensors:
                layer.bias = nn.Parameter(tensors[f"{name}.bias"].to(device), requires_grad=False)


def freeze_integers(qmodel: nn.Module) -> None:
    """Hold the present integers of all weights while their scales change."""
    require_calibrated(qmodel)
    refuse_moments(qmodel, "would cancel out the scales of frozen integers")
    for layer in quant_layers(qmodel).values():
        point = layer.weight_quant
        if not isinstance(point, FixedIntegers):
            layer.set_integers(point.to_integers(layer.weight.detach()), point.scale)
            layer.weight_quant = FixedIntegers.of(point, layer.weight)


def are_frozen(qmodel: nn.Module) -> bool:
    """Whether `freeze_integers` holds the integers."""
    return any(isinstance(point, FixedIntegers) for point in qmodel.modules())


def nearest(qmodel: nn.Module, teacher: nn.Module, images: Tensor) -> Iterator[Rounded]:
    """Nothing to do: the points round float weights to nearest."""
    return iter(())


@dataclass
class Segment:
    """A segment of the quantized network and of the float one, with what enters them."""

    name: str
    run: Callable[[Tensor], Tensor]
    run_float: Callable[[Tensor], Tensor]
    rest_float: Callable[[Tensor], Tensor]  # from its float output to the logits
    layers: dict[str, Layer]  # that it calls, in order
    float_layers: dict[str, Layer]
    inputs: list[Tensor]  # batches, as earlier rounding has left them
    float_inputs: list[Tensor]
    weights: dict[str, list[Tensor]]  # (n,) of each layer's inputs, by batch; empty: all equal
    chunk: int  # images whose graph is kept at a time

    def weights_of(self, name: str, batch: int, rows: Tensor) -> Tensor:
        """The weights (n, 1) of a layer's inputs (groups, n, inputs) in a batch."""
        if not self.weights:
            return torch.ones(rows.shape[1], 1, device=rows.device)
        return self.weights[name][batch][:, None]


@torch.no_grad()
def gptq(
    qmodel: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    damping: float = 0.01,
    by_activation: bool = True,
    refit_scales: bool = True,
    restore_means: bool = True,
    weigh: bool = True,
    batch: int = 32,
) -> Iterator[Rounded]:
    """Round layer by layer with GPTQ; the options turn off what was added to it.

    `damping` is a share of the Hessian's mean diagonal. `by_activation`: the most active inputs
    first, else in their own order. `batch` images at a time: it changes memory and last digits.
    """
    for segment in walk(qmodel, teacher, images, batch, weigh):
        yield from round_segment(segment, damping, by_activation, refit_scales, restore_means)


def round_segment(
    segment: Segment,
    damping: float = 0.01,
    by_activation: bool = True,
    refit_scales: bool = True,
    restore_means: bool = True,
) -> Iterator[Rounded]:
    means = float_means(segment)
    for name, layer in segment.layers.items():
        if layer.rounded:
            continue
        began = perf_counter()
        hessian, mean = moments(segment, name)
        if not torch.isfinite(hessian).all():
            raise ValueError(
                f"{name}: its inputs on the calibration images hold NaN or infinite values; "
                "check the images, and the scales of the layers before it"
            )
        if restore_means:
            hessian -= outer(mean)
        elimination = Elimination.of(hessian, damping, by_activation)
        errors = round_layer(layer, hessian, elimination, refit_scales)
        if restore_means:
            restore_mean(layer, segment.float_layers[name], mean, means[name])
        notes = []
        if elimination.dead:
            notes.append(f"{elimination.dead} inputs never vary: rounded to nearest")
        if elimination.damping > damping:
            notes.append(f"inputs depend on each other: damping {elimination.damping:.0e}")
        yield Rounded(name, *errors, tuple(notes), perf_counter() - began)


def walk(
    qmodel: nn.Module, teacher: nn.Module, images: Tensor, batch: int, weigh: bool
) -> Iterator[Segment]:
    """The segments of a network in order; what one is made to be changes the inputs of the next."""
    layers, float_layers = quant_layers(qmodel), quant_layers(teacher)
    for layer in float_layers.values():
        layer.forget_rounding()
    for point in teacher.modules():
        if isinstance(point, Point):
            point.passing = True
    floats = chain_of(teacher)
    floats.fit_chunk(images[:1])
    chunk = floats.chunk or batch
    weights = weigh_inputs(teacher, images, batch, chunk) if weigh else {}
    inputs, float_inputs = list(images.split(batch)), list(images.split(batch))
    segments = zip(chain_of(qmodel).segments, floats.segments, strict=True)
    for i, ((name, run, _), (_, run_float, _)) in enumerate(segments, 1):
        called: dict[str, Tensor] = {}
        with watch(layers, called.setdefault):
            run(inputs[0])
        yield Segment(
            name,
            run,
            run_float,
            partial(floats, start=i),
            {key: layers[key] for key in called},
            float_layers,
            inputs,
            float_inputs,
            weights,
            chunk,
        )
        inputs = [run(x) for x in inputs]
        float_inputs = [run_float(x) for x in float_inputs]


@contextmanager
def watch(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call `see(name, input)` whenever one of the layers is called."""

    def hook(name: str) -> Any:
        return lambda _, inputs: see(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def rows_of(layer: Layer, x: Tensor) -> Tensor:
    """What a layer's rows are multiplied with: (groups, n, inputs), n over images and places."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    sizes: Any = layer.kernel_size, layer.dilation, layer.padding, layer.stride
    patches = F.unfold(x, *sizes).unflatten(1, (layer.groups, -1))
    return patches.permute(1, 0, 3, 2).flatten(1, 2)  # from (images, groups, inputs, places)


def moments(segment: Segment, name: str) -> tuple[Tensor, Tensor]:
    """Weighted means over a layer's inputs: of x x^T (groups, d, d), and of x (groups, d)."""
    layer = segment.layers[name]
    products: list[Tensor] = []
    means: list[Tensor] = []
    total = 0.0

    def see(_: str, x: Tensor) -> None:
        nonlocal total
        rows = rows_of(layer, layer.input_quant(x))
        weights = segment.weights_of(name, len(means), rows)
        share = float(weights.sum())
        # A batch in float32 and around its own mean, so that nothing is lost; sums in float64.
        mean = (rows * weights).sum(1) / share
        rows = rows - mean[:, None]
        mean = mean.double()
        products.append((rows.mT @ (rows * weights)).double() + share * outer(mean))
        means.append(share * mean)
        total += share

    with watch({name: layer}, see):
        for x in segment.inputs:
            segment.run(x)
    return torch.stack(products).sum(0) / total, torch.stack(means).sum(0) / total


def outer(mean: Tensor) -> Tensor:
    """(groups, d) to (groups, d, d)."""
    return mean[:, :, None] * mean[:, None]


def float_means(segment: Segment) -> dict[str, Tensor]:
    """The weighted mean (groups, d) of the float network's input to each layer of a segment."""
    layers = {name: segment.float_layers[name] for name in segment.layers}
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    totals = dict.fromkeys(layers, 0.0)

    def see(name: str, x: Tensor) -> None:
        rows = rows_of(layers[name], x)
        weights = segment.weights_of(name, len(sums[name]), rows)
        sums[name].append((rows * weights).sum(1).double())
        totals[name] += float(weights.sum())

    with watch(layers, see):
        for x in segment.float_inputs:
            segment.run_float(x)
    return {name: torch.stack(sums[name]).sum(0) / totals[name] for name in layers}


def draw_labels(logits: Tensor, generator: torch.Generator, count: int = 2) -> Tensor:
    """Labels (n, count) drawn from a network's own prediction (n, classes)."""
    return logits.softmax(1).multinomial(count, replacement=True, generator=generator)


def squared_slopes(logits: Tensor, outputs: list[Tensor], labels: Tensor) -> list[Tensor]:
    """The squared gradient of -log p(label) at each of a network's inner outputs.

    In the mean over labels (n, count) that were drawn from the network's own prediction, this is
    the Fisher information there.
    """
    squares = [torch.zeros_like(output) for output in outputs]
    for label in labels.T:
        with torch.enable_grad():
            loss = F.cross_entropy(logits, label, reduction="sum")
        slopes = torch.autograd.grad(loss, outputs, retain_graph=True)
        squares = [s + slope.square() for s, slope in zip(squares, slopes, strict=True)]
    return squares


def level(parts: list[Tensor]) -> list[Tensor]:
    """Weights that are 1 on average; a little for all, if no gradient is left."""
    mean = torch.cat(parts).mean().clamp(min=1e-30) if parts else 1.0
    return [part / mean + 0.01 for part in parts]


def weigh_inputs(
    teacher: nn.Module, images: Tensor, batch: int, chunk: int
) -> dict[str, list[Tensor]]:
    """How much each of a layer's inputs counts: weights (n,), by layer and batch.

    It is the squared slope at the layer's output. The graph of all layers is large: 5 GB for 32
    images of DeiT-Tiny. So that of one chunk of images is kept.
    """
    generator = torch.Generator(images.device).manual_seed(0)
    layers = quant_layers(teacher)
    weights: dict[str, list[Tensor]] = {name: [] for name in layers}
    for x in images.split(batch):
        labels = draw_labels(teacher(x), generator)
        parts = [
            slopes_at_outputs(teacher, layers, *part)
            for part in zip(x.split(chunk), labels.split(chunk), strict=True)
        ]
        for name in parts[0]:
            weights[name].append(torch.cat([part[name] for part in parts]))
    return {name: level(parts) for name, parts in weights.items()}


def slopes_at_outputs(
    teacher: nn.Module, layers: Mapping[str, Layer], x: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The squared slope (n,) at each place of each layer's output, summed over channels."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
        for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            logits = teacher(x.clone().requires_grad_())  # weights may not ask for gradients
        squares = squared_slopes(logits, list(outputs.values()), labels)
    finally:
        for hook in hooks:
            hook.remove()
    channels = {name: 1 if isinstance(layers[name], nn.Conv2d) else -1 for name in outputs}
    return {
        name: square.sum(channels[name]).flatten()
        for name, square in zip(outputs, squares, strict=True)
    }


def weigh_outputs(segment: Segment, outputs: list[Tensor]) -> Tensor:
    """How much each place of a segment's float output counts, as (n, ...), 1 for the channels."""
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    convolution = outputs[0].ndim == 4 and isinstance([*segment.layers.values()][-1], nn.Conv2d)
    weights = []
    for output in outputs:
        labels = draw_labels(segment.rest_float(output), generator)
        for x, drawn in zip(output.split(segment.chunk), labels.split(segment.chunk), strict=True):
            middle = x.clone().requires_grad_()
            with torch.enable_grad():
                logits = segment.rest_float(middle)
            (square,) = squared_slopes(logits, [middle], drawn)
            weights.append(square.mean(1 if convolution else -1, keepdim=True))
    return torch.cat(level(weights))


def round_layer(
    layer: Layer, hessian: Tensor, elimination: Elimination, refit_scales: bool
) -> tuple[float, float]:
    """Give a layer its rounded weight (and scales); the errors to nearest and now, as shares."""
    groups, inputs = hessian.shape[:2]
    point = layer.weight_quant
    weight = layer.weight.double().reshape(groups, -1, inputs)
    scale = point.scale.reshape(groups, -1)
    zero_point = point.zero_point.double().expand(point.scale.shape).reshape(scale.shape)
    integers, scale, before, after = round_rows(
        weight, hessian, elimination, scale, zero_point, point.integers, refit_scales
    )
    layer.set_integers(integers.reshape(layer.weight.shape), scale.flatten())
    energy = max(float(squared_error(weight, torch.zeros_like(weight), hessian).sum()), 1e-30)
    return float(before.sum()) / energy, float(after.sum()) / energy


def restore_mean(layer: Layer, float_layer: Layer, mean: Tensor, float_mean: Tensor) -> None:
    """Set a layer's bias so that its mean output is that of the float layer; means (groups, d)."""

    def output(weights: Tensor, means: Tensor) -> Tensor:  # (groups, rows, d), (groups, d)
        rows = weights.double().reshape(len(means), -1, means.shape[1])
        return (rows @ means[..., None]).flatten()

    shift = output(float_layer.weight, float_mean) - output(layer.weight, mean)
    bias = shift if float_layer.bias is None else float_layer.bias.double() + shift
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


def learned(
    qmodel: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    start: str = "gptq",
    budget: int = 60,
    drop: float = 0.0,
    seed: int = 0,
    weigh: bool = True,
    batch: int = 32,
) -> Iterator[Rounded]:
    """Learn the rounding of each block, from the integers of `start`: "gptq" or "nearest".

    `budget` is what a block may cost, in its own forwards on all images; a gradient costs three.
    `drop`: see `learned.learn`. `batch` images at a time, in a step of the descent too.
    """
    if start not in ("gptq", "nearest"):
        raise ValueError(f"unknown start {start!r} of learned rounding; known: gptq, nearest")
    if budget < COST_OF_GRADIENT:
        raise ValueError(
            f"budget must be at least {COST_OF_GRADIENT} forwards of a block, one gradient, not "
            f"{budget}"
        )
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be a probability from 0 to 1, not {drop}")
    return learn_blocks(
        walk(qmodel, teacher, images, batch, weigh), start, budget, drop, batch, seed
    )


@torch.no_grad()
def learn_blocks(
    segments: Iterator[Segment], start: str, budget: int, drop: float, batch: int, seed: int
) -> Iterator[Rounded]:
    for segment in segments:
        layers = segment.layers
        if all(layer.rounded for layer in layers.values()):
            continue
        for layer in layers.values():
            if layer.rounded:
                layer.forget_rounding()
        began = perf_counter()
        try:
            notes = start_block(segment, start)
            before, after = learn(block_of(segment), budget, drop, batch, seed)
            if not math.isfinite(before):
                raise ValueError(
                    f"{segment.name}: its outputs on the calibration images hold NaN or infinite "
                    "values; check the images, and the scales of the layers before it"
                )
        except BaseException:  # `integers_of` holds whole blocks, so that they can be resumed
            for layer in layers.values():
                layer.forget_rounding()
            raise
        more = () if after < before else (f"learning found nothing better than {start}",)
        seconds = (perf_counter() - began) / len(layers)
        for name in layers:
            yield Rounded(name, before, after, notes.get(name, ()) + more, seconds)


def start_block(segment: Segment, start: str) -> dict[str, tuple[str, ...]]:
    """Give the layers of a segment the integers from which learning starts; notes by layer."""
    if start == "gptq":
        return {event.name: event.notes for event in round_segment(segment)}
    for layer in segment.layers.values():
        point = layer.weight_quant
        layer.set_integers(point.to_integers(layer.weight), point.scale)
    return {}


def block_of(segment: Segment) -> Block:
    """A segment as what is to be reconstructed."""
    outputs = [segment.run_float(x) for x in segment.float_inputs]
    targets = torch.cat(outputs)
    weights = weigh_outputs(segment, outputs) if segment.weights else torch.ones_like(targets)
    return Block(
        segment.run,
        segment.layers,
        {name: segment.float_layers[name].weight for name in segment.layers},
        torch.cat(segment.inputs),
        torch.cat(segment.float_inputs),
        targets,
        weights,
    )


METHODS: dict[str, Callable[..., Iterator[Rounded]]] = {
    "nearest": nearest,
    "gptq": gptq,
    "learned": learned,
}
