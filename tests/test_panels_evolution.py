"""EvolutionPanel without a browser: controls, buttons, bad values, errors, leaks; and its toy."""

import asyncio
import math
import threading
import time
from html import unescape

import ipywidgets as W
import pytest
import torch
from conftest import until
from traitlets import TraitError

from evolq_lite.landscape import JaggedBowl
from evolq_lite.objective import Objective
from evolq_lite.panels import EvolutionPanel, Panel, evolution
from evolq_lite.panels.drawing import Drawing
from evolq_lite.panels.evolution import BLOCK, TOY, Run
from evolq_lite.search import EvolQ, minimize

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")
SECONDS = 60  # a wait that ends earlier where all is well
PAPER = {"landscape": TOY, "population": 15, "tournament": 10, "mutation": 1e-3, "seed": 0}


@pytest.fixture(autouse=True)
def at_full_speed(monkeypatch):
    """No waiting for an eye to follow."""
    monkeypatch.setattr(evolution, "PACE", 0.0)


class Sketch(EvolutionPanel):
    """The panel without its picture, which takes a while; counts what it drew."""

    drawn = 0

    def draw(self, result, **values):
        self.drawn += 1
        return Drawing("A picture."), result.words()


def done(panel: EvolutionPanel) -> str:
    """The words of the status line when the job under way has ended."""
    panel.worker.wait_until_done(SECONDS)
    return panel.words


def button(panel: EvolutionPanel, word: str) -> W.Button:
    """The button with a word on it."""
    (found,) = (widget for widget in buttons(panel.ui) if widget.description == word)
    return found


def buttons(widget: W.Widget) -> list[W.Button]:
    """All buttons in a widget, wherever they lie."""
    if isinstance(widget, W.Button):
        return [widget]
    return [b for child in getattr(widget, "children", ()) for b in buttons(child)]


def press(panel: EvolutionPanel, *words: str) -> str:
    """Press buttons one after another, each when the last has done its work."""
    for word in words:
        button(panel, word).click()
        done(panel)
    return panel.words


def path(panel: EvolutionPanel) -> list[float]:
    """The values of all candidates."""
    return [child.value for child in panel.running.children]


def alt(panel: EvolutionPanel) -> str:
    """The alt text of the picture."""
    found = unescape(panel.view.value.split('aria-label="')[1].split('"')[0])
    assert len(found.split()) <= 40
    return found


# The toy


def test_the_toy_is_an_objective_and_jagged():
    toy = JaggedBowl()
    assert isinstance(toy, Objective)
    assert toy(toy.start[None]).shape == (1,) and toy(toy.start.repeat(7, 1)).shape == (7,)
    near = toy.start + torch.linspace(-1e-3, 1e-3, 401)[:, None] * torch.tensor([1.0, -1.0])
    steps = toy(near).diff()
    assert steps.abs().max() > 20 * steps.abs().median()  # it jumps where a rounding flips
    assert (steps > 0).any() and (steps < 0).any()


def test_on_the_toy_the_paper_s_width_gets_out_of_the_pit_and_a_small_one_does_not():
    toy, found = JaggedBowl(), {}
    value = float(toy(toy.start[None])[0])
    for step in (1e-4, 1e-3, 3e-2):
        searches = [EvolQ(toy.start, value, step, seed=seed) for seed in range(5)]
        found[step] = sum(minimize(toy, search, 100)[1] for search in searches) / 5
    assert found[1e-3] < 0.4 * value and found[1e-4] > 0.9 * value
    assert found[3e-2] > 2 * found[1e-3]


def test_a_run_is_the_library_s_search():
    run, toy = Run(PAPER, JaggedBowl()), JaggedBowl()
    search = EvolQ(toy.start, float(toy(toy.start[None])[0]), 1e-3, seed=0)
    values: list[float] = []
    minimize(toy, search, 40, lambda vector, value: values.append(value))
    for _ in range(40):
        run.step()
    assert [child.value for child in run.children] == values
    assert run.search.best[1] == search.best[1]
    assert sum(copies for *_, copies in run.members()) == 15
    for child in run.children:
        assert (child.vector - child.parent).abs().max() <= 1e-3 + 1e-8
        assert float(toy(child.parent[None])[0]) == child.parent_value
        assert child.entered or not child.best


# Controls and buttons


def test_it_opens_with_the_paper_s_settings_and_fifteen_copies_of_the_start():
    assert EvolutionPanel("other", made=7).words.startswith("Candidate 7 ")
    panel = EvolutionPanel()
    assert panel.values == PAPER and panel.generation == 0
    assert panel.words.endswith("Copies of the start in the population: 15 of 15.")
    assert "after 0 candidates" in alt(panel)
    assert 'role="status"' in panel.status.value


