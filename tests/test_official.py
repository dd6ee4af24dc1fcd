"""What the published script does: each option worked out by hand, the preset, and its name.

The right values come from the formulas, which stand beside them.
"""

import json
from dataclasses import replace
from math import sqrt

import pytest
import torch
from commands import call, command
from conftest import toy, toy_images
from PIL import Image
from torch import nn

import evolq_lite as eq
from evolq_lite import cli
from evolq_lite.config import preset_of
from evolq_lite.convert import kind_of, points
from evolq_lite.data import transform_of
from evolq_lite.deployed import Deployed
from evolq_lite.export import export_onnx
from evolq_lite.files import checksum_of, seal
from evolq_lite.kernels import missing
from evolq_lite.layers import QuantLinear, QuantProducts
from evolq_lite.numerics import IntRange, log2_fake_quantize, match_moments
from evolq_lite.observers import MeanSquaredError, PowerOfTwo
from evolq_lite.rounding import freeze_integers, quant_layers
from evolq_lite.runs.folder import RunFolder, seed_of
from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Bench, state_of

OFFICIAL = eq.PRESETS["official"]


def near(values):
    return pytest.approx(values, abs=1e-5)


def layer_of(weight, bias=None, **options) -> QuantLinear:
    """A calibrated linear layer with this weight (out, in), whose inputs lie between -1 and 3."""
    weight = torch.tensor(weight) if isinstance(weight, list) else weight
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    layer = QuantLinear.from_float(plain, eq.QuantConfig(**options))
    layer.input_quant.observe(), layer.weight_quant.observe()
    with torch.no_grad():
        layer(torch.linspace(-1, 3, weight.shape[1]).repeat(2, 1))
    layer.input_quant.freeze(), layer.weight_quant.freeze()
    return layer


# Golden values


def test_asymmetric_minmax_weights():
    """scale = (1.5 + 0.375) / 15 = 0.125, zero point = 0 - round(-0.375 / 0.125) = 3."""
    layer = layer_of([[-0.375, 0.05, 0.3, 1.5]], weight_bits=4, weight_symmetric=False)
    point = layer.weight_quant
    assert point.scale.tolist() == near([0.125]) and point.zero_point.tolist() == [3.0]
    # -0.375, 0.05, 0.3, 1.5 are -3, 0.4, 2.4, 12 steps: codes 0, 3, 5, 15 of 0 ... 15
    assert point.to_integers(layer.weight).tolist() == [[-3, 0, 2, 12]]
    assert layer.quantize_weight().tolist() == [near([-0.375, 0.0, 0.25, 1.5])]


def test_moments_are_those_of_the_float_weights():
    """Weights 0.2 + (-0.7, -0.1, 0.1, 0.7): mean 0.2, variance (0.49 + 0.01 + 0.01 + 0.49) / 4.

    At 2 bits the step is (0.9 + 0.5) / 3 = 0.4667. The weights are -1.07, 0.21, 0.64, 1.93 steps:
    integers -1, 0, 1, 2 with mean 0.5 and variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25. So they
    are scaled by sqrt(0.25 / 1.25) = 1 / sqrt(5), and shifted by 0.2 - 0.5 / sqrt(5).
    """
    layer = layer_of(
        [[-0.5, 0.1, 0.3, 0.9]], weight_bits=2, weight_symmetric=False, moment_correction=True
    )
    assert layer.weight_quant.to_integers(layer.weight).tolist() == [[-1, 0, 1, 2]]
    found = layer.quantize_weight()
    root = sqrt(5)
    assert found.tolist() == [near([0.2 + (q - 0.5) / root for q in (-1, 0, 1, 2)])]
    assert float(found.mean()) == near(0.2) and float(found.var(correction=0)) == near(0.25)


def test_moments_of_equal_integers_keep_the_mean_only():
    """No scale gives 2, 2, 2 a variance; shifting by the mean, 0.3 - 2, leaves 0.3 everywhere."""
    scale, shift = match_moments(torch.full((1, 3), 2.0), torch.tensor([[0.2, 0.3, 0.4]]))
    assert scale.tolist() == [1.0] and shift.tolist() == near([-1.7])


