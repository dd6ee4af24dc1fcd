"""What all panels share: controls, a status line in words, a picture with alt text.

A panel has two methods of its own: `compute(tick, **values)` asks the library, in a thread, and
`draw(result, **values)` turns the result into a picture and a sentence. `values` are those of its
controls. When a control changes, the status line answers at once and the picture follows; the last
change wins. Pictures go through a trait (`HTML.value`): that is safe from a thread, works in
JupyterLab and Voila, and can carry alt text, which an image widget cannot.
"""

import math
from collections.abc import Callable
from functools import partial
from html import escape
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import ipywidgets as W
from IPython.core.getipython import get_ipython
from traitlets import TraitError, validate

from evolq_lite.files import DATA, write_whole
from evolq_lite.panels.drawing import Drawing, as_image
from evolq_lite.panels.worker import Cancelled, Tick, Worker

CANCELLING = "Cancelling …"
# What a page needs beside the widgets. ipywidgets gives a class to what has lost its kernel, and no
# name to a slider's handle; an image that cannot be loaded is where a page runs a line of script.
PAGE = """<style>
.evolq-drawing { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 4px 0 }
.evolq-drawing > svg { max-width: 100%; height: auto; overflow: visible }
.evolq-drawing { color: var(--jp-ui-font-color1, inherit) }
.evolq-words { paint-order: stroke; stroke: var(--jp-layout-color0, #fff); stroke-width: 3px }
.evolq-stale { opacity: 0.45 }
.evolq-status [role="status"] { line-height: 1.4 }
.evolq-panel .jupyter-widgets.widget-slider .noUi-connects {
  background: var(--jp-ui-font-color2, #616161) }
.evolq-panel .noUi-handle { border: 1px solid var(--jp-ui-font-color2, #616161) }
[data-jp-theme-light="false"] .evolq-paper { filter: brightness(0.8) }
[data-jp-theme-light="false"] .evolq-panel .widget-dropdown > select { background-image: url("data:\
image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E%3Cpath d='M5 7l4 4 \
4-4' fill='none' stroke='white' stroke-width='2'/%3E%3C/svg%3E") }
.evolq-lost { display: none; font-weight: bold }
.jupyter-widgets-disconnected .evolq-lost { display: block }
</style><img src="data:," alt="" style="display: none" onerror="
const start = () => {
  const panel = this.closest('.evolq-panel');
  if (!panel) { setTimeout(start, 100); return; }
  const name = () => panel.querySelectorAll('.widget-slider').forEach(slider =>
    slider.querySelectorAll('.noUi-handle').forEach(handle =>
      handle.setAttribute('aria-label', slider.querySelector('.widget-label').textContent)));
  name();
  new MutationObserver(name).observe(panel, {childList: true, subtree: true});
};
start()">"""
# Saves the picture as it is in the page: its plots side by side in one file.
SAVE = """<button type="button" class="lm-Widget jupyter-widgets jupyter-button widget-button"
title="Save the picture as an SVG file" style="width: auto; min-width: 90px" onclick="
const plots = this.closest('.evolq-panel').querySelectorAll('.evolq-view .evolq-drawing > svg');
let across = 0, tall = 0, parts = '';
for (const plot of plots) {
  const part = plot.cloneNode(true);
  part.setAttribute('x', across);
  across += +plot.getAttribute('width');
  tall = Math.max(tall, +plot.getAttribute('height'));
  parts += new XMLSerializer().serializeToString(part);
}
const file = `<svg xmlns='http://www.w3.org/2000/svg' width='${across}' height='${tall}'
  font-family='sans-serif'><style>.evolq-words { paint-order: stroke; stroke: white;
  stroke-width: 3px }</style><rect width='100%' height='100%' fill='white'/>${parts}</svg>`;
const link = document.createElement('a');
link.href = window.URL.createObjectURL(new Blob([file], {type: 'image/svg+xml'}));
link.download = 'panel.svg';
link.click();
window.URL.revokeObjectURL(link.href);">Save picture</button>"""
LOST = '<div class="evolq-lost">Kernel restarted: run this cell again.</div>'
OTHER_MACHINE = (
    "(The stored picture of these settings is from another machine, whose kernels add in another "
    "order: digits differ.)"
)
UNRUN = "<p>The controls appear when you run this cell.</p>"
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
    """Whole numbers."""


