"""One run from beginning to end: quantize, calibrate, evolve into a run folder, test once.

The command line and the SearchPanel both do exactly this, so a run begun in one goes on in the
other. Nothing is printed: progress goes through callbacks, which may raise to stop; what was
finished by then is in the folder.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize, set_execution, twin
from evolq_lite.data import checked, load_demo, load_images, subset, transform_of
from evolq_lite.evaluate import Accuracy, Comparison, packed, predict
from evolq_lite.evolve import Evaluation, Visit, evaluations_of, evolve, width_after
from evolq_lite.figures import history_figure, save_figure, top1_figure
from evolq_lite.files import sha256
from evolq_lite.folders import list_folder
from evolq_lite.networks import load_network
from evolq_lite.objective import batches
from evolq_lite.parallel import Parts, Pool, Pooled, Recipe
from evolq_lite.record import RunFolder, environment, peak_memory

DEMO_QUANT = QuantConfig(weight_bits=3, act_bits=8)
DEMO_IMAGES = 500
BATCH = 100  # images per forward of a float network


@dataclass(frozen=True)
class Task:
    """What is searched: a float network, calibration images, test images read once, by batches."""

    source: dict[str, Any]  # what identifies it, for config.json
    hashes: dict[str, str]
    model: nn.Module
    calibration: Tensor
    targets: Tensor
    test: Callable[[int], Iterator[Tensor]]  # from images per batch
    labels: Callable[[], Tensor]
    note: str
    make: Callable[..., Parts]  # what a worker calls, with these arguments, for model and images
    arguments: tuple[Any, ...]


def embedded_parts(name: str, images: int, seed: int) -> Parts:
    """An embedded network, calibration images, and its logits for them."""
    demo = load_demo(name, images, seed)
    return demo.model, demo.calibration, demo.targets


def calibration_paths(folder: Path, wanted: int | None, seed: int) -> list[Path]:
    """Calibration images of a folder, drawn by seed: all, or 1,000, if the number is None."""
    found = list_folder(folder).paths
    wanted = min(1000, len(found)) if wanted is None else wanted
    return [found[int(i)] for i in subset(len(found), wanted, seed)]


def folder_parts(
    name: str,
    checkpoint: str | None,
    folder: str,
    wanted: int | None,
    seed: int,
    image_size: int | None,
) -> Parts:
    """A timm network, calibration images of a folder, and its logits for them."""
    file = None if checkpoint is None else Path(checkpoint)
    model = load_network(name, file, image_size).model
    paths = calibration_paths(Path(folder), wanted, seed)
    images = load_images(paths, transform_of(model))
    with torch.no_grad():
        return model, images, torch.cat([model(x) for x in images.split(BATCH)])


def embedded_ready(*names: str) -> str:
    """What this machine lacks for embedded networks, or nothing."""
    try:
        for file in ("typefaces-train.npz", *(f"typefaces-{name}.safetensors" for name in names)):
            checked(file)
    except ValueError as error:
        return str(error)
    return ""


def folder_ready(*paths: str | None) -> str:
    """Which file or folder of a run this machine lacks, or nothing."""
    gone = [path for path in paths if path is not None and not Path(path).exists()]
    return f"{gone[0]} is not there; put it on every worker under the same path" if gone else ""


def embedded_task(name: str, images: int, seed: int, device: torch.device | str = "cpu") -> Task:
    """An embedded network, "vit" or "cnn", on Typefaces-62."""
    demo = load_demo(name, images, seed)
    test = cache(lambda: demo.test)  # images and labels from one reading
    files = ("typefaces-train.npz", "typefaces-test.npz", f"typefaces-{name}.safetensors")
    return Task(
        {"model": f"typefaces-{name}", "calibration_images": images},
        {name: sha256(checked(name)) for name in files},
        demo.model.to(device),
        demo.calibration.to(device),
        demo.targets.to(device),
        lambda batch: (x.to(device) for x in test()[0].split(batch)),
        lambda: test()[1],
        "9,920 characters of 160 typefaces that neither training nor calibration has seen",
        embedded_parts,
        (name, images, seed),
    )


@dataclass(frozen=True)
class Outcome:
    """What the test images say of the float, the first and the evolved network."""

    setting: str
    right: dict[str, Tensor]  # "float", "before", "evolved": which images (n,) are right
    history: list[dict[str, Any]]

    @property
    def accuracies(self) -> dict[str, Accuracy]:
        """Top-1 of each network."""
        return {name: Accuracy(int(it.sum()), len(it)) for name, it in self.right.items()}

    @property
    def gain(self) -> Comparison:
        """The evolved network against the first."""
        return Comparison.of(self.right["before"], self.right["evolved"])

    @property
    def titles(self) -> dict[str, str]:
        """The three networks' names for a reader."""
        return {
            "float": "float",
            "before": f"{self.setting} before",
            "evolved": f"{self.setting} evolved",
        }

    @property
    def seconds(self) -> float:
        """Time of the search."""
        return sum(line["seconds"] for line in self.history)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return {
            "setting": self.setting,
            "float_top1": self.accuracies["float"].top1,
            "before_top1": self.accuracies["before"].top1,
            "after_top1": self.accuracies["evolved"].top1,
            "intervals": {name: value.interval for name, value in self.accuracies.items()},
            "gain": self.gain.gain,
            "gain_interval": self.gain.interval,
            "p_value": self.gain.p_value,
            "significant": self.gain.significant,
            "fitness_before": self.history[0]["fitness"],
            "fitness_after": min(line["fitness"] for line in self.history),
            "evaluations": len(self.history),
            "search_seconds": self.seconds,
            "peak_memory_mib": peak_memory(),
            "images": self.gain.images,
            "correct": {name: packed(it.cpu()) for name, it in self.right.items()},
        }


