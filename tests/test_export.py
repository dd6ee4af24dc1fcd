"""Exported files: the same network elsewhere, what the file says, and what cannot be exported."""

import errno
import json
import os
import re
import sys
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from commands import call, tree
from conftest import toy, toy_images, until
from onnx.reference import ReferenceEvaluator
from PIL import Image
from torch import nn

import evolq_lite as eq
from evolq_lite import bits, export, rounding
from evolq_lite.convert import Point, kind_of
from evolq_lite.deployed import Deployed
from evolq_lite.panels import GalleryPanel
from evolq_lite.runs import shipping

SMALL = eq.QuantConfig(weight_bits=4)


def calibrated(model, images, config=SMALL):
    """A quantized network whose scales are as uneven as a search of all of them leaves them."""
    qmodel = eq.quantize(model, config)
    eq.calibrate(qmodel, images)
    for _ in eq.round_weights(qmodel, images, config.rounding):
        pass
    return qmodel


def evolve_all(qmodel, width=0.01):
    """Change every scale a little, those of activations too."""
    draw = torch.Generator().manual_seed(0)
    for name, scale in qmodel.named_buffers():
        if name.endswith("scale"):
            scale.mul_(1 + width * torch.randn(scale.shape, generator=draw))


def run_openvino(path, images):
    """Logits by OpenVINO, without what it does by itself to make a network faster."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    model = openvino.Core().compile_model(path, "CPU", options)
    return torch.from_numpy(model(images.numpy())[0].copy())


def share_equal(found, wanted):
    """On which share of images two networks say the same class."""
    return float((found.argmax(1) == wanted.argmax(1)).float().mean())


@pytest.fixture(scope="module")
def demo():
    return eq.load_demo("vit", 200)


@pytest.fixture(scope="module")
def vit(demo, tmp_path_factory):
    """The embedded ViT by GPTQ at 3 bits with all scales evolved, and its file."""
    qmodel = calibrated(demo.model, demo.calibration, eq.QuantConfig(3, 8, rounding="gptq"))
    evolve_all(qmodel, 0.002)
    path = tmp_path_factory.mktemp("onnx") / "vit.onnx"
    eq.export_onnx(qmodel, path, demo.calibration[:1], weights="int4", facts={"embedded": "vit"})
    return qmodel, path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A toy ViT and its file."""
    images = toy_images("vit", 32)
    qmodel = calibrated(toy("vit"), images)
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    eq.export_onnx(qmodel, path, images, facts={"classes": list("abcdefghij")})
    return qmodel, path


@torch.no_grad()
def test_the_embedded_vit_is_the_same_network_in_both_runtimes(demo, vit):
    qmodel, path = vit
    images = demo.test[0][::25]
    wanted = torch.cat([qmodel(x) for x in images.split(100)])
    for found in (Deployed(path)(images), run_openvino(path, images)):
        assert share_equal(found, wanted) >= 0.98
        assert (found - wanted).abs().median() < 0.1 * (demo.model(images) - wanted).abs().median()


@torch.no_grad()
def test_block_by_block_codes_are_the_same(demo, vit, tmp_path):
    qmodel, path = vit
    chain = eq.chain_of(qmodel)
    inputs = chain.trace(demo.calibration[:20])
    model = onnx.load(path)
    norms = {n.name: n.input[0] for n in model.graph.node if n.op_type == "LayerNormalization"}
    values = [norms[f"blocks.{i}.norm1/LayerNormalization"] for i in range(6)]
    values.append(norms["norm/LayerNormalization"])
    for i, (start, end) in enumerate(pairwise(values)):
        part = onnx.utils.Extractor(model).extract_model([start], [end])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(part.SerializeToString(), options)
        x = inputs[chain.index(f"blocks.{i}")]
        found = torch.from_numpy(session.run(None, {start: x.numpy()})[0])
        wanted, step = qmodel.blocks[i](x), qmodel.blocks[i].sum2.scale
        assert ((found - wanted).abs() > 0.5 * step).float().mean() <= 0.003


