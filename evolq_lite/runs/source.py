"""Where a run comes from: a float network, calibration images, and test images for the end.

A source is a small frozen description that knows how to load what it describes. It can be sent to
another process, or another machine, and loads the same there. What identifies it is content: hashes
of files, so that a run resumes after its files have moved.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from evolq_lite.config import DEMO_IMAGES, OFFICIAL_CROP
from evolq_lite.data import (
    check_images,
    checked,
    demo_file,
    hash_images,
    load_demo,
    load_demo_test,
    load_images,
    subset,
    test_faces,
    transform_of,
)
from evolq_lite.files import sha256
from evolq_lite.folders import Listing, label_images, list_folder
from evolq_lite.networks import Loaded, load_network

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

    def check(self, progress: Progress = quiet) -> dict[str, str]:
        """Make sure that all files are there and whole; SHA-256 of all the result depends on."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What a user should know of how things were read, a sentence each."""
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

    def groups(self) -> Tensor | None:
        """Which test images (n,) are alike, as those of one typeface; None if none are."""
        ...


@lru_cache(maxsize=1)
def demo_test(network: str) -> tuple[Tensor, Tensor]:
    """The embedded test images and labels, kept from one reading; the same for each network."""
    return load_demo_test()


@dataclass(frozen=True)
class Embedded:
    """An embedded network, "vit" or "cnn", on Typefaces-62; `images` are drawn by seed."""

    network: str = "vit"
    images: int = DEMO_IMAGES
    seed: int = 0

    note = "9,920 characters of 160 typefaces that neither training nor calibration has seen"

    @property
    def files(self) -> tuple[str, ...]:
        """The files of `data/` that it reads."""
        return "typefaces-train.npz", "typefaces-test.npz", demo_file(self.network)

    def identity(self) -> dict[str, Any]:
        return {"model": f"typefaces-{self.network}", "calibration_images": self.images}

    def paths(self) -> dict[str, str | None]:
        return {}

    def check(self, progress: Progress = quiet) -> dict[str, str]:
        return {name: sha256(checked(name)) for name in self.files}

    def notes(self) -> tuple[str, ...]:
        return ()

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

    def groups(self) -> Tensor | None:
        return test_faces()


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
    image_size: int | None = None  # where the checkpoint does not tell
    crop: float | None = None  # share of the shorter side that is kept; None: as timm does

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
        image_size: int | None = None,
        crop: float | None = None,
    ) -> "Folders":
        """Without a number of calibration images 1,000, or all if there are fewer.

        ValueError for folders that cannot be read so, or that hold too few images.
        """
        if crop is not None and not 0.1 <= crop <= 1:  # NaN is neither
            raise ValueError(f"--crop must be from 0.1 to 1, not {crop}")
        found, tests = list_folder(calibration).paths, list_folder(test).paths
        if len(found) < 2:
            raise ValueError(
                f"{calibration} holds 1 image; give at least 2: infoNCE compares images"
            )
        wanted = min(1000, len(found)) if calibration_images is None else calibration_images
        subset(len(found), wanted, seed, f"calibration images from {calibration}")
        if test_images is not None:
            subset(len(tests), test_images, 0, f"test images from {test}")
        return cls(
            model,
            absolute(checkpoint),
            str(calibration.absolute()),
            str(test.absolute()),
            absolute(class_map),
            wanted,
            test_images,
            seed,
            image_size,
            crop,
        )

    @property
    def note(self) -> str:
        return f"{len(self.labels()):,}-image check on {self.test_folder}"

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "calibration_images": self.calibration_images,
            "test_images": self.test_images,
            "image_size": self.image_size,
            "crop": self.crop,
        }

    def paths(self) -> dict[str, str | None]:
        return {
            "checkpoint": self.checkpoint,
            "calibration": self.calibration,
            "test": self.test_folder,
            "class_map": self.class_map,
        }

    def check(self, progress: Progress = quiet) -> dict[str, str]:
        """Open every image that will be needed, test images too; returns hashes of all files.

        ValueError for a damaged image, and for classes that do not fit the network. Test images are
        decoded, and not looked at.
        """
        classes = int(self.load_network().model.num_classes)  # type: ignore[arg-type]
        paths, labels = self.choose_tests(classes)
        found = {
            "calibration images": hash_images(check_images(self.choose_calibration(), progress)),
            "test images": hash_images(self.open_tests(paths, progress), labels),
        }
        for name in ("checkpoint", "class_map"):
            if (path := getattr(self, name)) is not None:
                found[name.replace("_", " ")] = sha256(Path(path))
        return found

    def notes(self) -> tuple[str, ...]:
        """How the network was built, and which files of the folders are left out."""
        loaded = self.load_network()
        classes = int(loaded.model.num_classes)  # type: ignore[arg-type]
        listings = self.list_images(self.calibration), self.list_tests(classes)
        left_out = (
            f"Left out of {listing.folder}: {listing.omissions}."
            for listing in listings
            if listing.left_out
        )
        return (*loaded.notes, *listings[1].notes, *left_out)

    def lack(self) -> str:
        for path in (self.checkpoint, self.calibration):
            if path is not None and not Path(path).exists():
                return f"{path} is not there; put it on every worker under the same path"
        return ""

    def load(self, progress: Progress = quiet, device: torch.device | str = "cpu") -> Parts:
        """Everything on a device; ValueError for a network that is not supported."""
        model = self.load_network().model.to(device)
        transform = transform_of(model, self.crop)
        images = load_images(self.choose_calibration(), transform, progress).to(device)
        with torch.no_grad():
            targets = torch.cat([model(x) for x in images.split(BATCH)])
        return Parts(model, images, targets)

    def test(self, batch: int) -> Iterator[Tensor]:
        model = self.load_network().model
        paths, _ = self.choose_tests(int(model.num_classes))  # type: ignore[arg-type]
        transform = transform_of(model, self.crop)
        for i in range(0, len(paths), batch):
            yield load_images(paths[i : i + batch], transform)

    def labels(self) -> Tensor:
        classes = int(self.load_network().model.num_classes)  # type: ignore[arg-type]
        return self.choose_tests(classes)[1]

    def groups(self) -> Tensor | None:
        return None

    def load_network(self) -> Loaded:
        """The float network, and what is to be known of how it was built."""
        if self.checkpoint is None:
            return load_once(self.model, None, self.image_size, 0)
        file = Path(self.checkpoint)
        # A file that is not there is for `load_network` to tell.
        written = file.stat().st_mtime_ns if file.is_file() else 0
        return load_once(self.model, file, self.image_size, written)

    def list_images(self, folder: str) -> Listing:
        """All images below one of the two folders."""
        return list_folder(Path(folder))

    def open_tests(self, paths: list[Path], progress: Progress) -> list[str]:
        """Decode the test images; their SHA-256, each."""
        return check_images(paths, progress)

    def choose_calibration(self) -> list[Path]:
        """Calibration images, drawn by seed."""
        found = self.list_images(self.calibration).paths
        return [found[int(i)] for i in subset(len(found), self.calibration_images, self.seed)]

    def list_tests(self, classes: int) -> Listing:
        """All images of the test folder with their classes, for a network of so many."""
        class_map = None if self.class_map is None else Path(self.class_map)
        return label_images(self.list_images(self.test_folder), classes, class_map)

    def choose_tests(self, classes: int) -> tuple[list[Path], Tensor]:
        """Test images and labels: all, or a fixed random subset."""
        listing = self.list_tests(classes)
        labels = listing.labels
        assert labels is not None
        if self.test_images is None:
            return listing.paths, labels
        picked = subset(len(labels), self.test_images, 0, "test images").sort().values
        return [listing.paths[int(i)] for i in picked], labels[picked]


@lru_cache(maxsize=1)
def load_once(name: str, checkpoint: Path | None, image_size: int | None, written: int) -> Loaded:
    """A network that several questions are asked about, kept until its file is written anew."""
    return load_network(name, checkpoint, image_size)


def official_crop(model: str) -> float | None:
    """The share of an image that the paper's script keeps, None where that is timm's."""
    return OFFICIAL_CROP if model.startswith(("deit", "levit")) else None


def absolute(path: Path | None) -> str | None:
    """A path as another process must know it, which may have started elsewhere."""
    return None if path is None else str(path.absolute())
