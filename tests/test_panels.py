"""Panels without a browser: every control, bad values, latest wins, cancel, errors, no leaks."""

import asyncio
import math
import threading
import time
from html import escape, unescape
from types import SimpleNamespace

import ipywidgets as W
import pytest
from conftest import until
from traitlets import TraitError

from evolq_lite import data
from evolq_lite.panels import Panel, QuantizerPanel, base, quantizer
from evolq_lite.panels.base import FloatSlider, IntSlider, LogSlider, control, view_path
from evolq_lite.panels.drawing import Drawing
from evolq_lite.panels.worker import Cancelled, Worker

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")
SECONDS = 30  # a wait that ends earlier where all is well


def picture(words: str = "A picture.") -> Drawing:
    """The smallest picture."""
    return Drawing(words)


class Toy(Panel):
    """A panel without a library behind it, which keeps a book of what it was asked for."""

    def __init__(self, **options):
        self.asked = []
        super().__init__(**options)

    def make_controls(self):
        return {
            "size": control(IntSlider, "Size", "How large", value=4, min=2, max=8),
            "rate": control(LogSlider, "Rate", "How fast", value=0.1, low=0.01, high=1.0),
            "kind": control(W.Dropdown, "Kind", "Which", options=["plain", "<b>bold</b>"]),
        }

    def compute(self, tick, **values):
        self.asked.append(values)
        return values

    def draw(self, result, **values):
        return picture(f"Size {values['size']}."), f"size {values['size']}, {values['kind']}"


class SlowToy(Toy):
    """A panel whose every answer takes ten steps of a hundredth of a second."""

    slow = True
    hold = False  # until it is cancelled

    def compute(self, tick, **values):
        super().compute(tick, **values)
        step = 0
        while step < 10 or self.hold:
            time.sleep(0.01)
            step += 1
            tick(min(step / 10, 0.99))
        return values


class Sketch(QuantizerPanel):
    """The controls of a QuantizerPanel, without its picture, which takes a while."""

    def compute(self, tick, **values):
        return None

    def draw(self, result, **values):
        return picture(), f"{values['bits']} bits, {values['clip']:.0%}"


def done(panel: Panel) -> str:
    """The words of the status line when the job under way has ended."""
    panel.worker.wait_until_done(SECONDS)
    return panel.words


async def settled(panel: Panel) -> str:
    """The same inside an event loop, where a job waits for the next change before it starts."""
    end = time.monotonic() + SECONDS
    while panel.worker.timer is not None or not panel.worker.future.done():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    return panel.words


def alt_of(panel: Panel) -> str:
    """The alt text of a panel's picture."""
    return unescape(panel.view.value.split('aria-label="')[1].split('"')[0])


def widgets() -> set[str]:
    """All widgets that are alive."""
    return set(W.widget._instances)


def threads() -> list[threading.Thread]:
    """All threads of panels."""
    return [t for t in threading.enumerate() if t.name.startswith("evolq-panel")]


# The controls of QuantizerPanel


def test_every_control_changes_picture_alt_text_and_words():
    panel = QuantizerPanel()
    moves = [
        ("bits", 2, "2 bits"),
        ("bits", 8, "8 bits"),
        ("symmetric", False, "asymmetric"),
        ("channels", True, "per channel"),
        ("clip", 0.05, "5% of the range kept"),
        ("clip", 0.5, "50% of the range kept"),
        *(("tensor", name, name[1:]) for name in list(quantizer.TENSORS)[1:]),
    ]
    for name, value, expected in moves:
        view, words = panel.view.value, panel.words
        panel.controls[name].value = value
        done(panel)
        assert panel.words != words and panel.view.value != view, name
        assert expected in (alt_of(panel) if name == "tensor" else panel.words), name
        assert len(alt_of(panel).split()) <= 40


def test_the_same_values_give_the_same_picture_and_words():
    first = QuantizerPanel("one", bits=3, clip=0.5)
    other = QuantizerPanel("two")
    other.controls["bits"].value = 3
    other.controls["clip"].value = 0.5
    assert done(other) == first.words and other.view.value == first.view.value


@pytest.mark.parametrize("channels", [False, True])
def test_the_two_errors_are_the_whole_error(channels):
    for name in quantizer.TENSORS:
        x = quantizer.tensor_of(name)
        args = 3, False, channels, 0.6
        whole = ((quantizer.quantized(x, *args) - x) ** 2).mean()
        assert math.isclose(quantizer.split_error(x, *args).sum(), whole, rel_tol=1e-4)


