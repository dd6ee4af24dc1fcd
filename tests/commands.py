"""The command line as tests call it, and a small network with photographs to call it on."""

import re
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from evolq_lite.cli import main

BAR = re.compile(r"%\||\d\w+ \[\d\d:\d\d")  # of progress, with and without a total
SHORT = ("--passes", 1, "--cycles", 1)


def call(*arguments: object) -> int:
    """The exit status of the command line."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def sentence(error: str) -> str:
    """What stderr holds besides progress bars: exactly one line of ours."""
    lines = [x for x in error.replace("\r", "\n").splitlines() if x.strip() and not BAR.search(x)]
    assert len(lines) == 1, error
    assert lines[0].startswith("evolq_lite: "), error
    return lines[0]


def command(options: dict[str, object], *more: object) -> tuple[object, ...]:
    """The `run` command with options; those that are None are left out."""
    pairs = [part for key, v in options.items() if v is not None for part in (key, v)]
    return ("run", *pairs, *SHORT, "--granularity", "global", *more)


def small_network(**options: object) -> nn.Module:
    """What timm.create_model gives for resnet10t in these tests: a narrow one of 3 classes."""
    torch.manual_seed(0)
    return timm.models.resnet.resnet10t(
        **{"num_classes": 3, "channels": (8, 8, 8, 8), "pretrained": False, **options}
    )


def noise_image(n: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An RGB image of noise; each n another."""
    pixels = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_photos(folder: Path, classes: str = "abc", each: int = 2) -> Path:
    """A folder of class folders of small images."""
    for n in range(each * len(classes)):
        path = folder / classes[n // each] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(n).save(path)
    return folder
