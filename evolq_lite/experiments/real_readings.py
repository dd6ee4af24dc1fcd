"""R3 and R8: what the searches of R12 say of C3 and C8 on real networks.

Nothing is computed here. R12 runs the paper's search, one by KL and one by gradient from the
same starts at the same cost on trained ViT-Tiny and DeiT-Tiny, and keeps the losses of each test
image. KL decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from evolq_lite.experiments import real_starts
from evolq_lite.experiments.c8_beyond import AHEAD, GAIN, START_AHEAD
from evolq_lite.experiments.c12_starts import ADAM, ADAM_NOTE, EVOLQ, KL, NONE
from evolq_lite.experiments.cells import Claim
from evolq_lite.experiments.real_cells import Change
from evolq_lite.experiments.real_starts import BEST, POOR, SCRIPT, Networks, group
from evolq_lite.experiments.results import Cell
from evolq_lite.experiments.verdicts import UNDECIDED, Row, Verdict, count_seeds, decide


def settings_of(results: pd.DataFrame, start: str) -> dict[str, Networks]:
    """By setting: what each search has made of one start."""
    return {setting: found for (setting, at), found in group(results).items() if at == start}


def scope_of(results: pd.DataFrame, start: str) -> str:
    """What a sentence begins with."""
    seeds = count_seeds(results[results["start"] == start])
    return f"On a 1,000-image check ({seeds}, one pass)"


def judge_gradients(results: pd.DataFrame) -> Verdict:
    """Does EvolQ end below Adam in KL, from MinMax at the same cost, in every setting?

    Whatever the answer, it decides nothing while Adam has a poor step.
    """
    images = int(results["test_images"].iloc[0])
    rows: list[Row] = []
    ahead, behind = [], []
    for (setting, start), found in group(results).items():
        if start not in (POOR, SCRIPT):
            continue
        decides = start == POOR
        label = f"{setting}: {EVOLQ}, over {ADAM}, on {start}"
        change = Change.of(found[ADAM], found[EVOLQ], images)
        rows += change.rows(label, change.kl.better if decides else None)
        if decides:
            ahead.append(change.kl.better)
            behind.append(change.kl.worse)
    return Verdict(
        UNDECIDED,
        f"{scope_of(results, POOR)}, {EVOLQ} from MinMax ends below {ADAM} in KL in "
        f"{sum(ahead)} of {len(ahead)} settings, above it in {sum(behind)}; {ADAM}'s step was too "
        "short.",
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
            change, counts = Change.of(was, now, images), name == AHEAD
            clear = change.top1.gain > 0 and change.top1.significant
            kl, top1, entropy = change.rows(
                f"{setting}: {name}", change.kl.better if counts else None
            )
            rows += [replace(top1, holds=clear if counts else None), kl, entropy]
            if counts:
                ahead.append(clear and change.kl.better)
            elif name == GAIN:
                gained.append(change.kl.better)
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
    note: str,
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
        note=note,
        reads="R12",
    )


GRADIENTS_CLAIM = tell(
    "R3",
    "Does the paper's search end below gradients, on trained ViT-Tiny and DeiT-Tiny?",
    judge_gradients,
    (POOR,),
    (EVOLQ, ADAM),
    f"{ADAM_NOTE} A pass has room for a few of them: together they move a scale by about half a "
    "percent, less than one mutation of the search does.",
)
CHOICE_CLAIM = tell(
    "R8",
    "Does this repo's best start, searched, beat the paper's search, on ViT-Tiny and DeiT-Tiny?",
    judge_choice,
    (POOR, BEST),
    (EVOLQ, KL),
    "Both searches cost the same. The integers of the better start were learned before, which "
    "takes a quarter of an hour of one core.",
    stage_of_choice,
)