def test_every_control_has_a_name_a_tooltip_and_a_class():
    panel = QuantizerPanel()
    assert set(panel.controls) == {"tensor", "bits", "symmetric", "channels", "clip"}
    for name, widget in panel.controls.items():
        assert widget.description and widget.tooltip
        assert f"evolq-{name}" in widget._dom_classes
        assert getattr(widget, "continuous_update", True) is True  # it follows the handle


# Values out of range


@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [
        ("bits", 99, 8),
        ("bits", -5, 2),
        ("clip", 7.5, 1.0),
        ("clip", 0.0, 0.05),
        ("clip", math.inf, 1.0),
        ("clip", -math.inf, 0.05),
    ],
)
@pytest.mark.parametrize("browser", [False, True])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_values_are_clamped_with_a_word(name, asked, taken, browser, at_the_end):
    panel = Sketch(**{name: taken if at_the_end else {"bits": 4, "clip": 0.5}[name]})
    if browser:
        panel.controls[name].set_state({"value": asked})
    else:
        panel.controls[name].value = asked
    said = done(panel)
    assert panel.values[name] == taken
    description = panel.controls[name].description.lower()
    assert said.startswith(f"{description} {asked:g} is outside")
    words = f"{panel.values['bits']} bits, {panel.values['clip']:.0%}"
    assert said.endswith(f"; using {taken:g}. {words}") and said.count("; using") == 1
    panel.controls["symmetric"].value = False
    assert done(panel) == words  # said once


@pytest.mark.parametrize("browser", [False, True])
def test_nan_leaves_a_value_as_it_is(browser):
    panel = Sketch(clip=0.5)
    words = panel.words
    slider = panel.controls["clip"]
    if browser:
        slider.set_state({"value": math.nan})
    else:
        slider.value = math.nan
    assert slider.value == 0.5
    assert done(panel).endswith(words) and "nan is outside 0.05 to 1; using 0.5" in panel.words


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("bits", {"value": math.nan}),
        ("bits", {"value": None}),
        ("bits", {"value": "many"}),
        ("clip", {"value": [1.0]}),
        ("symmetric", {"value": "perhaps"}),
        ("tensor", {"index": 99}),
    ],
)
def test_what_is_no_value_is_refused_and_changes_nothing(name, state):
    panel = Sketch()
    values = panel.values
    with pytest.raises(TraitError):
        panel.controls[name].set_state(state)
    assert panel.values == values
    panel.controls["bits"].value = 6
    assert done(panel).startswith("6 bits")


def test_values_of_the_constructor_are_clamped_with_a_word():
    panel = Sketch(bits=99, clip=-3)
    assert panel.values["bits"] == 8 and panel.values["clip"] == 0.05
    assert "bits 99 is outside 2 to 8; using 8. " in panel.words
    assert "range kept -3 is outside 0.05 to 1; using 0.05. 8 bits" in panel.words
    panel = Sketch(clip=2)  # the default is the end of the range
    assert panel.words.startswith("range kept 2 is outside 0.05 to 1; using 1. 4 bits")


def test_a_logarithmic_slider_is_clamped_at_its_real_ends():
    toy = Toy(rate=5.0)
    assert toy.values["rate"] == 1.0 and "rate 5 is outside 0.01 to 1" in toy.words
    toy.controls["rate"].set_state({"value": -1})
    assert "rate -1 is outside 0.01 to 1; using 0.01" in done(toy)
    assert math.isclose(toy.values["rate"], 0.01)
    toy.controls["rate"].value = math.nan
    assert math.isclose(toy.values["rate"], 0.01)


def test_sliders_work_outside_a_panel():
    assert IntSlider(value=4, min=2, max=8).value == 4
    slider = FloatSlider(value=0.5, min=0.0, max=1.0)
    slider.value = 3
    assert slider.value == 1.0


# Names


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"bit": 3}, ValueError, "QuantizerPanel has no control 'bit'; it has tensor, bits, symm"),
        ({"bits": "four"}, ValueError, "bits is 'four'; give a whole number from 2 to 8"),
        ({"bits": 4.5}, ValueError, "bits is 4.5; give a whole number from 2 to 8"),
        ({"clip": "half"}, ValueError, "clip is 'half'; give a number from 0.05 to 1"),
        ({"channels": "no"}, ValueError, "channels is 'no'; give True or False"),
        ({"tensor": "weights of nothing"}, ValueError, "give one of: weights of blocks.0.attn.qkv"),
    ],
)
def test_a_bad_argument_is_refused_and_leaves_nothing_behind(values, error, words):
    before = widgets()
    with pytest.raises(error, match=words):
        QuantizerPanel(**values)
    assert widgets() == before and not Panel.alive
    assert Sketch().words.startswith("4 bits")