@torch.no_grad()
@pytest.mark.parametrize("how", ["mixed", "learned", "frozen"])
def test_chosen_integers_and_bits_are_in_the_file(tmp_path, how):
    """Bits by layer, learned rounding, and integers held while their scales have moved."""
    images = toy_images("vit", 32)
    qmodel = calibrated(toy("vit"), images, eq.QuantConfig(3, rounding="gptq"))
    if how == "learned":
        for _ in eq.round_weights(qmodel, images, "learned", budget=40):
            pass
    elif how == "mixed":
        genome = bits.bits_genome(qmodel, (2, 3, 5), mean=3.0)
        table = bits.bits_table(qmodel, images, genome)
        bits.start_bits(qmodel, genome, table)
        vector = torch.tensor([(2.0, 3.0, 5.0)[i % 3] for i in range(len(genome.names))])
        bits.write_bits(qmodel, genome, table, vector)
    else:
        rounding.freeze_integers(qmodel)
        evolve_all(qmodel, 0.3)
    eq.export_onnx(qmodel, tmp_path / "toy.onnx", images[:2], weights="int4")
    stored = {t.name: t for t in onnx.load(tmp_path / "toy.onnx").graph.initializer}
    packed = 0
    for name, layer in rounding.quant_layers(qmodel).items():
        if not isinstance(layer, nn.Linear):
            continue
        kind = "packed" if layer.weight_quant.integers.bits <= 4 else "codes"
        packed += kind == "packed"
        found = onnx.numpy_helper.to_array(stored[f"{name}.{kind}"]).astype(int)
        assert (found == layer.weight_quant.to_integers(layer.weight).T.numpy()).all()
    assert packed and (how != "mixed" or packed < 9)
    found, wanted = Deployed(tmp_path / "toy.onnx")(images), qmodel(images)
    assert (found - wanted).abs().median() < 1e-4


@torch.no_grad()
def test_a_head_multiplies_integers_and_scores_cost_no_product(tmp_path, small):
    """What the profile found: a Gemm in float at the head, and a Mul where no point needs it."""
    qmodel, path = small
    images = toy_images("vit", 32)
    assert "Gemm" not in optimized(path, tmp_path)
    eq.export_onnx(qmodel, tmp_path / "less.onnx", images, float_points="scores,sums")
    found = optimized(tmp_path / "less.onnx", tmp_path)
    assert found.count("Mul") == 2  # of the images' own point
    qmodel = eq.twin(qmodel)
    for name, point in qmodel.named_modules():
        if isinstance(point, Point) and kind_of(name) in ("scores", "sums"):
            point.stay_float()
    assert (Deployed(tmp_path / "less.onnx")(images) - qmodel(images)).abs().median() < 1e-4


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["swin", "levit", "resnet", "regnetx", "regnety"])
def test_other_families_are_the_same_networks(family, tmp_path):
    images = toy_images(family, 64)
    config = eq.PRESETS["recommended"] if family == "swin" else SMALL
    qmodel = calibrated(toy(family), images, config)
    evolve_all(qmodel)
    eq.export_onnx(qmodel, tmp_path / "toy.onnx", images[:2])
    wanted = qmodel(images)
    found = Deployed(tmp_path / "toy.onnx")(images)
    assert share_equal(found, wanted) >= 0.96
    # Random weights and three stages: in LeViT a code that flips early changes everything after it.
    if family != "levit":
        assert share_equal(run_openvino(tmp_path / "toy.onnx", images), wanted) >= 0.96


@torch.no_grad()
def test_uncommon_points_are_the_same(tmp_path):
    """Asymmetric weights, signed activations of 5 bits, a scale per channel, powers of two."""
    config = eq.QuantConfig(
        6, 5, weight_symmetric=False, act_symmetric=True, sums="channel", log2_attention=True
    )
    images = toy_images("vit", 64)
    qmodel = calibrated(toy("vit"), images, config)
    eq.export_onnx(qmodel, tmp_path / "toy.onnx", images)
    found, wanted = Deployed(tmp_path / "toy.onnx")(images), qmodel(images)
    assert (found - wanted).abs().median() < 1e-4