def test_step_makes_one_candidate_and_tells_its_fate():
    panel = EvolutionPanel()
    view = panel.view.value
    words = press(panel, "Step")
    assert panel.generation == 1 and words.startswith("Candidate 1 has fitness ")
    assert panel.view.value != view and "after 1 candidates" in alt(panel)
    last = panel.running.children[-1]
    assert last.verdict in words and f"{last.value:.5f}" in words
    press(panel, "Step")
    accepted = sum(child.best for child in panel.running.children)
    assert panel.generation == 2 and f"Accepted: {accepted}." in panel.words


def test_every_control_begins_anew_and_changes_the_search(monkeypatch):
    monkeypatch.setattr(evolution, "block", Flat)
    monkeypatch.setattr(evolution, "network", lambda: None)
    panel = Sketch()
    moves = {"population": 3, "tournament": 1, "mutation": 5e-3, "seed": 7, "landscape": BLOCK}
    for name, value in moves.items():
        for _ in range(20):
            button(panel, "Step").click()
        done(panel)
        before = path(panel)
        panel.controls[name].value = value
        assert "No candidate yet" in done(panel) and panel.generation == 0, name
        for _ in range(20):
            button(panel, "Step").click()
        done(panel)
        assert len(path(panel)) == 20 and path(panel) != before, name
    assert "of 3." in panel.words


class Flat:
    """An objective that stands for the real block: the sum of four scales."""

    start = torch.full((4,), 0.1)

    def __call__(self, population):
        return population.sum(1)


def test_play_goes_on_until_it_has_made_its_candidates_with_pictures_in_between(monkeypatch):
    monkeypatch.setattr(evolution, "PICTURE", 0.0)
    monkeypatch.setattr(evolution, "PLAY", 12)
    panel = Sketch()
    drawn = panel.drawn
    press(panel, "Play")
    assert panel.generation == 12 and panel.drawn == drawn + 12
    assert panel.words.startswith("Candidate 12 ") and panel.bar.value == 1.0
    press(panel, "Play", "Step")
    assert panel.generation == 25


@pytest.mark.parametrize("word", ["Pause", "Cancel"])
def test_pause_and_cancel_obey_at_once_and_step_goes_on(monkeypatch, word):
    monkeypatch.setattr(evolution, "PACE", 0.05)
    panel = Sketch()
    button(panel, "Play").click()
    assert panel.words == "Playing …"
    until(lambda: panel.generation >= 3)
    assert not panel.cancel_button.disabled and panel.bar.layout.visibility == "visible"
    made, began = panel.generation, time.monotonic()
    (panel.cancel_button if word == "Cancel" else button(panel, word)).click()
    words = done(panel)
    assert time.monotonic() - began < 2 and panel.generation <= made + 2  # 0.5 s when not busy
    assert words.startswith("Cancelled" if word == "Cancel" else "Candidate")
    assert panel.cancel_button.disabled and panel.bar.layout.visibility == "hidden"
    stopped = panel.generation
    press(panel, "Step")
    assert panel.generation == stopped + 1 and panel.words.startswith(f"Candidate {stopped + 1} ")
    press(panel, "Pause", "Pause")  # nothing to pause
    assert panel.generation == stopped + 1


def test_step_while_playing_stops_playing(monkeypatch):
    monkeypatch.setattr(evolution, "PACE", 0.05)
    panel = Sketch()
    button(panel, "Play").click()
    until(lambda: panel.generation >= 2)
    made = panel.generation
    press(panel, "Step")
    assert made < panel.generation <= made + 2


def test_reset_and_controls_stop_playing_and_begin_anew(monkeypatch):
    monkeypatch.setattr(evolution, "PACE", 0.05)
    panel = Sketch()
    for stop in (
        lambda: button(panel, "Restart").click(),
        lambda: setattr(panel.controls["seed"], "value", 5),
    ):
        button(panel, "Play").click()
        until(lambda: panel.generation >= 2)
        stop()
        assert "No candidate yet" in done(panel) and panel.generation == 0
    press(panel, "Step")
    assert panel.generation == 1


def test_clicks_that_come_fast_add_up():
    panel = Sketch()

    async def clicks() -> None:
        for _ in range(5):
            button(panel, "Step").click()
        end = time.monotonic() + SECONDS
        while panel.generation < 5:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    asyncio.run(clicks())
    assert done(panel).startswith("Candidate 5 ") and panel.generation == 5


