"""PAPER: the paper's whole grid on ImageNet: every network, bit-width and start, three seeds.

A cell is one run of the product: 1,000 training images, ten passes, all validation images read once
at its end. The 297 cells want a GPU for each process that computes them, and days (`paper_cost`
counts the forwards); this repo holds a small trial of it: two networks, one pass, one seed, and
1,000 test images. What is there becomes a table in the paper's form, beside the published numbers
that we could trace to their source. Cells are resumed, and shared out among workers as those of the
claims are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import pandas as pd
import torch

from evolq_lite.config import PRESETS, QuantConfig, SearchConfig
from evolq_lite.data import check_images, hash_images
from evolq_lite.evaluate import SeedComparison, tell_p, unpacked
from evolq_lite.evolve import Evaluated
from evolq_lite.experiments.results import VERSION, Cell, Result, ResultFile, where
from evolq_lite.experiments.verdicts import to_markdown
from evolq_lite.files import sha256, write_whole
from evolq_lite.folders import Listing, list_folder
from evolq_lite.networks import check_name
from evolq_lite.runs.environment import device_here
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Folders, Progress, official_crop, quiet

# The paper's name, and timm's with the weights that published float accuracies belong to.
NETWORKS = {
    "DeiT-T": "deit_tiny_patch16_224.fb_in1k",
    "DeiT-S": "deit_small_patch16_224.fb_in1k",
    "DeiT-B": "deit_base_patch16_224.fb_in1k",
    "ViT-B": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "Swin-T": "swin_tiny_patch4_window7_224.ms_in1k",
    "Swin-S": "swin_small_patch4_window7_224.ms_in1k",
    "Swin-B": "swin_base_patch4_window7_224.ms_in1k",
    "LeViT": "levit_256.fb_dist_in1k",  # the size is our choice: what we know of the paper has none
    "ResNet-18": "resnet18.tv_in1k",
    "ResNet-50": "resnet50.tv_in1k",
    "RegNet-3.2GF": "regnetx_032.pycls_in1k",  # X is our choice
}
# How the networks are quantized before the search; bits come from the cell.
SCRIPT = "official"
STARTS = {
    "MinMax": PRESETS["paper"],
    "MSE": replace(PRESETS["paper"], weight_observer="mse"),
    SCRIPT: PRESETS["official"],
}
BITS = (8, 4, 3)  # of weights; activations have 8
PASSES, SEEDS, MOST = 10, 3, 1000
HEADING = "# The paper's grid"
CALIBRATION = 1000  # training images
VALIDATION = 50_000  # images of ImageNet's validation set
LAYOUTS = (("train", "val"), ("calibration", "validation"))  # ImageNet's, and that of REAL
Watch = Callable[[Evaluated], None]

# Published top-1 of the first seven networks: FQ-ViT's README, at 8 bits (attention too), images
# cropped by 0.875.
PUBLISHED = {
    "float": (72.21, 79.85, 81.85, 84.53, 81.35, 83.20, 83.60),
    "MinMax": (70.94, 75.05, 78.02, 23.64, 64.38, 74.37, 25.58),
    "OMSE": (71.30, 75.03, 79.57, 73.39, 79.30, 78.96, 48.55),
    "FQ-ViT": (71.61, 79.17, 81.20, 83.31, 80.51, 82.71, 82.97),
}
# Published gains of Evol-Q in points, by network and weight bits: over the best before it in the
# paper's abstract; over BRECQ in one summary of the paper, which we could not check.
GAINS = {
    ("ViT-B", 8): "+0.15 (abstract)",
    ("ViT-B", 4): "+0.78 (abstract)",
    ("ViT-B", 3): "+10.30 (abstract)",
    ("ResNet-18", 4): "+0.5 (summary)",
    ("ResNet-50", 4): "+2.25 (summary)",
    ("RegNet-3.2GF", 4): "+2.66 (summary)",
}
UNKNOWN, MISSING = "not reported here", "not run"

HOW_PUBLISHED = f"""\
Ours with timm's own preprocessing, but for the start "official", which crops DeiT and LeViT as the
paper's script does; the row "float" is timm's. Published top-1 is from FQ-ViT's README, which crops
by 0.875; Evol-Q's published gains are from the paper's abstract, over the best before it, or from
one summary of it, over BRECQ, which we could not check. "{UNKNOWN}": we traced no published number.
"""
CHECK = """\
**A {:,}-image check, not the ImageNet validation set of 50,000: do not compare it with published
numbers.** None are shown."""


def check_counts(passes: int, seeds: int) -> None:
    """ValueError for a number of passes or seeds that is no sensible one."""
    for name, number in (("passes", passes), ("seeds", seeds)):
        if not 1 <= number <= MOST:
            raise ValueError(f"--{name} must be at least 1 and at most {MOST:,}, not {number}")


@lru_cache(maxsize=2)
def list_once(folder: str) -> Listing:
    """The images of a folder, listed once a command: ImageNet has 1.3 million."""
    return list_folder(Path(folder))


OPENED: dict[str, list[str]] = {}


def open_once(folder: str, progress: Progress = quiet) -> list[str]:
    """The SHA-256 of every image of a folder, decoded once a command."""
    if folder not in OPENED:
        OPENED[folder] = check_images(list_once(folder).paths, progress)
    return OPENED[folder]


def may_resume(folder: Path) -> bool:
    """Whether a run began there."""
    return (folder / "config.json").is_file()


@dataclass(frozen=True)
class Photographs(Folders):
    """Folders that many cells ask the same: listed and checked once."""

    def list_images(self, folder: str) -> Listing:
        return list_once(folder)

    def open_tests(self, paths: list[Path], progress: Progress) -> list[str]:
        return open_once(self.test_folder, progress)


@dataclass(frozen=True)
class Grid:
    """What is computed, from which files, and where to; `Grid.at` builds it from people's paths.

    A task for a worker carries it, so paths are absolute.
    """

    training: str
    validation: str
    class_map: str | None
    weights: str
    out: str
    calibration_images: int
    test_images: int
    networks: tuple[str, ...]  # timm's names
    device: str = "auto"
    passes: int = PASSES
    seeds: int = SEEDS
    watch: Watch | None = field(default=None, compare=False)  # shown each evaluation, if here

    name = "PAPER"

    @classmethod
    def at(
        cls,
        imagenet: Path,
        weights: Path,
        out: Path,
        class_map: Path | None = None,
        networks: Sequence[str] = (),
        device: str = "auto",
        passes: int = PASSES,
        seeds: int = SEEDS,
        watch: Watch | None = None,
    ) -> "Grid":
        """ValueError for a folder, a network or a number that cannot be meant so.

        Without names, all networks of the paper; `wnids.txt` in the folder is its class map.
        """
        list_once.cache_clear()
        OPENED.clear()
        training, validation = find_layout(imagenet.absolute())
        listed, tests = list_once(str(training)), list_once(str(validation))
        if len(listed.paths) < CALIBRATION:
            raise ValueError(
                f"{training} holds {len(listed.paths)} images, and the paper calibrates with "
                f"{CALIBRATION:,}; give --imagenet a folder that holds as many"
            )
        if class_map is None and (imagenet / "wnids.txt").is_file():
            class_map = imagenet / "wnids.txt"
        check_counts(passes, seeds)
        return cls(
            str(training),
            str(validation),
            None if class_map is None else str(class_map.absolute()),
            str(weights.absolute()),
            str(out.absolute()),
            CALIBRATION,
            len(tests.paths),
            tuple(dict.fromkeys(find_network(n) for n in networks or NETWORKS)),
            device,
            passes,
            seeds,
            watch,
        )

    def cells(self) -> list[Cell]:
        """Every run: the first seed of all networks first, so that the table fills evenly."""
        return [
            {
                "network": network,
                "weight_bits": bits,
                "start": start,
                "seed": seed,
                "passes": self.passes,
                "test_images": self.test_images,
            }
            for seed in range(self.seeds)
            for network in self.networks
            for bits in BITS
            for start in STARTS
        ]

    def source(self, network: str, seed: int = 0, start: str = "") -> Photographs:
        """A network with its images; timm's own weights if no file holds them."""
        base = network.partition(".")[0]
        files = [Path(self.weights) / f"{name}.safetensors" for name in (network, base)]
        checkpoint = next((str(file) for file in files if file.is_file()), None)
        return Photographs(
            network,
            checkpoint,
            self.training,
            self.validation,
            self.class_map,
            self.calibration_images,
            None,
            seed,
            crop=official_crop(network) if start == SCRIPT else None,
        )

    @property
    def file(self) -> ResultFile:
        """Where the results are."""
        return ResultFile(Path(self.out), self.name)

    def missing(self) -> list[Cell]:
        """The cells whose results are not there; ValueError if those are of another version.

        Days of work are not to be mixed, or done again without a word.
        """
        versions = {line.get("version", VERSION) for _, line in self.file.whole_lines()}
        if others := versions - {VERSION}:
            raise ValueError(
                f"{self.file.path} holds results of version {others.pop()}, and this is version "
                f"{VERSION}; give another --out, and keep the old folder"
            )
        cells = self.cells()
        return [cell for cell, line in zip(cells, self.file.find(cells)) if line is None]

    def check(self, progress: Progress) -> None:
        """ValueError if the networks of missing cells, or the images, cannot be read so.

        OSError if something is in the way of a run.

        Before any cell begins: a run would say it after hours.
        """
        tasks = self.missing()
        for folder in map(self.folder_of, tasks):
            RunFolder.claim(folder, may_resume(folder), replace=False)
        for network in dict.fromkeys(cell["network"] for cell in tasks):
            source = self.source(network)
            try:
                classes = int(source.load_network().model.num_classes)  # type: ignore[arg-type]
            except ValueError as error:
                why, sep, _ = str(error).partition("; offline")
                if source.checkpoint is not None or not sep:  # else only its weights are missing
                    raise
                raise ValueError(
                    f"no weights of {network} in {self.weights} or in timm's cache ({why}); give "
                    f"--weights FOLDER with {network.partition('.')[0]}.safetensors"
                ) from None
            source.list_tests(classes)
        if tasks:
            open_once(self.validation, progress)

    def inputs(self, cells: Sequence[Cell]) -> dict[str, str]:
        """What identifies the files of some cells, as `check` has found them."""
        found = {"validation images": hash_images(open_once(self.validation))}
        for network in dict.fromkeys(cell["network"] for cell in cells):
            file = self.source(network).checkpoint
            found[f"weights of {network}"] = "timm's" if file is None else sha256(Path(file))
        return found

    def folder_of(self, cell: Cell) -> Path:
        """Where the run of a cell is kept."""
        label = "-".join(str(value) for value in cell.values())
        return Path(self.out) / "runs" / label.replace("/", "_")

    def run(self, cell: Cell) -> Result:
        """The whole run of a cell, or the rest of it; returns its summary."""
        quant, search = configs_of(cell)
        folder = self.folder_of(cell)
        resume = may_resume(folder)
        device = device_here(self.device)
        source = self.source(cell["network"], cell["seed"], cell["start"])
        parts = source.load(device=device)
        with Run(source, quant, search, folder, resume=resume, device=device, parts=parts) as whole:
            for event in whole.evolve():
                if isinstance(event, Evaluated) and self.watch is not None:
                    self.watch(event)
            outcome = whole.test()
            whole.write(outcome)
        return outcome.summary()

    def tell(self, heading: str = "##") -> str:
        """The tables of what is there, one for each bit-width, in Markdown."""
        cells = self.cells()
        results = self.file.read(cells)
        whole = self.test_images == VALIDATION
        parts = [
            f"{len(results)} of {len(cells)} cells were run (passes: {self.passes}; training "
            f"images: {self.calibration_images:,}; seeds: {self.seeds}). Top-1 in percent, mean "
            "over seeds; a gain is over the start, with its 95 % interval. KL: to the float "
            "network, before and after the search, in nats an image, with a p-value for each seed.",
            *([] if results.empty else [tell_changes(results)]),
            HOW_PUBLISHED.strip() if whole else CHECK.format(self.test_images),
        ]
        for bits in BITS:
            parts += [f"{heading} W{bits}A8", to_markdown(tabulate(results, self, bits, whole))]
        return "\n\n".join(parts)

    def write_page(self) -> Path:
        """The tables of what is there, as a page beside the results."""
        path = Path(self.out) / "README.md"
        write_whole(path, f"{HEADING}\n\n{self.tell()}\n".encode())
        return path

    def lack(self) -> str:
        """What a worker's machine lacks, in a sentence; "" if nothing."""
        for path in (self.training, self.validation, *[self.class_map] * bool(self.class_map)):
            if path is not None and not Path(path).exists():
                return f"{path} is not there; put ImageNet on every worker under the same path"
        try:
            device_here(self.device)
        except ValueError as error:
            return str(error)
        return ""


