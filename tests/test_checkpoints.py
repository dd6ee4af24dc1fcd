"""Networks and checkpoints as people have them: built as the file says, or refused in words."""

import argparse
import collections
import datetime
import json
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from commands import call, command, noise_image, sentence, small_network, tree
from conftest import SMALL_REGNET
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evolq_lite.checkpoints import convert_checkpoint, read_state
from evolq_lite.data import transform_of
from evolq_lite.networks import hash_weights, load_network

State = dict[str, Tensor]
SWIN = "swin_tiny_patch4_window7_224"
DINO = "vit_small_patch14_dinov2"  # timm's has no head, and images of 518 pixels
DISTILLED = "deit_tiny_distilled_patch16_224"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, one thread (small networks), and no hub to wait for."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's Swin and DeiT, a few channels wide."""
    few = {
        SWIN: {"embed_dim": 12, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
        DISTILLED: {"embed_dim": 24, "depth": 2},
        "deit_tiny_patch16_224": {"embed_dim": 24, "depth": 2},
        "regnety_002": SMALL_REGNET,
        DINO: {"embed_dim": 24, "depth": 2, "num_heads": 2},
    }
    real = timm.create_model

    def create(name: str, **options: object) -> nn.Module:
        return real(name, **{**few.get(name, {}), **options})

    monkeypatch.setattr(timm, "create_model", create)


def saved(state: State | nn.Module, path: str = "net.safetensors") -> Path:
    """A checkpoint of a network, or of a state."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    return Path(path)


def network(name: str, **options: object) -> nn.Module:
    """A random network in evaluation mode."""
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


# Built as the shapes say

BUILT: dict[str, tuple[str, dict[str, object], dict[str, object], str]] = {
    "ViT of 5 classes": ("test_vit", {"num_classes": 5}, {}, "5 classes"),
    "ViT for larger images": ("test_vit", {"img_size": 224}, {}, "224 x 224"),
    "ViT for smaller images": ("test_vit", {"img_size": 64, "num_classes": 2}, {}, "64 x 64"),
    "ViT for grey images": ("test_vit", {"in_chans": 1}, {}, "1 channel;.*grey"),
    "ViT of other patches": ("test_vit", {"img_size": 96, "patch_size": 8}, {}, "8 x 8"),
    "ViT with averaged patches": ("test_vit", {"global_pool": "avg"}, {}, "fc_norm"),
    "ViT with registers": ("test_vit2", {"num_classes": 7, "img_size": 192}, {}, "192 x 192"),
    "ViT as timm has it": ("test_vit", {}, {}, "^$"),
    "DINOv2 with a head": (
        DINO,
        {"num_classes": 5, "img_size": 56},
        {},
        "5 classes.*none.*56 x 56",
    ),
    "distilled DeiT": (DISTILLED, {"num_classes": 5, "img_size": 96}, {}, "96 x 96"),
    "LeViT for larger images": ("levit_128s", {"num_classes": 5, "img_size": 256}, {}, "256 x 256"),
    "ResNet of 5 classes": ("test_resnet", {"num_classes": 5}, {}, "5 classes.*No shape tells"),
    "ResNet, size asked for": ("test_resnet", {}, {"image_size": 192}, "^Images are 192 x 192"),
    "ResNet for grey images": ("test_resnet", {"in_chans": 1}, {}, "grey"),
    "RegNet of 5 classes": ("regnety_002", {"num_classes": 5}, {}, "5 classes.*No shape tells"),
    "Swin of 5 classes": (SWIN, {"num_classes": 5}, {}, "5 classes.*No shape tells"),
    "Swin, its last window shrunk": (SWIN, {"img_size": 192}, {}, "192 x 192"),
    "Swin, other windows": (
        *(SWIN, {"img_size": 128, "window_size": 4}, {"image_size": 128}),
        "128 x 128.*Windows are 4 x 4",
    ),
    "Swin, size asked for": (SWIN, {"img_size": 448}, {"image_size": 448}, "448 x 448"),
}


@pytest.mark.parametrize("case", BUILT)
def test_network_is_built_as_its_checkpoint_says(case):
    """The same logits as the network that was saved, images of its size, and a word about it."""
    name, options, asked, words = BUILT[case]
    wanted = network(name, **options)
    loaded = load_network(name, saved(wanted), **asked)
    assert re.search(words, " ".join(loaded.notes)), loaded.notes
    channels, height, width = loaded.model.pretrained_cfg["input_size"]
    x = torch.randn(2, channels, height, width)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), wanted(x), rtol=0, atol=1e-5)
    assert loaded.model.num_classes == wanted.num_classes
    assert not loaded.model.training


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_fits_the_network(channels):
    """Images come in the size and the channels that the checkpoint tells."""
    loaded = load_network("test_vit", saved(network("test_vit", in_chans=channels, img_size=64)))
    image = transform_of(loaded.model)(noise_image(0, (90, 70)))
    assert image.shape == (channels, 64, 64)


def test_four_channels_are_refused_where_images_are_read():
    model = load_network("test_vit", saved(network("test_vit", in_chans=4))).model
    with pytest.raises(ValueError, match="4 channels"):
        transform_of(model)


def test_the_same_network_in_another_process():
    """A worker calls the same function with the same arguments, whatever its random state."""
    file = saved(network("test_vit", num_classes=5, img_size=64))
    code = (
        "import sys, torch; torch.manual_seed(7); from evolq_lite.networks import *;"
        "from pathlib import Path; loaded = load_network('test_vit', Path(sys.argv[1]));"
        "print(hash_weights(loaded.model), loaded.notes)"
    )
    loaded = load_network("test_vit", file)
    run = [sys.executable, "-c", code, str(file)]
    answer = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    assert answer == f"{hash_weights(loaded.model)} {loaded.notes}"
    assert hash_weights(loaded.model) != hash_weights(network("test_vit"))


# Names and kinds of numbers


def test_a_wrapper_has_put_a_prefix_before_all_names():
    model = network("test_vit", num_classes=5)
    for prefix in ("module.", "model.", "_orig_mod.", "_orig_mod.module.", "net.backbone.", "x."):
        state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
        loaded = load_network("test_vit", saved(state))
        assert hash_weights(loaded.model) == hash_weights(model)
        assert repr(prefix) in loaded.notes[0]


def test_what_lies_outside_of_the_network_is_left_out_and_said():
    model = network("test_vit")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {"criterion.weight": torch.ones(3), "accuracy.total": torch.ones(1)}
    loaded = load_network("test_vit", saved(state))
    assert re.search(r"outside of the network: \S+ and 1 more", " ".join(loaded.notes))


def test_names_of_the_first_swin_are_renamed():
    """Downsampling at the end of a stage, head without .fc, and the tables that timm computes."""
    model = network(SWIN)
    state = {}
    for name, value in model.state_dict().items():
        match = re.match(r"layers\.(\d)\.(downsample\..*)", name)
        old = f"layers.{int(match[1]) - 1}.{match[2]}" if match else name
        state[old.replace("head.fc.", "head.")] = value
    tables = {k: v for k, v in model.named_buffers() if k not in model.state_dict()}
    assert any("relative_position_index" in name for name in tables)
    loaded = load_network(SWIN, saved({**state, **tables}))
    assert hash_weights(loaded.model) == hash_weights(model)
    assert "renamed" in " ".join(loaded.notes) and "computed anew" in " ".join(loaded.notes)


def test_the_mask_of_an_old_swin_tells_the_image_size():
    model = network(SWIN, img_size=448)
    masks = {k: v for k, v in model.named_buffers() if k.endswith("attn_mask") and v is not None}
    loaded = load_network(SWIN, saved({**model.state_dict(), **masks}))
    assert loaded.model.pretrained_cfg["input_size"] == (3, 448, 448)


def test_missing_counts_of_batches():
    """BatchNorm's counter is for training; files of old and averaged weights do not have it."""
    wanted = network("test_resnet")
    state = {k: v for k, v in wanted.state_dict().items() if "num_batches" not in k}
    assert hash_weights(load_network("test_resnet", saved(state)).model) == hash_weights(wanted)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_used_as_float32_and_this_is_said(kind):
    state = {k: v.to(kind) for k, v in network("test_vit").state_dict().items()}
    loaded = load_network("test_vit", saved(state))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.head.weight, state["head.weight"].float())
    assert str(kind).removeprefix("torch.") in loaded.notes[-1]


