"""C10: what does racing save, and what does it cost? Our own question, about our own deviation.

Racing drops a candidate once its first batches leave it no chance (`racing.py`). Three searches
start alike: the paper's, which evaluates everything; a race with as many candidates, which is
cheaper; and a race that goes on until it has computed as many batches as the paper's search.

The paper's search also keeps every candidate's loss on each batch. From these, decisions at other
levels follow without a forward pass: what would have been computed, and which candidates that the
paper accepts would have been dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.evolve import Evaluated, Visit, evaluations_of, evolve
from evolq_lite.experiments.cells import Claim, Tables, measure_gain, measure_loss
from evolq_lite.experiments.plots import NAMES, plot_gains
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import Setting, measure_test, prepare, tell_search
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture
from evolq_lite.objective import BlockObjective, Population, Values
from evolq_lite.racing import LEVEL, Losses, run_race

START, PAPER, RACE, EQUAL = "start", "paper", "race", "race, equal cost"
LEVELS = (0.2, 0.1, LEVEL, 0.02, 0.01)
MANY = 1000  # passes: more than any race needs to reach the paper's cost


def cells(quick: bool) -> list[Cell]:
    """The start and three searches, at two bit-widths."""
    sizes = {
        "images": 60 if quick else 1000,
        "batch": 10 if quick else 100,
        "passes": 1 if quick else 10,
        "every": 21 if quick else 1,
    }
    return [
        {"network": "vit", "weight_bits": bits, "search": search, "seed": seed, **sizes}
        for bits in ((3,) if quick else (4, 3))
        for search in (START, PAPER, RACE, EQUAL)
        for seed in ((0,) if quick else range(5))
    ]


def run(cell: Cell) -> Result:
    """Search as the cell says; test."""
    setting = prepare(
        cell["network"], cell["images"], cell["seed"], QuantConfig(cell["weight_bits"])
    )
    told: Result = {}
    if cell["search"] == PAPER:
        told = search_and_keep(setting, config_of(cell, racing=False))
    elif cell["search"] != START:
        told = race(setting, cell)
    return {**told, **measure_test(setting, cell["every"])}


def config_of(cell: Cell, racing: bool) -> SearchConfig:
    """The paper's search, maybe as a race; one that is to spend the paper's cost ends later."""
    passes = MANY if cell["search"] == EQUAL else cell["passes"]
    return SearchConfig(passes=passes, seed=cell["seed"], batch=cell["batch"], racing=racing)


def race(setting: Setting, cell: Cell) -> Result:
    """A race in place, to the end of its passes or until it has cost what the paper's search does.

    It is stopped between visits: what the last visit found is in the network.
    """
    budget = evaluations_of(setting.chain, config_of({**cell, "search": RACE}, racing=False))
    history: list[Evaluated] = []
    for event in evolve(
        setting.chain,
        setting.demo.calibration,
        setting.demo.targets,
        config_of(cell, racing=True),
    ):
        if isinstance(event, Evaluated):
            history.append(event)
        elif cell["search"] == EQUAL and sum(e.share for e in history) >= budget:
            break
    # One evaluation more: the best one's loss on each batch, before the first candidate.
    return tell_search(history) | {"cost": sum(event.share for event in history) + 1}


def search_and_keep(setting: Setting, config: SearchConfig) -> Result:
    """The paper's search in place, and what races at several levels would have decided."""
    kept: list[Losses] = []

    def keep(visit: Visit) -> Callable[[Population], Values]:
        objective = BlockObjective(
            setting.chain,
            visit.blocks,
            setting.demo.calibration,
            setting.demo.targets,
            batch=config.batch,
            genome=visit.genome,
        )

        @torch.no_grad()
        def values(population: Population) -> Values:
            found = [torch.stack(list(objective.batch_losses(v))).cpu() for v in population]
            kept.extend(found)
            return torch.stack([losses.mean() for losses in found])

        return values

    events = evolve(
        setting.chain,
        setting.demo.calibration,
        setting.demo.targets,
        config,
        elsewhere=keep,
    )
    history = [event for event in events if isinstance(event, Evaluated)]
    return tell_search(history) | {"cost": len(history), "levels": decide_levels(kept, history)}