@torch.no_grad()
def test_the_standard_itself_computes_the_same(small):
    qmodel, path = small
    images = toy_images("vit", 3)
    onnx.checker.check_model(str(path), full_check=True)
    found = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})[0]
    assert np.median(np.abs(found - qmodel(images).numpy())) < 1e-4


def test_the_file_keeps_the_layers_names_and_stores_bytes(small):
    graph = onnx.load(small[1]).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    codes = stored["blocks.1.attn.qkv.codes"]
    assert codes.data_type == onnx.TensorProto.INT8
    assert list(codes.dims) == [24, 72]  # transposed
    places = {node.name for node in graph.node}
    assert {"blocks.1.attn.qkv/MatMul", "blocks.1.sum2/QuantizeLinear"} <= places
    text = small[1].read_bytes()
    assert b".py" not in text and b"torch" not in text  # nothing of the machine that made it


def test_packed_weights_take_half_a_byte_and_are_the_same_integers(vit):
    qmodel, path = vit
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    packed = stored["blocks.2.mlp.fc1.packed"]
    assert packed.data_type == onnx.TensorProto.INT4
    assert len(packed.raw_data) == 48 * 192 // 2
    layer = qmodel.blocks[2].mlp.fc1
    wanted = layer.weight_quant.to_integers(layer.weight).T
    assert (onnx.numpy_helper.to_array(packed).astype(int) == wanted.numpy()).all()