# Refused


def changed(change: Callable[[State], object], **options: object) -> State:
    """The state of a small ViT, changed in place."""
    state = network("test_vit", **options).state_dict()
    change(state)
    return state


def renamed_like(pattern: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        values = list(state.values())
        state.clear()
        state.update({pattern.format(i): value for i, value in enumerate(values)})

    return change


def twice(state: State) -> None:
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in state.items()}
    state.clear()
    state.update(both)


TRANSFORMERS = "vit.encoder.layer.{}.attention.attention.query.weight"
REFUSED: dict[str, tuple[str, Callable[[], State | nn.Module], str]] = {
    "headless ViT": (
        "test_vit",
        lambda: network("test_vit", num_classes=0),
        "no head .*head.weight",
    ),
    "headless ResNet": ("test_resnet", lambda: network("test_resnet", num_classes=0), "no head"),
    "headless LeViT": ("levit_128s", lambda: network("levit_128s", num_classes=0), "no head"),
    "headless, wrapped": (
        "test_vit",
        lambda: {
            f"backbone.{k}": v for k, v in network("test_vit", num_classes=0).state_dict().items()
        },
        "no head",
    ),
    "one class": ("test_vit", lambda: network("test_vit", num_classes=1), "head of 1 class"),
    "an oblong image": (
        "test_vit",
        lambda: network("test_vit", img_size=(160, 80)),
        "not a square",
    ),
    "another width": (
        "test_vit",
        lambda: network("test_vit", embed_dim=32, num_heads=2),
        r"shape \(.*instead of.*--model",
    ),
    "deeper": ("test_vit", lambda: network("test_vit", depth=8), r"foreign key blocks\.6"),
    "shallower": ("test_vit", lambda: network("test_vit", depth=4), r"lacks blocks\.4"),
    "not distilled": (DISTILLED, lambda: network("deit_tiny_patch16_224"), "not distilled"),
    "distilled": ("deit_tiny_patch16_224", lambda: network(DISTILLED), "distilled network"),
    "a missing bias": (
        "test_vit",
        lambda: changed(lambda s: s.pop("norm.bias")),
        "lacks norm.bias",
    ),
    "more than it has": (
        "test_vit",
        lambda: changed(lambda s: s.update(more=torch.ones(1))),
        "foreign key more.*timm",
    ),
    "a head of another layout": (
        "test_vit",
        lambda: changed(lambda s: s.update({"head.1.weight": s.pop("head.weight")})),
        "no head",
    ),
    "NaN": (
        "test_vit",
        lambda: changed(lambda s: s["head.weight"].fill_(torch.nan)),
        "head.weight holds NaN",
    ),
    "too large for float32": (
        "test_vit",
        lambda: changed(lambda s: s.update({"norm.bias": s["norm.bias"].double() + 1e300})),
        "norm.bias holds NaN or infinite",
    ),
    "8-bit integers": (
        "test_vit",
        lambda: changed(lambda s: s.update({"norm.bias": s["norm.bias"].to(torch.int8)})),
        "int8; give a float network",
    ),
    "names of transformers": (
        "test_vit",
        lambda: changed(
            lambda s: (renamed_like(TRANSFORMERS)(s), s.update({"head.weight": torch.ones(3, 64)}))
        ),
        "Hugging Face transformers",
    ),
    "two networks": ("test_vit", lambda: changed(twice), "two networks.*student.*teacher"),
    "windows that leave the size open": (
        SWIN,
        lambda: network(SWIN, img_size=256, window_size=8),
        "windows of 8 x 8.*256 pixels.*--image-size",
    ),
    "tables of another window": (
        SWIN,
        lambda: {
            **network(SWIN).state_dict(),
            "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49).long(),
        },
        "relative_position_index differs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoint_of_another_network(case):
    """The sentence names the file and what is wrong with it."""
    name, make, words = REFUSED[case]
    file = saved(make())
    with pytest.raises(ValueError, match=words) as error:
        load_network(name, file)
    assert str(error.value).startswith("net.safetensors") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_vit", {}, 224),
        ("test_vit", {"img_size": 224}, 160),
        ("levit_128s", {}, 256),
        (SWIN, {"img_size": 192}, 224),
    ],
)
def test_an_image_size_that_the_shapes_rule_out(name, options, size):
    file = saved(network(name, **options))
    with pytest.raises(ValueError, match="omit --image-size"):
        load_network(name, file, image_size=size)