class FloatSlider(_Clamped, W.FloatSlider):
    """Real numbers."""


class LogSlider(_Clamped, W.FloatLogSlider):
    """Real numbers on a logarithmic scale: `low` and `high` are the ends themselves."""

    def __init__(self, low: float, high: float, **options: Any) -> None:
        super().__init__(min=math.log10(low), max=math.log10(high), **options)

    @validate("value")
    def _validate_value(self, proposal: Any) -> Any:
        return self.within(proposal["value"], self.base**self.min, self.base**self.max)


def control(kind: type[W.Widget], description: str, tooltip: str, **options: Any) -> Any:
    """A control with a name, a tooltip, and room for both."""
    return kind(
        description=description,
        tooltip=tooltip,
        style={"description_width": "118px"},
        layout={"width": "390px"},
        **options,
    )


class Panel:
    """A panel is built and shown by a notebook's last expression; `close()` lets everything go.

    A cell that is run again closes the panels that it made before; outside a notebook, a panel
    closes the one before it of the same kind, or of the same `name`. Keyword arguments set
    controls, out-of-range values are clamped with a word. A panel that is `shipped` opens with the
    stored picture of its default values, and computes when a control moves; others compute their
    first picture at once.
    """

    wait = 0.05  # seconds for another change to come
    slow = False  # shows progress and a Cancel button
    live = False  # answers within a few milliseconds: follows a handle while it is held
    shipped = False
    again = "Change a control to try again."
    presets: ClassVar[dict[str, Values]] = {}  # settings by the words of a button
    alive: ClassVar[list["Panel"]] = []

    def __init__(self, name: str | None = None, **values: Any) -> None:
        kind = type(self).__name__
        self.place, self.execution = whereabouts(name or kind, own=name is not None)
        for earlier in list(Panel.alive):
            if earlier.place == self.place and earlier.execution != self.execution:
                earlier.close()
        self.moved, self.note, self.words = perf_counter(), "", ""
        self.shown = ""  # what was said of the picture
        self.opened = self.closed = self.setting = False
        self.view, self.status = W.HTML(), W.HTML()
        self.page = W.HTML(PAGE, layout={"height": "0px", "margin": "0px"})
        self.bar = W.FloatProgress(max=1.0, layout={"width": "290px", "visibility": "hidden"})
        self.cancel_button = W.Button(
            description="Cancel", tooltip="Stop computing", disabled=True, layout={"width": "90px"}
        )
        self.reset_button = small_button(
            "Reset", "Bring back the settings that the panel opened with", self.reset
        )
        self.pin_button = small_button(
            "Pin",
            "Keep this picture to compare the next one with; press again to drop it",
            self.pin,
        )
        self.save = W.HTML(SAVE)
        self.pinned = W.HTML()
        self.preset_buttons = [
            small_button(word, f"Settings: {told(preset)}", partial(self.use, preset))
            for word, preset in self.presets.items()
        ]
        self.worker = Worker(self.wait, self.progressed, self.ended)
        self.cancel_button.on_click(lambda _: self.cancel())
        self.controls: dict[str, Any] = self.make_controls()
        for key, widget in self.controls.items():
            widget.add_class(f"evolq-{key.replace('_', '-')}")
            if isinstance(widget, _Clamped):
                widget.on_clamp = self.clamped
                widget.continuous_update = self.live  # type: ignore[attr-defined]
        try:
            self.set_controls(values)
        except Exception:
            for widget in (*self.controls.values(), *self.own()):
                close_all(widget)
            raise
        self.first, self.usual = self.values, self.defaults()
        for widget in self.controls.values():
            widget.observe(self.heard, names="value")
        for widget, word in ((self.view, "view"), (self.status, "status"), (self.bar, "bar")):
            widget.add_class(f"evolq-{word}")
        for button in (self.cancel_button, self.reset_button, self.pin_button):
            button.add_class(f"evolq-{button.description.lower()}")
        self.ui = self.arrange()
        self.ui.add_class("evolq-panel")
        self.ui.add_class(f"evolq-{kind.lower()}")
        Panel.alive.append(self)
        self.open()
        self.opened = True
        if self.note:  # a stored picture has not said it
            self.say(self.note + self.words)
            self.note = ""

    def own(self) -> list[W.Widget]:
        """The widgets that every panel has beside its controls."""
        buttons = [self.cancel_button, self.reset_button, self.pin_button, *self.preset_buttons]
        return [self.view, self.status, self.page, self.bar, self.save, self.pinned, *buttons]

    def set_controls(self, values: Values) -> None:
        """Give controls values; ValueError if there is no control of a name or no such value."""
        if unknown := values.keys() - self.controls.keys():
            raise ValueError(
                f"{type(self).__name__} has no control {min(unknown)!r}; "
                f"it has {', '.join(self.controls)}"
            )
        for key, value in values.items():
            widget = self.controls[key]
            try:
                if isinstance(widget, IntSlider) and isinstance(value, float) and value % 1:
                    raise TraitError  # it would be cut off without a word
                widget.value = value
            except TraitError as error:
                what = f"{type(self).__name__}: {key} is {value!r}"
                raise ValueError(f"{what}; give {accepted(widget)}") from error

    def make_controls(self) -> dict[str, Any]:
        """The controls by name; the names are the arguments of `compute` and `draw`."""
        raise NotImplementedError

    def compute(self, tick: Tick, **values: Any) -> Any:
        """What the picture shows; runs in a thread, calls tick(fraction) between its batches."""
        raise NotImplementedError

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """A picture with an alt text of at most 40 words, and words for the status line."""
        raise NotImplementedError

    def buttons(self) -> list[W.Widget]:
        """What stands under the controls."""
        return [self.row(*([self.cancel_button] if self.slow else []))]

    def row(self, *before: W.Widget) -> W.Widget:
        """Buttons side by side, with those that every panel has, and the bar of a slow one."""
        every = [self.reset_button, self.pin_button, *self.preset_buttons, self.save]
        every += [self.bar] if self.slow else []
        return W.Box([*before, *every], layout={"flex_flow": "row wrap", "align_items": "center"})

    def arrange(self) -> W.Widget:
        """Controls side by side where the page is wide enough; below, the words and the picture."""
        controls = W.Box([*self.controls.values()], layout={"flex_flow": "row wrap"})
        shown = self.status, self.view, self.pinned, self.page
        return W.VBox([controls, *self.buttons(), *shown])

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
        if stored is None or self.values != self.usual:
            return False
        picture, words = stored
        self.show(picture, f"{words} (Stored result of these settings.)")
        return True

    def show(self, picture: str, words: str) -> None:
        """Show a picture of the present settings, and say what it shows."""
        self.view.value, self.shown = picture, words
        self.view.remove_class("evolq-stale")
        self.say(words)

    def compared(self, words: str, values: Values) -> str:
        """Words for a result; if the stored one of these values reads otherwise, they say why."""
        stored = first_view(type(self).__name__) if self.shipped and values == self.usual else None
        return words if stored is None or stored[1] == words else f"{words} {OTHER_MACHINE}"

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
        self.status.value = f'<div role="status" aria-live="polite">{escape(words)}</div>{LOST}'

    def clamped(self, words: str, moves: bool) -> None:
        """Say that a value was out of range: now, or with the picture of the one taken."""
        if moves or not self.opened:
            self.note += f"{words}. "
        else:
            self.say(f"{words}. {self.words}")

    def heard(self, change: Any) -> None:
        """A control has a new value: by hand, unless several are being set at once."""
        if not self.setting:
            self.changed(change)

    def changed(self, change: Any) -> None:
        """A control has moved: answer at once, compute soon."""
        if self.live:
            self.worker.follow(self.job())
            return
        self.view.add_class("evolq-stale")
        self.say(f"{self.note}Computing …")
        self.worker.request(self.job())

    def reset(self) -> None:
        """Bring back the settings that the panel opened with, and their picture."""
        self.use(self.first)

    def use(self, values: Values) -> None:
        """Set several controls at once, for one answer."""
        self.setting = True
        try:
            self.set_controls(values)
        finally:
            self.setting = False
        self.worker.forget()
        if self.show_stored():
            self.busy(False)
        else:
            self.changed(None)

    def pin(self) -> None:
        """Keep the picture and its words below; drop them if they are kept."""
        if self.pinned.value:
            self.pinned.value = ""
        else:
            words = f"<p><b>Pinned:</b> {escape(self.words)}</p>"
            self.pinned.value = f"<hr>{words}{self.view.value}"

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
            picture, words = self.draw(result, **values)
            tick(1.0)
            self.show(picture.html(), note + self.compared(words, values))

        return run

    def busy(self, yes: bool) -> None:
        """Show or hide progress and Cancel."""
        if self.slow:
            self.cancel_button.disabled = not yes
            self.bar.layout.visibility = "visible" if yes else "hidden"

    def progressed(self, fraction: float) -> None:
        """Move the bar; not more than ten times a second, a message each."""
        if self.slow and (fraction in (0.0, 1.0) or perf_counter() - self.moved > 0.1):
            self.bar.value, self.moved = fraction, perf_counter()

    def ended(self, error: BaseException | None) -> None:
        """A job has ended: say so if it did not end well."""
        self.busy(False)
        if isinstance(error, Cancelled):
            self.say(f"Cancelled. {self.whose()}")
        elif error is None and self.words == CANCELLING:  # too late, it was finished
            self.say(self.said)
        elif error is not None:
            why = (str(error) or type(error).__name__).rstrip(".")
            self.say(f"{type(error).__name__}: {why}. {self.again}")

    def whose(self) -> str:
        """Of what settings the picture is, which is not of those that the controls show."""
        return f"The dimmed picture is an earlier one: {self.shown}" if self.shown else ""

    def close(self) -> None:
        """Stop computing and take every widget away."""
        if self.closed:
            return
        self.closed = True
        self.worker.close()
        for widget in self.controls.values():
            widget.unobserve(self.heard, names="value")
        if self in Panel.alive:
            Panel.alive.remove(self)
        for widget in (self.ui, *self.own()):
            close_all(widget)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The live widget where a page can show one, otherwise the picture and its words."""
        bundle = dict(self.ui._repr_mimebundle_(**options) or {})
        said = self.status.value.removesuffix(LOST)
        picture = as_image(self.view.value) if self.view.value else ""
        return {**bundle, "text/html": picture + said + UNRUN}


def small_button(word: str, tooltip: str, act: Callable[[], None]) -> W.Button:
    """A button that does something."""
    layout = {"width": "auto", "min_width": "90px"}
    button = W.Button(description=word, tooltip=tooltip, layout=layout)
    button.on_click(lambda _: act())
    return button


def accepted(widget: W.Widget) -> str:
    """The values that a control takes, in words."""
    if isinstance(widget, W.Dropdown):
        values = [o[1] if isinstance(o, tuple) else o for o in widget.options]
        return f"one of: {', '.join(map(str, values))}"
    if isinstance(widget, LogSlider):
        return f"a number from {widget.base**widget.min:g} to {widget.base**widget.max:g}"
    if isinstance(widget, _Clamped):
        kind = "whole number" if isinstance(widget, IntSlider) else "number"
        return f"a {kind} from {widget.min:g} to {widget.max:g}"  # type: ignore[attr-defined]
    return "True or False" if isinstance(widget, W.Checkbox) else "a text"


def told(values: Values) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


ALONE = count()  # executions of what is not run by a notebook


def whereabouts(name: str, own: bool) -> tuple[str, str]:
    """What makes a panel, and which time it does: a cell and its execution, in a notebook.

    Outside a notebook, and for a panel with a name of its `own`, each panel is a new execution.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent("shell") if kernel is not None and not own else None
    if not parent:
        return name, str(next(ALONE))
    cell = parent.get("metadata", {}).get("cellId") or parent["content"].get("code", "")
    return f"{name} in {cell}", parent["header"]["msg_id"]


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
    whole = picture.startswith("<figure ") and picture.endswith("</figure>") and words.strip()
    return (picture, words.strip()) if whole else None