def optimized(path, tmp_path):
    """The operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options)
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def test_the_runtime_multiplies_integers_and_leaves_softmax_alone(vit, tmp_path):
    found = optimized(vit[1], tmp_path)
    integer = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")
    assert sum(found.count(name) for name in integer) >= 6 * 6
    assert found.count("Softmax") == 6
    assert "QLinearSoftmax" not in found and "MatMulNBits" not in found


def test_points_can_be_left_out(tmp_path, small):
    qmodel, path = small
    images = toy_images("vit", 2)
    eq.export_onnx(qmodel, tmp_path / "less.onnx", images, float_points="scores")
    counts = [
        sum(node.op_type == "QuantizeLinear" for node in onnx.load(file).graph.node)
        for file in (path, tmp_path / "less.onnx")
    ]
    assert counts[0] - counts[1] == 2  # one a block
    assert Deployed(tmp_path / "less.onnx").facts["float_points"] == "scores"


def test_the_file_says_what_its_receiver_must_know(small):
    network = Deployed(small[1])
    facts = network.facts
    assert facts["input_size"] == [3, 32, 32]
    assert facts["mean"] == facts["std"] == [0.5, 0.5, 0.5]
    assert facts["classes"] == list("abcdefghij")
    assert network.classes == 10
    assert facts["quantization"]["weight_bits"] == 4
    assert len(facts["digest"]) == 64


def test_exporting_leaves_the_network_as_it_was(demo, small):
    qmodel, _ = small
    images = toy_images("vit", 4)
    before = qmodel(images)
    export.make_exportable(qmodel, ["scores"])
    assert torch.equal(qmodel(images), before)


# What cannot be exported


def test_a_network_that_is_not_calibrated_is_refused(tmp_path):
    qmodel = eq.quantize(toy("vit"), SMALL)
    with pytest.raises(ValueError, match="not calibrated"):
        eq.export_onnx(qmodel, tmp_path / "x.onnx", toy_images("vit", 1))
    with pytest.raises(ValueError, match="no quantized layers"):
        eq.export_onnx(toy("vit"), tmp_path / "x.onnx", toy_images("vit", 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("point", "values", "words"),
    [
        ("zero_point", 3.5, "not a whole number from 0 to 255"),
        ("zero_point", 300.0, "not a whole number from 0 to 255"),
        ("scale", float("nan"), "not a positive number"),
        ("scale", 0.0, "not a positive number"),
    ],
)
def test_points_that_the_format_cannot_hold_are_named(small, tmp_path, point, values, words):
    qmodel = eq.twin(small[0])
    where = qmodel.blocks[1].mlp.fc2.input_quant
    setattr(where, point, torch.tensor(values))
    with pytest.raises(ValueError, match=f"blocks.1.mlp.fc2.input_quant has .*{words}"):
        eq.export_onnx(qmodel, tmp_path / "x.onnx", toy_images("vit", 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int2"}, "unknown weights 'int2'; known: int8, int4"),
        ({"float_points": "softmax"}, "unknown kind of point 'softmax'"),
    ],
)
def test_unknown_options_are_refused(small, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        eq.export_onnx(small[0], tmp_path / "x.onnx", toy_images("vit", 1), **options)


def test_weights_of_more_than_four_bits_cannot_be_packed(tmp_path):
    images = toy_images("vit", 8)
    qmodel = calibrated(toy("vit"), images, eq.QuantConfig(weight_bits=5))
    with pytest.raises(ValueError, match="no weight has 4 bits or fewer"):
        eq.export_onnx(qmodel, tmp_path / "x.onnx", images, weights="int4")


def test_a_module_that_torch_cannot_trace_is_one_sentence(small, tmp_path):
    class Fickle(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    qmodel = eq.twin(small[0])
    qmodel.norm = nn.Sequential(qmodel.norm, Fickle())
    with pytest.raises(ValueError, match=r"torch cannot export this VisionTransformer \(.*\)$"):
        eq.export_onnx(qmodel, tmp_path / "x.onnx", toy_images("vit", 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_extra_is_told(small, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'evolq_lite\[export\]'"):
        eq.export_onnx(small[0], tmp_path / "x.onnx", toy_images("vit", 1))


def test_a_missing_runtime_is_told(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="onnxruntime is not installed"):
        Deployed(small[1])


def rewritten(path, target, told):
    """A file that says something else of itself, or nothing."""
    model = onnx.load(path)
    del model.metadata_props[:]
    if told is not None:
        onnx.helper.set_model_props(model, {export.KEY: told})
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("told", [None, "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_files_that_do_not_say_what_they_are_are_refused(small, tmp_path, told):
    path = rewritten(small[1], tmp_path / "foreign.onnx", told)
    words = "did not write it" if told is None else "does not understand"
    with pytest.raises(ValueError, match=words):
        Deployed(path)


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"\x08\x07garbage", b"PK\x03\x04"])
def test_files_of_other_programs_are_refused(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="is not an ONNX file that can be run here"):
        Deployed(tmp_path / "x.onnx")


def test_images_of_another_size_are_refused(small):
    with pytest.raises(ValueError, match=r"reads images \(n, 3, 32, 32\), not \(1, 3, 28, 28\)"):
        Deployed(small[1])(torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", [3, 28, 28]),
        ("embedded", "gpt"),
        ("classes", 10),
        ("test", {"images": 9, "correct": "ff"}),
        ("test", {"images": 9, "correct": "no"}),
        ("test", []),
    ],
)
def test_a_file_that_lies_about_itself_is_refused(small, tmp_path, key, value):
    facts = {**Deployed(small[1]).facts, key: value}
    path = rewritten(small[1], tmp_path / "lie.onnx", json.dumps(facts))
    with pytest.raises(ValueError, match="export it again"):
        Deployed(path)


def test_a_file_cut_short_is_refused(small, tmp_path, capsys):
    (tmp_path / "cut.onnx").write_bytes(small[1].read_bytes()[:-1000])
    assert call("verify", tmp_path / "cut.onnx") == 2
    assert "is not an ONNX file that can be run here" in capsys.readouterr().err
    assert call("verify", tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_full_disk_keeps_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        eq.export_onnx(small[0], path, toy_images("vit", 1))
    assert tree(tmp_path) == {"net.onnx": b"old"}


# The command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the embedded CNN, and its file."""
    folder = tmp_path_factory.mktemp("run")
    search = ("--passes", 1, "--cycles", 1, "--granularity", "global", "--calibration-images", 50)
    assert call("demo", "--model", "cnn", "--out", folder / "run", *search) == 0
    assert call("export", folder / "run", "--out", folder / "net.onnx") == 0
    return folder


