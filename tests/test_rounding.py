"""Which integers weights become: GPTQ against a dense reference; frozen, saved and sent ones."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import toy, toy_images
from safetensors.torch import load_file, save
from torch import Tensor, nn

from evolq_lite import (
    BlockObjective,
    QuantConfig,
    SearchConfig,
    calibrate,
    chain_of,
    describe,
    evolve,
    load_demo,
    load_scales,
    quantize,
    save_scales,
)
from evolq_lite.chain import CHUNK_BYTES
from evolq_lite.convert import factors_of, quantizers, set_factors, twin
from evolq_lite.evolve import Evaluated, visits_of
from evolq_lite.fast import set_execution
from evolq_lite.fitness import kl
from evolq_lite.gptq import Elimination, round_rows, squared_error, sweep
from evolq_lite.layers import QuantConv2d, QuantLinear
from evolq_lite.numerics import IntRange
from evolq_lite.quantizer import FixedIntegers
from evolq_lite.rounding import (
    Rounded,
    are_frozen,
    freeze_integers,
    integers_of,
    quant_layers,
    round_segment,
    round_weights,
    rows_of,
    set_integers,
    walk,
    weigh_outputs,
)
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.run import Run
from evolq_lite.runs.scales import digest_of, extras_of, put_extras, put_scales, scales_of
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Bench, Task, rounding_of, state_of

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


@torch.no_grad()
def test_inputs_are_weighed_alike_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many images have their graph kept at a time changes last digits of weights only."""
    found = []
    for size in (CHUNK_BYTES, 3 * 1024):
        monkeypatch.setattr("evolq_lite.chain.CHUNK_BYTES", size)
        x = toy_images("vit", 12)
        qmodel = quantize(toy("vit"), QuantConfig(3))
        calibrate(qmodel, x)
        segments = walk(qmodel, twin(qmodel), x, batch=8, weigh=True)
        for segment in islice(segments, 2):  # the stem, and a block
            list(round_segment(segment))
        outputs = [segment.run_float(x) for x in segment.float_inputs]
        found.append((segment.chunk, segment.weights, weigh_outputs(segment, outputs)))
    (many, weights, at_outputs), (few, again, same) = found
    assert few < 8 <= many
    assert torch.allclose(at_outputs, same, rtol=1e-3)
    for name, batches in weights.items():
        assert [len(w) for w in batches] == [len(w) for w in again[name]]
        assert torch.allclose(torch.cat(batches), torch.cat(again[name]), rtol=1e-3)


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
        {name: saved[name]},
        {**saved, "blocks.0.attn.proj.floats": saved[name]},
    ):
        with pytest.raises(ValueError, match="these integers"):
            set_integers(qmodel, wrong)
        assert not any(layer.rounded for layer in quant_layers(qmodel).values())
    set_integers(qmodel, saved)
    with torch.no_grad():
        assert torch.equal(qmodel(toy_images("vit")), rounded("vit")(toy_images("vit")))


def state(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in qmodel.state_dict().items()}


def wiggle(qmodel: nn.Module) -> None:
    """Move the scales of weights as a search does, in place, far enough for integers to flip."""
    for layer in quant_layers(qmodel).values():
        layer.weight_quant.scale *= 1.2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("calibrated", [True, False])
def test_saved_integers_come_back_under_scales_that_have_moved(
    tmp_path: Path, frozen: bool, calibrated: bool
) -> None:
    images = toy_images("vit")
    qmodel = rounded("vit", bits=4)
    if frozen:
        freeze_integers(qmodel)
    wiggle(qmodel)
    flips = any(
        not torch.equal(layer.weight_quant.to_integers(layer.weight).short(), layer.chosen[0])
        for layer in quant_layers(qmodel).values()
    )
    assert flips != frozen
    save_scales(tmp_path / "scales", qmodel, visits=1)
    other = quantize(toy("vit"), QuantConfig(weight_bits=4, execution="simulate"))
    if calibrated:
        calibrate(other, images[:3])
        list(round_weights(other, images[:3]))  # other integers, which go
    assert load_scales(tmp_path / "scales", other) == {"visits": 1}
    assert are_frozen(other) == frozen
    with torch.no_grad():
        assert torch.equal(other(images), qmodel(images))
        wiggle(other)
        wiggle(qmodel)
        assert torch.equal(other(images), qmodel(images))
    assert (frozen, "frozen" in describe(other)) in ((True, True), (False, False))
    save_scales(tmp_path / "again", other, visits=1)
    save_scales(tmp_path / "scales", qmodel, visits=1)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "scales").read_bytes()