def find_layout(imagenet: Path) -> tuple[Path, Path]:
    """The folders of training and validation images below a folder; ValueError if they miss."""
    for names in LAYOUTS:
        folders = imagenet / names[0], imagenet / names[1]
        if all(folder.is_dir() for folder in folders):
            return folders
    ways = " nor ".join(f"{first}/ and {second}/" for first, second in LAYOUTS)
    raise ValueError(
        f"{imagenet} has neither {ways}; give --imagenet the folder of ImageNet as it is unpacked, "
        "a folder for each class in both"
    )


def find_network(name: str) -> str:
    """timm's name of a network, by its name in the paper or timm's, with or without weights.

    ValueError if neither has it.
    """
    for paper, ours in NETWORKS.items():
        if name.lower() in (paper.lower(), ours, ours.partition(".")[0]):
            return ours
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"{error}; the paper's networks are {', '.join(NETWORKS)}") from None
    return name


def name_of(network: str) -> str:
    """The paper's name of a network, or timm's if the paper has none."""
    return {ours: paper for paper, ours in NETWORKS.items()}.get(network, network)


def configs_of(cell: Cell) -> tuple[QuantConfig, SearchConfig]:
    """How a cell quantizes and searches."""
    quant = replace(STARTS[cell["start"]], weight_bits=cell["weight_bits"], act_bits=8)
    if not cell["network"].startswith(("vit", "deit")):  # its points are those of a plain ViT
        quant = replace(quant, outputs=False)
    return quant, SearchConfig(passes=cell["passes"], seed=cell["seed"])


