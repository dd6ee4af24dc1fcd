"""Rounding a whole network: to nearest, or by GPTQ. Read with lesson 8.

A calibrated network rounds each weight to the nearest integer, anew in every forward pass.
`round_weights` chooses the integers by what they do to the network's numbers instead:

| method | chooses a weight's integer |
|---|---|
| `nearest` | by the weight alone |
| `gptq` | so that its layer's output stays, layer by layer (see `gptq.py`) |

GPTQ goes from the images to the logits, so that each layer is rounded for inputs that earlier
rounding has disturbed. Two things from the float network guide them:

- *Weights of inputs.* Not all tokens matter alike: a class token decides more than a patch of sky.
  A token counts by the squared gradient of the network's prediction there (Fisher information).
- *Means.* An error that is the same for all inputs costs nothing, because the bias can take it. So
  GPTQ sees inputs minus their mean, and then the bias restores the mean output.

A rounded layer holds integers times scale as a weight of its own. So points, searches and integer
execution need nothing else, and the float network stays as it is. While a search moves the scales,
an integer may still flip; `freeze_integers` holds all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.convert import Point, twin
from evolq_lite.gptq import Elimination, round_rows, squared_error
from evolq_lite.layers import QuantConv2d, QuantLinear
from evolq_lite.numerics import along
from evolq_lite.quantizer import FixedIntegers

Layer = QuantLinear | QuantConv2d


@dataclass(frozen=True)
class Rounded:
    """An event: the weights of a layer are integers now.

    The errors are shares of the output's own energy, `before` with rounding to nearest, `after`
    with these. `notes` tells what had to be done about the inputs.
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
    those of `gptq` below; `nearest` takes none, and goes back to the float weights,
    which the points round. `done`, what `integers_of` says of an earlier call that was stopped, is
    put in place first: layers in it are not rounded again. ValueError for an unknown method, no
    images, a network that is not calibrated, integers that do not fit it, or a layer whose inputs
    are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown rounding {method!r}; known: {', '.join(METHODS)}")
    if len(images) == 0:
        raise ValueError("no images to round weights for; give at least one")
    layers = quant_layers(qmodel)
    for name, layer in layers.items():
        if not layer.weight_quant.frozen:
            raise ValueError(f"{name} is not calibrated; call calibrate(qmodel, images) first")
        if layer.moment_correction and method != "nearest":
            raise ValueError(
                f"moment_correction would rescale the weights that {method} has fitted to their "
                "inputs; quantize the network without it"
            )
        if layer.rounded:
            layer.forget_rounding()
    teacher = twin(qmodel)
    if done is not None:
        set_integers(qmodel, done)
    return METHODS[method](qmodel, teacher, images, **options)


def quant_layers(qmodel: nn.Module) -> dict[str, Layer]:
    """The layers with quantized weights, by name."""
    return {name: m for name, m in qmodel.named_modules() if isinstance(m, Layer)}


