"""Lesson 6: a whole search, of scales or of bits by layer, with Run, Pause, Resume and Cancel.

The run folder is the command line's own: a canceled run continues with Resume here, or there with
`python -m evolq_lite demo --resume --out FOLDER --step WIDTH` and the other options that were set.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import Tensor

from evolq_lite.bits import layer_bits, sum_up_bits
from evolq_lite.config import DEMO_IMAGES, DEMO_QUANT, IDLE, QuantConfig, SearchConfig
from evolq_lite.data import CHARACTERS, normalised, read_typefaces
from evolq_lite.evaluate import LOSSES, Accuracy
from evolq_lite.evolve import Evaluated
from evolq_lite.files import parse_json
from evolq_lite.fitness import FITNESS
from evolq_lite.panels.base import FloatSlider, IntSlider, LogSlider, Panel, Values, control
from evolq_lite.panels.drawing import BLUE, COLORS, GRAY, ORANGE, Drawing, Plot, Tiles
from evolq_lite.panels.worker import Cancelled, Job, Tick
from evolq_lite.runs.folder import Busy, RunFolder
from evolq_lite.runs.run import Outcome, Run
from evolq_lite.runs.source import Embedded, Parts

FOLDER = Path("runs/panel")
DRAW_EVERY = 0.5  # seconds
OUTLINES = ("circle", "square", "diamond", "up", "down", "plus")
OFFERED = 20  # characters to choose from after a run
LIKELIEST = 5
PREPARING = "Preparing: quantizing and calibrating …"


@lru_cache(maxsize=1)
def load(source: Embedded) -> Parts:
    """The embedded ViT with its calibration images, read once for the same ones."""
    return source.load()


class SearchPanel(Panel):
    """What is searched, with its options, loss and seed: a whole run in `out`.

    Calibration images are those of the demo, fewer if `images` says so; `out` is the run folder.
    """

    slow = True
    shipped = True
    again = "Press Run to try again."
    presets = {
        "One member": {"population": 1, "step": 1e-3, "cycles": 3, "passes": 10},
        "Wide": {"population": 15, "step": 0.1, "cycles": 3, "passes": 10},
        "Short visits": {"population": 15, "step": 1e-3, "cycles": 1, "passes": 20},
        "Long visits": {"population": 15, "step": 1e-3, "cycles": 10, "passes": 2},
    }

    def __init__(
        self,
        name: str | None = None,
        out: Path | str = FOLDER,
        images: int = DEMO_IMAGES,
        **values: Any,
    ) -> None:
        self.out, self.images, self.looks = Path(out), images, 0
        self.asked = ""  # the button that must be pressed again
        self.paused = threading.Event()
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """Eleven options of the two configs, under their names there."""
        usual = SearchConfig()
        sliders = {
            "weight_bits": ("Weight bits", DEMO_QUANT.weight_bits, 2, 8),
            "act_bits": ("Activation bits", DEMO_QUANT.act_bits, 4, 8),
            "population": ("Population", usual.population, 1, 40),
            "passes": ("Passes", usual.passes, 1, 20),
            "cycles": ("Cycles", usual.cycles, 1, 10),
            "evaluations": ("Tries of bits", usual.evaluations, 1, 720),
        }
        options = {f.name: f.metadata for f in (*fields(QuantConfig), *fields(SearchConfig))}
        helps = {name: about["help"] for name, about in options.items()}
        return {
            "search": control(
                W.Dropdown, "Search", helps["search"], options=options["search"]["choices"]
            ),
            "mean_bits": control(
                FloatSlider,
                "Mean bits",
                helps["mean_bits"],
                value=2.5,
                min=2.1,
                max=6.0,
                step=0.1,
                readout_format=".1f",
            ),
            **{
                key: control(IntSlider, word, helps[key], value=value, min=low, max=high)
                for key, (word, value, low, high) in sliders.items()
            },
            "step": control(
                LogSlider,
                "Mutation width",
                "How far a scale may move; the paper uses 0.001 up to 4 bits, 0.0001 above",
                low=1e-5,
                high=1e-1,
                value=1e-3,
                readout_format=".1e",
            ),
            "fitness": control(W.Dropdown, "Loss", helps["fitness"], options=list(FITNESS)),
            "seed": control(IntSlider, "Seed", helps["seed"], value=0, min=0, max=99),
        }

    def buttons(self) -> list[W.Widget]:
        """Run, Pause, Resume and Cancel before the rest."""
        self.run_button, self.pause_button, self.resume_button = (
            W.Button(description=word, tooltip=tip, layout={"width": "90px"})
            for word, tip in (
                ("Run", "Start a new run; asks before it replaces an earlier one in the folder"),
                ("Pause", "Wait after the current candidate"),
                ("Resume", "Continue after Pause, or resume the cancelled run in the folder"),
            )
        )
        self.run_button.on_click(lambda _: self.run())
        self.pause_button.on_click(lambda _: self.pause())
        self.resume_button.on_click(lambda _: self.resume())
        named = {"run": self.run_button, "pause": self.pause_button, "resume": self.resume_button}
        for word, button in named.items():
            button.add_class(f"evolq-{word}")
        self.pause_button.disabled = True
        self.cancel_button.tooltip = "Stop; everything finished so far stays in the folder"
        self.character = control(
            W.Dropdown,
            "Character",
            "A test character that the search has made right or wrong",
            options=[("choose one", None)],
        )
        self.character.add_class("evolq-character")
        self.character.observe(lambda _: self.show_character(), names="value")
        self.detail = W.HTML()
        self.detail.add_class("evolq-detail")
        self.withdraw()
        return [self.row(*named.values(), self.cancel_button)]

    def arrange(self) -> W.Widget:
        """As other panels, and below it a character."""
        box = super().arrange()
        box.children = (*box.children, self.character, self.detail)
        return box

    def open(self) -> None:
        """Show the stored run, or an empty panel: a run takes too long to begin by itself."""
        self.enable(True)
        if not self.show_stored():
            self.say("Press Run.")

    def show_stored(self) -> bool:
        """Show the stored run, which is one on the demo's images."""
        return self.images == DEMO_IMAGES and super().show_stored()

    def changed(self, change: Any) -> None:
        """Options take effect at the next Run."""
        note, self.note, self.asked = self.note, "", ""
        self.enable(True)
        self.view.add_class("evolq-stale")
        shown = " The picture is of a run with other options." if self.view.value else ""
        self.say(f"{note}Press Run to search with these options.{shown}")

    def busy(self, yes: bool) -> None:
        """Only what makes sense can be pressed."""
        super().busy(yes)
        for button in (self.run_button, self.resume_button, self.reset_button):
            button.disabled = yes
        for button in self.preset_buttons:
            button.disabled = yes
        self.pause_button.disabled = not yes
        self.enable(not yes)

    def enable(self, yes: bool) -> None:
        """Only controls that have an effect on the chosen search can be moved."""
        idle = without_effect(self.values["search"])
        for key, widget in self.controls.items():
            widget.disabled = not yes or key in idle

    def run(self) -> None:
        """Begin a run; if there is one in the folder, ask first."""
        if (self.out / "config.json").is_file() and self.asked != "Run":
            done = (self.out / "summary.json").is_file()
            state = "a finished run" if done else "an unfinished run, which Resume continues"
            self.asked = "Run"
            self.say(f"{self.out} holds {state}. Press Run again to replace it.")
            return
        self.start(resume=False)

    def resume(self) -> None:
        """Go on after a pause, else with the run in the folder, after asking for its options."""
        if self.paused.is_set() and not self.cancel_button.disabled:
            self.paused.clear()
            self.pause_button.disabled, self.resume_button.disabled = False, True
            self.say(self.words.removeprefix("Paused. ") or PREPARING)
            return
        stored = self.stored_options()
        differ = [key for key in stored if not same(stored[key], self.values[key])]
        if differ and self.asked != "Resume":
            self.asked = "Resume"
            named = ", ".join(f"{self.controls[k].description} {stored[k]}" for k in differ)
            self.say(
                f"The run in {self.out} has other options ({named}). Press Resume again to bring "
                "them back and continue it."
            )
            return
        self.setting = True
        try:
            self.set_controls({key: stored[key] for key in differ})
        finally:
            self.setting = False
        self.start(resume=True)

    def stored_options(self) -> Values:
        """The controls' values of the run in the folder; none if they cannot be had."""
        try:
            config = parse_json((self.out / "config.json").read_bytes())
            found = {"search": "scales", **config["quantization"], **config["search"]}
            idle = without_effect(found["search"])
            kinds = {key: type(value) for key, value in self.values.items() if key not in idle}
            return {key: kind(found[key]) for key, kind in kinds.items()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def start(self, resume: bool) -> None:
        """Begin a run, or continue the one in the folder."""
        self.paused.clear()
        self.begun, self.asked = False, ""
        self.withdraw()
        self.say(PREPARING)
        self.busy(True)
        self.worker.submit(self.search_job(resume))

    def pause(self) -> None:
        """Wait after the present candidate."""
        self.paused.set()
        self.pause_button.disabled, self.resume_button.disabled = True, False
        self.say(f"Paused. {self.words}")

    def options(self) -> tuple[QuantConfig, SearchConfig]:
        """The two configs that the controls stand for."""
        idle = without_effect(self.values["search"])
        values = {key: value for key, value in self.values.items() if key not in idle}
        bits = {key: values.pop(key) for key in ("weight_bits", "act_bits") if key in values}
        for key, form in (("step", ".1e"), ("mean_bits", ".1f")):
            if key in values:
                values[key] = float(f"{values[key]:{form}}")  # as it reads, for the command line
        return replace(DEMO_QUANT, **bits), SearchConfig(**values, batch=min(100, self.images))

    def search_job(self, resume: bool) -> Job:
        """Search, then test; what is finished is in the folder whenever it stops."""
        quant, search = self.options()

        def job(tick: Tick) -> None:
            self.claim(resume, tick)
            source = Embedded("vit", self.images, search.seed)
            parts = load(source)
            tick(0.0)
            with Run(
                source, quant, search, self.out, resume, replace=not resume, parts=parts
            ) as run:
                self.begun = True
                self.search(run, tick)

        return job

    def claim(self, resume: bool, tick: Tick) -> None:
        """Make sure of the folder; ValueError says in this panel's words why it cannot be had.

        A panel that was just closed may be about to leave it.
        """
        for last in (False, False, False, True):
            try:
                return RunFolder.claim(self.out, resume, replace=not resume)
            except Busy:
                if last:
                    raise
            except ValueError as error:
                if not (self.out / "config.json").is_file():
                    raise ValueError(
                        f"{self.out.resolve()} contains no run to resume; press Run"
                    ) from error
                raise
            tick(0.0)
            time.sleep(0.7)

    def search(self, run: Run, tick: Tick) -> None:
        """Search to the end and test, reporting by picture, words and `tick`."""
        resumed = len(run.past)
        began = drawn = perf_counter()
        for event in run.evolve():
            if not isinstance(event, Evaluated):
                continue
            done = len(run.past)
            began += self.hold(tick, done / run.total)
            if perf_counter() - drawn > DRAW_EVERY or done == run.total:
                self.picture(run.past)
                each = (perf_counter() - began) / (done - resumed)
                self.say(self.progress(run.past, run.total, each * (run.total - done)))
                drawn = perf_counter()
        self.say("The search is done. Now all three networks see the test images, once …")
        seen = 0

        def tested(images: int) -> None:
            nonlocal seen
            seen += images
            self.hold(tick, min(1.0, seen / len(run.source.labels())))

        outcome = run.test(tested)
        run.write(outcome)
        self.looks += 1
        bits = (layer_bits(run.before), layer_bits(run.qmodel)) if run.genome is not None else None
        self.picture(outcome.history, outcome, bits)
        said = self.verdict(outcome)
        if self.images == DEMO_IMAGES and self.looks == 1:  # as the stored run
            said = self.compared(said, self.values)
        self.say(said)
        self.offer(run, outcome)

    def withdraw(self) -> None:
        """Offer no character."""
        self.shares: dict[str, Tensor] = {}  # (characters, classes) by network
        self.detail.value = ""
        self.character.options = [("choose one", None)]
        self.character.layout.display = "none"

    @torch.no_grad()
    def offer(self, run: Run, outcome: Outcome) -> None:
        """Let the reader choose among characters that the search has made right or wrong."""
        before, evolved = (outcome.scores[name].right for name in ("before", "evolved"))
        changed = (before != evolved).nonzero().flatten()
        if len(changed) == 0:
            return
        changed = changed[torch.linspace(0, len(changed) - 1, OFFERED).long().unique()]
        part = read_typefaces("test")
        self.pictures = normalised(part.images[changed].float() / 255)
        models = {"float": run.parts.model, "before": run.before, "evolved": run.qmodel}
        self.shares = {name: model(self.pictures).softmax(1) for name, model in models.items()}
        self.names = [
            f"{CHARACTERS[int(label)]}, {'now right' if right else 'now wrong'}"
            for label, right in zip(part.labels[changed], evolved[changed])
        ]
        numbered = [(f"{i + 1}: {name}", i) for i, name in enumerate(self.names)]
        self.character.options = [("choose one", None), *numbered]
        self.character.layout.display = ""

    def show_character(self) -> None:
        """The five likeliest labels of the chosen character, for each of the three networks."""
        chosen = self.character.value
        if chosen is None or not self.shares:
            self.detail.value = ""
            return
        rows = {name: shares[chosen] for name, shares in self.shares.items()}
        told = ", ".join(
            f"{name} {CHARACTERS[int(row.argmax())]} {float(row.max()):.0%}"
            for name, row in rows.items()
        )
        alt = f"Character {self.names[chosen]}. Likeliest label: {told}."
        tile = Tiles("Character", self.pictures[chosen].numpy(), [self.names[chosen]])
        plots = [draw_likeliest(name, row) for name, row in rows.items()]
        self.detail.value = Drawing(alt, tile, *plots).html()

    def hold(self, tick: Tick, fraction: float) -> float:
        """Report progress; while paused, wait here and obey Cancel. Returns the seconds waited."""
        tick(fraction)
        began = perf_counter()
        while self.paused.is_set():
            if not self.words.startswith("Paused."):  # the search had words on their way
                self.say(f"Paused. {self.words}")
            tick(fraction)
            time.sleep(0.05)
        return perf_counter() - began

    def picture(
        self,
        history: list[Evaluated],
        outcome: Outcome | None = None,
        bits: tuple[dict[str, int], dict[str, int]] | None = None,
    ) -> None:
        """Show the search, at the end with what the test images say, and bits before and after."""
        accepted = sum(event.accepted for event in history[1:])
        best = min(event.fitness for event in history)
        alt = (
            f"Fitness over {len(history)} evaluations: it falls from {history[0].fitness:.5f} to "
            f"{best:.5f}; {accepted} candidates were accepted."
        )
        plots = [draw_history(history)]
        if outcome is not None:
            named = {outcome.titles[k]: v for k, v in outcome.accuracies.items()}
            alt += " Top-1: " + ", ".join(f"{k} {v.top1:.2%}" for k, v in named.items()) + "."
            plots.append(draw_top1(named))
        if bits is not None:
            alt += f" Bits: {sum_up_bits(*bits)}."
            plots.append(draw_bits(*bits))
        self.view.remove_class("evolq-stale")
        self.view.value = Drawing(alt, *plots).html()

    def progress(self, history: list[Evaluated], total: int, left: float) -> str:
        """The search under way, in words."""
        accepted = sum(event.accepted for event in history[1:])
        best = min(event.fitness for event in history)
        return (
            f"{len(history)} of {total} evaluations, {history[-1].block}; "
            f"{accepted / max(1, len(history) - 1):.0%} accepted; fitness "
            f"{history[0].fitness:.5f} to {best:.5f}; about {left:.0f} s left."
        )

    def ended(self, error: BaseException | None) -> None:
        """Say where a cancelled run can go on."""
        super().ended(error)
        if isinstance(error, Cancelled):
            self.say(
                f"Cancelled. Resume continues the run in {self.out.resolve()}."
                if self.begun
                else "Cancelled before the run started."
            )

    def verdict(self, outcome: Outcome) -> str:
        """The end of a run in words, with a warning to those who run many."""
        top1 = {name: str(value) for name, value in outcome.accuracies.items()}
        warning = (
            f" This was look {self.looks} at the test images. Options chosen by such looks are not "
            "a result."
            if self.looks > 1
            else ""
        )
        losses = ". ".join(
            f"{LOSSES[name]} {change.was:.4f} to {change.now:.4f}: {change.verdict}"
            for name, change in outcome.losses.items()
        )
        return (
            f"{outcome.setting}, {len(outcome.history)} evaluations: "
            f"top-1 before {top1['before']}, evolved {top1['evolved']}, float {top1['float']}. "
            f"Gain {outcome.gain}: {outcome.gain.verdict}. {losses}.{warning}"
        )


def same(one: Any, other: Any) -> bool:
    """Whether two values of a control are the same as they read."""
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return f"{one:.1e}" == f"{other:.1e}" if isinstance(other, float) else bool(one == other)


def draw_history(history: list[Evaluated]) -> Plot:
    """Fitness over evaluations, a color and a shape for each block; hollow: not accepted."""
    values = np.array([event.fitness for event in history])
    accepted = np.array([event.accepted for event in history])
    finite, best = values[np.isfinite(values)], np.fmin.accumulate(values)
    low, high = finite.min(), max(values[0], np.quantile(finite, 0.98))
    room = 0.06 * (high - low) + 1e-9
    plot = Plot(
        "The search. Filled: accepted, hollow: not",
        (-1, max(10, len(history))),
        (low - room, high + room),
        "evaluation",
        "fitness (lower is better)",
        width=640,
        height=380,
        rows=2,
        left=70,
    )
    plot.steps(np.arange(len(best)), best, color="currentColor", width=1.4, label="best so far")
    for block in sorted({event.block for event in history}):
        # A block keeps its look all the time; -1 is a look of its own, for bits.
        number = int("".join(filter(str.isdigit, block)) or -1)
        color, shape = COLORS[number % len(COLORS)], OUTLINES[number % len(OUTLINES)]
        mine = np.array([event.block == block for event in history])
        for hollow, here in ((False, mine & accepted), (True, mine & ~accepted)):
            at = np.where(here)[0]
            titles = [f"evaluation {i + 1}, {block}: {values[i]:.5f}" for i in at]
            label = "" if hollow else block
            plot.points(at, values[at], color, shape, 3.2, hollow, titles, label)
    return plot


def without_effect(search: str) -> tuple[str, ...]:
    """The options that mean nothing in a search of that name."""
    return IDLE[search] if search == "scales" else (*IDLE[search], "weight_bits")


def draw_bits(before: Mapping[str, int], after: Mapping[str, int]) -> Plot:
    """Each layer's bits as a bar, from input to output; a line across it is where it started."""
    groups: dict[str, list[int]] = {}  # places of the layers of a block
    for i, name in enumerate(after):
        first, *rest = name.split(".")
        groups.setdefault(rest[0] if rest and rest[0].isdigit() else first, []).append(i)
    plot = Plot(
        "Bits by layer. Lines: before",
        (-0.8, len(after) - 0.2),
        (0, max(*after.values(), *before.values()) + 1),
        "layer (numbers are blocks)",
        "bits of weights",
        width=640,
        height=300,
        xticks=[(sum(places) / len(places), group) for group, places in groups.items()],
    )
    looks = {"more": ORANGE, "fewer": BLUE, "the same": GRAY}
    for look, color in looks.items():
        label = look
        for i, (name, bits) in enumerate(after.items()):
            was = before[name]
            if look == ("more" if bits > was else "fewer" if bits < was else "the same"):
                title = f"{name}: {was} before, {bits} evolved"
                plot.bars([i - 0.4, i + 0.4], [bits], color, [title], label)
                label = ""  # once in the legend
    for i, (name, bits) in enumerate(after.items()):
        plot.line([i - 0.45, i + 0.45], [before[name]] * 2, "currentColor")
        plot.words(i, max(bits, before[name]), str(bits))
    return plot


def draw_likeliest(name: str, shares: Tensor) -> Plot:
    """The five likeliest labels (classes,) of one network."""
    values, classes = (100 * shares).topk(LIKELIEST)
    labels = [CHARACTERS[int(i)] for i in classes]
    plot = Plot(
        name,
        (-0.6, LIKELIEST - 0.4),
        (0, 100),
        "label",
        "probability, %",
        width=240,
        height=220,
        rows=0,
        xticks=list(enumerate(labels)),
    )
    color = COLORS[("float", "before", "evolved").index(name)]
    titles = [f"{label}: {value:.1f} %" for label, value in zip(labels, values)]
    plot.bars(np.arange(LIKELIEST + 1) - 0.5, values.numpy(), color, titles)
    return plot


def draw_top1(rows: dict[str, Accuracy]) -> Plot:
    """Top-1 of the networks, with 95 % intervals."""
    ends = [100 * end for value in rows.values() for end in value.interval]
    plot = Plot(
        "Top-1 with 95 % interval",
        (min(ends) - 1, max(ends) + 1),
        (len(rows) - 0.5, -0.7),
        "top-1 on the test images, %",
        width=400,
        height=300,
        rows=0,
        left=118,
        yticks=list(enumerate(rows)),
    )
    for i, value in enumerate(rows.values()):
        point, (low, high) = 100 * value.top1, (100 * end for end in value.interval)
        plot.interval(low, high, i, COLORS[i])
        plot.points([point], [i], COLORS[i], OUTLINES[i], 5, titles=[str(value)])
        plot.words(point, i, f"{point:.2f} %")
    return plot