class Run:
    """A calibrated network with its folder, ready to search from where the folder has come to.

    `resume` opens the run in `out` (ValueError unless it was begun with the same options),
    `replace` removes it first; FileExistsError if there is one and neither is given. A context: at
    its end the folder's lock is released.
    """

    def __init__(
        self,
        task: Task,
        quant: QuantConfig,
        search: SearchConfig,
        out: Path,
        resume: bool = False,
        replace: bool = False,
    ) -> None:
        self.task, self.quant, self.search = task, quant, search
        config = {**task.source, "quantization": asdict(quant), "search": asdict(search)}
        # Refuses other options, or a folder in use, before calibration.
        resumed = RunFolder.resume(out, config) if resume else None
        try:
            self.qmodel = quantize(task.model, quant)
            calibrate(self.qmodel, task.calibration, quant, search.batch)
            self.folder = resumed = resumed or RunFolder.create(out, config, replace)
            self.before, self.chain = twin(self.qmodel), chain_of(self.qmodel)
            self.chain.fit_chunk(task.calibration[:1])
            self.state = environment(
                execution=set_execution(self.qmodel, quant.execution),
                device=str(task.calibration.device),
                chunk=self.chain.chunk,
                seed=search.seed,
                sha256=task.hashes,
            )
            self.folder.enter(self.state)
            self.done, self.fitness = self.folder.restore(self.qmodel)
            self.past = self.folder.history()
        except BaseException:
            if resumed is not None:
                resumed.close()
            raise
        self.total = evaluations_of(self.chain, search)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let others into the folder."""
        self.folder.close()

    def evolve(
        self, on_evaluation: Callable[[Evaluation], None], pool: Pool | None = None
    ) -> float:
        """Search to the end; each evaluation is in the folder before its callback hears of it.

        With a pool, its workers evaluate the candidates.
        """

        asked = False

        def heard(evaluation: Evaluation) -> None:
            nonlocal asked
            if pool is not None and pool.stamp is not None and not asked:
                self.folder.enter({**self.state, "workers": list(pool.stamp[1])})
                asked = True
            self.folder.append(evaluation)
            on_evaluation(evaluation)

        if pool is None:
            self.folder.enter({**self.state, "workers": None})
        step = self.search.width(self.quant.weight_bits)
        return evolve(
            self.chain,
            self.task.calibration,
            self.task.targets,
            self.search,
            width_after(self.search, step, (line["accepted"] for line in self.past[1:])),
            heard,
            lambda visits, fitness: self.folder.save(self.qmodel, visits, fitness),
            self.done,
            self.fitness,
            None if pool is None else partial(self.pooled, pool),
        )

    def pooled(self, pool: Pool, visit: Visit) -> Pooled:
        """The objective of a visit on a pool's workers."""
        recipe = Recipe(self.task.make, self.task.arguments, self.quant, self.search)
        count = len(batches(self.task.targets, self.search.batch))
        return Pooled(pool, recipe, count, self.chain, visit.blocks, visit.genome)

    def test(self, on_images: Callable[[int], None] = lambda images: None) -> Outcome:
        """Read the test images, once, with all three networks."""
        models = {"float": self.task.model, "before": self.before, "evolved": self.qmodel}
        found = predict(models, self.task.test(self.chain.chunk or BATCH), on_images)
        labels = self.task.labels()
        return Outcome(
            f"W{self.quant.weight_bits}A{self.quant.act_bits}",
            {name: p.cpu() == labels for name, p in found.items()},
            self.folder.history(),
        )

    def write(self, outcome: Outcome) -> None:
        """Add summary.json and two figures to the folder."""
        accuracies = {outcome.titles[k]: v for k, v in outcome.accuracies.items()}
        save_figure(history_figure(outcome.history), self.folder.path / "fitness.png")
        save_figure(top1_figure(accuracies, outcome.gain), self.folder.path / "top1.png")
        self.folder.write("summary.json", outcome.summary())