# One job at a time, the latest wins


def test_in_an_event_loop_quick_changes_give_one_answer():
    async def drag():
        toy = Toy()
        toy.asked.clear()
        for size in (5, 6, 7, 8):
            toy.controls["size"].value = size
        assert toy.words == "Computing …"  # at once
        return await settled(toy), toy.asked

    words, asked = asyncio.run(drag())
    assert words == "size 8, plain" and [values["size"] for values in asked] == [8]


def test_the_latest_change_stops_the_job_under_way_and_nobody_says_cancelled():
    async def change_twice():
        toy, said = SlowToy(), []
        toy.asked.clear()
        toy.status.observe(lambda change: said.append(change.new), names="value")
        toy.controls["size"].value = 5
        while not toy.asked:
            await asyncio.sleep(0.005)
        toy.hold = True  # the first job would never end by itself
        toy.controls["size"].value = 6
        while len(toy.asked) < 2:
            await asyncio.sleep(0.005)
        toy.hold = False
        return await settled(toy), toy, said

    words, toy, said = asyncio.run(change_twice())
    assert words == "size 6, plain" and 'aria-label="Size 6."' in toy.view.value
    assert [values["size"] for values in toy.asked] == [5, 6]
    assert not any("Cancelled" in line or "size 5" in line for line in said)
    assert toy.cancel_button.disabled and toy.bar.layout.visibility == "hidden"


def test_a_change_back_and_forth_ends_where_the_controls_stand():
    async def change():
        toy = SlowToy()
        for size in (5, 6, 4, 7, 4):
            toy.controls["size"].value = size
            await asyncio.sleep(0.07)
        return await settled(toy)

    assert asyncio.run(change()) == "size 4, plain"


def test_without_an_event_loop_requests_queue_and_the_latest_wins():
    toy = SlowToy()
    toy.asked.clear()
    for size in (5, 6, 7):
        toy.controls["size"].value = size
    assert done(toy) == "size 7, plain"
    assert toy.asked[-1]["size"] == 7 and len(toy.asked) <= 2


def test_progress_goes_from_nothing_to_all():
    toy, seen = SlowToy(), []
    toy.bar.observe(lambda change: seen.append(change.new), names="value")
    toy.controls["size"].value = 6
    done(toy)
    assert seen[0] == 0.0 and seen == sorted(seen) and seen[-1] == 1.0


# Cancel


def cancelled_soon(toy: SlowToy) -> None:
    """A click on Cancel stops a job that would not end by itself."""
    until(lambda: not toy.cancel_button.disabled)
    assert toy.bar.layout.visibility == "visible"
    view, clicked = toy.view.value, time.monotonic()
    toy.cancel_button.click()
    until(lambda: "Cancelled" in toy.words)
    assert time.monotonic() - clicked < 0.5
    assert toy.words == "Cancelled. The dimmed picture is an earlier one: " + toy.shown
    assert toy.shown.startswith("size ") and "evolq-stale" in toy.view._dom_classes
    assert toy.view.value == view
    until(lambda: toy.cancel_button.disabled and toy.bar.layout.visibility == "hidden")


def test_cancel_stops_a_job_and_the_panel_goes_on():
    toy = SlowToy()
    toy.hold = True
    toy.controls["size"].value = 7
    cancelled_soon(toy)
    toy.hold = False
    toy.controls["size"].value = 5
    assert done(toy) == "size 5, plain"
    toy.cancel_button.click()  # nothing is under way
    assert done(toy) == "size 5, plain"


def test_cancel_also_stops_a_change_that_still_waits():
    async def cancel_while_waiting():
        toy = SlowToy()
        toy.asked.clear()
        toy.controls["size"].value = 7
        toy.cancel_button.click()
        assert toy.words.startswith("Cancelled")
        await asyncio.sleep(0.1)
        assert toy.words.startswith("Cancelled") and not toy.asked
        toy.hold = True
        toy.controls["size"].value = 5
        while not toy.asked:
            await asyncio.sleep(0.005)
        toy.controls["size"].value = 6  # the job of 5 stops, that of 6 waits
        toy.cancel_button.click()
        await asyncio.sleep(0.1)
        assert toy.words.startswith("Cancelled") and len(toy.asked) == 1
        toy.hold = False
        toy.controls["size"].value = 8
        return await settled(toy)

    assert asyncio.run(cancel_while_waiting()) == "size 8, plain"


