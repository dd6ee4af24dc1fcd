"""One run from beginning to end: quantize, calibrate, evolve into a run folder, test once.

The command line and the SearchPanel both do exactly this, so a run begun in one resumes in the
other. Nothing is printed: `evolve` yields events, and whoever iterates over them may stop at any
time; what was finished by then is in the folder.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor, nn

from evolq_lite.bits import (
    BitsGenome,
    BitsTable,
    evolve_bits,
    evolve_both,
    layer_bits,
    mean_bits,
    prepare_bits,
)
from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig, SearchConfig, preset_of
from evolq_lite.convert import calibrate, quantize, twin
from evolq_lite.evaluate import LOSSES, Accuracy, Comparison, LossChange, Scores, packed, score
from evolq_lite.evolve import Committed, Evaluated, Event, Visit, evaluations_of, evolve
from evolq_lite.fast import set_execution
from evolq_lite.figures import bits_figure, history_figure, save_figure, top1_figure
from evolq_lite.genome import Genome
from evolq_lite.objective import batches
from evolq_lite.racing import check_batches
from evolq_lite.rounding import Rounded, quant_layers, round_weights
from evolq_lite.runs.environment import environment, peak_memory
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.scales import digest_start, restore_integers, save_scales
from evolq_lite.runs.source import BATCH, Parts, Progress, Source, quiet
from evolq_lite.runs.workers import Workers, WorkersObjective, check_search, rounding_of, state_of


@dataclass(frozen=True)
class Outcome:
    """What the test images say of the float, the first and the evolved network."""

    setting: str
    scores: dict[str, Scores]  # of "float", "before", "evolved", and others set beside them
    history: list[Evaluated]
    groups: Tensor | None = None  # (n,) of images that are alike

    @property
    def accuracies(self) -> dict[str, Accuracy]:
        """Top-1 of each network."""
        right = {name: each.right for name, each in self.scores.items()}
        return {name: Accuracy(int(it.sum()), len(it)) for name, it in right.items()}

    @property
    def gain(self) -> Comparison:
        """The evolved network against the first."""
        return self.compare("before", "evolved")

    def compare(self, was: str, now: str) -> Comparison:
        """Top-1 of one network against another."""
        return Comparison.of(self.scores[was].right, self.scores[now].right)

    @property
    def losses(self) -> dict[str, LossChange]:
        """The evolved network's losses against the first's, by the names of `LOSSES`."""
        before, evolved = self.scores["before"], self.scores["evolved"]
        return {
            name: LossChange.of(getattr(before, name), getattr(evolved, name), self.groups)
            for name in LOSSES
        }

    @property
    def titles(self) -> dict[str, str]:
        """The networks' names for a reader."""
        return {name: f"{self.setting} {name}" for name in self.scores} | {"float": "float"}

    @property
    def seconds(self) -> float:
        """Time of the search."""
        return sum(event.seconds for event in self.history)

    @property
    def batches_share(self) -> float:
        """The part of all batches of all evaluations that was computed: 1 without racing."""
        return fmean(event.share for event in self.history)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return {
            "setting": self.setting,
            "float_top1": self.accuracies["float"].top1,
            "before_top1": self.accuracies["before"].top1,
            "after_top1": self.accuracies["evolved"].top1,
            "top1": {name: value.top1 for name, value in self.accuracies.items()},
            "intervals": {name: value.interval for name, value in self.accuracies.items()},
            "gain": self.gain.gain,
            "gain_interval": self.gain.interval,
            "p_value": self.gain.p_value,
            "significant": self.gain.significant,
            "losses": {name: told(change) for name, change in self.losses.items()},
            "agreement": {
                name: float(each.agrees.float().mean()) for name, each in self.scores.items()
            },
            "fitness_before": self.history[0].fitness,
            "fitness_after": min(event.fitness for event in self.history),
            "evaluations": len(self.history),
            "batches_share": self.batches_share,
            "search_seconds": self.seconds,
            "peak_memory_mib": peak_memory(),
            "images": self.gain.images,
            "correct": {name: packed(each.right) for name, each in self.scores.items()},
        }


