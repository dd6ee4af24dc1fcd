"""Images and networks: the embedded ones, which work offline, and any timm one on image folders.

The embedded task is Typefaces-62 (data/README.md): 62 characters in typefaces never seen in
training, a small ViT and a small residual CNN trained on it here. Their files are checked against
`data/SHA256SUMS` when read. Calibration images are drawn from the training part by seed; the test
part is other typefaces.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from evolq_lite import _torchvision  # noqa: F401  isort: skip  (before timm)

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor, nn

from evolq_lite.files import sha256

DATA = Path(os.environ.get("EVOLQ_DATA", Path(__file__).resolve().parents[1] / "data"))
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
DEMO_MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "architecture": "vit_tiny_patch16_224",
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 62,
        "embed_dim": 48,
        "depth": 6,
        "num_heads": 3,
    },
    "cnn": {
        "architecture": "resnet18",
        "layers": [1, 1, 1, 1],
        "in_chans": 1,
        "num_classes": 62,
        "channels": [32, 64, 128, 192],
    },
}


@dataclass(frozen=True)
class Typefaces:
    """Part of Typefaces-62: images (n, 1, 28, 28) uint8, ink 255; labels, faces, groups (n,)."""

    images: Tensor
    labels: Tensor
    faces: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Demo:
    """A float network, calibration images with its logits for them, how to read the test part."""

    name: str
    model: nn.Module
    calibration: Tensor  # (n, 1, 28, 28), normalised
    targets: Tensor  # (n, 62), the float network's logits

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test images (9920, 1, 28, 28), normalised, and labels (9920,): read once, at the end."""
        part = read_typefaces("test")
        return normalised(part.images.float() / 255), part.labels


def checked(name: str) -> Path:
    """The path of an embedded file; ValueError if it is missing, or not as `SHA256SUMS` says."""
    path, sums = DATA / name, DATA / "SHA256SUMS"
    if not path.is_file() or not sums.is_file():
        raise ValueError(
            f"{path if not path.is_file() else sums} is missing; "
            "restore it with: git checkout -- data"
        )
    lines = [line.split() for line in sums.read_text(errors="replace").splitlines()]
    wanted = {words[1]: words[0] for words in lines if len(words) == 2}.get(name)
    if wanted != sha256(path):
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not that of SHA256SUMS; "
            "restore it: git checkout -- data"
        )
    return path


def demo_file(name: str) -> str:
    """The file name of an embedded network's weights."""
    if name not in DEMO_MODELS:
        raise ValueError(f"unknown embedded network {name!r}; known: {', '.join(DEMO_MODELS)}")
    return f"typefaces-{name}.safetensors"


@cache
def test_faces() -> Tensor:
    """The typeface (9920,) of each embedded test image; images of one typeface lie together."""
    return read_typefaces("test").faces


def read_typefaces(part: str) -> Typefaces:
    """Read the "train" or the "test" part."""
    try:
        with np.load(checked(f"typefaces-{part}.npz"), allow_pickle=False) as file:
            arrays = {
                key: torch.from_numpy(file[key].copy())
                for key in ("images", "labels", "faces", "groups")
            }
    except (BadZipFile, KeyError, OSError) as error:
        raise ValueError(
            f"typefaces-{part}.npz cannot be read: {error}; restore it with: git checkout -- data"
        ) from None
    return Typefaces(
        arrays["images"][:, None], *(arrays[key].long() for key in ("labels", "faces", "groups"))
    )


def normalised(images: Tensor) -> Tensor:
    """Map pixels from [0, 1] to [-1, 1] (mean and deviation 0.5), as both networks were trained."""
    return (images - 0.5) / 0.5


def build_demo_model(name: str, checkpoint: Path | None = None) -> nn.Module:
    """The architecture of an embedded network, from timm; with weights if a checkpoint is given."""
    demo_file(name)  # refuses unknown names
    options = dict(DEMO_MODELS[name])
    model = unfused(timm.create_model(options.pop("architecture"), pretrained=False, **options))
    if name == "cnn":  # 28 x 28 pixels are few: no pooling after the stem
        model.maxpool = nn.Identity()
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def subset(n: int, size: int, seed: int, what: str = "calibration images") -> Tensor:
    """`size` of n indices, drawn without replacement by seed; ValueError if there are fewer."""
    if not 2 <= size <= n:
        raise ValueError(f"{size} {what} asked for; between 2 and {n} are possible")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]