def test_only_a_slow_panel_shows_a_cancel_button():
    def inside(widget):
        return {widget}.union(*map(inside, getattr(widget, "children", ())))

    toy, slow = Toy(), SlowToy()
    assert toy.cancel_button not in inside(toy.ui)
    assert {slow.cancel_button, slow.bar} <= inside(slow.ui)
    assert {toy.view, toy.status, *toy.controls.values()} <= inside(toy.ui)


# Errors


class Broken(Toy):
    """Fails at some sizes: while computing, or while drawing."""

    def compute(self, tick, **values):
        if values["size"] == 5:
            raise ValueError("size <5> is no good.")
        if values["size"] == 7:
            raise KeyboardInterrupt
        return super().compute(tick, **values)

    def draw(self, result, **values):
        if values["size"] == 6:
            raise ZeroDivisionError
        return super().draw(result, **values)


def test_an_error_is_words_in_the_status_line_and_the_panel_goes_on():
    panel = Broken()
    view = panel.view.value
    for size, words in [
        (5, "ValueError: size <5> is no good. Change a control to try again."),
        (6, "ZeroDivisionError: ZeroDivisionError. Change a control to try again."),
        (7, "KeyboardInterrupt: KeyboardInterrupt. Change a control to try again."),
    ]:
        panel.controls["size"].value = size
        assert done(panel) == words
        assert panel.view.value == view
        assert panel.cancel_button.disabled
    assert "&lt;5&gt;" not in panel.status.value
    panel.controls["size"].value = 8
    assert done(panel) == "size 8, plain" and panel.view.value != view


def test_an_error_in_the_first_picture_still_gives_a_panel():
    panel = Broken(size=5)
    assert panel.words.startswith("ValueError: size <5>") and panel.view.value == ""
    panel.controls["size"].value = 4
    assert done(panel) == "size 4, plain"


def test_a_missing_data_file_is_told_with_the_command_that_restores_it(monkeypatch, tmp_path):
    quantizer.tensor_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(data, "DATA", tmp_path)
        panel = QuantizerPanel()
        assert "is missing; restore it with: git checkout -- data" in panel.words
        assert panel.words.endswith("Change a control to try again.")
    panel.controls["bits"].value = 5
    assert done(panel).startswith("5 bits")


