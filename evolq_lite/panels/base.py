"""What all panels share: controls, a status line in words, a picture with alt text.

A panel has two methods of its own: `compute(tick, **values)` asks the library, in a thread, and
`draw(result, **values)` turns the result into a picture and a sentence. `values` are those of its
controls. When a control changes, the status line answers at once and the picture follows; the last
change wins. Pictures go through a trait (`HTML.value`): that is safe from a thread, works in
JupyterLab and Voila, and can carry alt text, which an image widget cannot.
"""

import math
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import ipywidgets as W
from traitlets import validate

from evolq_lite.data import DATA
from evolq_lite.figures import Picture
from evolq_lite.files import write_whole
from evolq_lite.panels.worker import Cancelled, Tick, Worker

CANCELLING = "Cancelling …"
DRAWING = threading.Lock()  # matplotlib's fonts and caches are not made for threads
Values = dict[str, Any]


class _Clamped:
    """A slider that keeps to its range, and says so: `on_clamp(words, whether the value moves)`."""

    on_clamp: Callable[[str, bool], None] | None = None
    kept: float | None = None  # the last good value; a browser's is set before it is checked

    def within(self, asked: float, low: float, high: float) -> float:
        """The nearest value inside the range; NaN is the last good one."""
        now = self.value  # type: ignore[attr-defined]
        if math.isnan(asked):
            taken = low if self.kept is None else self.kept
        else:
            taken = min(max(asked, low), high)
        self.kept = taken
        if not math.isclose(taken, asked) and self.on_clamp is not None:
            name = self.description.lower()  # type: ignore[attr-defined]
            words = f"{name} {asked:g} is outside {low:g} to {high:g}; using {taken:g}"
            self.on_clamp(words, taken != now)
        return taken

    @validate("value")
    def _validate_value(self, proposal: Any) -> Any:
        return self.within(proposal["value"], self.min, self.max)  # type: ignore[attr-defined]


class IntSlider(_Clamped, W.IntSlider):
    """Whole numbers, one event for each drag."""


class FloatSlider(_Clamped, W.FloatSlider):
    """Real numbers, one event for each drag."""


class LogSlider(_Clamped, W.FloatLogSlider):
    """Real numbers on a logarithmic scale: `low` and `high` are the ends themselves."""

    def __init__(self, low: float, high: float, **options: Any) -> None:
        super().__init__(min=math.log10(low), max=math.log10(high), **options)

    @validate("value")
    def _validate_value(self, proposal: Any) -> Any:
        return self.within(proposal["value"], self.base**self.min, self.base**self.max)


def control(kind: type[W.Widget], description: str, tooltip: str, **options: Any) -> Any:
    """A control with a name, a tooltip, and room for both; sliders speak when let go."""
    if issubclass(kind, _Clamped):
        options.setdefault("continuous_update", False)
    return kind(
        description=description,
        tooltip=tooltip,
        style={"description_width": "118px"},
        layout={"width": "390px"},
        **options,
    )


