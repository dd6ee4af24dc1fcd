"""Figures that several claims share."""

import math
from collections.abc import Mapping

from evolq_lite.evaluate import Gain, SeedComparison
from evolq_lite.figures import PETROFF, Picture, new_figure

ACROSS = 3  # panels side by side


def forest(groups: Mapping[str, Mapping[str, Gain]], title: str) -> Picture:
    """Gains in top-1 as points with 95 % intervals, one panel a group; strokes are seeds."""
    rows = max(len(gains) for gains in groups.values())
    said = ". ".join(
        f"{group}: " + "; ".join(f"{name} {gain}" for name, gain in gains.items())
        for group, gains in groups.items()
    )
    across = 2 if len(groups) == 4 else min(ACROSS, len(groups))
    down = math.ceil(len(groups) / across)
    size = 4.6 * across, (0.36 * rows + 1.3) * down
    picture = new_figure(*size, f"{title}. {said}.")
    panels = picture.subplots(down, across, squeeze=False).flatten()
    for axes, (group, gains) in zip(panels, groups.items()):
        for i, gain in enumerate(gains.values()):
            low, high = (100 * x for x in gain.interval)
            point = 100 * gain.gain
            clear = gain.significant
            axes.errorbar(
                point,
                i,
                xerr=[[point - low], [high - point]],
                fmt="o",
                color=PETROFF[0],
                markerfacecolor=PETROFF[0] if clear else "white",
                capsize=3,
            )
            if isinstance(gain, SeedComparison):
                seeds = [100 * g for g in gain.gains]
                axes.plot(seeds, [i + 0.22] * len(seeds), "|", ms=6, color=PETROFF[1])
        axes.axvline(0, color="0.5", lw=1)
        axes.set_yticks(range(len(gains)), list(gains))
        axes.set_ylim(len(gains) - 0.5, -0.5)
        axes.set_xlabel("gain in top-1, points")
        axes.set_title(group, fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    several = any(
        isinstance(g, SeedComparison) for gains in groups.values() for g in gains.values()
    )
    key = f"hollow: not significant{'; strokes: seeds' if several else ''}"
    picture.suptitle(f"{title} ({key})", fontsize="medium")
    return picture