def test_a_control_that_moves_and_comes_back_begins_anew():
    panel = Sketch()
    press(panel, "Step")

    async def there_and_back() -> None:
        panel.controls["seed"].value = 1
        panel.controls["seed"].value = 0
        while panel.worker.timer is not None or not panel.worker.future.done():
            await asyncio.sleep(0.01)

    asyncio.run(there_and_back())
    assert "No candidate yet" in panel.words and panel.generation == 0


# The same values, the same picture


def test_the_same_seed_gives_the_same_picture_and_words_and_another_gives_others():
    one, two = EvolutionPanel("one", made=15), EvolutionPanel("two", made=15)
    assert one.view.value == two.view.value and one.words == two.words
    other = Sketch("other", made=15, seed=3)
    assert path(one) == path(two) != path(other)
    for word in ("Restart", "Step", "Step", "Step"):
        button(one, word).click()
    done(one)
    assert path(one) == path(two)[:3]


def test_the_real_block_is_played_too():
    panel = EvolutionPanel(landscape=BLOCK)
    view, words = panel.view.value, panel.words
    assert "blocks.5" in alt(panel) and words.endswith("15 of 15.")
    assert len(panel.running.start) == 192
    press(panel, "Step")
    assert panel.view.value != view and panel.words != words
    last = panel.running.children[-1]
    again = panel.running.objective(last.vector[None])
    assert last.value == pytest.approx(float(again[0]), abs=1e-4)  # kernels differ by chunk


# Values that are hostile


@pytest.mark.parametrize(
    "name, asked, taken",
    [
        ("population", 0, 1),
        ("population", -5, 1),
        ("population", 10**9, 60),
        ("tournament", 0, 1),
        ("tournament", 61, 60),
        ("mutation", 0.0, 1e-5),
        ("mutation", -1.0, 1e-5),
        ("mutation", 5.0, 0.1),
        ("mutation", math.inf, 0.1),
        ("seed", -1, 0),
        ("seed", 1000, 99),
    ],
)
def test_values_out_of_range_are_clamped_with_a_word(name, asked, taken):
    panel = Sketch()
    panel.controls[name].set_state({"value": asked})  # as a browser sends it
    words = done(panel)
    assert panel.controls[name].value == pytest.approx(taken)
    assert "is outside" in words and f"using {taken:g}" in words
    press(panel, "Step")
    assert panel.generation == 1


def test_no_number_is_the_last_good_one_and_no_landscape_is_none():
    panel = Sketch(mutation=2e-3)
    panel.controls["mutation"].set_state({"value": math.nan})
    done(panel)
    assert panel.controls["mutation"].value == pytest.approx(2e-3)
    with pytest.raises(TraitError):
        panel.controls["landscape"].value = "the moon"
    assert panel.values["landscape"] == TOY
    press(panel, "Step")
    assert panel.generation == 1
    with pytest.raises(ValueError, match="no control 'cycles'"):
        EvolutionPanel(cycles=3)
    for made in (-1, 2.5, "many"):
        with pytest.raises(ValueError, match=r"made is .*; give a whole number of candidates"):
            EvolutionPanel(made=made)


def test_another_landscape_clears_the_picture_at_once(monkeypatch):
    """The real block takes a second to come: the toy's picture does not stand there meanwhile."""
    panel, waiting = EvolutionPanel(), threading.Event()
    make = evolution.objective_of

    def late(landscape, tick):
        assert waiting.wait(SECONDS)
        return make(TOY, tick)

    monkeypatch.setattr(evolution, "objective_of", late)
    panel.controls["landscape"].value = BLOCK
    assert "Empty axes: blocks.5 of the ViT is being prepared." in alt(panel)
    waiting.set()
    done(panel)
    assert "Empty axes" not in alt(panel)


@pytest.mark.parametrize(
    "population, tournament, mutation", [(1, 1, 1e-5), (60, 60, 0.1), (1, 60, 0.1), (60, 1, 1e-5)]
)
def test_extremes_can_be_drawn(population, tournament, mutation):
    sizes = {"population": population, "tournament": tournament}
    panel = EvolutionPanel(made=8, mutation=mutation, **sizes)
    assert panel.generation == 8 and f"of {population}." in panel.words


# What fails