class Panel:
    """A panel is built and shown by a notebook's last expression; `close()` lets everything go.

    Building one with the name of an earlier one closes that: a cell that is run again leaks
    nothing. Keyword arguments set controls, out-of-range values are clamped with a word. A panel
    that is `shipped` opens with the stored picture of its default values, and computes when a
    control moves; others compute their first picture at once.
    """

    wait = 0.05  # seconds for another change to come
    slow = False  # shows progress and a Cancel button
    shipped = False
    again = "Change a control to try again."
    alive: ClassVar[dict[str, "Panel"]] = {}

    def __init__(self, name: str | None = None, **values: Any) -> None:
        kind = type(self).__name__
        self.name = name or kind
        if earlier := Panel.alive.pop(self.name, None):
            earlier.close()
        self.moved, self.note, self.words = perf_counter(), "", ""
        self.opened = self.closed = False
        self.view, self.status = W.HTML(), W.HTML()
        self.bar = W.FloatProgress(max=1.0, layout={"width": "290px", "visibility": "hidden"})
        self.cancel_button = W.Button(
            description="Cancel", tooltip="Stop computing", disabled=True, layout={"width": "90px"}
        )
        self.worker = Worker(self.wait, self.progressed, self.ended)
        self.cancel_button.on_click(lambda _: self.cancel())
        self.controls: dict[str, Any] = self.make_controls()
        for key, widget in self.controls.items():
            widget.add_class(f"evolq-{key.replace('_', '-')}")
            if isinstance(widget, _Clamped):
                widget.on_clamp = self.clamped
        try:
            self.set_controls(values)
        except Exception:
            rest = self.view, self.status, self.bar, self.cancel_button
            for widget in (*self.controls.values(), *rest):
                close_all(widget)
            raise
        for widget in self.controls.values():
            widget.observe(self.changed, names="value")
        for widget, word in ((self.view, "view"), (self.status, "status"), (self.bar, "bar")):
            widget.add_class(f"evolq-{word}")
        self.cancel_button.add_class("evolq-cancel")
        self.ui = self.arrange()
        self.ui.add_class(f"evolq-{kind.lower()}")
        Panel.alive[self.name] = self
        self.open()
        self.opened = True
        if self.note:  # a stored picture has not said it
            self.say(self.note + self.words)
            self.note = ""

    def set_controls(self, values: Values) -> None:
        """Give controls values; ValueError if there is no control of a name."""
        if unknown := values.keys() - self.controls.keys():
            raise ValueError(
                f"{type(self).__name__} has no control {min(unknown)!r}; "
                f"it has {', '.join(self.controls)}"
            )
        for key, value in values.items():
            self.controls[key].value = value

    def make_controls(self) -> dict[str, Any]:
        """The controls by name; the names are the arguments of `compute` and `draw`."""
        raise NotImplementedError

    def compute(self, tick: Tick, **values: Any) -> Any:
        """What the picture shows; runs in a thread, calls tick(fraction) between its batches."""
        raise NotImplementedError

    def draw(self, result: Any, **values: Any) -> tuple[Picture, str]:
        """A picture whose label is its alt text, and a sentence for the status line."""
        raise NotImplementedError

    def buttons(self) -> list[W.Widget]:
        """What stands under the controls."""
        return [W.HBox([self.cancel_button, self.bar])] if self.slow else []

    def arrange(self) -> W.Widget:
        """Controls side by side where the page is wide enough; below, the words and the picture."""
        controls = W.Box([*self.controls.values()], layout={"flex_flow": "row wrap"})
        return W.VBox([controls, *self.buttons(), self.status, self.view])

    @property
    def values(self) -> Values:
        """The controls' values."""
        return {name: widget.value for name, widget in self.controls.items()}

    def open(self) -> None:
        """Show the first picture: the stored one, or one that is computed here and now."""
        if not self.show_stored():
            self.worker.submit(self.job())
            self.worker.wait_until_done()

    def show_stored(self) -> bool:
        """Show the stored picture of the default values, False if it does not apply."""
        stored = first_view(type(self).__name__) if self.shipped else None
        if stored is None or self.values != self.defaults():
            return False
        self.view.value, words = stored
        self.say(f"{words} (Stored result of these settings.)")
        return True

    def defaults(self) -> Values:
        """The values that the controls begin with."""
        fresh = self.make_controls()
        values = {name: widget.value for name, widget in fresh.items()}
        for widget in fresh.values():
            close_all(widget)
        return values

    def say(self, words: str) -> None:
        """Put words into the status line."""
        self.words = words
        self.status.value = f'<div role="status" aria-live="polite">{escape(words)}</div>'

    def clamped(self, words: str, moves: bool) -> None:
        """Say that a value was out of range: now, or with the picture of the one taken."""
        if moves or not self.opened:
            self.note += f"{words}. "
        else:
            self.say(f"{words}. {self.words}")

    def changed(self, change: Any) -> None:
        """A control has moved: answer at once, compute soon."""
        self.say(f"{self.note}Computing …")
        self.worker.request(self.job())

    def cancel(self) -> None:
        """Stop at the next tick, and answer at once: some steps take seconds, such as loading."""
        if self.worker.idle:
            return
        self.said = self.words
        self.say(CANCELLING)
        self.worker.cancel()

    def job(self) -> Any:
        """Compute and show the present values."""
        values, note, self.note = self.values, self.note, ""

        def run(tick: Tick) -> None:
            self.busy(True)
            result = self.compute(tick, **values)
            tick(1.0)
            with DRAWING:
                picture, words = self.draw(result, **values)
                shown = picture._repr_html_()
            tick(1.0)
            self.view.value = shown
            self.say(note + words)

        return run

    def busy(self, yes: bool) -> None:
        """Show or hide progress and Cancel."""
        self.cancel_button.disabled = not yes
        self.bar.layout.visibility = "visible" if yes else "hidden"

    def progressed(self, fraction: float) -> None:
        """Move the bar; not more than ten times a second, a message each."""
        if fraction in (0.0, 1.0) or perf_counter() - self.moved > 0.1:
            self.bar.value, self.moved = fraction, perf_counter()

    def ended(self, error: BaseException | None) -> None:
        """A job has ended: say so if it did not end well."""
        self.busy(False)
        if isinstance(error, Cancelled):
            self.say("Cancelled. The picture is the last one that was finished.")
        elif error is None and self.words == CANCELLING:  # too late, it was finished
            self.say(self.said)
        elif error is not None:
            why = (str(error) or type(error).__name__).rstrip(".")
            self.say(f"{type(error).__name__}: {why}. {self.again}")

    def close(self) -> None:
        """Stop computing and take every widget away."""
        if self.closed:
            return
        self.closed = True
        self.worker.close()
        for widget in self.controls.values():
            widget.unobserve(self.changed, names="value")
        if Panel.alive.get(self.name) is self:
            del Panel.alive[self.name]
        for widget in (self.ui, self.cancel_button, self.bar):
            close_all(widget)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The live widget where a page can show one, otherwise the picture and its words."""
        bundle = dict(self.ui._repr_mimebundle_(**options) or {})
        return {**bundle, "text/html": self.view.value + self.status.value}


def close_all(widget: W.Widget) -> None:
    """Close a widget and all that it holds."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    if widget.comm is None:  # closed before
        return
    for part in ("layout", "style"):
        if hasattr(widget, part):
            getattr(widget, part).close()
    widget.close()


def store_view(panel: Panel) -> None:
    """Keep what a panel shows as the first view of its kind."""
    path = view_path(type(panel).__name__)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, f"{panel.view.value}\n{panel.words}\n".encode())


def view_path(kind: str) -> Path:
    """Where the stored first view of a kind of panel lies."""
    return DATA / "panels" / f"{kind}.html"


def first_view(kind: str) -> tuple[str, str] | None:
    """The stored picture and words of a kind of panel, None if they are missing or damaged."""
    path = view_path(kind)
    if not path.is_file():
        return None
    picture, _, words = path.read_text("utf-8", errors="replace").partition("\n")
    whole = picture.startswith("<figure><img ") and picture.endswith("</figure>") and words.strip()
    return (picture, words.strip()) if whole else None