def test_moments_are_restored_anew_for_each_scale():
    """A scale that flips no integer changes nothing; one that does gives other weights.

    With steps of 0.56 in place of 0.4667, 0.1, 0.3 and 0.9 are 0.18, 0.54, 1.6 steps: -1, 0, 1, 2
    stay. With 0.64 they are 0.16, 0.47, 1.41: integers -1, 0, 0, 1.
    """
    layer = layer_of(
        [[-0.5, 0.1, 0.3, 0.9]], weight_bits=2, weight_symmetric=False, moment_correction=True
    )
    first = layer.quantize_weight()
    layer.weight_quant.scale.fill_(0.56)
    assert torch.equal(layer.quantize_weight(), first)
    layer.weight_quant.scale.fill_(0.64)
    found = layer.quantize_weight()
    # mean 0, variance 0.5: scaled by sqrt(0.25 / 0.5)
    assert found.tolist() == [near([0.2 + q * sqrt(0.5) for q in (-1, 0, 0, 1)])]


def test_one_scale_for_q_k_and_v():
    """q in -1 ... 0.5, k in 0 ... 2, v in -0.55 ... 1: together -1 ... 2, so the step is 3 / 255.

    The zero point is round(1 / (3 / 255)) = 85.
    """
    tensors = [torch.tensor(ends).view(1, 1, 2, 1) for ends in ((-1, 0.5), (0, 2.0), (-0.55, 1))]
    found = {}
    for qkv in ("shared", "separate"):
        products = QuantProducts(eq.QuantConfig(qkv=qkv))
        for module in products.children():
            module.observe()
        products(*tensors, scale=1.0)
        for module in products.children():
            module.freeze()
        found[qkv] = products
    shared, separate = found["shared"], found["separate"]
    assert shared.q is shared.k is shared.v
    assert float(shared.k.scale) == near(3 / 255) and float(shared.k.zero_point) == 85
    steps = [float(point.scale) for point in (separate.q, separate.k, separate.v)]
    assert steps == near([1.5 / 255, 2 / 255, 1.55 / 255])


def test_power_of_two_factors_of_the_last_batch():
    """Values from 0 to 255 over both batches: steps 1, 1/2, 1/4, 1/8 with zero point 0.

    Channel 0: the first batch has 0 and 255, the last 200. 200 is a code at step 1, while at 1/2
    the largest is 127.5: step 1. Channel 1: the first batch has 0 and 200, which takes step 1. The
    last has 0.125 and 0.625, which only the step 1/8 holds exactly.
    """
    first, last = torch.tensor([[0.0, 0.0], [255, 200]]), torch.tensor([[200, 0.125], [200, 0.625]])
    steps = {}
    for batches in ("all", "last"):
        observer = PowerOfTwo(IntRange(8, False), axis=-1)
        observer.update(first)
        if batches == "last":
            observer.forget_samples()
        observer.update(last)
        scale, zero_point = observer.params()
        steps[batches] = scale.tolist()
        assert float(zero_point) == 0
    assert steps == {"all": near([1, 1]), "last": near([1, 0.125])}


def test_squared_errors_of_the_last_batch():
    """Values from 0 to 3 at 2 bits: a factor f of the range gives the grid 0, f, 2f, 3f.

    The last batch, 0, 0.75, 1.5, 2.25, lies on the grid of f = 0.75. With the first batch, 3 would
    be clipped to 2.25, which costs 0.5625; at f = 1 all costs are 0.0625 + 0.25 + 0.0625 = 0.375.
    """
    steps = {}
    for batches in ("all", "last"):
        observer = MeanSquaredError(IntRange(2, False))
        observer.update(torch.tensor([0.0, 3.0]))
        if batches == "last":
            observer.forget_samples()
        observer.update(torch.tensor([0, 0.75, 1.5, 2.25]))
        steps[batches] = float(observer.params()[0])
    assert steps["last"] == near(0.75) and steps["all"] > 0.8


