"""Which integers weights become: GPTQ against a dense reference, frozen ones."""

from itertools import islice

import pytest
import torch
from conftest import toy, toy_images
from torch import Tensor, nn

from evolq_lite import QuantConfig, calibrate, load_demo, quantize
from evolq_lite.fast import set_execution
from evolq_lite.fitness import kl
from evolq_lite.gptq import Elimination, round_rows, squared_error, sweep
from evolq_lite.layers import QuantConv2d, QuantLinear
from evolq_lite.numerics import IntRange
from evolq_lite.quantizer import FixedIntegers
from evolq_lite.rounding import (
    freeze_integers,
    integers_of,
    quant_layers,
    round_weights,
    rows_of,
    set_integers,
)

Case = tuple[Tensor, Tensor, Tensor, Tensor, IntRange]


def case(bits: int, symmetric: bool, seed: int = 0, inputs: int = 12, images: int = 40) -> Case:
    """Random weights (1, 5, inputs), the Hessian of correlated inputs, scale, zero point, range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 5, inputs, generator=generator, dtype=torch.double)
    x = torch.randn(images, inputs, generator=generator, dtype=torch.double)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.double)
    integers = IntRange(bits, signed=symmetric)
    low, high = weight.amin(2).clamp(max=0), weight.amax(2).clamp(min=0)
    steps = integers.hi - integers.lo
    scale = 2 * torch.maximum(-low, high) / steps if symmetric else (high - low) / steps
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round()
    return weight, (x.T @ x / images)[None], scale.float(), zero, integers


def reference(
    w: Tensor, hessian: Tensor, order: Tensor, scale: float, zero: float, integers: IntRange
) -> Tensor:
    """One row, slowly: after each input, solve anew for the best floats that are left."""
    start, w, q = w, w.clone(), torch.zeros_like(w)
    for k, i in enumerate(order):
        q[i] = (w[i] / scale).round().clamp(integers.lo - zero, integers.hi - zero)
        fixed, left = order[: k + 1], order[k + 1 :]
        lost = q[fixed] * scale - start[fixed]
        made_up = torch.linalg.solve(hessian[left][:, left], hessian[left][:, fixed] @ lost)
        w[left] = start[left] - made_up
    return q


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by_activation", [True, False])
def test_gptq_equals_the_dense_reference(bits: int, symmetric: bool, by_activation: bool) -> None:
    weight, hessian, scale, zero, integers = case(bits, symmetric)
    elimination = Elimination.of(hessian, 0.01, by_activation)
    found = sweep(weight, elimination, scale.double(), zero, integers)
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(12, dtype=torch.double)
    order = hessian[0].diagonal().argsort(descending=True) if by_activation else torch.arange(12)
    for row in range(5):
        numbers = float(scale[0, row]), float(zero[0, row])
        assert torch.equal(
            found[0, row], reference(weight[0, row], damped, order, *numbers, integers)
        )


def test_gptq_equals_the_reference_beyond_one_panel() -> None:
    weight, hessian, scale, zero, integers = case(3, True, inputs=150, images=400)
    found = sweep(weight, Elimination.of(hessian, 0.01, False), scale.double(), zero, integers)
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(150, dtype=torch.double)
    wanted = reference(weight[0, 0], damped, torch.arange(150), float(scale[0, 0]), 0.0, integers)
    assert torch.equal(found[0, 0], wanted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("images", [3, 40])  # 3: far below the rank of 12 inputs
def test_no_row_gets_worse_than_nearest(seed: int, bits: int, symmetric: bool, images: int) -> None:
    weight, hessian, scale, zero, integers = case(bits, symmetric, seed, images=images)
    elimination = Elimination.of(hessian, 0.01, True)
    for refit in (False, True):
        q, new, nearest, error = round_rows(
            weight, hessian, elimination, scale, zero, integers, refit
        )
        lo, hi = integers.lo - zero[..., None], integers.hi - zero[..., None]
        plain = (weight / scale[..., None].double()).round().clamp(lo, hi)
        wanted = squared_error(weight, plain * scale[..., None].double(), hessian)
        assert torch.equal(nearest, wanted) and (error <= nearest).all()
        found = squared_error(weight, q * new[..., None].double(), hessian)
        assert torch.allclose(found, error)
        assert ((q >= lo) & (q <= hi)).all() and torch.equal(q, q.round())
        assert refit or torch.equal(new, scale)


def test_gptq_is_better_than_nearest_where_inputs_are_correlated() -> None:
    weight, hessian, scale, zero, integers = case(3, True)
    _, _, nearest, error = round_rows(
        weight, hessian, Elimination.of(hessian, 0.01, True), scale, zero, integers, False
    )
    assert error.sum() < 0.7 * nearest.sum()


def test_inputs_that_never_vary_are_rounded_to_nearest() -> None:
    weight, hessian, scale, zero, integers = case(4, True)
    hessian[:, 3], hessian[:, :, 3] = 0, 0
    elimination = Elimination.of(hessian, 0.01, True)
    q = sweep(weight, elimination, scale.double(), zero, integers)
    assert elimination.dead == 1
    assert torch.equal(q[..., 3], (weight[..., 3] / scale.double()).round().clamp(-8, 7))


def test_damping_rises_where_inputs_depend_on_each_other() -> None:
    weight, hessian, scale, zero, integers = case(4, True, images=3)
    elimination = Elimination.of(hessian, 0.0, True)
    assert 0 < elimination.damping <= 1e-3 and torch.isfinite(elimination.root).all()
    _, _, nearest, error = round_rows(weight, hessian, elimination, scale, zero, integers)
    assert (error <= nearest).all()


def layer_of(float_layer: nn.Module, config: QuantConfig) -> QuantLinear | QuantConv2d:
    """A quantized layer with points that a range of inputs has set."""
    kind = QuantConv2d if isinstance(float_layer, nn.Conv2d) else QuantLinear
    layer = kind.from_float(float_layer, config)
    for point, x in ((layer.input_quant, torch.tensor([-3.0, 3])), (layer.weight_quant, None)):
        point.observe()
        point(layer.weight if x is None else x)
        point.freeze()
    return layer


@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_is_the_linear_layer_of_its_patches(groups: int) -> None:
    conv = nn.Conv2d(6, 9, 3, stride=2, padding=1, dilation=1, groups=groups)
    layer = layer_of(conv, QuantConfig())
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = rows_of(layer, x)  # (groups, n, inputs)
    weight = conv.weight.reshape(groups, 9 // groups, -1)
    y = (rows @ weight.mT).permute(1, 0, 2).flatten(1) + conv.bias
    assert torch.allclose(y, conv(x).permute(0, 2, 3, 1).flatten(0, 2), atol=1e-5)


def rounded(name: str, method: str = "gptq", bits: int = 3, **options: object) -> nn.Module:
    """A toy network, calibrated and rounded."""
    config = QuantConfig(weight_bits=bits, execution="simulate", weight_symmetric=name != "deit")
    qmodel = quantize(toy(name), config)
    calibrate(qmodel, toy_images(name))
    list(round_weights(qmodel, toy_images(name), method))
    return qmodel


def test_every_family_is_rounded_in_order(family: str) -> None:
    model = toy(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qmodel = quantize(model, QuantConfig(weight_bits=3))
    calibrate(qmodel, toy_images(family))
    events = list(round_weights(qmodel, toy_images(family)))
    layers = quant_layers(qmodel)
    assert {event.name for event in events} == set(layers)
    assert all(event.after <= event.before for event in events)
    for name, layer in layers.items():
        point, weight = layer.weight_quant, layer.weight
        q = point.to_integers(weight)
        zero = point.zero_point.view(-1, *[1] * (weight.ndim - 1))
        assert torch.equal(q * point.scale.view_as(zero), weight), name
        assert ((q + zero >= point.integers.lo) & (q + zero <= point.integers.hi)).all()
        assert not weight.requires_grad and layer.rounded
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_integer_execution_multiplies_the_same_integers() -> None:
    qmodel, x = rounded("vit"), toy_images("vit")
    with torch.no_grad():
        outputs = {}
        for execution in ("plain", "simulate", "auto"):
            set_execution(qmodel, execution)
            outputs[execution] = qmodel(x)
    assert torch.allclose(outputs["plain"], outputs["simulate"], atol=1e-3)
    assert torch.allclose(outputs["plain"], outputs["auto"], atol=1e-3)


def test_gptq_brings_the_embedded_network_closer_to_float() -> None:
    demo = load_demo("vit", calibration=200)
    qmodel = quantize(demo.model, QuantConfig(weight_bits=3, weight_observer="mse"))
    calibrate(qmodel, demo.calibration)
    with torch.no_grad():
        start = kl(qmodel(demo.calibration), demo.targets)
        list(round_weights(qmodel, demo.calibration))
        assert kl(qmodel(demo.calibration), demo.targets) < start / 2


def test_biases_restore_the_mean_output() -> None:
    demo = load_demo("vit", calibration=50)
    qmodel = quantize(demo.model, QuantConfig(weight_bits=3))
    calibrate(qmodel, demo.calibration)
    first = quant_layers(qmodel)["patch_embed.proj"]
    list(round_weights(qmodel, demo.calibration, weigh=False))
    with torch.no_grad():
        found, wanted = first(demo.calibration), demo.model.patch_embed.proj(demo.calibration)
    assert torch.allclose(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-5)


def test_rounding_resumes_where_it_was_stopped() -> None:
    whole = integers_of(rounded("vit"))
    images = toy_images("vit")
    first, second = (
        quantize(toy("vit"), QuantConfig(weight_bits=3, execution="simulate")) for _ in range(2)
    )
    for qmodel in (first, second):
        calibrate(qmodel, images)
    list(islice(round_weights(first, images), 2))
    done = integers_of(first)
    assert 0 < len(done) < len(whole)
    events = list(round_weights(second, images, done=done))
    assert not any(f"{event.name}.integers" in done for event in events)
    found = integers_of(second)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_rounding_again_and_calibrating_start_from_float_weights() -> None:
    qmodel, images = rounded("vit"), toy_images("vit")
    weights = [layer._float[0] for layer in quant_layers(qmodel).values()]
    list(round_weights(qmodel, images, "nearest"))
    assert [layer.weight for layer in quant_layers(qmodel).values()] == weights
    list(round_weights(qmodel, images))
    calibrate(qmodel, images)
    assert not any(layer.rounded for layer in quant_layers(qmodel).values())


def test_frozen_integers_stay_while_scales_move() -> None:
    qmodel, x = rounded("vit", bits=8), toy_images("vit")
    layer = quant_layers(qmodel)["blocks.0.attn.qkv"]
    q = layer.weight_quant.to_integers(layer.weight)
    with torch.no_grad():
        start = qmodel(x)
        freeze_integers(qmodel)
        assert torch.equal(qmodel(x), start)
        layer.weight_quant.scale *= 1.1
        assert torch.equal(layer.weight_quant.to_integers(layer.weight), q)
        assert not torch.equal(qmodel(x), start)
    saved = integers_of(qmodel)
    assert torch.equal(saved["blocks.0.attn.qkv.integers"].float(), q)
    calibrate(qmodel, x)
    assert not any(isinstance(m, FixedIntegers) for m in qmodel.modules())


def test_integers_are_put_into_an_equal_network_only() -> None:
    saved = integers_of(rounded("vit"))
    qmodel = quantize(toy("vit"), QuantConfig(weight_bits=3, execution="simulate"))
    calibrate(qmodel, toy_images("vit"))
    name = "blocks.0.attn.proj.integers"
    for wrong in (
        {"blocks.7.attn.proj.integers": saved[name]},
        {**saved, name: saved[name][1:]},
        {name.replace("integers", "bias"): saved[name.replace("integers", "bias")]},
        {**saved, name: saved[name] + 10},
    ):
        with pytest.raises(ValueError, match="these integers"):
            set_integers(qmodel, wrong)
        assert not any(layer.rounded for layer in quant_layers(qmodel).values())
    set_integers(qmodel, saved)
    with torch.no_grad():
        assert torch.equal(qmodel(toy_images("vit")), rounded("vit")(toy_images("vit")))


def test_bad_input_gets_one_sentence() -> None:
    images = toy_images("vit")
    qmodel = quantize(toy("vit"), QuantConfig(weight_bits=3))
    with pytest.raises(ValueError, match="not calibrated"):
        round_weights(qmodel, images)
    with pytest.raises(ValueError, match="not calibrated"):
        freeze_integers(qmodel)
    calibrate(qmodel, images)
    with pytest.raises(ValueError, match="unknown rounding 'gtpq'; known: nearest, gptq"):
        round_weights(qmodel, images, "gtpq")
    with pytest.raises(ValueError, match="no images"):
        round_weights(qmodel, images[:0])
    qmodel.blocks[1].norm1.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv: .* NaN"):
        list(round_weights(qmodel, images, weigh=False))


def test_few_images_are_enough_for_damping() -> None:
    qmodel = quantize(toy("vit"), QuantConfig(weight_bits=3))
    calibrate(qmodel, toy_images("vit"))
    events = list(round_weights(qmodel, toy_images("vit")[:1], damping=0.0))
    assert any("depend on each other" in note for event in events for note in event.notes)
    assert all(event.after <= event.before for event in events)
