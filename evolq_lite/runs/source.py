"""Where a run comes from: a float network, calibration images, and test images for the end.

A source is a small frozen description that knows how to load what it describes. It can be sent to
another process, or another machine, and loads the same there. What identifies it is content: hashes
of files, so that a run resumes after its files have moved.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.data import (
    checked,
    list_folder,
    load_demo,
    load_images,
    load_timm,
    read_class_map,
    subset,
    transform_of,
)
from evolq_lite.files import sha256

DEMO_QUANT = QuantConfig(weight_bits=3, act_bits=8)
DEMO_IMAGES = 500
BATCH = 100  # images per forward of a float network

Progress = Callable[[int], None]  # told how many more images are done


def quiet(images: int) -> None:
    """A progress that nobody watches."""


class Parts(NamedTuple):
    """What a search needs: `targets` (n, classes) are the float network's logits for `images`."""

    model: nn.Module
    images: Tensor  # (n, channels, height, width)
    targets: Tensor


class Source(Hashable, Protocol):
    """Frozen and picklable; equal sources load the same."""

    @property
    def note(self) -> str:
        """What the test images are, for the table."""
        ...

    def identity(self) -> dict[str, Any]:
        """What config.json says of it, and what a resumed run is compared with."""
        ...

    def paths(self) -> dict[str, str | None]:
        """Where its files lie; they may move."""
        ...

    def hashes(self) -> dict[str, str]:
        """SHA-256 of all that the result depends on."""
        ...

    def lack(self) -> str:
        """What this machine lacks to load it, in a sentence; "" if nothing."""
        ...

    def load(self, progress: Progress = quiet) -> Parts:
        """The float network, calibration images and its logits for them."""
        ...

    def test(self, batch: int) -> Iterator[Tensor]:
        """The test images in batches; read once, at the end."""
        ...

    def labels(self) -> Tensor:
        """The classes (n,) of the test images."""
        ...


@lru_cache(maxsize=1)
def demo_test(network: str) -> tuple[Tensor, Tensor]:
    """The embedded test images and labels, kept from one reading."""
    return load_demo(network, 2).test


@dataclass(frozen=True)
class Embedded:
    """An embedded network, "vit" or "cnn", on Typefaces-62, calibrated on `images` drawn by seed."""

    network: str = "vit"
    images: int = DEMO_IMAGES
    seed: int = 0

    note = "9,920 characters of 160 typefaces that neither training nor calibration has seen"

    @property
    def files(self) -> tuple[str, ...]:
        """The files of `data/` that it reads."""
        return "typefaces-train.npz", "typefaces-test.npz", f"typefaces-{self.network}.safetensors"

    def identity(self) -> dict[str, Any]:
        return {"model": f"typefaces-{self.network}", "calibration_images": self.images}

    def paths(self) -> dict[str, str | None]:
        return {}

    def hashes(self) -> dict[str, str]:
        return {name: sha256(checked(name)) for name in self.files}

    def lack(self) -> str:
        try:
            for name in self.files:
                checked(name)
        except ValueError as error:
            return str(error)
        return ""

    def load(self, progress: Progress = quiet) -> Parts:
        demo = load_demo(self.network, self.images, self.seed)
        progress(self.images)
        return Parts(demo.model, demo.calibration, demo.targets)

    def test(self, batch: int) -> Iterator[Tensor]:
        yield from demo_test(self.network)[0].split(batch)

    def labels(self) -> Tensor:
        return demo_test(self.network)[1]