def test_log2_codes():
    """-log2 of 1, 0.71, 0.7, 0.3 is 0, 0.49, 0.51, 1.74; beyond code 15 there is only zero."""
    x = torch.tensor([1, 0.71, 0.7, 0.3, 2**-15.4, 2**-15.6, 0.0])
    assert log2_fake_quantize(x, 4).tolist() == [1, 1, 0.5, 0.25, 2**-15, 0, 0]


def test_tokens_and_positions_are_quantized_before_they_are_added():
    """Tokens in steps of 0.5, positions in steps of 0.2: 0.8 + 0.33 becomes 1.0 + 0.4."""
    qmodel = eq.quantize(toy("vit"), eq.QuantConfig(outputs=True))
    with torch.no_grad():
        qmodel.pos_embed.fill_(0.33), qmodel.cls_token.fill_(-0.3)
    for point, step in ((qmodel.tokens, 0.5), (qmodel.positions, 0.2)):
        point.scale, point.zero_point = torch.tensor(step), torch.tensor(128.0)
        point.frozen = True
    x = qmodel._pos_embed(torch.full((1, 16, 24), 0.8))
    # the class token: -0.3 is -0.6 steps, rounded to -1: -0.5 + 0.4
    assert x[0, 0].tolist() == near([-0.1] * 24) and x[0, 1].tolist() == near([1.4] * 24)


# In every execution


