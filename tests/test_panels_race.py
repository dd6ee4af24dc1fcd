"""RacePanel: a bet first, equal cost for all, the same race for the same seed."""

from html import unescape

import pytest
import torch

from evolq_lite.landscape import JaggedBowl
from evolq_lite.panels import RacePanel, race
from evolq_lite.panels.evolution import TOY
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


def test_every_runner_asks_and_tells():
    toy = JaggedBowl()
    first = float(toy(toy.start[None])[0])
    for name, make in race.RUNNERS.items():
        assert isinstance(make(toy.start, first, 0), Optimizer), name


def test_a_runner_whose_package_is_missing_stays_at_home(monkeypatch):
    def missing(start, value, seed):
        raise ValueError("this search needs the package cmaes")

    monkeypatch.setitem(race.RUNNERS, "separable CMA-ES", missing)
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
