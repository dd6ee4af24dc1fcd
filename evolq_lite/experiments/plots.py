"""Figures that several claims share."""

from collections.abc import Mapping

from evolq_lite.evaluate import Comparison
from evolq_lite.figures import PETROFF, Picture, new_figure


def forest(groups: Mapping[str, Mapping[str, Comparison]], title: str) -> Picture:
    """Gains in top-1 as points with 95 % intervals, one panel a group, zero as a line."""
    rows = max(len(gains) for gains in groups.values())
    said = ". ".join(
        f"{group}: " + "; ".join(f"{name} {gain}" for name, gain in gains.items())
        for group, gains in groups.items()
    )
    picture = new_figure(4.6 * len(groups), 0.36 * rows + 1.3, f"{title}. {said}.")
    for axes, (group, gains) in zip(
        picture.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        for i, gain in enumerate(gains.values()):
            low, high = (100 * x for x in gain.interval)
            point = 100 * gain.gain
            clear = gain.p_value < 0.05
            axes.errorbar(
                point,
                i,
                xerr=[[point - low], [high - point]],
                fmt="o",
                color=PETROFF[0],
                markerfacecolor=PETROFF[0] if clear else "white",
                capsize=3,
            )
        axes.axvline(0, color="0.5", lw=1)
        axes.set_yticks(range(len(gains)), list(gains))
        axes.invert_yaxis()
        axes.set_xlabel("gain in top-1, points")
        axes.set_title(group, fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    picture.suptitle(f"{title} (hollow: not significant)", fontsize="medium")
    return picture