@pytest.mark.slow
def test_the_receiver_finds_what_the_run_found(run):
    verdict = shipping.verify(Deployed(run / "net.onnx"))
    summary = json.loads((run / "run" / "summary.json").read_text())
    assert verdict.accuracy.images == 9920
    assert abs(verdict.accuracy.top1 - summary["after_top1"]) < 0.002
    assert verdict.agreement > 0.99
    assert "the run it came from" in str(verdict)
    assert Deployed(run / "net.onnx").facts["classes"][:2] == ["A", "B"]


def test_a_file_is_verified_on_a_folder_by_the_names_that_it_holds(run, tmp_path, capsys):
    images = eq.load_demo("cnn", 2).test
    for i in range(0, 9920, 400):
        name = eq.data.CHARACTERS[int(images[1][i])]
        folder = tmp_path / "photos" / f"{name}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((images[0][i, 0] * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    assert call("verify", run / "net.onnx", "--test", tmp_path / "photos") == 0
    said = capsys.readouterr().out
    assert "on 25 images; there is no run on these images" in said
    found = shipping.verify(Deployed(run / "net.onnx"), tmp_path / "photos")
    whole = shipping.verify(Deployed(run / "net.onnx"))
    assert int(found.right.sum()) == int(whole.right[::400].sum())


def test_a_wrong_mean_is_seen(run, tmp_path):
    facts = Deployed(run / "net.onnx").facts
    wrong = rewritten(run / "net.onnx", tmp_path / "w.onnx", json.dumps({**facts, "mean": [0.0]}))
    image = torch.zeros(28, 28, dtype=torch.uint8).numpy()
    good, bad = (Deployed(p).prepare(Image.fromarray(image)) for p in (run / "net.onnx", wrong))
    assert torch.equal(good, -torch.ones(1, 28, 28))
    assert torch.equal(bad, torch.zeros(1, 28, 28))


def test_a_panel_reads_what_is_typed(run, no_silent_callbacks, panels_are_closed):
    panel = GalleryPanel(run / "net.onnx", text="H-4 m!", typeface=3)
    assert re.match(r"Read as \w{3}: \d of 3 right \(typeface 3, mean 0.50", panel.words)
    right = panel.words
    panel.controls["mean"].value = 0.0
    until(lambda: "mean 0.00" in panel.words)
    panel.reset()
    until(lambda: panel.words == right)
    panel.controls["text"].value = "?"
    until(lambda: "Type letters" in panel.words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--out", "new.onnx", "--weight-bits", 4), ("is a run", "omit --weight-bits")),
        (("run", "--out", "net.onnx"), ("exists", "--replace")),
        (("run", "--out", "nowhere/net.onnx"), ("is not a folder",)),
        (("run", "--out", "new.onnx", "--weights", "int9"), ("unknown weights",)),
        (("deit_tiny_patch16_224", "--out", "new.onnx"), ("--calibration DIR",)),
        ((".", "--out", "new.onnx"), ("holds no run",)),
    ],
)
def test_what_export_refuses(run, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(run)
    before = sorted(run.rglob("*"))
    assert call("export", *arguments) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert sorted(run.rglob("*")) == before


def test_what_verify_refuses(run, small, capsys):
    assert call("verify", run / "none.onnx") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert call("verify", small[1]) == 2
    assert "give --test DIR" in capsys.readouterr().err


def test_a_run_without_a_finished_visit_is_refused(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "environment.json"):
        (tmp_path / "run" / name).write_bytes((run / "run" / name).read_bytes())
    assert call("export", tmp_path / "run", "--out", tmp_path / "x.onnx") == 2
    assert "no finished visit" in capsys.readouterr().err


def test_a_run_whose_calibration_gives_another_network_is_refused(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for file in (run / "run").iterdir():
        if file.is_file():
            (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    state = json.loads((tmp_path / "run" / "environment.json").read_text())
    (tmp_path / "run" / "environment.json").write_text(json.dumps({**state, "calibrated": "no"}))
    assert call("export", tmp_path / "run", "--out", tmp_path / "x.onnx") == 2
    assert "is another one than the run began with" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()