@pytest.mark.skipif(bool(missing(8)), reason="no exact integer kernel on this machine")
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_asymmetric_weights_and_moments_as_integers(bits, moments):
    """Float out, with an activation, and as codes for the next layer."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * 0.2 + torch.linspace(-0.5, 0.5, 64)[:, None]
    options = {"weight_bits": bits, "weight_symmetric": False, "moment_correction": moments}
    layer = layer_of(weight, torch.randn(64), **options)
    target = layer_of(torch.randn(3, 64)).input_quant
    network = nn.ModuleList([layer, nn.ModuleList([target])])
    x = torch.rand(50, 96) * 4 - 1
    with torch.no_grad():
        eq.set_execution(network, "plain")
        wanted = layer(x)
        if moments:
            found = layer.quantize_weight()
            assert torch.allclose(found.mean(1), weight.mean(1), atol=1e-5)
            assert torch.allclose(found.std(1), weight.std(1), atol=1e-5)
        assert eq.set_execution(network, "integer") == "integer"
        for act in (None, nn.GELU()):
            acted = wanted if act is None else act(wanted)
            assert torch.allclose(layer(x, act), acted, atol=1e-4)
            codes = layer(x, act, target)
            codes = codes if codes.dtype is torch.uint8 else target.codes(codes)
            assert (codes.int() - target.codes(acted).int()).abs().max() <= 1
        for factor in (1.1, 0.9):  # another candidate: never an old product
            layer.weight_quant.scale.mul_(factor)
            found = layer(x)
            assert not torch.allclose(found, wanted, atol=1e-4)
            eq.set_execution(network, "plain")
            assert torch.allclose(layer(x), found, atol=1e-4)
            eq.set_execution(network, "integer")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_preset_agrees_in_all_executions(bits):
    model, x = toy("vit"), toy_images("vit")
    qmodel = eq.quantize(model, replace(OFFICIAL, weight_bits=bits))
    eq.calibrate(qmodel, x, batch=5)
    found = {}
    with torch.no_grad():
        for execution in ("plain", "simulate", "auto"):
            eq.set_execution(qmodel, execution)
            found[execution] = qmodel(x)
            assert torch.equal(eq.twin(qmodel)(x), found[execution])
            assert torch.equal(eq.chain_of(qmodel)(x), found[execution])
        wanted = model(x)
    assert torch.equal(found["simulate"], found["plain"])
    assert (found["auto"] - found["plain"]).norm() / found["plain"].norm() < 0.02
    assert (found["plain"] - wanted).norm() / wanted.norm() < (0.1 if bits == 8 else 0.5)


@pytest.mark.parametrize("scales", ["attention", "all"])
def test_searches_run_on_the_preset(scales):
    """Candidates as in the model itself; the one point for q, k and v is searched once."""
    x = toy_images("vit")
    qmodel = eq.quantize(toy("vit"), OFFICIAL)
    eq.calibrate(qmodel, x)
    targets = toy("vit")(x).detach()
    objective = eq.BlockObjective(eq.chain_of(qmodel), "blocks.1", x, targets, scales=scales)
    names = objective.genome.names
    assert sum(".products." in name for name in names) == (3 if scales == "all" else 0)
    start = objective.start
    candidate = start * (1 + 0.2 * torch.rand(len(start)))
    values = objective(torch.stack([start, candidate, start]))
    assert values[0] == values[2] != values[1]
    objective.commit(candidate)
    assert objective(candidate[None])[0] == values[1]
    gradient, value = objective.gradient(candidate)
    assert torch.isfinite(gradient).all() and value == pytest.approx(float(values[1]), rel=0.01)


@pytest.mark.parametrize("execution", ["plain", "simulate", "auto"])
def test_gptq_on_asymmetric_weights(execution):
    """The network multiplies the very integers that GPTQ has chosen."""
    x = toy_images("vit")
    config = eq.QuantConfig(weight_bits=3, weight_symmetric=False, execution=execution)
    qmodel = eq.quantize(toy("vit"), config)
    eq.calibrate(qmodel, x)
    events = list(eq.round_weights(qmodel, x))
    assert all(event.after <= event.before for event in events)
    with torch.no_grad():
        found = qmodel(x)
        for layer in (m for m in qmodel.modules() if isinstance(m, QuantLinear)):
            assert torch.allclose(layer.quantize_weight(), layer.weight, atol=1e-6)
        eq.set_execution(qmodel, "plain")
        assert (found - qmodel(x)).norm() / found.norm() < 0.02


def test_a_worker_takes_over_the_state_of_the_preset():
    """Its network, calibrated on other images, computes the same once it has the scales."""
    source, config = Embedded("vit", 20), replace(OFFICIAL, weight_bits=3)
    search = eq.SearchConfig(batch=10)
    parts = source.load()
    qmodel = eq.quantize(parts.model, config)
    eq.calibrate(qmodel, parts.images, config, search.batch)
    bench = Bench(source, config, search)
    with torch.no_grad():
        torch.set_num_threads(1)
        wanted = eq.chain_of(qmodel)(parts.images[:10])
        assert not torch.equal(bench.qmodel(parts.images[:10]), wanted)
        bench.load(state_of(qmodel), b"")
        assert torch.equal(bench.qmodel(parts.images[:10]), wanted)


# Points, batches, names


def test_points_of_outputs_and_of_the_shared_scale():
    qmodel = eq.quantize(toy("vit"), OFFICIAL)
    eq.calibrate(qmodel, toy_images("vit"))
    rows = {row.name: row for row in points(qmodel)}
    outputs = {name for name in rows if kind_of(name) == "outputs"}
    in_blocks = {
        f"blocks.{i}.{slot}.output" for i in (0, 1) for slot in ("attn.proj_drop", "mlp.drop2")
    }
    assert outputs == in_blocks | {"patch_embed.norm.output", "tokens", "positions", "logits"}
    assert all(rows[name].values == 1 and rows[name].bits == 8 for name in outputs)
    shared = [row.granularity for row in rows.values() if kind_of(row.name) == "qkv"]
    assert shared == ["per tensor, for q, k and v"] * 2
    with torch.no_grad():
        logits = qmodel(toy_images("vit"))
    steps = logits / qmodel.logits.scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    sensitive = {row.name: row.points for row in eq.sensitivity(qmodel, toy_images("vit"))}
    assert sensitive["outputs"] == 8 and sensitive["qkv"] == 2


def test_outputs_that_stay_float_change_nothing():
    model, x = toy("vit"), toy_images("vit")
    found = []
    for options in ({}, {"outputs": True, "float_points": "outputs"}):
        qmodel = eq.quantize(model, eq.QuantConfig(**options))
        eq.calibrate(qmodel, x)
        found.append(qmodel(x).detach())
    assert torch.equal(*found)


def test_calibration_takes_ranges_from_all_batches_and_samples_from_the_last():
    x, config = toy_images("vit"), eq.QuantConfig(sample_batches="last")
    qmodel = eq.quantize(toy("vit"), config)
    seen = []
    qmodel.blocks[0].sum1.register_forward_hook(lambda m, i, o: seen.append(i[0].clone()))
    eq.calibrate(qmodel, x, batch=5)
    assert [len(part) for part in seen] == [5, 5, 2]
    wanted = PowerOfTwo(IntRange(8, False), axis=-1)
    for part in seen:
        wanted.forget_samples()
        wanted.update(part)
    scale, zero_point = wanted.params()
    assert torch.equal(qmodel.blocks[0].sum1.scale, scale)
    assert torch.equal(qmodel.blocks[0].sum1.zero_point, zero_point)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("paper", eq.QuantConfig()),
        ("paper", eq.QuantConfig(execution="plain")),
        ("official", OFFICIAL),
        ("recommended, with weight_bits 3", replace(eq.PRESETS["recommended"], weight_bits=3)),
        ("official, with act_observer minmax", replace(OFFICIAL, act_observer="minmax")),
        ("paper, with edge_bits 8, rounding gptq", eq.QuantConfig(edge_bits=8, rounding="gptq")),
    ],
)
def test_a_config_is_named_by_the_nearest_preset(name, config):
    assert preset_of(config) == name
    assert f"preset: {name}\n" in eq.describe(eq.quantize(toy("vit"), config))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moment_correction": True, "rounding": "gptq"}, "moment_correction.*gptq.*omit one"),
        ({"qkv": "shared", "act_observer": "moving_average"}, "give another act_observer"),
        ({"qkv": "joint"}, "unknown qkv 'joint'; known: separate, shared"),
        ({"sample_batches": "last", "sums": "tensor"}, "no effect without .*mse, percentile, ptf"),
        ({"sample_batches": "first"}, "known: all, last"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        eq.QuantConfig(**options)


def test_moments_are_refused_where_integers_are_chosen_or_frozen():
    qmodel = eq.quantize(toy("vit"), eq.QuantConfig(moment_correction=True))
    eq.calibrate(qmodel, toy_images("vit"))
    with pytest.raises(ValueError, match="rescale the weights that gptq has fitted"):
        eq.round_weights(qmodel, toy_images("vit"))
    with pytest.raises(ValueError, match="would cancel out"):
        freeze_integers(qmodel)
    assert list(eq.round_weights(qmodel, toy_images("vit"), "nearest")) == []


def test_a_network_with_moments_is_not_exported_as_one_without(tmp_path):
    qmodel = eq.quantize(toy("vit"), OFFICIAL)
    eq.calibrate(qmodel, toy_images("vit"))
    with pytest.raises(ValueError, match=r"moment_correction.* export a network quantized without"):
        export_onnx(qmodel, tmp_path / "net.onnx", toy_images("vit", 1))
    assert not any(tmp_path.iterdir())


def test_gptq_beside_a_run_does_without_the_correction(tmp_path):
    config = replace(OFFICIAL, weight_bits=3)
    with Run(Embedded("vit", 8), config, eq.SearchConfig(batch=4), tmp_path / "run") as run:
        network = run.round_start()
        assert all(layer.moment_correction for layer in quant_layers(run.before).values())
    for layer in quant_layers(network).values():
        assert layer.rounded
        assert torch.allclose(layer.quantize_weight(), layer.weight, atol=1e-6)


@pytest.mark.parametrize("name", ["deit", "swin", "levit", "resnet"])
def test_outputs_are_points_of_a_plain_vit(name):
    """The toy DeiT is a distilled one: it has a second token and a second head."""
    with pytest.raises(ValueError, match=r"plain ViT .*--no-outputs"):
        eq.quantize(toy(name), OFFICIAL)
    quick = replace(OFFICIAL, outputs=False, act_observer="minmax")
    qmodel = eq.quantize(toy(name), quick)
    eq.calibrate(qmodel, toy_images(name))
    with torch.no_grad():
        assert torch.isfinite(qmodel(toy_images(name))).all()


# On the command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rounding", "gptq"), ("moment_correction", "gptq", "omit one")),
        (("--act-observer", "moving_average"), ("qkv separate",)),
        (("--crop", 1.5), ("--crop must be from 0.1 to 1",)),
        (("--crop", "nan"), ("--crop must be from 0.1 to 1",)),
    ],
)
def test_a_preset_with_what_contradicts_it_is_one_sentence(refused, folders, flags, words):
    refused(command(folders, "--preset", "official", *flags), *words)


def test_the_preset_on_a_resnet_is_refused_with_what_to_do(folders, tmp_path, capsys):
    assert call(*command(folders, "--preset", "official")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "plain ViT" in said and "--no-outputs" in said
    assert not (tmp_path / "out").exists()


def test_the_preset_keeps_the_scripts_share_of_an_image():
    def crop(model, *words):
        run = ("run", "--model", model, "--calibration", "c", "--test", "t", *words)
        return cli.crop_of(cli.parser().parse_args(run))

    official = ("--preset", "official")
    assert crop("deit_tiny_patch16_224", *official) == 0.875
    assert crop("deit_tiny_patch16_224", *official, "--crop", "0.95") == 0.95
    assert crop("vit_tiny_patch16_224", *official) is None
    assert crop("deit_tiny_patch16_224") is None


def test_a_smaller_crop_shows_less_of_an_image():
    """A white frame around a black square of 0.85 of the width: a crop of 0.8 shows no frame."""
    image = Image.new("RGB", (200, 200), "white")
    image.paste("black", (15, 15, 185, 185))
    model = toy("vit")
    corners = {crop: transform_of(model, crop)(image)[0, 0, 0] for crop in (0.8, 1.0)}
    assert corners[1.0] > corners[0.8] + 1


def test_a_run_names_its_preset_and_its_crop(folders, tmp_path):
    assert (
        call(*command(folders, "--preset", "recommended", "--weight-bits", 3, "--crop", 0.8)) == 0
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["preset"] == "recommended, with weight_bits 3" and config["crop"] == 0.8


def test_a_run_is_exported_with_its_crop(folders, tmp_path):
    """It was calibrated on these crops, and whoever has the file must cut images likewise."""
    assert call(*command(folders, "--crop", 0.8)) == 0
    assert call("export", tmp_path / "out", "--out", tmp_path / "net.onnx") == 0
    assert Deployed(tmp_path / "net.onnx").facts["crop_pct"] == 0.8


def test_a_run_that_an_earlier_version_began_resumes(folders, tmp_path, monkeypatch):
    """Its config lacks the newer options: they had the values that are defaults now."""
    more = ("--passes", 2, "--cycles", 3)
    assert call(*command({**folders, "--out": tmp_path / "whole"}, *more)) == 0
    append, count = RunFolder.append, iter(range(1, 100))

    def stop(self, event):
        append(self, event)
        if next(count) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", stop)
        assert call(*command(folders, *more)) == 130
    out = tmp_path / "out"
    events = RunFolder(out).history()
    old = json.loads((out / "config.json").read_text())
    del old["preset"], old["crop"]
    for name in ("moment_correction", "outputs", "qkv", "sample_batches"):
        del old["quantization"][name]
    (out / "config.json").write_text(json.dumps(old))
    lines, checksum = b"", seed_of(old)
    for event in events:
        line = seal(event.as_dict(), checksum)
        lines, checksum = lines + line, checksum_of(line)
    (out / "history.jsonl").write_bytes(lines)
    assert call(*command(folders, "--resume", "--qkv", "shared", *more)) == 2
    assert call(*command(folders, "--resume", *more)) == 0
    found = [RunFolder(path).history() for path in (out, tmp_path / "whole")]
    assert len(found[0]) == 7
    assert [event.fitness for event in found[0]] == [event.fitness for event in found[1]]
