"""Learned rounding: never worse, the same every time, and nothing half-done left behind."""

from itertools import islice

import pytest
import torch
from conftest import toy, toy_images
from torch import Tensor, nn

from evolq_lite import QuantConfig, calibrate, quantize
from evolq_lite.fast import set_execution
from evolq_lite.layers import QuantLinear
from evolq_lite.learned import Block, Choice, learn
from evolq_lite.quantizer import FixedIntegers, Quantizer
from evolq_lite.rounding import integers_of, quant_layers, round_weights

BUDGET = 60  # forwards of a block


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def calibrated(name: str = "vit", bits: int = 3, **options: object) -> nn.Module:
    """A toy network, ready to be rounded."""
    qmodel = quantize(toy(name), QuantConfig(weight_bits=bits, **options))
    calibrate(qmodel, toy_images(name))
    return qmodel


def block_of_one(x: Tensor, float_weight: Tensor) -> Block:
    """A single layer on inputs (n, 4), at the nearest integers."""
    linear = nn.Linear(4, 3, bias=False)
    linear.weight.data = float_weight
    layer = QuantLinear.from_float(linear, QuantConfig(weight_bits=3))
    layer.input_quant.stay_float()
    layer.weight_quant.observe()
    layer.weight_quant(layer.weight)
    layer.weight_quant.freeze()
    integers = layer.weight_quant.to_integers(float_weight)
    layer.set_integers(integers, layer.weight_quant.scale)
    targets = x @ float_weight.T
    weights = {"linear": float_weight}
    return Block(layer, {"linear": layer}, weights, x, x, targets, torch.ones(len(x), 1))


def every_choice(block: Block) -> float:
    """The least error of a block of one layer, over both neighbours of each weight."""
    layer, weight = block.layers["linear"], block.float_weights["linear"]
    low = (weight / layer.weight_quant.scale[:, None]).floor()
    lo, hi = layer.weight_quant.integers.lo, layer.weight_quant.integers.hi
    least = 0.0
    bits = torch.cartesian_prod(*[torch.arange(2.0)] * 4)  # (16, 4)
    for row in range(3):
        q = (low[row] + bits).clamp(lo, hi) * layer.weight_quant.scale[row]
        outputs = block.inputs @ q.T  # (n, 16)
        lost = outputs - block.targets[:, row, None]
        least += float(lost.square().mean(0).min())
    return least / 3


