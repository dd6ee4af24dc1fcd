"""What the claims on trained ViT-Tiny and DeiT-Tiny share: folders, one reading, comparisons.

Networks and photographs are not in this repo. 1,000 photographs calibrate, 1,000 others test, which
are read once by all networks of a cell. (They are easier than the ImageNet validation set: compare
accuracies with each other only.)
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from evolq_lite.config import QuantConfig
from evolq_lite.data import Demo, check_images, hash_images
from evolq_lite.evaluate import (
    LOSSES,
    LossChange,
    SeedComparison,
    pack_values,
    packed,
    score,
    unpack_values,
    unpacked,
)
from evolq_lite.experiments.c12_starts import copy_of
from evolq_lite.experiments.cells import Claim
from evolq_lite.experiments.results import VERSION, Cell, Result, by
from evolq_lite.experiments.setup import Setting, prepare_demo, round_setting
from evolq_lite.experiments.verdicts import Row
from evolq_lite.files import sha256
from evolq_lite.folders import list_folder
from evolq_lite.runs.environment import device_here, tell_device
from evolq_lite.runs.scales import digest_of, load_scales, save_scales, scales_of
from evolq_lite.runs.source import BATCH, Folders, Progress, quiet

NETWORKS = {"vit_tiny_patch16_224": "ViT-Tiny", "deit_tiny_patch16_224": "DeiT-Tiny"}
FLOAT = "float"
log = logging.getLogger("evolq_lite")
PARTS = "calibration", "validation"  # folders of photographs
CLASS_MAP = "wnids.txt"  # beside them
CALIBRATION = 1000  # photographs, where a cell does not say how many
KEPT = Path("runs/real/starts")  # integers that were chosen


@dataclass(frozen=True)
class Place:
    """Where cells of real networks are computed: folders, and a device by name.

    "auto" is CUDA if there is one; workers take a machine's GPUs in turn.
    """

    weights: Path
    photographs: Path
    device: str = "cpu"


def source_of(cell: Cell, place: Place, images: int) -> Folders:
    """A cell's network on the photographs; `images` of them to calibrate, drawn by its seed."""
    return Folders.at(
        model=cell["network"],
        checkpoint=place.weights / f"{cell['network']}.safetensors",
        calibration=place.photographs / PARTS[0],
        test=place.photographs / PARTS[1],
        class_map=place.photographs / CLASS_MAP,
        calibration_images=images,
        seed=cell["seed"],
    )


def start_from(
    source: Folders, config: QuantConfig, device: str = "cpu", choose_integers: bool = True
) -> Setting:
    """A source's network on a device, quantized, calibrated and (`choose_integers`) rounded.

    What rounding chose is kept in `runs/real/starts`: learned rounding takes a quarter of an hour,
    and several claims begin with the same. The name of a file tells what calibration made of which
    options, so that it serves no other network, images or scheme.
    """
    model, images, targets = source.load(device=device_here(device))
    demo = Demo(source.model, model, images, targets)
    setting = prepare_demo(demo, config, choose_integers=False)
    if choose_integers and config.rounding != "nearest":
        made = digest_of(scales_of(setting.qmodel), {"version": VERSION, **asdict(config)})
        name = f"{source.model}-W{config.weight_bits}-{config.rounding}-{made[:16]}.safetensors"
        if not restore_start(KEPT / name, setting.qmodel):
            KEPT.mkdir(parents=True, exist_ok=True)  # before a quarter of an hour, not after it
            round_setting(setting, config)
            save_scales(KEPT / name, setting.qmodel)
    return setting


def restore_start(path: Path, qmodel: nn.Module) -> bool:
    """Put the integers that are kept in a file into a network; whether it could be done.

    A damaged file is told of in the log, and no good.
    """
    if not path.exists():
        return False
    try:
        load_scales(path, qmodel)
    except ValueError as error:
        log.warning("%s; the integers of weights are chosen again", error)
        return False
    return True


def read_test(source: Folders, networks: Mapping[str, nn.Module]) -> Result:
    """Which test images each network has right, and its losses; the first network is in float."""
    device = next(networks[FLOAT].parameters()).device
    scores = score(networks, (x.to(device) for x in source.test(BATCH)), source.labels())
    told: Result = {"images": len(source.labels()), "device": tell_device(device)}
    for name, found in scores.items():
        losses = {loss: pack_values(getattr(found, loss)) for loss in LOSSES}
        told[name] = {"correct": packed(found.right), **losses}
    return told


def search_each(
    source: Folders, start: Setting, name: str, searches: Mapping[str, Callable[[Setting], Result]]
) -> Result:
    """Every search, in place on a copy of the start `name`; one reading by all networks."""
    networks: dict[str, nn.Module] = {FLOAT: start.demo.model, name: start.qmodel}
    told: dict[str, Result] = {}
    for search, work in searches.items():
        setting = copy_of(start)
        told[search] = work(setting)
        networks[search] = setting.qmodel
    read = read_test(source, networks)
    return {**read, **{search: told[search] | read[search] for search in searches}}