def decide_levels(kept: Sequence[Losses], history: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """For each level: the share of batches, and how many accepted candidates would be dropped."""
    out = []
    for level in LEVELS:
        best, shares, lost = kept[0], [], 0
        for losses, event in zip(kept[1:], history[1:], strict=True):
            seen = len(run_race(losses, best, level))
            shares.append(seen / len(best))
            lost += event.accepted and seen < len(best)
            best = losses if event.accepted else best
        out.append({"level": level, "share": sum(shares) / len(shares), "lost": int(lost)})
    return out


def group(results: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Results by setting and search."""
    return {
        f"{NAMES[network]} W{bits}A8": by(found, "search")
        for (network, bits), found in by(results, "network", "weight_bits").items()
    }


def figure(results: pd.DataFrame) -> Picture:
    """What each search gains over its start, one panel for each bit-width."""
    gains = {
        setting: {s: measure_gain(found[START], found[s]) for s in (PAPER, RACE, EQUAL)}
        for setting, found in group(results).items()
    }
    return plot_gains(gains, "Gain over MinMax, with and without racing", same_scale=True)


def verdict(results: pd.DataFrame) -> Verdict:
    """Is a race at the paper's cost significantly ahead of the paper's search, in every setting?"""
    rows, others, shares = [], [], []
    for setting, found in group(results).items():
        paper, equal = found[PAPER], found[EQUAL]
        shares.append(float((found[RACE]["cost"] / paper["cost"].to_numpy()).mean()))
        gain = measure_gain(paper, equal)
        rows.append(
            Row.of(
                f"{setting}: race at equal cost, over the paper's search",
                gain,
                gain.gain > 0 and gain.significant,
            )
        )
        others.append(
            Row.of_loss(
                f"{setting}: race at equal cost, over the paper's search, KL",
                measure_loss(paper, equal, "kl"),
            )
        )
        others.append(
            Row.of(
                f"{setting}: race with as many candidates, over the paper's search",
                measure_gain(paper, found[RACE]),
            )
        )
    ahead = sum(bool(row.holds) for row in rows)
    return Verdict(
        decide(row.holds for row in rows),
        f"On the embedded ViT (Typefaces-62, {count_seeds(results)}), as many candidates cost "
        f"{100 * sum(shares) / len(shares):.0f} % when they race; at equal cost a race gains more "
        f"in {ahead} of {len(rows)} settings.",
        (*rows, *others),
    )


def tables(results: pd.DataFrame) -> Tables:
    """What each search costs and finds; what other levels would decide."""
    rows, levels = [], []
    for setting, found in group(results).items():
        for search in (START, PAPER, RACE, EQUAL):
            mine = found[search]
            searched = search != START
            rows.append(
                {
                    "setting": setting,
                    "search": search,
                    "candidates": f"{mine['evaluations'].mean():.0f}" if searched else "",
                    "cost, evaluations": f"{mine['cost'].mean():.0f}" if searched else "",
                    "loss": f"{mine['fitness'].mean():.5f}" if searched else "",
                    "top-1, %": f"{100 * mine['top1'].mean():.2f}",
                }
            )
        paper = found[PAPER]
        for i, level in enumerate(LEVELS):
            told = [row[i] for row in paper["levels"]]
            levels.append(
                {
                    "setting": setting,
                    "level": f"{level:g}{' (used)' if level == LEVEL else ''}",
                    "batches computed": f"{100 * sum(t['share'] for t in told) / len(told):.0f} %",
                    "accepted ones dropped": f"{sum(t['lost'] for t in told)} of "
                    f"{paper['accepted'].sum():.0f}",
                }
            )
    return {
        "Means over seeds": pd.DataFrame(rows),
        "What races at other levels would have decided about the paper's candidates": pd.DataFrame(
            levels
        ),
    }


CLAIM = Claim(
    "C10",
    "Does dropping candidates early gain at the paper's cost?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R10",
)