@pytest.mark.parametrize("integers", [True, False])
def test_factors_of_channels_are_saved_and_sent_with_the_integers(
    tmp_path: Path, integers: bool
) -> None:
    config, images = QuantConfig(weight_bits=4, gelu_factors=True), toy_images("vit")
    qmodel, other, third = (quantize(toy("vit"), config) for _ in range(3))
    for network in (qmodel, third):
        calibrate(network, images)
    powers = torch.arange(-3, 3).repeat(16).float().exp2()  # of 96 channels
    set_factors(qmodel, dict.fromkeys(factors_of(qmodel), powers))
    if integers:
        list(round_weights(qmodel, images))
    save_scales(tmp_path / "scales", qmodel)
    load_scales(tmp_path / "scales", other)
    put_extras(third, extras_of(qmodel))
    put_scales(third, scales_of(qmodel))
    with torch.no_grad():
        wanted = qmodel(images)
        assert torch.equal(other(images), wanted) and torch.equal(third(images), wanted)
    without = quantize(toy("vit"), QuantConfig(weight_bits=4))
    with pytest.raises(ValueError, match="another network or another quantization"):
        load_scales(tmp_path / "scales", without)


def test_a_file_without_integers_takes_a_rounded_network_back_to_nearest(tmp_path: Path) -> None:
    images = toy_images("vit")
    qmodel = quantize(toy("vit"), QuantConfig(weight_bits=4, execution="simulate"))
    calibrate(qmodel, images)
    save_scales(tmp_path / "scales", qmodel)
    with torch.no_grad():
        wanted = qmodel(images)
        list(round_weights(qmodel, images))
        load_scales(tmp_path / "scales", qmodel)
        assert torch.equal(qmodel(images), wanted)


def test_a_file_with_integers_that_do_not_fit_changes_nothing(tmp_path: Path) -> None:
    path, name = tmp_path / "scales", "blocks.0.attn.proj"
    qmodel, other = rounded("vit", bits=3), rounded("vit", bits=4)
    integers, scales = integers_of(other), scales_of(other)
    for wrong, said in (
        ({f"{name}.integers": integers[f"{name}.integers"].int()}, "torch.int32"),
        ({f"{name}.integers": integers[f"{name}.integers"][1:]}, "shape"),
        ({f"{name}.integers": integers[f"{name}.integers"]}, "do not fit 3 bits"),
        ({f"{name}.scale": -integers[f"{name}.scale"]}, "not positive"),
        ({f"{name}.bias": integers[f"{name}.bias"] * torch.nan}, "NaN"),
        ({f"{name}.wrong": integers[f"{name}.bias"]}, "another network"),
    ):
        tensors = {**scales, **integers_of(qmodel), **wrong}
        path.write_bytes(save(tensors, {"run": json.dumps({"sha256": digest_of(tensors, {})})}))
        before = state(qmodel)
        with pytest.raises(ValueError, match=said):
            load_scales(path, qmodel)
        assert all(torch.equal(before[key], value) for key, value in state(qmodel).items())


def test_frozen_integers_give_the_same_numbers_in_every_execution() -> None:
    qmodel, x = rounded("vit"), toy_images("vit")
    freeze_integers(qmodel)
    wiggle(qmodel)
    found = {}
    with torch.no_grad():
        for execution in ("plain", "simulate", "auto"):
            set_execution(qmodel, execution)
            found[execution] = qmodel(x)
    assert torch.equal(found["plain"], found["simulate"])
    assert torch.allclose(found["plain"], found["auto"], atol=1e-3)


def test_a_search_with_frozen_integers_moves_scales_only() -> None:
    qmodel, images = rounded("vit"), toy_images("vit")
    integers = integers_of(qmodel)
    targets = toy("vit")(images).detach()
    config = SearchConfig(passes=1, cycles=2, step=0.05, mutation="relative", integers="frozen")
    start = {name: p.scale.clone() for name, p in quantizers(qmodel).items()}
    list(evolve(chain_of(qmodel), images, targets, config))
    moved = {
        name for name, p in quantizers(qmodel).items() if not torch.equal(p.scale, start[name])
    }
    assert moved and all(".attn." in name for name in moved)
    for name, layer in quant_layers(qmodel).items():
        point = layer.weight_quant
        assert torch.equal(point.to_integers(layer.weight).short(), integers[f"{name}.integers"])
    float_weights = quantize(toy("vit"), QuantConfig(float_points="weights"))
    calibrate(float_weights, images)
    with pytest.raises(ValueError, match="stays float, so there are no integers"):
        freeze_integers(float_weights)
    with pytest.raises(ValueError, match="stays float, so there are no integers"):
        round_weights(float_weights, images)
    assert list(round_weights(float_weights, images, "nearest")) == []


SOURCE = Embedded("cnn", 60, 0)


