"""The embedded images and networks, which work offline, and images from files.

The embedded task is Typefaces-62 (data/README.md): 62 characters in typefaces never seen in
training, a small ViT and a small residual CNN trained on it here. Their files are checked against
`data/SHA256SUMS` when read. Calibration images are drawn from the training part by seed; the test
part is other typefaces.

Image files are read as timm's readers do (RGB, not turned by EXIF), and those that would come out
wrong without a word (numbers without a known range, truncated files) are refused by name.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from evolq_lite import _torchvision  # noqa: F401  isort: skip  (before timm)

import numpy as np
import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from evolq_lite.checkpoints import load_weights
from evolq_lite.files import DATA, mistake, sha256
from evolq_lite.networks import unfused

# Of the longer side to the shorter: a thin strip is huge once its width is what a network wants.
MAX_RATIO = 500
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
        return load_demo_test()


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
    # What timm says of the architecture is true of its own weights; of these, this is.
    prepared = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    model = unfused(
        timm.create_model(
            options.pop("architecture"),
            pretrained=False,
            pretrained_cfg_overlay=prepared,
            **options,
        )
    )
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


def load_demo_test() -> tuple[Tensor, Tensor]:
    """The embedded test images (9920, 1, 28, 28), normalised, and labels (9920,)."""
    part = read_typefaces("test")
    return normalised(part.images.float() / 255), part.labels


def transform_of(model: nn.Module, crop: float | None = None) -> Callable[[Image.Image], Tensor]:
    """timm's own preprocessing for a network: size, crop, interpolation, mean and deviation.

    `crop` is the share of the shorter side that is kept, in place of timm's.
    """
    config = resolve_model_data_config(model)
    if crop is not None:
        config["crop_pct"] = crop
    transform: Callable[[Image.Image], Tensor] = create_transform(**config, is_training=False)
    channels = config["input_size"][0]
    if channels == 1:
        return lambda image: transform(image.convert("L"))
    if channels != 3:
        raise ValueError(f"the network takes images of {channels} channels; files have 3, or 1")
    return transform


def read_image(path: Path, content: bytes) -> Image.Image:
    """The RGB image that a file's content is; ValueError names a file that is not an image."""
    try:
        with warnings.catch_warnings():  # Pillow warns of large images, which are no fault
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content)) as image:
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels are too thin a strip")
                return rgb(image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        why = mistake(content) or ("Pillow knows no such format" if unknown else str(error))
        raise ValueError(
            f"{path} cannot be read as an image ({why}); remove or replace it"
        ) from None


def rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; Pillow alone would clip 16-bit greys to white, and warn of some palettes.

    Numbers of 32 bits have no known white, so they are refused.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if sixteen:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers without a known range; save it with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def check_images(
    paths: Sequence[Path], progress: Callable[[int], None] = lambda images: None
) -> list[str]:
    """Decode all images that a run will need, without looking at them; their SHA-256, each.

    Each file is read once. ValueError names the first damaged one: before a search, not after it.
    """
    digests = []
    for path in paths:
        content = _content(path)
        read_image(path, content)
        digests.append(hashlib.sha256(content).hexdigest())
        progress(1)
    return digests


def hash_images(digests: Sequence[str], labels: Tensor | None = None) -> str:
    """What identifies images (`check_images`) in their order, with their labels if these matter."""
    numbers = [""] * len(digests) if labels is None else [str(x) for x in labels.tolist()]
    lines = [f"{digest} {n}\n" for digest, n in zip(digests, numbers, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_images(
    paths: Sequence[Path],
    transform: Callable[[Image.Image], Tensor],
    progress: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Transformed images (n, channels, height, width); ValueError names a file that is no image."""
    out = []
    for path in paths:
        out.append(transform(read_image(path, _content(path))))
        progress(1)
    images = torch.stack(out)
    if not torch.isfinite(images).all():
        raise ValueError("the images hold NaN or infinite values")
    return images


def _content(path: Path) -> bytes:
    """A file's bytes; ValueError names it, be it a dead link or unreadable."""
    try:
        return path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{path} cannot be read ({why}); remove or replace it") from None
