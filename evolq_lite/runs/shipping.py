"""From a run's folder to an ONNX file, and from such a file back to a top-1: `export`, `verify`.

`open_run` makes the network that a run has come to once more: the float network and the calibration
images from where the run found them, calibrated and rounded as then (a digest tells whether that
gave the same), with the scales after the last finished visit. `verify` is for whoever has nothing
but the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolq_lite.bits import BitsTable, prepare_bits
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import (
    CHARACTERS,
    check_images,
    checked,
    hash_images,
    load_images,
    subset,
)
from evolq_lite.deployed import Deployed
from evolq_lite.evaluate import Accuracy, predict, unpacked
from evolq_lite.files import in_line, sha256
from evolq_lite.folders import label_images, list_folder
from evolq_lite.rounding import round_weights
from evolq_lite.runs.folder import read_object
from evolq_lite.runs.scales import digest_start, load_scales
from evolq_lite.runs.source import BATCH, Embedded, Folders, Progress, Source, demo_test, quiet

EMBEDDED = "typefaces-"  # what the names of embedded networks begin with
SCALES = "scales.safetensors"  # those after a run's last finished visit
AGAIN = "copy the run's whole folder again, or run it again"


@dataclass(frozen=True)
class Shipment:
    """A network that is ready to be exported, an image for it, and what the file shall say."""

    qmodel: nn.Module
    example: Tensor  # (n, channels, height, width)
    facts: dict[str, Any]


def source_in(config: dict[str, Any]) -> Source:
    """The source that a run's config.json describes."""
    model, seed = config["model"], config["search"]["seed"]
    if model.startswith(EMBEDDED):
        return Embedded(model.removeprefix(EMBEDDED), config["calibration_images"], seed)
    paths = config["paths"]
    return Folders(
        model,
        paths["checkpoint"],
        paths["calibration"],
        paths["test"],
        paths["class_map"],
        config["calibration_images"],
        config["test_images"],
        seed,
        config["image_size"],
        config.get("crop"),  # a run older than the option has none
    )


def make_shipment(source: Source, quant: QuantConfig, batch: int = BATCH) -> Shipment:
    """Quantize, calibrate and round a source's network, as a run does before it searches."""
    qmodel, images = calibrate_source(source, quant, batch)
    for _ in round_weights(qmodel, images, quant.rounding):
        pass
    return Shipment(qmodel, images[:2], facts_of(source))


def calibrate_source(
    source: Source, quant: QuantConfig, batch: int = BATCH
) -> tuple[nn.Module, Tensor]:
    """A source's network, quantized and calibrated, and the calibration images."""
    model, images, _ = source.load()
    qmodel = quantize(model, quant)
    calibrate(qmodel, images, quant, batch)
    return qmodel, images


def facts_of(source: Source) -> dict[str, Any]:
    """What a source tells the receiver of its network: name, classes, kind of test images."""
    facts: dict[str, Any] = {"network": source.identity()["model"]}
    if isinstance(source, Embedded):
        return {**facts, "classes": list(CHARACTERS), "embedded": source.network}
    assert isinstance(source, Folders)
    if source.crop is not None:
        facts["crop_pct"] = source.crop
    if Path(source.test_folder).is_dir():
        classes = int(source.load_network().model.num_classes)  # type: ignore[arg-type]
        facts["classes"] = list(source.list_tests(classes).classes) or None
    return facts


@dataclass(frozen=True)
class PastRun:
    """What a run's folder says of the network in it."""

    path: Path
    quant: QuantConfig
    search: SearchConfig
    source: Source
    threads: int
    calibrated: str  # digest of the network that the run began with
    test: dict[str, Any] | None  # what it found on its test images, None before it has read them


def read_part(path: Path) -> dict[str, Any]:
    """A file of a run's folder; ValueError if it is missing or damaged."""
    try:
        return read_object(path, AGAIN)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {AGAIN}") from None


