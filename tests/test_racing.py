"""Racing: candidates that are dropped before all batches have been seen."""

import json
from dataclasses import replace
from importlib import import_module
from math import sqrt

import pytest
import torch
from scipy import stats
from test_search import make_problem, run, state_hash

from evolq_lite import BlockObjective, RandomSearch, SearchConfig, evolve
from evolq_lite.cli import main
from evolq_lite.racing import Race, is_hopeless
from evolq_lite.runs.folder import RunFolder

PLAIN = SearchConfig(passes=3, cycles=4, batch=2)  # 9 images: batches of 2, 2, 2, 3
RACING = replace(PLAIN, racing=True)
racing = import_module("evolq_lite.racing")


def test_the_decision_is_students_on_batches_drawn_without_replacement():
    differences = torch.tensor([0.3, 0.1, 0.4, 0.2])
    error = float(differences.std()) * sqrt(1 / 4 - 1 / 10)
    chance = stats.t.cdf(-float(differences.mean()) / error, 3)
    assert is_hopeless(differences, 10, chance * 1.001)
    assert not is_hopeless(differences, 10, chance * 0.999)
    assert not is_hopeless(-differences, 10, 0.5), "ahead"


@pytest.mark.parametrize(
    ("differences", "total", "dropped"),
    [
        ([9.0], 10, False),  # one batch has no standard deviation
        ([9.0, 9.1], 2, False),  # all are known: nothing to save
        ([9.0, 9.0], 10, True),  # behind by the same everywhere
        ([0.0, 0.0], 10, False),  # the same network
        ([float("nan")], 10, True),
        ([-1.0, float("inf")], 10, True),
    ],
)
def test_decisions_at_the_edges(differences, total, dropped):
    assert is_hopeless(torch.tensor(differences), total) is dropped


def test_a_candidate_that_would_win_is_rarely_dropped():
    """Ten batches, true lead half a standard deviation of the differences: at most one in ten."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 10, generator=generator)
    rows += -0.5 - rows.mean(1, keepdim=True)

    def dropped(row):
        return any(is_hopeless(row[:k], 10) for k in range(1, 11))

    assert 0 < sum(dropped(row) for row in rows) < 200
    behind = [dropped(row + 1.5) for row in rows[:500]]
    assert sum(behind) > 350, "and one as far behind usually is"


def test_some_are_dropped_and_what_is_accepted_was_seen_whole():
    chain, history, fitness, _, (images, targets) = run(RACING)
    dropped = [event for event in history if event.share < 1]
    assert dropped and len(dropped) < len(history) - 1
    assert {event.share for event in history} <= {0.25, 0.5, 0.75, 1.0}
    best = history[0].fitness
    for event in history[1:]:
        assert event.accepted == (event.fitness < best)
        assert event.share == 1 or event.fitness >= best, "a forecast never beats the best"
        best = min(best, event.fitness)
    objective = BlockObjective(chain, "blocks.0", images, targets, batch=2)
    assert fitness == best == float(objective(objective.start[None])[0]) < history[0].fitness


@pytest.mark.parametrize("config", [RACING, replace(RACING, parallel=2, mutation="adaptive")])
def test_a_race_that_drops_nobody_is_the_papers_search(config, monkeypatch):
    monkeypatch.setattr(racing, "is_hopeless", lambda *_: False)
    chain, raced, *_ = run(config)
    other, plain, *_ = run(replace(config, racing=False))
    assert state_hash(chain) == state_hash(other)
    assert [replace(e, seconds=0.0) for e in raced] == [replace(e, seconds=0.0) for e in plain]


@pytest.mark.parametrize("config", [RACING, replace(RACING, parallel=2)])
def test_a_replayed_race_ends_like_one_that_was_not_stopped(config):
    whole, history, fitness, *_ = run(config)
    for stop in range(0, len(history) + 1, 2):
        part, images, targets = make_problem()
        events = list(evolve(part, images, targets, config, 0.02, past=history[:stop]))
        again = [replace(e, seconds=0.0) for e in events if hasattr(e, "share")]
        assert again == [replace(e, seconds=0.0) for e in history]
        assert state_hash(part) == state_hash(whole) and events[-1].fitness == fitness


class Batches:
    """An objective whose losses on five batches are the vector itself."""

    def batch_losses(self, vector):
        yield from vector


def test_failed_candidates_and_failed_starts():
    five, nan = torch.arange(1.0, 6.0), float("nan")
    race, failed = Race(), torch.tensor([nan, 1, 1, 1, 1])
    values = race.values(Batches(), RandomSearch(five, 3.0, 0.1), torch.stack([failed, five - 1]))
    assert values[0].isnan() and values[1] == 2
    assert race.take_shares(3) == [1.0, 0.2, 1.0]
    assert race.take_shares(2) == [1.0, 1.0], "told once"
    race, behind = Race(), torch.stack([five + 1, five + 2])
    assert race.values(Batches(), RandomSearch(failed, nan, 0.1), behind).tolist() == [4, 5]
    assert race.take_shares(2) == [1.0, 1.0], "against a failed start nobody is dropped"


def test_too_few_batches_are_refused_before_any_work(tmp_path, capsys):
    chain, images, targets = make_problem()
    with pytest.raises(ValueError, match="9 calibration images in batches of 5 are 2"):
        list(evolve(chain, images, targets, SearchConfig(batch=5, racing=True)))
    out = tmp_path / "run"
    options = ("--calibration-images", "60", "--batch", "30", "--racing", "--out", str(out))
    assert main(["demo", *options]) == 2
    assert "give more images, a smaller batch" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--workers", "2"), "omit --workers and --scheduler, or --racing"),
        (("--search", "bits", "--mean-bits", "3"), "racing True has no effect with search bits"),
    ],
)
def test_racing_is_refused_where_it_means_nothing(options, says, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--racing", "--out", str(out), *options]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_race_on_the_command_line_resumes_and_tells_its_share(
    few_test_images, tmp_path, monkeypatch, capsys
):
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = ("--model", "cnn", "--calibration-images", "80", "--batch", "10", "--passes", "1")
    assert main(["demo", "--racing", *options, "--out", str(whole)]) == 0
    assert "Racing computed " in capsys.readouterr().out
    append, count = RunFolder.append, iter(range(100))

    def interrupted(self, event):
        append(self, event)
        if next(count) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", interrupted)
        assert main(["demo", "--racing", *options, "--out", str(part)]) == 130
    assert main(["demo", "--racing", *options, "--out", str(part), "--resume"]) == 0
    assert len({(out / "scales.safetensors").read_bytes() for out in (whole, part)}) == 1
    told = []
    for out in (whole, part):
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        told.append([(x["fitness"], x.get("share")) for x in lines])
    assert told[0] == told[1] and any(share for _, share in told[0])
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 < summary["batches_share"] < 1