# The table


def tell_changes(results: pd.DataFrame) -> str:
    """In how many cells the search has surely changed something, and to which side."""
    kl = [losses["kl"] for losses in results["losses"]]
    sure = [loss["change"] for loss in kl if loss["significant"]]
    gains = results["gain"][results["significant"].astype(bool)]
    return (
        f"In {sum(c < 0 for c in sure)} of these {len(results)} cells KL is significantly lower "
        f"after the search, in {sum(c > 0 for c in sure)} higher; top-1 is significantly higher in "
        f"{(gains > 0).sum()}, and lower in {(gains < 0).sum()}. (Paired tests in each cell, "
        f"p < 0.05: by chance alone, {len(results) / 20:.1f} of {len(results)} would be. For top-1 "
        "it is McNemar's exact test, which can say no where the interval just leaves out 0.)"
    )


def tabulate(results: pd.DataFrame, grid: Grid, bits: int, published: bool) -> pd.DataFrame:
    """One bit-width: a column for each network, rows of published numbers beside ours."""
    columns = {
        name_of(network): tell_column(network, results, bits, grid.seeds, published)
        for network in grid.networks
    }
    table = pd.DataFrame(columns)
    table.insert(0, "top-1", table.index)
    return table


def tell_column(
    network: str, results: pd.DataFrame, bits: int, seeds: int, published: bool
) -> dict[str, str]:
    """What is known of a network at some weight bits, by row."""
    found = where(results, network=network) if len(results) else results
    timms = found[found["start"] != SCRIPT] if len(found) else found  # cropped as timm does
    column = {"float": tell_mean(timms[:1], "float_top1", 1)}
    if published:
        methods = PUBLISHED if bits == 8 else ("float",)
        column = {f"{m}, published": tell_published(m, network) for m in methods} | column
    for start in STARTS:
        mine = where(found, weight_bits=bits, start=start) if len(found) else found
        if start == SCRIPT:
            column["float, cropped as by the script"] = tell_mean(mine[:1], "float_top1", 1)
        column[start] = tell_mean(mine, "before_top1", seeds)
        column[f"Evol-Q from {start}"] = tell_mean(mine, "after_top1", seeds)
        column[f"gain from {start}"] = tell_gain(mine)
        column[f"KL from {start}"] = tell_kl(mine)
    if published:
        column["gain of Evol-Q, published"] = GAINS.get((name_of(network), bits), UNKNOWN)
    return column


