"""Pictures that panels and lessons share, drawn into axes of the caller."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from evolq_lite.figures import PETROFF

STYLES = ("-", "--", ":", "-.")


def draw_lines(
    axes: Any,
    radii: Float[Tensor, " n"],
    lines: Mapping[str, Float[Tensor, " n"]],
    middle: float,
    floor: float,
) -> None:
    """Lines through a landscape by name, as changes from `middle`; the noise floor as a band.

    Each name gets a colour, a marker and a style. `middle` and `floor` are in the units of the
    values; `radii` are shares of a scale, shown in per cent.
    """
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(
            100 * radii.numpy(),
            values.numpy() - middle,
            "osD^"[i % 4] + STYLES[i % 4],
            color=PETROFF[i % len(PETROFF)],
            ms=4,
            lw=1.2,
            label=name,
        )
    axes.axhspan(
        -floor / 2,
        floor / 2,
        facecolor="0.6",
        edgecolor="0.3",
        alpha=0.4,
        label="noise floor",
    )
    axes.set(xlabel="radius, % of every scale")
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes.grid(alpha=0.3)
