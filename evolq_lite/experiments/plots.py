"""Figures that several claims share."""

import math
from collections.abc import Mapping, Sized

from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from evolq_lite.evaluate import LOSSES, Gain, LossChange, SeedComparison
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure

NAMES = {"vit": "ViT", "cnn": "CNN"}
SHORT = {"kl": "KL divergence", "cross_entropy": "cross-entropy"}
ACROSS = 3  # panels side by side
LEAST = 8.0  # inches: what a title takes

Gains = Mapping[str, Mapping[str, Gain]]  # by panel, then by row
Searches = Mapping[str, Mapping[str, Mapping[str, LossChange]]]  # by panel, start, search


def plot_gains(groups: Gains, title: str, same_scale: bool = False) -> Picture:
    """Gains in top-1 as points with 95 % intervals, one panel per group; strokes are seeds.

    `same_scale` gives all panels one axis, for gains that may be compared across panels.
    """
    names = [list(gains) for gains in groups.values()]
    same_rows = all(rows == names[0] for rows in names)
    across = {4: 2, 8: 4}.get(len(groups), min(ACROSS, len(groups)))
    down = math.ceil(len(groups) / across)
    height = 0.36 * max(map(len, names)) + 1.1
    width = 2.6 * across + 2 if same_rows else 4.6 * across
    picture = new_figure(max(width, LEAST), height * down + 0.4, describe(groups, title))
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


def count_panels(groups: Sized) -> str:
    return f"{len(groups)} panels" if len(groups) > 1 else "one panel"


def describe(groups: Gains, title: str) -> str:
    """A figure of gains in at most 40 words; all numbers are in the table beside it."""
    gains = [
        (gain.gain, f"{group}, {name}", gain.significant)
        for group, rows in groups.items()
        for name, gain in rows.items()
    ]
    least, most = min(gains), max(gains)
    return (
        f"{title}, in {count_panels(groups)}. "
        f"Largest {100 * most[0]:+.2f} points ({most[1]}), "
        f"smallest {100 * least[0]:+.2f} ({least[1]}); "
        f"{sum(clear for _, _, clear in gains)} of {len(gains)} are significant."
    )


def plot_starts(groups: Searches, title: str, loss: str = "kl") -> Picture:
    """What searches make of each start: its mean loss, a panel for each group, a row a start.

    A bar marks the start itself; a search's marker is filled where it changes the loss
    significantly.
    """
    across = min(2, len(groups))
    down = math.ceil(len(groups) / across)
    starts = list(dict.fromkeys(start for found in groups.values() for start in found))
    picture = new_figure(
        max(4.4 * across + 1, LEAST),
        (0.55 * len(starts) + 0.9) * down + 0.9,
        describe_starts(groups, title, loss),
    )
    grid = picture.subplots(down, across, squeeze=False, sharey=True)
    for axes, (group, found) in zip(grid.flat, groups.items()):
        for row, start in enumerate(starts):
            searches = found.get(start, {})
            for i, (search, change) in enumerate(searches.items()):
                height = row + 0.6 * ((i + 0.5) / len(searches) - 0.5)
                axes.plot([change.was, change.now], [height] * 2, color=PETROFF[i], lw=1)
                axes.plot(
                    change.now,
                    height,
                    MARKERS[i],
                    color=PETROFF[i],
                    ms=6,
                    mfc=PETROFF[i] if change.significant else "white",
                    label=search if not row else None,
                )
            if searches:
                was = next(iter(searches.values())).was
                label = "the start" if not row else None
                axes.vlines(was, row - 0.38, row + 0.38, color="0.2", lw=2.5, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(starts)), starts)
        axes.set_ylim(len(starts) - 0.5, -0.5)
        axes.set_title(group, fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel(f"{LOSSES[loss]}, nats (log)")
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    picture.suptitle(f"{title} (hollow: not significant)", fontsize="medium")
    return picture


def describe_starts(groups: Searches, title: str, loss: str) -> str:
    """A figure of searches on starts in at most 40 words."""
    changes = [
        change
        for found in groups.values()
        for searches in found.values()
        for change in searches.values()
    ]
    better = sum(change.better for change in changes)
    worse = sum(change.worse for change in changes)
    return (
        f"{title}, in {count_panels(groups)}, a row for each start: of {len(changes)} searches "
        f"{better} lower the {SHORT[loss]} significantly, {worse} raise it."
    )