class Breaking(JaggedBowl):
    """A toy whose evaluation fails from the second call on: it raises, or is no finite number."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, population):
        self.calls += 1
        if self.calls > 1 and self.how == "raise":
            raise RuntimeError("no <memory> left")
        values = super().__call__(population)
        return values * float(self.how) if self.calls > 1 else values


def test_an_objective_that_raises_is_told_and_the_panel_goes_on(monkeypatch):
    panel = Sketch()
    with monkeypatch.context() as patch:
        patch.setattr(evolution, "objective_of", lambda landscape, tick: Breaking("raise"))
        press(panel, "Restart")
        for word in ("Step", "Play"):
            words = press(panel, word)
            assert words.startswith("RuntimeError: no <memory> left. ") and "Step" in words
            assert "&lt;memory&gt;" in panel.status.value and panel.cancel_button.disabled
    press(panel, "Restart", "Step")  # not the hundred that Play was asked for
    assert panel.words.startswith("Candidate 1 ") and panel.generation == 1


def test_a_block_that_cannot_be_loaded_is_told_and_tried_again(monkeypatch):
    def missing():
        raise ValueError("data/typefaces-vit.safetensors is missing; restore it")

    panel = Sketch()
    monkeypatch.setattr(evolution, "network", missing)
    panel.controls["landscape"].value = BLOCK
    assert done(panel).startswith("ValueError: data/typefaces-vit.safetensors is missing; restore")
    monkeypatch.setattr(evolution, "network", lambda: None)
    monkeypatch.setattr(evolution, "block", Flat)
    assert press(panel, "Step").startswith("Candidate 1 ")


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_candidate_that_fails_is_rejected_in_words_and_picture(monkeypatch, how):
    monkeypatch.setattr(evolution, "objective_of", lambda landscape, tick: Breaking(how))
    panel = EvolutionPanel(population=4, made=2)
    assert "dropped: its evaluation failed" in panel.words
    assert "Accepted: 0." in panel.words and "4 of 4." in panel.words


# Closing


def test_close_takes_every_widget_and_the_thread_away_also_while_playing():
    before, threads = set(W.widget._instances), threading.active_count()
    panel = Sketch()
    button(panel, "Play").click()
    panel.close()
    until(lambda: threading.active_count() <= threads)
    assert set(W.widget._instances) == before and panel not in Panel.alive
    panel.close()  # twice does no harm


def test_a_cell_that_is_run_again_leaks_nothing():
    Sketch()
    until(lambda: len(threads_of_panels()) == 1)
    before = len(W.widget._instances)
    for _ in range(5):
        button(Sketch(), "Step").click()
    until(lambda: len(threads_of_panels()) == 1)
    assert len(W.widget._instances) == before


def threads_of_panels() -> list[threading.Thread]:
    """All threads of panels."""
    return [t for t in threading.enumerate() if t.name.startswith("evolq-panel")]


def test_every_control_and_button_has_a_name_and_a_tooltip():
    panel = Sketch()
    words = ("Step", "Play", "Pause", "Restart")
    for widget in (*panel.controls.values(), *(button(panel, word) for word in words)):
        assert widget.description and widget.tooltip
        assert any(name.startswith("evolq-") for name in widget._dom_classes)


# The map: trails, the pits around the best, and what leaves it


def toy_run(*places: tuple[float, float, bool]) -> Run:
    """A run on the toy with children at places, which joined the population or not."""
    values = {"mutation": 1e-3, "population": 3, "tournament": 3, "seed": 0}
    run = Run(values, JaggedBowl())
    for x, y, joined in places:
        vector = torch.tensor([x, y])
        run.children.append(evolution.Child(vector, 1.0, run.start, 1.2, joined, False))
    return run


def test_a_child_that_leaves_the_map_is_drawn_at_its_edge_and_said():
    inside, outside = (0.077, 0.063, True), (0.5, 0.06, False)
    assert "outside the map" not in str(evolution.draw_toy(toy_run(inside)))
    picture = str(evolution.draw_toy(toy_run(outside)))
    assert "outside the map" in picture and "child, dropped" in picture


def test_earlier_children_leave_trails_and_dropped_ones_a_mark():
    last = (0.0765, 0.0632, False)
    bare = str(evolution.draw_toy(toy_run(last)))
    joined = str(evolution.draw_toy(toy_run((0.077, 0.063, True), last)))
    dropped = str(evolution.draw_toy(toy_run((0.077, 0.063, False), last)))
    assert joined.count("<polyline") == bare.count("<polyline") + 2  # a line and its dark edge
    assert dropped.count("<path") == bare.count("<path") + 1


def test_beside_the_map_lies_the_neighborhood_of_the_best():
    panel = EvolutionPanel(made=5)
    assert "Around the best, 4 times larger" in panel.view.value
    assert "where its children can be" in panel.view.value
    wide = EvolutionPanel("wide", made=1, mutation=0.05)
    assert "Around the best, 1 times larger" in wide.view.value