def compute_at(claim: Claim, place: Place, **options: Any) -> Claim:
    """A claim on real networks that is computed at a place (with other options)."""
    return replace(claim, run=partial(claim.run, place=place, **options))


def check_folders(
    cells: Sequence[Cell], place: Place, progress: Progress = quiet
) -> dict[str, str]:
    """ValueError unless the networks and photographs of some cells are there, and can be read.

    Every photograph is opened: otherwise a cell would fail after a quarter of an hour. Returns what
    identifies the files, by what they are: results of others must not be averaged with theirs.
    """
    checkpoints = {name: place.weights / f"{name}.safetensors" for name in NETWORKS}
    images = (place.photographs, *(place.photographs / part for part in (*PARTS, CLASS_MAP)))
    for path in (*checkpoints.values(), *images):
        if not path.exists():
            raise ValueError(
                f"{path} is not there; give --weights FOLDER with {' and '.join(NETWORKS)} as "
                ".safetensors, and --photographs FOLDER with calibration/, validation/, wnids.txt"
            )
    for name in NETWORKS:
        source = source_of({"network": name, "seed": 0}, place, wanted_by(cells))
        source.list_tests(int(source.load_network().model.num_classes))  # type: ignore[arg-type]
    found = {f"weights of {name}": sha256(path) for name, path in checkpoints.items()}
    found["class map"] = sha256(place.photographs / CLASS_MAP)
    for part in PARTS:
        digests = check_images(list_folder(place.photographs / part).paths, progress)
        found[f"photographs in {part}"] = hash_images(digests)
    return found


def wanted_by(cells: Sequence[Cell]) -> int:
    """How many photographs calibrate, and serve as fresh ones beside those, at most."""
    return max(cell.get("images", CALIBRATION) + cell.get("fresh", 0) for cell in cells)


def check_of(results: pd.DataFrame) -> str:
    """What a selection of test images is called: never the whole test."""
    return f"{int(results['test_images'].max()):,}-image check"


def group_settings(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The results of each network and bit-width, a row for each seed."""
    settings = by(results, "network", "weight_bits").items()
    return {f"{NETWORKS[network]} W{bits}A8": found for (network, bits), found in settings}


def stack(column: pd.Series, read: Callable[[Result], Tensor]) -> Tensor:
    """What is kept of each image, (seeds, n)."""
    return torch.stack([read(result) for result in column])


def measure_gain(was: pd.Series, now: pd.Series, images: int) -> SeedComparison:
    """Top-1 of one column of results against another."""
    before, after = (stack(c, lambda r: unpacked(r["correct"], images)) for c in (was, now))
    return SeedComparison.of(before, after)


def measure_loss(was: pd.Series, now: pd.Series, loss: str) -> LossChange:
    """A loss of one column of results against another."""
    return LossChange.of(*(stack(c, lambda r: unpack_values(r[loss])) for c in (was, now)))


@dataclass(frozen=True)
class Change:
    """One column of results against another: the same test images, a pair for each seed."""

    kl: LossChange
    top1: SeedComparison
    cross_entropy: LossChange

    @classmethod
    def of(cls, was: pd.Series, now: pd.Series, images: int) -> "Change":
        return cls(
            measure_loss(was, now, "kl"),
            measure_gain(was, now, images),
            measure_loss(was, now, "cross_entropy"),
        )

    def rows(self, label: str, holds: bool | None = None) -> tuple[Row, Row, Row]:
        """KL, top-1 and cross-entropy; `holds` is for the row of KL, if that decides."""
        return (
            Row.of_loss(f"{label}, KL", self.kl, holds),
            Row.of(label, self.top1),
            Row.of_loss(f"{label}, cross-entropy", self.cross_entropy),
        )


def tell_means(column: pd.Series, images: int) -> dict[str, str]:
    """Top-1 and losses, means over seeds, for a table."""
    right = stack(column, lambda r: unpacked(r["correct"], images))
    return {
        "top-1, %": f"{100 * float(right.float().mean()):.1f}",
        "KL to float": mean_loss(column, "kl"),
        "cross-entropy": mean_loss(column, "cross_entropy"),
    }


def change_loss(
    groups: Mapping[str, pd.DataFrame],
    start: str,
    others: Iterable[str],
    how: str,
    loss: str = "kl",
) -> dict[str, dict[str, dict[str, LossChange]]]:
    """A loss of other networks against a start's, by setting, network and `how`: `plot_starts`."""
    return {
        setting: {name: {how: measure_loss(found[start], found[name], loss)} for name in others}
        for setting, found in groups.items()
    }


def mean_loss(column: pd.Series, loss: str) -> str:
    """The mean of a loss over images and seeds, for a table."""
    return f"{float(stack(column, lambda r: unpack_values(r[loss])).mean()):.4f}"
