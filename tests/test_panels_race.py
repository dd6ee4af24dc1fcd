"""RacePanel: a bet first, equal cost for all, the same race for the same seed."""

from html import unescape

import pytest
import torch

from evolq_lite.descent import COST_OF_GRADIENT, descend
from evolq_lite.landscape import JaggedBowl
from evolq_lite.panels import RacePanel, race
from evolq_lite.panels.evolution import BLOCK, TOY
from evolq_lite.search import Optimizer

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")
SECONDS = 120


@pytest.fixture(autouse=True)
def at_full_speed(monkeypatch):
    """No time for an eye to follow."""
    monkeypatch.setattr(race, "SECONDS", 0.0)
    torch.set_num_threads(1)


def run(panel: RacePanel) -> str:
    """Press Race and wait; returns the words."""
    panel.race_button.click()
    panel.worker.wait_until_done(SECONDS)
    return panel.words


def alt_of(panel: RacePanel) -> str:
    return unescape(panel.view.value.split('aria-label="')[1].split('"')[0])


def test_there_is_no_race_without_a_bet():
    panel = RacePanel()
    assert "Bet on a winner, then press Race." in panel.words
    assert "starting line" in alt_of(panel) and panel.view.value.count("<svg width=") == 2
    assert run(panel).startswith("Bet on a winner first")
    assert not panel.wins


def test_the_winner_is_named_and_the_bet_placed():
    panel = RacePanel(bet="EvolQ (paper)", budget=20)
    words = run(panel)
    winner = words.partition(" wins, seed 0")[0]
    assert winner in race.RUNNERS and panel.wins == {(TOY, winner): 1}
    assert ("You won your bet" in words) == (winner == "EvolQ (paper)")
    assert "after 20 forward passes each" in alt_of(panel) and len(alt_of(panel).split()) <= 40
    panel.controls["bet"].value = winner
    assert panel.words == "Press Race."
    words = run(panel)  # the same seed: the same race
    assert f"{winner} wins" in words and "You won your bet." in words
    assert f"Wins on this landscape so far: {winner} 2." in words


def test_all_runners_spend_the_same_and_never_get_worse():
    panel = RacePanel(bet="SPSA", budget=12)
    found = panel.compute(lambda fraction: None, **panel.values)
    assert set(found.best) == set(race.RUNNERS) and found.cost == 12
    for values in found.best.values():
        assert len(values) == 13 and values == sorted(values, reverse=True)
    order = found.ranking()
    assert found.best[order[0]][-1] == min(values[-1] for values in found.best.values())


def test_every_search_asks_and_tells():
    toy = JaggedBowl()
    first = float(toy(toy.start[None])[0])
    for name, make in race.SEARCHES.items():
        assert isinstance(make(toy.start, first, 0), Optimizer), name


def test_every_runner_pays_for_what_it_computes(monkeypatch):
    """A candidate costs one forward pass, a gradient three, and neither is had before it is due."""
    toy, spent = JaggedBowl(), 0
    first = float(toy(toy.start[None])[0])
    forward, gradient = JaggedBowl.__call__, JaggedBowl.gradient

    def counted(self, population):
        nonlocal spent
        spent += len(population)
        return forward(self, population)

    def counted_gradient(self, vector):
        nonlocal spent
        before = spent
        found = gradient(self, vector)
        spent = before + COST_OF_GRADIENT  # whatever it took to compute
        return found

    monkeypatch.setattr(JaggedBowl, "__call__", counted)
    monkeypatch.setattr(JaggedBowl, "gradient", counted_gradient)
    runners = race.line_up(toy, first, seed=0)
    assert tuple(runners) == race.RUNNERS and len(runners) == 8
    for name, runner in runners.items():
        spent = 0
        for paid in range(1, 13):
            runner.spend()
            assert spent == paid if name != race.ADAM else spent == paid - paid % COST_OF_GRADIENT


def test_adam_in_the_race_is_the_descent_of_the_experiments():
    toy = JaggedBowl()
    first = float(toy(toy.start[None])[0])
    told = []
    best, value = descend(toy, "adam", race.ADAM_STEP, 60, lambda vector, found: told.append(found))
    runner = race.Gradient(toy, first)
    curve = [runner.spend() for _ in range(60)]
    assert curve[2::3] == [min(told[: i + 1]) for i in range(20)] and curve[-1] == value < first
    assert curve[:2] == [first, first]
    assert float(toy(best[None])[0]) == pytest.approx(value)


def test_the_toys_gradient_is_the_bowls():
    """The straight-through estimator takes round for the identity, and sees no pit."""
    toy = JaggedBowl()
    gradient, value = toy.gradient(toy.start)
    bowl = 2 * (toy.start - toy.centre) / toy.reach**2
    torch.testing.assert_close(gradient, bowl)
    assert value == float(toy(toy.start[None])[0])


def test_on_the_real_block_the_words_say_that_gradients_are_simulated():
    panel = RacePanel()
    for landscape in (TOY, BLOCK):
        result = race.Race(landscape, 1.0, list(race.RUNNERS))
        words = panel.draw(result, **{**panel.values, "landscape": landscape})[1]
        assert (race.SIMULATED in words) == (landscape == BLOCK)


def test_a_runner_whose_package_is_missing_stays_at_home(monkeypatch):
    def missing(start, value, seed):
        raise ValueError("this search needs the package cmaes")

    monkeypatch.setitem(race.SEARCHES, "separable CMA-ES", missing)
    words = run(RacePanel(bet="SPSA", budget=10))
    assert "Not at the start, for lack of a package: separable CMA-ES." in words


def test_a_race_can_be_cancelled(monkeypatch):
    monkeypatch.setattr(race, "SECONDS", 60.0)
    panel = RacePanel(bet="SPSA", budget=200)
    panel.race_button.click()
    panel.cancel_button.click()
    panel.worker.wait_until_done(SECONDS)
    assert panel.words.startswith("Cancelled") and not panel.race_button.disabled
    assert not panel.wins