def run(
    out: Path, rounding: str, integers: str, stop: int | None = None, **options: bool
) -> tuple[bytes, list[Evaluated], int]:
    """A short run on one thread: its file of scales, its history, how many layers it rounded."""
    torch.set_num_threads(1)
    events: list[Rounded] = []
    search = SearchConfig(passes=1, cycles=1, batch=30, step=1e-2, integers=integers)
    quant = QuantConfig(weight_bits=3, rounding=rounding)
    with Run(SOURCE, quant, search, out, on_rounded=events.append, **options) as whole:
        for i, _ in enumerate(whole.evolve(), 1):
            if i == stop:
                break
        history = [replace(event, seconds=0.0) for event in whole.folder.history()]
    return (out / "scales.safetensors").read_bytes(), history, len(events)


@pytest.mark.usefixtures("few_factors")
@pytest.mark.parametrize("integers", ["free", "frozen"])
def test_a_stopped_run_finds_its_integers_in_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, integers: str
) -> None:
    out, file = tmp_path / "run", tmp_path / "run" / "scales.safetensors"
    scales, history, count = run(tmp_path / "whole", "gptq", integers)
    assert count > 0 and len({event.fitness for event in history}) > 1
    run(out, "gptq", integers, stop=3)
    assert run(out, "gptq", integers, resume=True) == (scales, history, 0)
    assert not caplog.records
    # Damage costs time, and nothing else.
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert run(out, "gptq", integers, resume=True) == (scales, history, count)
    assert "digest differs; the integers of weights are chosen again" in caplog.text


@pytest.mark.usefixtures("few_factors")
def test_integers_of_another_run_are_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    wanted = run(out, "gptq", "free", stop=3)
    with Run(SOURCE, QuantConfig(weight_bits=3), SearchConfig(batch=30), tmp_path / "other") as it:
        list(round_weights(it.qmodel, it.parts.images[:20]))
        save_scales(out / "scales.safetensors", it.qmodel)
    assert run(out, "gptq", "free", stop=1, resume=True)[2] == wanted[2]
    assert "holds other integers than the run began with" in caplog.text


@pytest.mark.usefixtures("few_factors")
def test_a_folder_of_before_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has no integers, and its config does not know of options that are newer."""
    out = tmp_path / "run"
    whole = run(tmp_path / "whole", "gptq", "free")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    del config["search"]["integers"]
    folder = RunFolder.create(out, {k: v for k, v in config.items() if k != "format"})
    shutil.copy(tmp_path / "whole" / "environment.json", out)
    for event in RunFolder(tmp_path / "whole").history()[:3]:
        folder.append(event)
    folder.close()
    tensors = load_file(tmp_path / "whole" / "scales.safetensors")
    layers = [key.removesuffix(".integers") for key in tensors if key.endswith(".integers")]
    new = {f"{layer}.{part}" for layer in layers for part in ("integers", "scale", "bias")}
    old = {key: value for key, value in tensors.items() if key not in new}
    said = json.dumps({"sha256": digest_of(old, {})})
    (out / "scales.safetensors").write_bytes(save(old, {"run": said}))
    assert run(out, "gptq", "free", resume=True) == whole
    assert not caplog.records


@pytest.mark.usefixtures("few_factors")
@pytest.mark.parametrize("integers", ["free", "frozen"])
def test_a_worker_makes_the_same_of_the_integers_that_it_is_sent(
    tmp_path: Path, integers: str
) -> None:
    """Whatever its own calibration would have chosen."""
    torch.set_num_threads(1)
    search = SearchConfig(passes=1, batch=30, integers=integers)
    quant = QuantConfig(weight_bits=3, rounding="gptq")
    with Run(SOURCE, quant, search, tmp_path / "run") as whole:
        next(whole.evolve())  # freezes
        bench = Bench(SOURCE, quant, search)
        visit = visits_of(whole.chain, search)[1]
        with torch.no_grad():
            wiggle(whole.qmodel)
        for vector in (visit.genome.read(whole.qmodel), 1.01 * visit.genome.read(whole.qmodel)):
            here = BlockObjective(
                whole.chain,
                visit.blocks,
                whole.parts.images[30:],
                whole.parts.targets[30:],
                batch=30,
                genome=visit.genome,
            )
            state, rounding = state_of(whole.qmodel), rounding_of(whole.qmodel)
            numbers = vector.numpy().tobytes()
            task = Task(SOURCE, quant, search, state, visit.blocks, visit.genome, numbers, 1)
            assert bench.loss(task, rounding) == float(here(vector[None])[0])


def test_bad_input_gets_one_sentence() -> None:
    images = toy_images("vit")
    qmodel = quantize(toy("vit"), QuantConfig(weight_bits=3))
    with pytest.raises(ValueError, match="not calibrated"):
        round_weights(qmodel, images)
    with pytest.raises(ValueError, match="not calibrated"):
        freeze_integers(qmodel)
    calibrate(qmodel, images)
    with pytest.raises(ValueError, match="unknown rounding 'gtpq'; known: nearest, gptq, learned"):
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
