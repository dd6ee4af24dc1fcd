"""Questions in a lesson: choose an answer and check it, or guess and see the truth over the guess.

    Quiz("What is 2 + 2?", {"3": "No: count again.", "4": "Right."}, answer=2)
    Guess("How much of the signal is lost?", {"4 bits": 8.0, "3 bits": 34.1}, 0, 100, unit="%")

Without a kernel a page shows the same words: the question, and answers that unfold.
"""

import re
from collections.abc import Mapping
from html import escape
from typing import Any, ClassVar

import ipywidgets as W

from evolq_lite.panels.base import (
    LOST,
    PAGE,
    FloatSlider,
    close_all,
    small_button,
    whereabouts,
)
from evolq_lite.panels.drawing import BLUE, DASHES, ORANGE, Drawing, Plot

STYLE = """<style>
.evolq-question .widget-radio-box label { height: auto; white-space: normal; line-height: 1.45 }
.evolq-question .widget-radio-box { width: 100%; max-width: 720px }
.evolq-question .evolq-status { max-width: 720px }
.evolq-question .widget-html-content { line-height: 1.45 }
.evolq-question > .jupyter-button { align-self: flex-start }
</style>"""
CHOOSE = "Choose an answer first."


class Question:
    """A question that a cell shows; run again, the cell replaces it."""

    alive: ClassVar[dict[str, "Question"]] = {}
    lead = ""  # what stands before the question

    def __init__(self, question: str, *controls: W.Widget) -> None:
        self.heading, self.words = f"<p><b>{self.lead}{inline(question)}</b></p>", ""
        self.status = W.HTML()
        self.status.add_class("evolq-status")
        page = W.HTML(PAGE, layout={"height": "0px", "margin": "0px"})
        self.ui = W.VBox([W.HTML(STYLE + self.heading), *controls, self.status, page])
        self.ui.add_class("evolq-panel")
        self.ui.add_class("evolq-question")
        self.say("")
        place, _ = whereabouts(f"{type(self).__name__} {question}", own=False)
        if place in Question.alive:
            Question.alive[place].close()
        Question.alive[place] = self
        self.place = place

    def say(self, words: str) -> None:
        """Put words into the status line."""
        self.words = words
        self.status.value = f'<div role="status" aria-live="polite">{inline(words)}</div>{LOST}'

    def close(self) -> None:
        """Take every widget away."""
        if Question.alive.get(self.place) is self:
            del Question.alive[self.place]
        close_all(self.ui)

    def folded(self) -> str:
        """The answers for a page without a kernel."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The live widget where a page can show one, otherwise the words."""
        bundle = dict(self.ui._repr_mimebundle_(**options) or {})
        return {**bundle, "text/html": self.heading + self.folded()}


class Quiz(Question):
    """A question with options, each with its explanation; `answer` is the number of the right one.

    ValueError if there are fewer than two options, or the answer is none of them.
    """

    def __init__(self, question: str, options: Mapping[str, str], answer: int) -> None:
        if len(options) < 2 or not 1 <= answer <= len(options):
            raise ValueError(
                f"the answer is option {answer} of {len(options)}; give at least two options and "
                "the number of the right one, from 1"
            )
        self.options, self.answer = dict(options), answer
        shown = [(plain(option), i) for i, option in enumerate(options, 1)]
        self.choice = W.RadioButtons(options=shown, value=None, layout={"width": "100%"})
        self.choice.observe(lambda _: self.say(""), names="value")
        self.check_button = small_button("Check", "Is the chosen answer right?", self.check)
        super().__init__(question, self.choice, self.check_button)
        self.ui.add_class("evolq-quiz")

    def check(self) -> None:
        """Say whether the chosen option is right, and why."""
        if self.choice.value is None:
            self.say(CHOOSE)
            return
        why = list(self.options.values())[self.choice.value - 1]
        self.say(f"{'✓' if self.choice.value == self.answer else '✗'} {why}")

    def folded(self) -> str:
        return "".join(
            f"<details><summary>{inline(option)}</summary>{inline(why)}</details>"
            for option, why in self.options.items()
        )