def integers_of(qmodel: nn.Module) -> dict[str, Tensor]:
    """Integers, scale and bias of each layer whose integers are chosen or frozen, by name.

    Integers are int16, counted from the zero point.
    """
    tensors = {}
    for name, layer in quant_layers(qmodel).items():
        point = layer.weight_quant
        if layer.rounded or isinstance(point, FixedIntegers):
            tensors[f"{name}.integers"] = point.to_integers(layer.weight).to(torch.int16)
            tensors[f"{name}.scale"] = point.scale
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def set_integers(qmodel: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `integers_of` says into a network that is quantized and calibrated in the same way.

    ValueError if it does not fit; the network is then as it was.
    """
    layers = quant_layers(qmodel)
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if name not in layers or f"{name}.integers" not in tensors:
            raise ValueError(f"{key}: these integers belong to another network")
        layer = layers[name]
        shapes = {"integers": layer.weight.shape, "scale": layer.weight_quant.scale.shape}
        if tensor.shape != shapes.get(kind, layer.weight.shape[:1]):
            raise ValueError(f"{key}: these integers belong to another network")
        point = layer.weight_quant
        if kind == "integers":
            q = tensor.to(point.zero_point.device) + along(point.zero_point, tensor.ndim, 0)
            if q.min() < point.integers.lo or q.max() > point.integers.hi:
                raise ValueError(f"{key}: these integers do not fit {point.integers.bits} bits")
    for name, layer in layers.items():
        if f"{name}.integers" in tensors:
            device = layer.weight.device
            layer.weight_quant.scale = tensors[f"{name}.scale"].to(device)
            layer.set_integers(tensors[f"{name}.integers"].to(device))
            if f"{name}.bias" in tensors:
                layer.bias = nn.Parameter(tensors[f"{name}.bias"].to(device), requires_grad=False)


def freeze_integers(qmodel: nn.Module) -> None:
    """Hold the present integers of all weights while their scales change."""
    for name, layer in quant_layers(qmodel).items():
        if not layer.weight_quant.frozen:
            raise ValueError(f"{name} is not calibrated; call calibrate(qmodel, images) first")
        if layer.moment_correction:
            raise ValueError(
                "with moment_correction the scales of frozen integers would have no effect; "
                "quantize the network without it"
            )
        if not isinstance(layer.weight_quant, FixedIntegers):
            layer.weight_quant = FixedIntegers.of(layer.weight_quant, layer.weight)


def nearest(qmodel: nn.Module, teacher: nn.Module, images: Tensor) -> Iterator[Rounded]:
    """Nothing to do: the points round float weights to nearest."""
    return iter(())


@dataclass
class Segment:
    """A segment of the quantized network and of the float one, with what enters them."""

    name: str
    run: Callable[[Tensor], Tensor]
    run_float: Callable[[Tensor], Tensor]
    layers: dict[str, Layer]  # that it calls, in order
    float_layers: dict[str, Layer]
    inputs: list[Tensor]  # batches, as earlier rounding has left them
    float_inputs: list[Tensor]
    weights: dict[str, list[Tensor]]  # (n,) of each layer's inputs, by batch; empty: all equal

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
    weights = weigh_inputs(teacher, images, batch) if weigh else {}
    inputs, float_inputs = list(images.split(batch)), list(images.split(batch))
    segments = zip(chain_of(qmodel).segments, chain_of(teacher).segments, strict=True)
    for (name, run, _), (_, run_float, _) in segments:
        called: dict[str, Tensor] = {}
        with watch(layers, called.setdefault):
            run(inputs[0])
        own = {key: layers[key] for key in called}
        yield Segment(name, run, run_float, own, float_layers, inputs, float_inputs, weights)
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


def weigh_inputs(
    teacher: nn.Module, images: Tensor, batch: int, labels: int = 2
) -> dict[str, list[Tensor]]:
    """How much each of a layer's inputs counts: weights (n,), by layer and batch.

    The squared gradient of -log p(label) at the layer's output, for labels drawn from the float
    network's own prediction: in the mean over labels, the Fisher information there.
    """
    generator = torch.Generator(images.device).manual_seed(0)
    layers = quant_layers(teacher)
    weights: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
        for name, layer in layers.items()
    ]
    try:
        for x in images.split(batch):
            outputs.clear()
            with torch.enable_grad():
                logits = teacher(x.clone().requires_grad_())  # weights may not ask for gradients
                shares = logits.detach().softmax(1)
                drawn = shares.multinomial(labels, replacement=True, generator=generator)
                losses = [F.cross_entropy(logits, label, reduction="sum") for label in drawn.T]
            squares = [torch.zeros(()) for _ in outputs]
            for loss in losses:
                slopes = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
                squares = [s + slope.square() for s, slope in zip(squares, slopes, strict=True)]
            for name, square in zip(outputs, squares, strict=True):
                channels = 1 if isinstance(layers[name], nn.Conv2d) else -1
                weights[name].append(square.sum(channels).flatten())
    finally:
        for hook in hooks:
            hook.remove()
    for name, parts in weights.items():  # 1 on average; a little for all, if no gradient is left
        mean = torch.cat(parts).mean().clamp(min=1e-30) if parts else 1.0
        weights[name] = [part / mean + 0.01 for part in parts]
    return weights


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
    point.scale = scale.flatten().contiguous()
    layer.set_integers(integers.reshape(layer.weight.shape))
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


METHODS: dict[str, Callable[..., Iterator[Rounded]]] = {
    "nearest": nearest,
    "gptq": gptq,
}