def told(change: LossChange) -> dict[str, Any]:
    """What summary.json holds of a loss, in nats; None where a number is not finite."""
    low, high = change.interval
    numbers = {
        "before": change.was,
        "evolved": change.now,
        "change": change.change,
        "interval_low": low,
        "interval_high": high,
        "p_value": change.p_value,
    }
    finite = {name: value if isfinite(value) else None for name, value in numbers.items()}
    return {**finite, "significant": change.significant}


class Run:
    """A calibrated network with its folder, ready to search from where the folder has come to.

    `resume` opens the run in `out` (ValueError unless it was begun with the same options),
    `replace` removes it first; FileExistsError if there is one and neither is given. `parts` and
    `hashes` are what the source loads and checks, if they are at hand already. A context: at its
    end the folder's lock is released. `on_rounded` is called for each layer whose integers were
    chosen.
    """

    def __init__(
        self,
        source: Source,
        quant: QuantConfig,
        search: SearchConfig,
        out: Path,
        resume: bool = False,
        replace: bool = False,
        device: torch.device | str = "cpu",
        parts: Parts | None = None,
        hashes: dict[str, str] | None = None,
        lock: bool = True,
        on_rounded: Callable[[Rounded], None] = lambda event: None,
    ) -> None:
        self.source, self.quant, self.search = source, quant, search
        config = {
            **source.identity(),
            "preset": preset_of(quant),
            "quantization": asdict(quant),
            "search": asdict(search),
            "paths": source.paths(),
        }
        # Refuses other options, or a folder in use, before anything is loaded.
        folder = RunFolder.resume(out, config, lock) if resume else None
        try:
            model, images, targets = parts or source.load()
            if search.racing:
                check_batches(len(images), search.batch)
            self.parts = Parts(model.to(device), images.to(device), targets.to(device))
            self.qmodel = quantize(self.parts.model, quant)
            calibrate(self.qmodel, self.parts.images, quant, search.batch)
            self.genome: BitsGenome | None = None
            self.table: BitsTable = {}
            execution = quant.execution
            if search.searches_bits:
                self.genome, self.table, execution = prepare_bits(
                    self.qmodel, self.parts.images, search, on_rounded
                )
            else:
                self.choose_integers(folder, on_rounded)
            self.folder = folder = folder or RunFolder.create(out, config, replace, lock)
            self.before, self.chain = twin(self.qmodel), chain_of(self.qmodel)
            self.chain.fit_chunk(self.parts.images[:1])
            self.state = environment(
                execution=set_execution(self.qmodel, execution),
                device=str(self.parts.images.device),
                chunk=self.chain.chunk,
                seed=search.seed,
                sha256=hashes or source.check(),
                calibrated=digest_start(self.qmodel, self.table),
            )
            self.folder.enter(self.state)
            if quant.rounding != "nearest" and not self.folder.scales.exists():
                save_scales(self.folder.scales, self.qmodel, visits=0)
            self.past = self.folder.restore()
        except BaseException:
            if folder is not None:
                folder.close()
            raise
        self.total = search.evaluations + 1 if search.searches_bits else 1
        if search.search != "bits":
            self.total += evaluations_of(self.chain, search) - 1  # the start counts once

    @property
    def setting(self) -> str:
        """The bits of weights and activations, in a word."""
        bits: float = self.quant.weight_bits
        if self.genome is not None:
            bits = round(mean_bits(self.genome, self.genome.read(self.before)), 2)
        return f"W{bits:g}A{self.quant.act_bits}"

    def choose_integers(
        self, folder: RunFolder | None, on_rounded: Callable[[Rounded], None]
    ) -> None:
        """Round the weights, unless a stopped run has left their integers in its folder."""
        method = self.quant.rounding
        if method != "nearest" and folder is not None:
            restored = restore_integers(folder.scales, self.qmodel, folder.calibrated)
        else:
            restored = False
        if not restored:
            for event in round_weights(self.qmodel, self.parts.images, method):
                on_rounded(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let others into the folder."""
        self.folder.close()

    def evolve(self, workers: Workers | None = None) -> Iterator[Event]:
        """Search to the end; each evaluation is in the folder before it is yielded.

        What the folder holds already is replayed and not yielded. With workers, they evaluate the
        candidates.
        """
        if workers is not None:
            check_search(self.search)
        if workers is None:
            self.folder.enter({**self.state, "workers": None})
        replayed, asked = len(self.past), workers is None
        for event in self.search_on(workers):
            if replayed:
                replayed -= isinstance(event, Evaluated)
                continue
            if isinstance(event, Evaluated):
                if workers is not None and workers.stamp is not None and not asked:
                    self.folder.enter({**self.state, "workers": list(workers.stamp[1])})
                    asked = True
                self.folder.append(event)
                self.past.append(event)
            else:
                self.export(event)
            yield event

    def search_on(self, workers: Workers | None) -> Iterator[Event]:
        """The search itself, from the start; what the folder holds is replayed."""
        (_, images, targets), past, search = self.parts, list(self.past), self.search
        elsewhere = None if workers is None else partial(self.objective_of, workers)
        if self.genome is None:
            step = search.width(self.quant.weight_bits)
            return evolve(self.chain, images, targets, search, step, past, elsewhere)
        bits_elsewhere = None
        if workers is not None:
            bits_elsewhere = self.objective_on(workers, (), self.genome, self.table)
        if search.search == "bits":
            return evolve_bits(
                self.chain, images, targets, search, self.genome, self.table, past, bits_elsewhere
            )
        return evolve_both(
            self.chain,
            images,
            targets,
            search,
            self.genome,
            self.table,
            past,
            bits_elsewhere,
            elsewhere,
        )

    def export(self, event: Committed) -> None:
        """Write the scales after a visit."""
        save_scales(self.folder.scales, self.qmodel, visits=event.visits, fitness=event.fitness)

    def objective_of(self, workers: Workers, visit: Visit) -> WorkersObjective:
        """What evaluates the candidates of a visit on workers."""
        return self.objective_on(workers, visit.blocks, visit.genome)

    def objective_on(
        self,
        workers: Workers,
        blocks: tuple[str, ...],
        genome: Genome | BitsGenome,
        table: BitsTable | None = None,
    ) -> WorkersObjective:
        """What evaluates vectors of a genome on workers, in the network as it is now."""
        return WorkersObjective(
            workers,
            self.source,
            self.quant,
            self.search,
            state_of(self.qmodel),
            blocks,
            genome,
            len(batches(self.parts.targets, self.search.batch)),
            rounding_of(self.qmodel, self.genome is not None, table),
        )

    def round_start(self) -> nn.Module:
        """The first network with its weights rounded by GPTQ instead: what a search has to beat."""
        network = twin(self.before)
        for layer in quant_layers(network).values():
            layer.moment_correction = False  # GPTQ fits the weights itself
        for _ in round_weights(network, self.parts.images, "gptq"):
            pass
        return network

    def test(
        self, progress: Progress = quiet, others: Mapping[str, nn.Module] | None = None
    ) -> Outcome:
        """Read the test images, once, with all three networks, and others set beside them."""
        model, images, _ = self.parts
        models = {"float": model, "before": self.before, "evolved": self.qmodel, **(others or {})}
        tests = (x.to(images.device) for x in self.source.test(self.chain.chunk or BATCH))
        return Outcome(
            self.setting,
            score(models, tests, self.source.labels(), progress),
            self.folder.history(),
            self.source.groups(),
        )

    def write(self, outcome: Outcome) -> None:
        """Add summary.json and two figures to the folder, three for bits, the numbers first."""
        summary = outcome.summary()
        if self.genome is not None:
            summary |= {"bits": layer_bits(self.qmodel)}
        self.folder.write("summary.json", summary)
        accuracies = {outcome.titles[k]: v for k, v in outcome.accuracies.items()}
        top1 = top1_figure(accuracies, outcome.gain, outcome.losses)
        save_figure(history_figure(outcome.history), self.folder.path / "fitness.png")
        save_figure(top1, self.folder.path / "top1.png")
        if self.genome is not None:
            picture = bits_figure(layer_bits(self.before), layer_bits(self.qmodel))
            save_figure(picture, self.folder.path / "bits.png")
