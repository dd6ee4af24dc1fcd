"""R3, R4, R8: what the searches of R12 say of C3, C4 and C8 on real networks.

Nothing is computed here. R12 runs the paper's search, one by KL and one by gradient from the
same starts at the same cost on trained ViT-Tiny and DeiT-Tiny, and keeps the losses of each test
image. KL decides where both searches minimize infoNCE, and the cross-entropy of the labels where
one of them minimizes KL itself.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from evolq_lite.experiments import real_starts
from evolq_lite.experiments.c8_beyond import AHEAD, GAIN, START_AHEAD
from evolq_lite.experiments.c12_starts import ADAM, EVOLQ, KL, NONE
from evolq_lite.experiments.cells import Claim
from evolq_lite.experiments.real_cells import measure_gain, measure_loss
from evolq_lite.experiments.real_starts import BEST, POOR, Networks, group
from evolq_lite.experiments.results import Cell
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide

LOSSES = {"kl": "KL", "cross_entropy": "cross-entropy"}


def settings_of(results: pd.DataFrame, start: str) -> dict[str, Networks]:
    """By setting: what each search has made of one start."""
    return {setting: found for (setting, at), found in group(results).items() if at == start}


def scope_of(results: pd.DataFrame, start: str) -> str:
    """What a sentence begins with."""
    seeds = count_seeds(results[results["start"] == start])
    return f"On a 1,000-image check ({seeds}, one pass)"


def compare_searches(
    found: Networks, setting: str, was: str, now: str, decisive: str, images: int
) -> list[Row]:
    """The second search over the first: top-1 and both losses, of which one decides."""
    rows = [Row.of(f"{setting}: {now}, over {was}", measure_gain(found[was], found[now], images))]
    for loss, name in LOSSES.items():
        change = measure_loss(found[was], found[now], loss)
        holds = change.better if loss == decisive else None
        rows.append(Row.of_loss(f"{setting}: {now}, over {was}, {name}", change, holds))
    return rows


def judge(results: pd.DataFrame, rival: str, loss: str) -> Verdict:
    """Does EvolQ end below a rival in a loss, from MinMax at the same cost, in every setting?"""
    images = int(results["test_images"].iloc[0])
    rows = [
        row
        for setting, found in settings_of(results, POOR).items()
        for row in compare_searches(found, setting, rival, EVOLQ, loss, images)
    ]
    decisive = [row for row in rows if row.holds is not None]
    ahead = [bool(row.holds) for row in decisive]
    behind = [row.interval is not None and row.interval[0] > 0 for row in decisive]
    return Verdict(
        decide(ahead),
        f"{scope_of(results, POOR)}, EvolQ from MinMax ends below {rival} in {LOSSES[loss]} in "
        f"{sum(ahead)} of {len(ahead)} settings, above it in {sum(behind)}.",
        tuple(rows),
    )


def judge_choice(results: pd.DataFrame) -> Verdict:
    """Is C8's choice, learned integers and EvolQ by KL, ahead of the paper's search in both?

    In top-1 and in KL, in every setting, with the seeds for which integers were learned.
    """
    images = int(results["test_images"].iloc[0])
    results = results[results["seed"].isin(results[results["start"] == BEST]["seed"])]
    rows: list[Row] = []
    ahead, gained = [], []
    good = settings_of(results, BEST)
    for setting, found in settings_of(results, POOR).items():
        start, chosen = good[setting][NONE], good[setting][KL]
        for name, was, now in (
            (AHEAD, found[EVOLQ], chosen),
            (START_AHEAD, found[EVOLQ], start),
            (GAIN, start, chosen),
        ):
            gain, kl = measure_gain(was, now, images), measure_loss(was, now, "kl")
            clear, counts = gain.gain > 0 and gain.significant, name == AHEAD
            rows.append(Row.of(f"{setting}: {name}", gain, clear if counts else None))
            label = f"{setting}: {name}, KL"
            rows.append(Row.of_loss(label, kl, kl.better if counts else None))
            if counts:
                ahead.append(clear and kl.better)
            elif name == GAIN:
                gained.append(kl.better)
    return Verdict(
        decide(ahead),
        f"{scope_of(results, BEST)}, C8's choice beats the paper's search in {sum(ahead)} of "
        f"{len(ahead)} settings (top-1 and KL), its own start in {sum(gained)} (KL).",
        tuple(rows),
    )


def stage_of_choice(cell: Cell) -> int:
    """As R12's, which shows its first seed before integers are learned."""
    return max(real_starts.stage_of(cell), 1)


def tell(
    name: str,
    question: str,
    verdict: Callable[[pd.DataFrame], Verdict],
    starts: Sequence[str],
    searches: Sequence[str],
    stage: Callable[[Cell], int] = real_starts.stage_of,
) -> Claim:
    """A claim that is told from R12's results."""
    title = f"1,000-image check: {' and '.join(searches)}"
    return Claim(
        name,
        question,
        real_starts.cells,
        real_starts.run,
        partial(real_starts.draw, starts=starts, searches=searches, title=title),
        verdict,
        stage=stage,
        reads="R12",
    )


GRADIENTS_CLAIM = tell(
    "R3",
    "Does the paper's search end below gradients, on trained ViT-Tiny and DeiT-Tiny?",
    partial(judge, rival=ADAM, loss="kl"),
    (POOR,),
    (EVOLQ, ADAM),
)
LOSSES_CLAIM = tell(
    "R4",
    "Does infoNCE guide the search better than KL, on trained ViT-Tiny and DeiT-Tiny?",
    partial(judge, rival=KL, loss="cross_entropy"),
    (POOR,),
    (EVOLQ, KL),
)
CHOICE_CLAIM = tell(
    "R8",
    "Does this repo's best search beat the paper's, on trained ViT-Tiny and DeiT-Tiny?",
    judge_choice,
    (POOR, BEST),
    (EVOLQ, KL),
    stage_of_choice,
)