def test_an_interrupted_cell_leaves_a_panel_that_can_be_made_again(monkeypatch):
    def interrupted(self, seconds=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "wait_until_done", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Toy()
    (before,) = Panel.alive
    assert Toy().words == "size 4, plain"
    assert before.closed


# Words are text, not HTML


def test_words_are_escaped_and_announced():
    toy = Toy(kind="<b>bold</b>")
    assert toy.words == "size 4, <b>bold</b>"
    said = '<div role="status" aria-live="polite">size 4, &lt;b&gt;bold&lt;/b&gt;</div>'
    assert toy.status.value == said + base.LOST
    toy.say("<script>alert('&')</script>")
    assert "<script" not in toy.status.value and "&amp;" in toy.status.value


# Closing, and running a cell again


def test_close_takes_every_widget_and_the_thread_away():
    before = widgets()
    panel = Sketch()
    thread = next(iter(panel.worker.pool._threads))
    assert len(widgets()) > len(before)
    panel.close()
    panel.close()  # twice is fine
    assert widgets() == before and panel.closed and not Panel.alive
    thread.join(SECONDS)
    assert not thread.is_alive()
    panel.controls["bits"].value = 3  # nobody listens any more


def test_closing_stops_a_job_under_way():
    toy = SlowToy()
    toy.hold = True
    toy.controls["size"].value = 6
    until(lambda: not toy.cancel_button.disabled)
    thread = next(iter(toy.worker.pool._threads))
    toy.close()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_running_a_cell_again_leaks_nothing():
    until(lambda: not threads())
    before = widgets()
    Sketch(bits=3)
    once = len(widgets() - before)
    panels = [Sketch(bits=bits) for bits in (3, 4, 5)]
    assert len(widgets() - before) == once
    assert [panel.closed for panel in panels] == [True, True, False]
    assert Panel.alive == [panels[-1]]
    until(lambda: len(threads()) == 1)


def test_only_a_cell_that_is_run_again_closes_its_panels(monkeypatch):
    parent = {"metadata": {"cellId": "a"}, "content": {"code": ""}, "header": {"msg_id": "1"}}
    kernel = SimpleNamespace(get_parent=lambda channel: parent)
    monkeypatch.setattr(base, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    first, beside = Toy(), Toy()  # one cell may show two
    parent = {**parent, "metadata": {"cellId": "b"}, "header": {"msg_id": "2"}}
    elsewhere = Toy()
    assert Panel.alive == [first, beside, elsewhere]
    parent = {**parent, "metadata": {"cellId": "a"}, "header": {"msg_id": "3"}}
    again = Toy()
    assert first.closed and beside.closed and Panel.alive == [elsewhere, again]
    parent = {"content": {"code": "Toy()"}, "header": {"msg_id": "4"}}  # no JupyterLab
    last = Toy()
    assert Panel.alive == [elsewhere, again, last]


def test_reset_brings_back_what_the_panel_opened_with_in_one_answer():
    toy = Toy(size=6)
    view = toy.view.value
    toy.controls["size"].value = 3
    toy.controls["rate"].value = 0.5
    done(toy)
    toy.asked.clear()
    toy.reset_button.click()
    assert done(toy) == "size 6, plain" and toy.view.value == view and len(toy.asked) == 1
    assert toy.values == toy.first


def test_pin_keeps_a_picture_until_it_is_pressed_again():
    toy = Toy()
    toy.pin_button.click()
    toy.controls["size"].value = 7
    assert done(toy) == "size 7, plain"
    assert "Size 4." in toy.pinned.value and "size 4, plain" in toy.pinned.value
    assert "Size 7." in toy.view.value
    toy.pin_button.click()
    assert toy.pinned.value == ""


def test_a_preset_sets_its_controls_for_one_answer():
    class Preset(Toy):
        presets = {"Large": {"size": 8, "rate": 0.5}}

    toy = Preset()
    toy.asked.clear()
    (button,) = toy.preset_buttons
    assert button.description == "Large" and button.tooltip == "Settings: size 8, rate 0.5"
    button.click()
    assert done(toy) == "size 8, plain" and len(toy.asked) == 1


def test_a_picture_of_other_settings_is_dimmed():
    toy = SlowToy()
    assert "evolq-stale" not in toy.view._dom_classes
    toy.hold = True
    toy.controls["size"].value = 7
    until(lambda: not toy.cancel_button.disabled)
    assert "evolq-stale" in toy.view._dom_classes
    toy.cancel_button.click()
    done(toy)
    assert "evolq-stale" in toy.view._dom_classes
    toy.hold = False
    toy.controls["size"].value = 5
    done(toy)
    assert "evolq-stale" not in toy.view._dom_classes


def test_panels_of_other_names_and_kinds_live_side_by_side():
    panels = [Toy(), SlowToy(), Toy(name="left"), Toy(name="right")]
    assert not any(panel.closed for panel in panels)
    panels[2].close()
    assert [panel.closed for panel in panels] == [False, False, True, False]
    assert Panel.alive == [panels[0], panels[1], panels[3]]


# Stored first views


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A place for first views, with one for the kind Shipped."""
    monkeypatch.setattr(base, "DATA", tmp_path)
    path = view_path("Shipped")
    path.parent.mkdir()
    path.write_text(f"{picture('Stored.').html()}\nsize 4 · kept\n", encoding="utf-8")
    return SimpleNamespace(path=path)


class Shipped(Toy):
    """A panel with a stored first view."""

    shipped = True


def test_a_stored_view_opens_without_computing(stored):
    before = widgets()
    panel = Shipped()
    assert not panel.asked and 'aria-label="Stored."' in panel.view.value
    assert panel.words == "size 4 · kept (Stored result of these settings.)"
    panel.controls["size"].value = 5
    assert done(panel) == "size 5, plain"
    panel.controls["size"].value = 4
    assert done(panel) == f"size 4, plain {base.OTHER_MACHINE}"  # it reads otherwise, and says why
    stored.path.write_text(f"{panel.view.value}\nsize 4, plain\n", encoding="utf-8")
    panel.controls["size"].value = 5
    panel.controls["size"].value = 4
    assert done(panel) == "size 4, plain"
    panel.close()
    assert widgets() == before


def test_reset_shows_the_stored_view_again_and_stops_what_is_under_way(stored, monkeypatch):
    monkeypatch.setattr(base, "view_path", lambda kind: stored.path)
    monkeypatch.setattr(SlowToy, "shipped", True)
    toy = SlowToy()
    toy.hold = True
    toy.controls["size"].value = 7
    until(lambda: not toy.cancel_button.disabled)
    toy.reset_button.click()
    assert toy.words.endswith("(Stored result of these settings.)") and toy.values["size"] == 4
    until(toy.worker.future.done)
    assert toy.cancel_button.disabled and "evolq-stale" not in toy.view._dom_classes


def test_a_stored_view_is_for_the_default_values_only(stored):
    assert Shipped(size=5).words == "size 5, plain"
    assert Shipped(size=4).words.startswith("size 4 · kept")
    words = Shipped(rate=5.0, size=4).words
    assert words.startswith("rate 5 is outside") and words.endswith("size 4, plain")


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"no picture\nwords"])
def test_a_missing_or_damaged_stored_view_is_computed(stored, content):
    stored.path.unlink()
    if content is not None:
        stored.path.write_bytes(content)
    panel = Shipped()
    assert panel.words == "size 4, plain" and 'aria-label="Size 4."' in panel.view.value


def test_a_clamped_value_that_is_the_default_is_told_beside_the_stored_view(stored, monkeypatch):
    monkeypatch.setattr(Shipped, "defaults", lambda self: self.values)
    words = Shipped(size=99).words
    assert words.startswith("size 99 is outside 2 to 8; using 8. size 4 · kept")


# What a page without widgets shows


def test_the_mimebundle_has_the_widget_and_a_picture_with_alt_text():
    panel = QuantizerPanel()
    bundle = panel._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.ui.model_id
    html = bundle["text/html"]
    assert f'<figure><img alt="{escape(alt_of(panel))}" src="data:image/svg+xml;base64,' in html
    assert panel.words in unescape(html) and "Kernel restarted" not in html
    assert html.endswith("The controls appear when you run this cell.</p>")


# The worker by itself


def test_a_job_that_follows_lets_the_one_under_way_end_and_drops_those_between():
    gate, seen = threading.Event(), []
    worker = Worker(0.0, lambda fraction: None, lambda error: None)

    def job(number):
        def run(tick):
            gate.wait(SECONDS)
            tick(1.0)
            seen.append(number)

        return run

    worker.follow(job(0))
    until(worker.future.running)
    for number in (1, 2, 3):
        worker.follow(job(number))
    gate.set()
    worker.wait_until_done(SECONDS)
    assert seen == [0, 3]
    worker.close()


def test_the_worker_tells_progress_and_how_a_job_ended():
    told, ended = [], []
    worker = Worker(0.0, told.append, ended.append)
    worker.request(lambda tick: tick(0.5))
    worker.wait_until_done(SECONDS)
    assert told == [0.0, 0.5] and ended == [None]

    def fails(tick):
        raise OSError("disk")

    worker.request(fails)
    worker.wait_until_done(SECONDS)
    assert isinstance(ended[-1], OSError)
    worker.close()
    worker.cancel()  # after the end: nothing happens


def test_a_cancelled_job_stops_at_its_next_tick_and_says_so_once():
    begun, ended = threading.Event(), []
    worker = Worker(0.0, lambda fraction: None, ended.append)

    def endless(tick):
        begun.set()
        while True:
            tick(0.5)
            time.sleep(0.001)

    worker.request(endless)
    assert begun.wait(SECONDS)
    worker.cancel()
    worker.cancel()
    worker.wait_until_done(SECONDS)
    assert [type(error) for error in ended] == [Cancelled]
    worker.close()


# The fixture that this file relies on


def test_an_exception_in_a_callback_is_heard(caplog):
    button = W.Button()
    button.on_click(lambda _: 1 / 0)
    button.click()
    assert [r.getMessage() for r in caplog.records if "Exception in callback" in r.getMessage()]
    caplog.clear()  # so that the fixture does not hear it


def test_an_exception_in_a_timer_is_heard(caplog):
    async def fail():
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.01)

    asyncio.run(fail())
    assert [r.getMessage() for r in caplog.records if "Exception in callback" in r.getMessage()]
    caplog.clear()