def load_demo(name: str = "vit", calibration: int = 1000, seed: int = 0) -> Demo:
    """The embedded network "vit" or "cnn", with training images drawn by seed for calibration."""
    model = build_demo_model(name, checked(demo_file(name))).eval()
    pool = read_typefaces("train").images
    images = normalised(pool[subset(len(pool), calibration, seed)].float() / 255)
    with torch.no_grad():
        targets = torch.cat([model(x) for x in images.split(100)])
    return Demo(name, model, images, targets)


def unfused(model: nn.Module) -> nn.Module:
    """Use plain attention everywhere: fused kernels alter last digits and would skip quantizers."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a safetensors checkpoint.

    ValueError for other files, and for missing, foreign or differently shaped tensors.
    """
    if checkpoint.is_file() and checkpoint.suffix != ".safetensors":
        raise ValueError(
            f"{checkpoint} is no .safetensors file; others are pickles, which could run code, and "
            "are refused: the README shows how to convert them"
        )
    try:
        state = load_file(checkpoint)
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{checkpoint} cannot be read as a checkpoint ({why}); give a .safetensors file"
        ) from None
    own = model.state_dict()
    for what, keys in (
        ("lacks", own.keys() - state.keys()),
        ("has the foreign key", state.keys() - own.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"{checkpoint} {what} {min(keys, key=str)}{more}; "
                "it must have timm's key names for this network"
            )
    for key, value in state.items():
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)} instead of {tuple(own[key].shape)}"
            raise ValueError(
                f"{checkpoint}: {key} has shape {shapes}; is --model the right network?"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{checkpoint}: {key} holds NaN or infinite values")
    model.load_state_dict(state)


def load_timm(name: str, checkpoint: Path | None = None) -> nn.Module:
    """A timm network in evaluation mode, from a checkpoint or timm's own weights (online)."""
    if not timm.is_model(name.partition(".")[0]):
        near = get_close_matches(name, timm.list_models(), 3)
        hint = f"; near are {', '.join(near)}" if near else "; timm.list_models() names them all"
        raise ValueError(f"timm has no network {name!r}{hint}")
    try:
        model = timm.create_model(name, pretrained=checkpoint is None)
    except Exception as error:
        raise ValueError(
            f"timm could not build {name} ({str(error).splitlines()[0][:200]}); "
            "offline, give --checkpoint FILE"
        ) from None
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return unfused(model).eval()


def transform_of(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """timm's own preprocessing for a network: size, crop, interpolation, mean and deviation."""
    return create_transform(**resolve_model_data_config(model), is_training=False)


def list_folder(folder: Path, class_map: Path | None = None) -> tuple[list[Path], Tensor]:
    """Image files below a folder and their class indices (n,), by timm's rule: one folder a class.

    `class_map` lists the class folders in index order; needed where some of the network's classes
    have no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that holds a folder of images per class")
    if class_map is not None and not class_map.is_file():
        raise ValueError(
            f"{class_map} is no file; "
            "--class-map lists the class folders, one a line, in index order"
        )
    found, index = find_images_and_targets(str(folder))
    if not found:
        raise ValueError(f"{folder} holds no images (.png, .jpg, .jpeg); give a folder of images")
    labels = torch.tensor([label for _, label in found])
    if class_map is not None:
        mapped = read_class_map(class_map)
        if missing := index.keys() - mapped.keys():
            raise ValueError(
                f"{class_map} does not list the class folder {min(missing)!r} of {folder}; "
                "add or remove it"
            )
        # `index` is in the order of its values.
        labels = torch.tensor([mapped[name] for name in index])[labels]
    return [Path(path) for path, _ in found], labels


def read_class_map(file: Path) -> dict[str, int]:
    """The class folders that a text file lists, one a line, and their indices."""
    try:
        names = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(
            f"{file} is no text; --class-map lists the class folders, one a line"
        ) from None
    if len(set(names)) < len(names):
        raise ValueError(f"{file} lists a class folder twice; list each once, in index order")
    return {name: i for i, name in enumerate(names)}


def rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; Pillow alone would clip 16-bit greys to white, and warn of some palettes."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_images(
    paths: list[Path],
    transform: Callable[[Image.Image], Tensor],
    progress: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Transformed images (n, channels, height, width); ValueError names a file that is no image."""
    out = []
    for path in paths:
        try:
            with Image.open(path) as image:
                out.append(transform(rgb(image)))
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise ValueError(
                f"{path} cannot be read as an image ({error}); remove or replace it"
            ) from None
        progress(1)
    images = torch.stack(out)
    if not torch.isfinite(images).all():
        raise ValueError("the images hold NaN or infinite values")
    return images
