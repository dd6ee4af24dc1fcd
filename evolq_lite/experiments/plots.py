"""Figures that several claims share."""

import math
from collections.abc import Mapping

from matplotlib.ticker import MaxNLocator

from evolq_lite.evaluate import Gain, SeedComparison
from evolq_lite.figures import PETROFF, Picture, new_figure

NAMES = {"vit": "ViT", "cnn": "CNN"}
ACROSS = 3  # panels side by side

Gains = Mapping[str, Mapping[str, Gain]]  # by panel, then by row


def plot_gains(groups: Gains, title: str, same_scale: bool = False) -> Picture:
    """Gains in top-1 as points with 95 % intervals, one panel per group; strokes are seeds.

    `same_scale` gives all panels one axis, for gains that may be compared across panels.
    """
    names = [list(gains) for gains in groups.values()]
    same_rows = all(rows == names[0] for rows in names)
    across = 2 if len(groups) == 4 else min(ACROSS, len(groups))
    down = math.ceil(len(groups) / across)
    height = 0.36 * max(map(len, names)) + 1.1
    picture = new_figure(4.6 * across, height * down + 0.4, describe(groups, title))
    grid = picture.subplots(down, across, squeeze=False, sharex=same_scale, sharey=same_rows)
    for axes, (group, gains) in zip(grid.flat, groups.items()):
        for i, gain in enumerate(gains.values()):
            low, high = (100 * x for x in gain.interval)
            point = 100 * gain.gain
            axes.errorbar(
                point,
                i,
                xerr=[[point - low], [high - point]],
                fmt="o",
                color=PETROFF[0],
                markerfacecolor=PETROFF[0] if gain.significant else "white",
                capsize=3,
            )
            if isinstance(gain, SeedComparison):
                seeds = [100 * g for g in gain.gains]
                axes.plot(seeds, [i + 0.25] * len(seeds), "|", ms=7, mew=1.5, color=PETROFF[1])
        axes.axvline(0, color="0.5", lw=1)
        axes.set_yticks(range(len(gains)), list(gains))
        axes.set_ylim(len(gains) - 0.4, -0.5)
        axes.set_title(group, fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for axes in grid[-1]:
        axes.set_xlabel("gain in top-1, points")
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    several = any(
        isinstance(g, SeedComparison) for gains in groups.values() for g in gains.values()
    )
    key = f"hollow: not significant{'; strokes: seeds' if several else ''}"
    picture.suptitle(f"{title} ({key})", fontsize="medium")
    return picture


def describe(groups: Gains, title: str) -> str:
    """A figure of gains in at most 40 words; all numbers are in the table beside it."""
    gains = [
        (gain.gain, f"{group}, {name}", gain.significant)
        for group, rows in groups.items()
        for name, gain in rows.items()
    ]
    least, most = min(gains), max(gains)
    return (
        f"{title}, in {len(groups)} panels. "
        f"Largest {100 * most[0]:+.2f} points ({most[1]}), "
        f"smallest {100 * least[0]:+.2f} ({least[1]}); "
        f"{sum(clear for _, _, clear in gains)} of {len(gains)} are significant."
    )
