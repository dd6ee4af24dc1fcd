"""Options of single points, presets, and what each kind of point costs."""

import hashlib
from dataclasses import replace

import pytest
import torch
from commands import sentence
from conftest import toy, toy_images
from torch import nn

import evolq_lite as eq
from evolq_lite.cli import main, parser, quant_of
from evolq_lite.config import KINDS
from evolq_lite.convert import edge_layers, kind_of, points
from evolq_lite.sensitivity import tell_sensitivity


def calibrated(name: str, **options) -> nn.Module:
    qmodel = eq.quantize(toy(name), eq.QuantConfig(**options))
    eq.calibrate(qmodel, toy_images(name))
    return qmodel


def state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_every_point_has_a_kind(family):
    kinds = {kind_of(point.name) for point in points(calibrated(family))}
    assert kinds <= set(KINDS) and {"weights", "inputs", "sums"} <= kinds
    if family in ("vit", "deit", "swin", "levit"):
        assert kinds == {*KINDS} - {"outputs"}  # points of an option


EDGES = {
    "vit": ["patch_embed.proj", "head"],
    "deit": ["patch_embed.proj", "head", "head_dist"],
    "swin": ["patch_embed.proj", "head.fc"],
    "levit": ["stem.conv1", "head", "head_dist"],
    "resnet": ["conv1", "fc"],
    "bottleneck": ["conv1", "fc"],
    "regnetx": ["stem.conv", "head.fc"],
    "regnety": ["stem.conv", "head.fc"],
}


def test_edge_bits_are_those_of_the_first_and_the_last_layer(family):
    qmodel = calibrated(family, weight_bits=3, act_bits=4, edge_bits=8)
    names = edge_layers(qmodel)
    assert set(names) <= set(EDGES[family]) and len(names) >= 2
    for point in points(qmodel):
        edge = point.name.rpartition(".")[0] in names
        if point.name.endswith(("weight_quant", "input_quant")):
            assert point.bits == (8 if edge else 3 if "weight" in point.name else 4), point.name


def test_sums_may_have_a_scale_per_channel_which_helps_where_channels_differ():
    model, x = toy("vit"), toy_images("vit")
    with torch.no_grad():
        model.pos_embed[..., 0] *= 60  # an outlying channel, as trained ViTs have them
        wanted = model(x)
        errors = {}
        for sums in ("tensor", "ptf", "channel"):
            qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=8, sums=sums))
            eq.calibrate(qmodel, x)
            errors[sums] = float((qmodel(x) - wanted).norm() / wanted.norm())
            (row,) = [p for p in points(qmodel) if p.name == "blocks.0.sum1"]
            assert (row.values == 1) == (sums == "tensor")
    assert errors["channel"] < 0.5 * errors["tensor"] and errors["ptf"] < errors["tensor"]


def test_more_levels_reach_further():
    steps = {}
    for levels in (1, 4, 9):
        qmodel = calibrated("vit", ptf_levels=levels)
        scale = qmodel.blocks[0].sum1.scale
        ratios = scale.max() / scale
        assert torch.equal(ratios.log2(), ratios.log2().round())
        steps[levels] = float(ratios.max())
    assert steps[1] == 1 and steps[4] <= 8 and steps[9] <= 256


@pytest.mark.parametrize("execution", ["plain", "simulate", "auto"])
def test_points_that_stay_float_pass_floats_and_are_listed(execution):
    qmodel = calibrated("vit", float_points="sums,gelu", execution=execution)
    rows = {row.name: row for row in points(qmodel)}
    for name in ("blocks.0.sum1", "blocks.1.mlp.fc2.input_quant", "norm_pre.1"):
        assert rows[name].bits is None and rows[name].values == 0
    assert rows["blocks.0.attn.qkv.input_quant"].bits == 8
    assert any(
        "blocks.0.sum1" in line and "float" in line for line in eq.describe(qmodel).split("\n")
    )
    with torch.no_grad():
        plain = calibrated("vit", float_points="sums,gelu", execution="plain")
        x = toy_images("vit")
        assert (qmodel(x) - plain(x)).norm() / plain(x).norm() < 0.02
    eq.calibrate(qmodel, toy_images("vit"))
    assert points(qmodel) == list(rows.values())


def test_everything_float_is_the_float_network():
    model, x = toy("vit"), toy_images("vit")
    qmodel = eq.quantize(model, eq.QuantConfig(float_points=",".join(KINDS)))
    eq.calibrate(qmodel, x)
    with torch.no_grad():
        torch.testing.assert_close(qmodel(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"float_points": "sums,softmax"}, "unknown kind 'softmax'; known: sums, gelu"),
        ({"sums": "row"}, "unknown sums 'row'; known: tensor, ptf, channel"),
        ({"gelu_observer": "ptf"}, "unknown gelu_observer 'ptf'"),
        ({"edge_bits": 9}, "edge_bits: bits must be a whole number from 2 to 8"),
        ({"ptf_levels": 0}, "ptf_levels must be from 1 to 16"),
        ({"ptf_levels": 6, "sums": "channel"}, "no effect without sums ptf"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        eq.QuantConfig(**options)


def test_presets_are_configs_and_single_flags_win_over_them():
    def parse(*words):
        return quant_of(parser().parse_args([*words]))

    paper, ours = eq.PRESETS["paper"], eq.PRESETS["recommended"]
    run = ("run", "--model", "m", "--calibration", "c", "--test", "t")
    assert parse(*run) == paper == eq.QuantConfig()
    assert parse(*run, "--preset", "recommended") == ours
    assert parse(*run, "--preset", "recommended", "--sums", "ptf") == replace(ours, sums="ptf")
    demo = parse("demo", "--preset", "recommended")
    assert demo == replace(ours, weight_bits=3, act_bits=8)


def test_an_unknown_preset_gets_one_sentence(capsys):
    assert main(["demo", "--preset", "best"]) == 2
    said = sentence(capsys.readouterr().err)
    assert "paper" in said and "recommended" in said


def test_sensitivity_tells_what_costs_most_and_changes_nothing():
    """Weights of 2 bits beside activations of 8: leaving weights float must help most."""
    qmodel = calibrated("vit", weight_bits=2)
    before = state_hash(qmodel)
    rows = eq.sensitivity(qmodel, toy_images("vit"), layers=True)
    assert state_hash(qmodel) == before
    whole, *kinds = rows
    assert whole.name == "all quantized" and whole.divergence > 0
    named = {row.name: row for row in kinds}
    assert min(kinds, key=lambda row: row.divergence).name == "weights"
    assert named["weights"].divergence < 0.2 * whole.divergence
    assert {*KINDS, "edges"} - {"outputs"} <= named.keys()
    assert named["weights"].points == sum(", weights" in name for name in named)
    assert eq.sensitivity(qmodel, toy_images("vit"))[0] == whole
    assert tell_sensitivity(rows).split("\n")[2].startswith("weights")