def read_run(path: Path) -> PastRun:
    """What can be told of a run without computing anything.

    ValueError if the folder holds none, or none that can be exported.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run; give the folder that a run was written to")
    if not (path / SCALES).is_file():
        raise ValueError(f"{path} holds no finished visit yet; resume the run, then export it")
    config, state = (read_part(path / name) for name in ("config.json", "environment.json"))
    try:
        run = PastRun(
            path,
            QuantConfig(**config["quantization"]),
            SearchConfig(**config["search"]),
            source_in(config),
            state["threads"],
            state["calibrated"],
            test_facts(path, config, state["sha256"]),
        )
    except (KeyError, TypeError) as error:
        why = in_line(error)
        raise ValueError(f"{path} was made by another version ({why}); run it again") from None
    if lack := run.source.lack():
        raise ValueError(f"the run's files are not where they were: {lack}")
    return run


def open_run(run: PastRun) -> Shipment:
    """The network of a run after its last finished visit.

    ValueError if it cannot be made as the run had it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)  # sums round as they did
    table: BitsTable = {}
    try:
        if run.search.searches_bits:
            start, images = calibrate_source(run.source, run.quant, run.search.batch)
            _, table, _ = prepare_bits(start, images, run.search)
            shipment = Shipment(start, images[:2], facts_of(run.source))
        else:
            shipment = make_shipment(run.source, run.quant, run.search.batch)
    finally:
        torch.set_num_threads(threads)
    qmodel = shipment.qmodel
    if digest_start(qmodel, table) != run.calibrated:
        raise ValueError(
            f"calibrated again, the network of {run.path} is another one than the run began with; "
            "export it on the machine of the run, with the same files"
        )
    facts = {**shipment.facts, "run": load_scales(run.path / SCALES, qmodel), "test": run.test}
    return Shipment(qmodel, shipment.example, facts)


def test_facts(
    path: Path, config: Mapping[str, Any], hashes: Mapping[str, str]
) -> dict[str, Any] | None:
    """What a run found on its test images, None if it has not read them yet."""
    if not (path / "summary.json").is_file():
        return None
    summary = read_part(path / "summary.json")
    return {
        "sha256": hashes.get("test images") or hashes.get("typefaces-test.npz"),
        "subset": config.get("test_images"),
        "images": summary["images"],
        "correct": summary["correct"]["evolved"],
    }


@dataclass(frozen=True)
class Verdict:
    """Which test images (n,) a file gets right, and which the run got right that it came from."""

    right: Tensor
    run: Tensor | None  # None: the file comes from no finished run, or these are other images

    @property
    def accuracy(self) -> Accuracy:
        """Top-1 of the file."""
        return Accuracy(int(self.right.sum()), len(self.right))

    @property
    def agreement(self) -> float | None:
        """On which share of the images the file is right where the run was, and wrong where not."""
        return None if self.run is None else float((self.right == self.run).float().mean())

    def __str__(self) -> str:
        told = f"top-1 {self.accuracy} on {len(self.right):,} images"
        if self.run is None:
            return f"{told}; there is no run on these images to compare with"
        was = Accuracy(int(self.run.sum()), len(self.run))
        return (
            f"{told}; the run it came from {100 * was.top1:.2f} %, right and wrong on the same "
            f"images in {100 * float(self.agreement or 0):.2f} % of them"
        )


def verify(
    network: Deployed,
    test: Path | None = None,
    class_map: Path | None = None,
    progress: Progress = quiet,
) -> Verdict:
    """Run an exported network on test images: a folder's, or the embedded ones.

    ValueError if neither is meant, or the folder's classes do not fit.
    """
    facts = network.facts
    said = facts.get("test") or {}
    if test is None:
        if not facts.get("embedded"):
            raise ValueError("the file's network is not an embedded one; give --test DIR")
        digest = sha256(checked("typefaces-test.npz"))
        images, labels = demo_test(facts["embedded"])
        batches: Iterator[Tensor] = iter(images.split(BATCH))
    else:
        paths, labels = choose(network, test, class_map, said.get("subset"))
        digest = hash_images(check_images(paths), labels) if said else ""
        batches = (
            load_images(paths[i : i + BATCH], network.prepare) for i in range(0, len(paths), BATCH)
        )
    right = predict({"file": network}, batches, progress)["file"] == labels
    same = bool(said) and digest == said.get("sha256") and len(right) == said.get("images")
    return Verdict(right, unpacked(said["correct"], len(right)) if same else None)


def choose(
    network: Deployed, test: Path, class_map: Path | None, some: int | None
) -> tuple[list[Path], Tensor]:
    """Test images and labels: all, or the subset that the run took."""
    names = network.facts.get("classes") or ()
    listing = label_images(list_folder(test), network.classes, class_map, names)
    assert listing.labels is not None
    if some is None or some > len(listing.paths):
        return listing.paths, listing.labels
    picked = subset(len(listing.paths), some, 0, "test images").sort().values
    return [listing.paths[int(i)] for i in picked], listing.labels[picked]