@pytest.mark.parametrize("seed", range(3))
def test_a_small_layer_gets_close_to_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    x = torch.randn(64, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    block = block_of_one(x, weight)
    start, best = block.error(), every_choice(block)
    before, after = learn(block, budget=300)
    assert after <= before
    assert best - 1e-6 <= block.error() <= best + 0.5 * (start - best) + 1e-6


def test_a_choice_is_between_the_present_integer_and_the_next_one_towards_the_float_weight() -> (
    None
):
    qmodel = calibrated(bits=2)
    list(round_weights(qmodel, toy_images("vit")))
    for layer in quant_layers(qmodel).values():
        weight = layer._float[0].detach()
        choice = Choice(layer, weight)
        now = layer.weight_quant.to_integers(layer.weight)
        exact = weight / choice.scale
        assert ((choice.low == now) | (choice.low + 1 == now)).all()
        lo, hi = layer.weight_quant.integers.lo, layer.weight_quant.integers.hi
        inside = (exact > lo) & (exact < hi)
        towards = torch.where(now <= exact, now, now - 1)
        assert torch.equal(choice.low[inside], towards[inside])
        assert choice.low.min() >= lo and choice.low.max() < hi


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_no_block_gets_worse_and_the_grid_stays(name: str, start: str) -> None:
    qmodel, images = calibrated(name), toy_images(name)
    options = {"start": start, "budget": BUDGET, "batch": 4}
    events = list(round_weights(qmodel, images, "learned", **options))
    layers = quant_layers(qmodel)
    assert [event.name for event in events] == list(dict.fromkeys(e.name for e in events))
    assert {event.name for event in events} == set(layers)
    assert all(event.after <= event.before for event in events)
    assert any(event.after < 0.9 * event.before for event in events)
    for event in events:
        kept = any(f"nothing better than {start}" in note for note in event.notes)
        assert kept == (event.after == event.before)
    other = calibrated(name)
    list(round_weights(other, images, start))
    for key, layer in layers.items():
        point, weight = layer.weight_quant, layer.weight
        q = point.to_integers(weight)
        assert torch.equal(q * point.scale.view(-1, *[1] * (weight.ndim - 1)), weight), key
        assert q.min() >= point.integers.lo and q.max() <= point.integers.hi
        assert isinstance(point, Quantizer) and not weight.requires_grad
        assert layer.bias is None or not layer.bias.requires_grad
        if start == "nearest":
            assert torch.equal(point.scale, quant_layers(other)[key].weight_quant.scale), key


def test_integer_execution_multiplies_the_learned_integers() -> None:
    qmodel, x = calibrated(), toy_images("vit")
    list(round_weights(qmodel, x, "learned", budget=12))
    outputs = {}
    with torch.no_grad():
        for execution in ("plain", "simulate", "auto"):
            set_execution(qmodel, execution)
            outputs[execution] = qmodel(x)
    assert torch.allclose(outputs["plain"], outputs["simulate"], atol=1e-3)
    assert torch.allclose(outputs["plain"], outputs["auto"], atol=1e-3)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_learning_resumes_at_the_block_where_it_was_stopped(drop: float) -> None:
    images = toy_images("vit")
    whole, first, second = calibrated(), calibrated(), calibrated()
    options = {"budget": 12, "drop": drop}
    list(round_weights(whole, images, "learned", **options))
    list(islice(round_weights(first, images, "learned", **options), 2))  # in the first block
    done, wanted = integers_of(first), integers_of(whole)
    assert 0 < len(done) < len(wanted)
    assert all(torch.equal(done[name], wanted[name]) for name in done)
    events = list(round_weights(second, images, "learned", done, **options))
    assert not any(f"{event.name}.integers" in done for event in events)
    found = integers_of(second)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_block_that_is_interrupted_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel, images = calibrated(), toy_images("vit")
    layer = quant_layers(qmodel)["blocks.0.mlp.fc1"]
    scale, point = layer.weight_quant.scale.clone(), layer.weight_quant
    rounding = round_weights(qmodel, images, "learned", budget=12)
    stem = next(rounding)
    assert stem.name == "patch_embed.proj"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(rounding)
    assert {name.rpartition(".")[0] for name in integers_of(qmodel)} == {stem.name}
    assert layer.weight_quant is point and torch.equal(point.scale, scale)
    assert layer.weight is layer._float[0] and layer.bias is layer._float[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "floor"}, "unknown start 'floor' of learned rounding; known: gptq, nearest"),
        ({"budget": 0}, "budget must be at least 3 forwards of a block, one gradient, not 0"),
        ({"drop": 1.5}, "drop must be a probability from 0 to 1, not 1.5"),
        ({"drop": float("nan")}, "drop must be a probability"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], said: str) -> None:
    qmodel = calibrated()
    with pytest.raises(ValueError, match=said):
        round_weights(qmodel, toy_images("vit"), "learned", **options)
    assert not integers_of(qmodel)


@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_inputs_that_are_not_finite(start: str) -> None:
    qmodel, images = calibrated(), toy_images("vit")
    qmodel.blocks[1].norm1.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1.*: its .*puts .*NaN"):
        list(round_weights(qmodel, images, "learned", start=start, budget=3, weigh=False))
    assert not any(name.startswith("blocks.1.") for name in integers_of(qmodel))
    assert not any(isinstance(module, FixedIntegers | Choice) for module in qmodel.modules())