Damage = Callable[[Path], Path]


def other(name: str, content: Callable[[bytes], bytes]) -> Damage:
    """A file with other bytes, under another name."""

    def damage(path: Path) -> Path:
        path.with_name(name).write_bytes(content(path.read_bytes()))
        return path.with_name(name)

    return damage


def folder_named(path: Path) -> Path:
    path.unlink()
    path.mkdir()
    return path


FILES: dict[str, tuple[Damage, str]] = {
    "truncated": (other("net.safetensors", lambda b: b[: len(b) // 2]), "cannot be read"),
    "empty": (other("net.safetensors", lambda b: b""), "cannot be read.*empty"),
    "text": (other("net.safetensors", lambda b: b"These are weights.\n" * 9), "cannot be read"),
    "missing": (lambda path: path.with_name("none.safetensors"), "No such file"),
    "a folder": (folder_named, "cannot be read"),
    "a pointer": (
        other("net.safetensors", lambda b: b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "a web page": (other("net.safetensors", lambda b: b"\n<!DOCTYPE html><html>"), "web page"),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_is_no_checkpoint(refused, folders, case):
    damage, words = FILES[case]
    path = damage(folders["--checkpoint"])
    refused(command({**folders, "--checkpoint": path}), re.escape(str(path)), words)


# Names of networks


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resnet10s", "resnet10t"),
        ("deit_tiny_patch16_24", "deit_tiny_patch16_224"),
        ("ViT_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.augrag_in21k", "vit_tiny_patch16_224"),
        ("", "list_models"),
        ("someone/net", "hf-hub:someone/net"),
        ("hf_hub:someone/net", "offline.*--checkpoint"),
        ("hf-hub:someone/net", "offline.*--checkpoint"),
        ("hf-hub:", "offline.*--checkpoint"),
        ("local-dir:nowhere", "nowhere"),
        ("https://huggingface.co/timm/vit", "hf-hub:"),
        ("../vit", "hf-hub:|list_models"),
    ],
)
def test_name_that_timm_does_not_know(refused, folders, name, word):
    """Near names are suggested, where there are any, and other sources named."""
    checkpoint = None if "aug" in name else folders["--checkpoint"]
    refused(
        command({**folders, "--model": name, "--checkpoint": checkpoint}), re.escape(name), word
    )


@pytest.mark.parametrize("name", ["lcnet_035", "test_convnext", DINO])
def test_what_cannot_be_run_is_refused_before_weights_are_asked_for(
    refused, folders, monkeypatch, name
):
    """An unsupported family, or a network without a head: nothing is fetched for it."""
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        assert not pretrained
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    refused(command({**folders, "--model": name, "--checkpoint": None}), "no chain.*Levit|no head")


def test_unsupported_family_is_refused_before_its_checkpoint_is_read(refused, folders):
    """So it does not matter what is wrong with the file."""
    options = {**folders, "--model": "lcnet_035", "--checkpoint": "none.safetensors"}
    refused(command(options), "MobileNetV3", "Levit")


def test_no_pretrained_weights(refused, folders, monkeypatch):
    """Without a checkpoint and without the hub, a checkpoint is asked for."""
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("no route to host\nsecond line")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    refused(command({**folders, "--checkpoint": None}), "resnet10t", "no route", "--checkpoint")


def test_a_local_folder_in_the_layout_of_the_hub(tmp_path):
    """local-dir: names work offline; a checkpoint beside them wins."""
    model = network("test_vit", num_classes=5)
    folder = tmp_path / "hub"
    folder.mkdir()
    saved(model, str(folder / "model.safetensors"))
    keep = ["fixed_input_size", "input_size", "mean", "std", "crop_pct", "first_conv", "classifier"]
    config = {key: model.pretrained_cfg[key] for key in keep}
    text = {"architecture": "test_vit", "num_classes": 5, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(text))
    loaded = load_network(f"local-dir:{folder}")
    assert hash_weights(loaded.model) == hash_weights(model)
    other = network("test_vit", num_classes=9)
    assert load_network(f"local-dir:{folder}", saved(other)).model.num_classes == 9


# Pickles are refused, and converted without running what is in them


class Trap:
    """An object whose unpickling makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("trapped", "w")


class SystemTrap:
    """One that runs a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch trapped",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("what", ["state dict", "trap", "plain pickle"])
def test_pickled_checkpoint(refused, folders, what, suffix):
    """A checkpoint that is a pickle is refused, and nothing in it is run."""
    path = folders["--checkpoint"].with_suffix(suffix)
    if what == "plain pickle":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save(small_network().state_dict() if what == "state dict" else Trap(), path)
    said = command({**folders, "--checkpoint": path})
    refused(said, "pickle", "refused", "evolq_lite convert", "safetensors")
    assert not Path("trapped").exists()


def test_a_pickle_under_the_name_of_safetensors(refused, folders):
    """The name does not make it one."""
    torch.save(Trap(), folders["--checkpoint"])
    refused(command(folders), "cannot be read.*pickle.*evolq_lite convert")
    assert not Path("trapped").exists()


def unknown_type(module: str, name: str, base: type = object) -> object:
    """An object of a class that is known while it is pickled, and gone when it is read."""
    cls = type(name, (base,), {"__module__": module})
    parts = module.split(".")
    for i in range(len(parts)):
        sys.modules.setdefault(".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    setattr(sys.modules[module], name, cls)
    made = cls()
    if base is dict:
        made.update(lr=1e-3, nested={"a": [1]})
    else:
        made.x = 1
    return made


@pytest.fixture
def forget() -> None:
    """Modules that a test has made up."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def training(state: State, **more: object) -> dict[str, object]:
    """What a trainer stores: weights, an optimizer, and whatever it had at hand."""
    weights = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(weights.parameters())
    weights(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"epoch": 7, "optimizer": optimizer.state_dict(), "state_dict": state, **more}


LEFTOVERS: dict[str, Callable[[], object]] = {
    "argparse": lambda: argparse.Namespace(lr=1e-3, out=Path("x"), when=datetime.datetime.now()),
    "SimpleNamespace": lambda: types.SimpleNamespace(lr=1e-3),
    "numpy number": lambda: np.float64(81.5),
    "numpy integer": lambda: np.int64(3),
    "numpy array": lambda: np.random.default_rng(0).random(4),
    "numpy random state": np.random.get_state,
    "defaultdict": lambda: collections.defaultdict(list, loss=[1.0, 0.5]),
    "path": lambda: Path("runs") / "x",
    "random state": torch.get_rng_state,
    "torch's version": lambda: torch.__version__,
    "yacs": lambda: unknown_type("yacs.config", "CfgNode", dict),
    "Lightning": lambda: unknown_type("lightning.fabric.utilities.data", "AttributeDict", dict),
    "Lightning before": lambda: unknown_type(
        "pytorch_lightning.utilities.parsing", "AttributeDict", dict
    ),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", LEFTOVERS)
def test_convert_leaves_what_trainers_leave(forget, case, legacy):
    """Weights are taken, everything else is left and named; none of it is even built."""
    model = network("test_vit", num_classes=5)
    content = training(model.state_dict(), extra=LEFTOVERS[case]())
    torch.save(content, "net.pth", _use_new_zipfile_serialization=not legacy)
    for module in ("yacs", "yacs.config", "lightning", "pytorch_lightning"):
        sys.modules.pop(module, None)
    report = convert_checkpoint(Path("net.pth"), Path("net.safetensors"))
    assert set(report.left) == {"epoch", "optimizer", "extra"}
    assert report.part == "state_dict" and report.tensors == len(model.state_dict())
    assert hash_weights(load_network("test_vit", report.target).model) == hash_weights(model)


def wrapped(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def wrong(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def strided(value: Tensor) -> Tensor:
    """The same numbers, every second of a tensor."""
    twice = torch.zeros(*value.shape, 2)
    twice[..., 0] = value
    return twice[..., 0]


def shared(state: State) -> State:
    """All tensors as views of one."""
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    return {name: part.view(state[name].shape) for name, part in zip(state, parts)}


WEIGHTS: dict[str, tuple[Callable[[State], object], str, str]] = {
    "alone": (lambda s: s, "", ""),
    "model": (lambda s: {"model": s, "epoch": 1}, "model", ""),
    "state_dict": (lambda s: {"state_dict": s}, "state_dict", ""),
    "nested": (lambda s: {"checkpoint": {"model": {"module": s}}}, "checkpoint.model.module", ""),
    "DataParallel": (lambda s: wrapped("module.", s), "", "module."),
    "compiled": (lambda s: {"model": wrapped("_orig_mod.", s)}, "model", "_orig_mod."),
    "compiled and DDP": (lambda s: wrapped("module._orig_mod.", s), "", "module._orig_mod."),
    "Lightning": (lambda s: {"state_dict": wrapped("model.", s)}, "state_dict", "model."),
    "averaged beside it": (lambda s: {"model": s, "model_ema": wrong(s)}, "model", ""),
    "other names for it": (lambda s: {"params": s, "modelEMA": wrong(s)}, "params", ""),
    "tensors beside it": (
        lambda s: {"net": s, "rng": torch.ones(9), "acc": torch.ones(1)},
        "net",
        "",
    ),
    "among texts": (lambda s: {**s, "_version": 3, "arch": "vit", "_extra_state": None}, "", ""),
    "parameters": (lambda s: {k: nn.Parameter(v) for k, v in s.items()}, "", ""),
    "not contiguous": (lambda s: {k: strided(v) for k, v in s.items()}, "", ""),
    "shared": (shared, "", ""),
    "AveragedModel": (
        lambda s: {**wrapped("module.", s), "n_averaged": torch.tensor(4)},
        "",
        "module.",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_convert_finds_the_weights(case):
    """Wherever they are in the file, and whatever is put before their names."""
    make, part, prefix = WEIGHTS[case]
    model = network("test_vit", num_classes=5)
    torch.save(make(model.state_dict()), "net.pth")
    before = Path("net.pth").read_bytes()
    report = convert_checkpoint(Path("net.pth"), Path("net.safetensors"))
    assert (report.part, report.prefix) == (part, prefix)
    assert report.parameters == sum(value.numel() for value in model.state_dict().values())
    assert (report.shared > 0) == (case in ("shared",))
    assert hash_weights(load_network("test_vit", report.target).model) == hash_weights(model)
    assert Path("net.pth").read_bytes() == before
    assert sorted(os.listdir()) == ["net.pth", "net.safetensors"]


@pytest.mark.parametrize(
    "name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "modelEMA"]
)
@pytest.mark.parametrize("inner", ["", "module"])
def test_convert_averaged_weights(name, inner):
    state = network("test_vit").state_dict()
    mean = {inner: state} if inner else state
    torch.save(training(wrong(state), **{name: mean}), "net.pth")
    report = convert_checkpoint(Path("net.pth"), Path("net.safetensors"), ema=True)
    assert report.part == f"{name}.{inner}".strip(".")
    assert f"state_dict ({len(state)} tensors)" in report.left
    assert torch.equal(read_state(report.target)["head.weight"], state["head.weight"])


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_convert_one_of_several_networks(key):
    state = network("test_vit").state_dict()
    both = {"student": wrong(state), "teacher": wrong(state)}
    torch.save({**both, key: wrapped("module.", state)}, "net.pth")
    with pytest.raises(ValueError, match=r"several networks \(student, teacher\).*--key"):
        convert_checkpoint(Path("net.pth"), Path("net.safetensors"))
    report = convert_checkpoint(Path("net.pth"), Path("net.safetensors"), key=key)
    assert torch.equal(read_state(report.target)["head.weight"], state["head.weight"])


@pytest.mark.parametrize("ema", [False, True])
def test_convert_a_network_and_its_average_in_one_state(ema):
    """Under two prefixes, beside a counter."""
    state = network("test_vit").state_dict()
    mean, plain = (state, wrong(state)) if ema else (wrong(state), state)
    content = {**wrapped("online_model.", plain), **wrapped("ema_model.", mean)}
    torch.save({**content, "step": torch.tensor(3)}, "net.pth")
    report = convert_checkpoint(Path("net.pth"), Path("net.safetensors"), ema=ema)
    assert report.part == ("ema_model" if ema else "online_model")
    assert report.left == (f"{len(state) + 1} tensors outside of {report.part}",)
    assert hash_weights(load_network("test_vit", report.target).model) == hash_weights(
        network("test_vit")
    )


def test_convert_a_safetensors_file_too():
    """To take a wrapper's prefix away."""
    state = network("test_vit").state_dict()
    saved(wrapped("module.", state), "wrapped.safetensors")
    report = convert_checkpoint(Path("wrapped.safetensors"), Path("net.safetensors"))
    assert read_state(report.target).keys() == state.keys()


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def sparse(state: State) -> State:
    return {**state, "head.weight": state["head.weight"].to_sparse()}


def quantized(state: State) -> State:
    return {
        **state,
        "head.weight": torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8),
    }


BAD: dict[str, tuple[Callable[[State], object], dict[str, object], str]] = {
    "a trap": (lambda s: Trap(), {}, "type open|type io.open|type _io.open"),
    "a trap among weights": (lambda s: {"model": s, "args": Trap()}, {}, "type .*open"),
    "a trap under a weight": (lambda s: {**s, "head.bias": SystemTrap()}, {}, r"type \w+\.system"),
    "a trap in options": (
        lambda s: {"model": s, "args": argparse.Namespace(x=SystemTrap())},
        {},
        "system",
    ),
    "a whole network": (lambda s: small_network(), {}, r"type timm\..*ResNet.*state_dict\(\)"),
    "an unknown type": (
        lambda s: {"model": s, "cfg": argparse.Action([], "x")},
        {},
        "type argparse.Action",
    ),
    "a function": (
        lambda s: {"model": s, "act": torch.nn.functional.relu},
        {},
        "type torch.nn.functional.relu",
    ),
    "only an optimizer": (lambda s: training(s)["optimizer"], {}, "no weights"),
    "nothing": (lambda s: {}, {}, "no weights"),
    "a list": (lambda s: list(s.values()), {}, "no weights"),
    "one tensor": (lambda s: torch.ones(3), {}, "no weights"),
    "only averaged": (lambda s: {"state_dict_ema": s}, {}, "--ema"),
    "no averaged": (lambda s: {"model": s}, {"ema": True}, "omit --ema"),
    "no such key": (lambda s: {"model": s}, {"key": "net"}, "'net'; it has model"),
    "ema and key": (lambda s: s, {"ema": True, "key": "model"}, "one of them"),
    "sparse": (sparse, {}, "head.weight is sparse"),
    "quantized": (quantized, {}, "head.weight is quantized"),
    "nested": (lambda s: {**s, "x": nested()}, {}, "x is nested|cannot be read"),
    "without values": (lambda s: {**s, "x": torch.ones(2, device="meta")}, {}, "x is without"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_convert_refuses(case, legacy):
    """What could run code, or is not clear, in a sentence; nothing is run, nothing written."""
    make, options, words = BAD[case]
    state = {name: value.clone() for name, value in network("test_vit").state_dict().items()}
    torch.save(make(state), "net.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=words) as error:
        convert_checkpoint(Path("net.pth"), Path("net.safetensors"), **options)
    assert ("\n" not in str(error.value) and "net.pth" in str(error.value)) or "--ema and" in str(
        error.value
    )
    assert os.listdir() == ["net.pth"]


def program(path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(str(path))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_text("weights\n" * 9), "cannot be read"),
    "a web page": (lambda p: p.write_text("<html>404"), "web page"),
    "a pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "cannot be read"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "cannot be read"),
    "a plain pickle": (lambda p: p.write_bytes(pickle.dumps(Trap())), "type .*open|cannot be read"),
    "newer pickle": (lambda p: p.write_bytes(pickle.dumps({"a.weight": 1}, 5)), "cannot be read"),
    "a folder": (folder_named, "cannot be read"),
    "missing": (lambda p: p.unlink(), "does not exist"),
    "TorchScript": (program, "TorchScript"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DAMAGED)
def test_convert_what_is_no_checkpoint(case):
    damage, words = DAMAGED[case]
    torch.save(small_network().state_dict(), "net.pth")
    damage(Path("net.pth"))
    with pytest.raises(ValueError, match=words) as error:
        convert_checkpoint(Path("net.pth"), Path("net.safetensors"))
    assert "\n" not in str(error.value) and "net.pth" in str(error.value)
    assert not Path("net.safetensors").exists() and not Path("trapped").exists()


@pytest.mark.parametrize(
    "kind", ["there", "a folder", "itself", "a link to it", "no place", "ending"]
)
def test_convert_never_writes_over_what_is_there(refused, tmp_path, kind):
    """Not even with --replace over its own input; the sentence comes before any reading."""
    state = small_network().state_dict()
    torch.save(state, "net.pth")
    target, source, more = Path("net.safetensors"), Path("net.pth"), []
    if kind == "there":
        target.write_text("precious")
    elif kind == "a folder":
        target.mkdir()
        more = ["--replace"]
    elif kind == "itself":
        source = saved(state)
        more = ["--replace"]
    elif kind == "a link to it":
        target.symlink_to(source)
        more = ["--replace"]
    elif kind == "no place":
        target = Path("none") / target
    else:
        target = Path("net.pt")
    named = target.parent if kind == "no place" else target
    refused(("convert", source, target, *more), re.escape(str(named)), "another|must end|make it")


def test_convert_replaces_if_told_so():
    torch.save(small_network().state_dict(), "net.pth")
    Path("net.safetensors").write_text("old")
    assert call("convert", "net.pth", "net.safetensors", "--replace") == 0
    assert "fc.weight" in load_file("net.safetensors")


def test_convert_on_a_full_disk(monkeypatch, tmp_path, capsys):
    """The old file stays, and no half of a new one."""
    torch.save(small_network().state_dict(), "net.pth")
    Path("net.safetensors").write_text("old")
    before = tree(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert call("convert", "net.pth", "net.safetensors", "--replace") == 2
    assert "No space" in sentence(capsys.readouterr().err)
    assert tree(tmp_path) == before


def test_convert_says_what_was_taken_and_left(capsys):
    """And the file it makes is what `run` takes."""
    state = small_network().state_dict()
    args = argparse.Namespace(lr=1e-3)
    torch.save(
        training(wrapped("module.", state), args=args, state_dict_ema=wrong(state)), "net.pth"
    )
    assert call("convert", "net.pth", "net.safetensors") == 0
    said = capsys.readouterr().out
    for word in ("state_dict", "'module.'", f"{len(state)} tensors", "epoch", "optimizer", "args"):
        assert word in said
    assert f"state_dict_ema ({len(state)} tensors)" in said and "net.safetensors" in said
    assert torch.equal(load_file("net.safetensors")["fc.weight"], state["fc.weight"])
    assert call("convert", "net.pth", "mean.safetensors", "--ema") == 0
    assert not load_file("mean.safetensors")["fc.weight"].any()


def test_a_fine_tuned_checkpoint_runs_and_says_so(folders, tmp_path, capsys):
    """From a trainer's file to a summary: 2 classes instead of timm's 1,000."""
    state = small_network(num_classes=2).state_dict()
    torch.save(training(wrapped("module.", state)), "net.pth")
    assert call("convert", "net.pth", "tuned.safetensors") == 0
    (folders["--test"] / "c").rename(tmp_path / "c")
    options = {**folders, "--checkpoint": "tuned.safetensors"}
    assert call(*command(options)) == 0
    assert "2 classes (timm's has 3)" in capsys.readouterr().out
    assert json.loads((folders["--out"] / "summary.json").read_text())["images"] == 4
