"""R8: what the searches of R12 say of C8 on trained ViT-Tiny and DeiT-Tiny.

Nothing is computed here. R12 runs the paper's search and one by KL at the same cost from each
start, C8's choice among them, and keeps the losses of each test image.
"""

from dataclasses import replace

import pandas as pd

from evolq_lite.experiments import real_starts
from evolq_lite.experiments.c8_beyond import AHEAD, GAIN, START_AHEAD
from evolq_lite.experiments.c12_starts import EVOLQ, KL, NONE
from evolq_lite.experiments.cells import Claim
from evolq_lite.experiments.real_cells import Change, check_of
from evolq_lite.experiments.real_starts import BEST, POOR, Networks, group
from evolq_lite.experiments.results import Cell
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture


def settings_of(results: pd.DataFrame, start: str) -> dict[str, Networks]:
    """By setting: what each search has made of one start."""
    return {setting: found for (setting, at), found in group(results).items() if at == start}


def cells(quick: bool) -> list[Cell]:
    """R12's from both starts, with the seeds for which integers are learned."""
    found = [cell for cell in real_starts.cells(quick) if cell["start"] in (POOR, BEST)]
    learned = {cell["seed"] for cell in found if cell["start"] == BEST}
    return [cell for cell in found if cell["seed"] in learned]


def figure(results: pd.DataFrame) -> Picture:
    """Both searches from both starts, one panel for each network and bit-width."""
    title = f"{check_of(results)}: {EVOLQ} and {KL}"
    return real_starts.draw(results, (POOR, BEST), (EVOLQ, KL), title)


def verdict(results: pd.DataFrame) -> Verdict:
    """Is C8's choice ahead of the paper's search in top-1 and in KL, in every setting?

    That is learned integers, and EvolQ by KL.
    """
    images = int(results["test_images"].iloc[0])
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
        f"On a {check_of(results)} ({count_seeds(results)}, one pass), C8's choice beats the "
        f"paper's search in {sum(ahead)} of {len(ahead)} settings (top-1 and KL), its own start in "
        f"{sum(gained)} (KL).",
        tuple(rows),
    )


CLAIM = Claim(
    "R8",
    "Does this repo's best start, searched, beat the paper's search, on ViT-Tiny and DeiT-Tiny?",
    cells,
    real_starts.run,
    figure,
    verdict,
    note="Both searches cost the same. The integers of the better start were learned before, which "
    "takes a quarter of an hour of one core.",
    reads="R12",
)