class Guess(Question):
    """A guess before the truth: a slider for each name; *Show* draws the truth over the guesses.

    `truth` is a number by name, in `unit`, between `low` and `high`. ValueError if it is not.
    """

    lead = "Guess first: "

    def __init__(
        self,
        question: str,
        truth: Mapping[str, float],
        low: float,
        high: float,
        unit: str = "",
        explanation: str = "",
    ) -> None:
        if outside := [name for name, value in truth.items() if not low <= value <= high]:
            raise ValueError(
                f"{outside[0]} is {truth[outside[0]]:g}, outside {low:g} to {high:g}; "
                "widen the range of the guess"
            )
        self.truth, self.low, self.high = dict(truth), low, high
        self.unit, self.explanation = f" {unit}" if unit else "", explanation
        self.sliders = {name: self.slider(name) for name in truth}
        self.view = W.HTML()
        self.view.add_class("evolq-view")
        self.revealed = False
        self.show_button = small_button("Show the truth", "Draw it over your guess", self.reveal)
        sliders = W.Box([*self.sliders.values()], layout={"flex_flow": "row wrap"})
        super().__init__(question, sliders, self.show_button, self.view)
        self.ui.add_class("evolq-guess")
        self.draw()

    def slider(self, name: str) -> FloatSlider:
        """A slider that begins in the middle."""
        slider = FloatSlider(
            description=name,
            tooltip=f"Your guess for {name}",
            min=self.low,
            max=self.high,
            step=(self.high - self.low) / 100,
            value=(self.low + self.high) / 2,
            readout_format=".3g",
            style={"description_width": "118px"},
            layout={"width": "390px"},
        )
        slider.observe(lambda _: self.draw(), names="value")
        return slider

    @property
    def guesses(self) -> dict[str, float]:
        """What the sliders say."""
        return {name: slider.value for name, slider in self.sliders.items()}

    def draw(self) -> None:
        """The guesses, and the truth over them once it is asked for."""
        self.view.value = self.picture().html()
        if self.revealed:
            self.reveal()

    def reveal(self) -> None:
        """Show the truth, and say how far off each guess is."""
        if not self.revealed:
            self.revealed = True
            self.view.value = self.picture().html()
        told = "; ".join(
            f"{name}: you {self.guesses[name]:.3g}{self.unit}, truth {value:.3g}{self.unit}"
            for name, value in self.truth.items()
        )
        self.say(f"{told}. {self.explanation}".strip())

    def picture(self) -> Drawing:
        """Guesses and truth over the names."""
        names, room = list(self.truth), 0.05 * (self.high - self.low)
        places = list(range(len(names)))
        plot = Plot(
            "Guess and truth" if self.revealed else "Your guess",
            (-0.5, len(names) - 0.5),
            (self.low - room, self.high + room),
            "",
            self.unit.strip(),
            width=max(300, 90 * len(names) + 80),
            height=250,
            xticks=list(zip(places, names)),
        )
        guesses = list(self.guesses.values())
        titles = [f"guess {value:.3g}{self.unit}" for value in guesses]
        plot.line(places, guesses, BLUE, DASHES[1])
        plot.points(places, guesses, BLUE, "circle", 6, True, titles, "your guess")
        alt = f"Your guess: {', '.join(f'{v:.3g}{self.unit}' for v in guesses)}."
        if self.revealed:
            values = list(self.truth.values())
            titles = [f"truth {value:.3g}{self.unit}" for value in values]
            plot.line(places, values, ORANGE)
            plot.points(places, values, ORANGE, "diamond", 6, titles=titles, label="truth")
            alt += f" The truth: {', '.join(f'{v:.3g}{self.unit}' for v in values)}."
        return Drawing(alt, plot)

    def folded(self) -> str:
        told = "; ".join(f"{name} {value:.3g}{self.unit}" for name, value in self.truth.items())
        why = inline(f"{told}. {self.explanation}".strip())
        return f"<details><summary>The truth</summary>{why}</details>"


def inline(words: str) -> str:
    """Words for a page: `code`, **strong** and *stressed* as Markdown has them, the rest as is."""
    out = escape(words, quote=False)
    out = re.sub(r"`([^`]+)`", r"<code>\1</code>", out)
    out = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", out)
    return re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?!\w)", r"<em>\1</em>", out)


def plain(words: str) -> str:
    """Words without their marks, for a widget that knows none."""
    return re.sub(r"[`*]", "", words)