def tell_published(method: str, network: str) -> str:
    """A published top-1, where we know one."""
    top1 = dict(zip(NETWORKS, PUBLISHED[method])).get(name_of(network))
    return UNKNOWN if top1 is None else f"{top1:.2f}"


def tell_mean(found: pd.DataFrame, column: str, seeds: int) -> str:
    """The mean over the seeds that were run, and how many if some are missing."""
    if found.empty:
        return MISSING
    few = f" ({len(found)} of {seeds} seeds)" if len(found) < seeds else ""
    return f"{100 * fmean(found[column]):.2f}{few}"


def tell_kl(found: pd.DataFrame) -> str:
    """The divergence from the float network before and after the search, mean over seeds.

    With the p-value of each seed's change, image by image.
    """
    if found.empty:
        return MISSING
    changes = [losses["kl"] for losses in found["losses"]]
    ends = [[change[end] for change in changes] for end in ("before", "evolved")]
    told = " to ".join("infinite" if None in values else f"{fmean(values):.3f}" for values in ends)
    known = [change["p_value"] for change in changes if change["p_value"] is not None]
    return f"{told} ({', '.join(f'p {tell_p(p)}' for p in known)})" if known else told


def tell_gain(found: pd.DataFrame) -> str:
    """What the search gains over its start, all seeds together, and each seed's p-value."""
    if found.empty:
        return MISSING
    right = [
        torch.stack([unpacked(r["correct"][name], r["test_images"]) for _, r in found.iterrows()])
        for name in ("before", "evolved")
    ]
    gain = SeedComparison.of(*right)
    low, high = (100 * end for end in gain.interval)
    each = ", ".join(f"p {tell_p(p)}" for p in found["p_value"])
    return f"{100 * gain.gain:+.2f} [{low:+.2f}, {high:+.2f}] ({each})"