@dataclass(frozen=True)
class Folders:
    """A timm network on folders of images, with absolute paths as all processes must know them.

    `Folders.at` builds it from paths as people give them.
    """

    model: str
    checkpoint: str | None
    calibration: str
    test_folder: str
    class_map: str | None
    calibration_images: int
    test_images: int | None  # a fixed random subset; None means all
    seed: int

    @classmethod
    def at(
        cls,
        model: str,
        checkpoint: Path | None,
        calibration: Path,
        test: Path,
        class_map: Path | None = None,
        calibration_images: int | None = None,
        test_images: int | None = None,
        seed: int = 0,
    ) -> "Folders":
        """Without a number of calibration images 1,000, or all if there are fewer.

        ValueError for folders that cannot be read so, or that hold too few images.
        """
        found, _ = list_folder(calibration)
        tests, _ = list_folder(test, class_map)
        if len(found) < 2:
            raise ValueError(
                f"{calibration} holds 1 image; give at least 2: infoNCE compares images"
            )
        wanted = min(1000, len(found)) if calibration_images is None else calibration_images
        subset(len(found), wanted, seed)
        if test_images is not None:
            subset(len(tests), test_images, 0, "test images")
        return cls(
            model,
            absolute(checkpoint),
            str(calibration.absolute()),
            str(test.absolute()),
            absolute(class_map),
            wanted,
            test_images,
            seed,
        )

    @property
    def note(self) -> str:
        return f"{len(self.labels()):,}-image check on {self.test_folder}"

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "calibration_images": self.calibration_images,
            "test_images": self.test_images,
        }

    def paths(self) -> dict[str, str | None]:
        return {
            "checkpoint": self.checkpoint,
            "calibration": self.calibration,
            "test": self.test_folder,
            "class_map": self.class_map,
        }

    def hashes(self) -> dict[str, str]:
        tests, labels = self.choose_tests()
        found = {
            "calibration images": sha256(*self.choose_calibration()),
            "test images": sha256(*tests),
            "test labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        }
        for name in ("checkpoint", "class_map"):
            if (path := getattr(self, name)) is not None:
                found[name.replace("_", " ")] = sha256(Path(path))
        return found

    def lack(self) -> str:
        for path in (self.checkpoint, self.calibration):
            if path is not None and not Path(path).exists():
                return f"{path} is not there; put it on every worker under the same path"
        return ""

    def load(self, progress: Progress = quiet) -> Parts:
        """ValueError for a network that is not supported, or whose classes are not the folders'."""
        model = load_timm(self.model, None if self.checkpoint is None else Path(self.checkpoint))
        chain_of(model)
        self.check_classes(int(model.num_classes))  # type: ignore[arg-type]
        images = load_images(self.choose_calibration(), transform_of(model), progress)
        with torch.no_grad():
            targets = torch.cat([model(x) for x in images.split(BATCH)])
        return Parts(model, images, targets)

    def test(self, batch: int) -> Iterator[Tensor]:
        tests, _ = self.choose_tests()
        checkpoint = None if self.checkpoint is None else Path(self.checkpoint)
        transform = transform_of(load_timm(self.model, checkpoint))
        for i in range(0, len(tests), batch):
            yield load_images(tests[i : i + batch], transform)

    def labels(self) -> Tensor:
        return self.choose_tests()[1]

    def choose_calibration(self) -> list[Path]:
        """Calibration images, drawn by seed."""
        found, _ = list_folder(Path(self.calibration))
        return [found[int(i)] for i in subset(len(found), self.calibration_images, self.seed)]

    def choose_tests(self) -> tuple[list[Path], Tensor]:
        """Test images and labels: all, or a fixed random subset."""
        found, labels = self.list_tests()
        if self.test_images is None:
            return found, labels
        picked = subset(len(found), self.test_images, 0, "test images").sort().values
        return [found[int(i)] for i in picked], labels[picked]

    def list_tests(self) -> tuple[list[Path], Tensor]:
        """All images of the test folder with their classes."""
        class_map = None if self.class_map is None else Path(self.class_map)
        return list_folder(Path(self.test_folder), class_map)

    def check_classes(self, classes: int) -> None:
        """ValueError unless the test folder and the class map fit a network of so many classes."""
        _, labels = self.list_tests()
        if self.class_map is not None:
            lines = len(read_class_map(Path(self.class_map)))
            if lines != classes:
                raise ValueError(
                    f"{self.class_map} lists {lines} class folders, the network has {classes} "
                    "classes; list all of them in index order, those without images too"
                )
        folders = len(labels.unique())
        if int(labels.max()) >= classes or (self.class_map is None and folders != classes):
            raise ValueError(
                f"{self.test_folder} has {folders} class folders, the network {classes} classes; "
                "give --class-map FILE with the class folders in index order"
            )


def absolute(path: Path | None) -> str | None:
    """A path as another process must know it, which may have started elsewhere."""
    return None if path is None else str(path.absolute())
