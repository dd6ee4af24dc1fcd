"""Figures: arrays in, a matplotlib `Figure` out; no pyplot state, the label is the alt text."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.style  # makes the style library known
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from evolq_lite.bits import sum_up_bits
from evolq_lite.data import CHARACTERS
from evolq_lite.evaluate import LOSSES, Accuracy, Comparison, LossChange
from evolq_lite.evolve import Evaluated
from evolq_lite.files import write_whole

PETROFF = mpl.style.library["petroff10"]["axes.prop_cycle"].by_key()["color"]
MARKERS = "osD^vP*X<>"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


class Picture(Figure):
    """A figure that a notebook shows with its alt text, which is its label."""

    def png(self) -> bytes:
        """The picture as a PNG of 256 colours (a third of the bytes), described by its alt text."""
        canvas, about, out = FigureCanvasAgg(self), PngInfo(), BytesIO()
        canvas.draw()
        about.add_itxt("Description", str(self.get_label()))
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(method=Image.Quantize.FASTOCTREE).save(out, "PNG", pnginfo=about)
        return out.getvalue()

    def _repr_html_(self) -> str:
        data, alt = b64encode(self.png()).decode(), escape(str(self.get_label()))
        style = 'style="max-width: 100%"'  # no wider than the page
        return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}" {style}></figure>'


def new_figure(width: float, height: float, alt: str) -> Picture:
    """An empty figure in inches, with its own white face (for dark themes) and its alt text."""
    figure = Picture(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    figure.set_label(alt)
    return figure


def save_figure(figure: Picture, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_whole(path, figure.png())


def history_figure(history: Sequence[Evaluated]) -> Picture:
    """Fitness over evaluations, a colour and marker per block; the line is the model's fitness."""
    values = np.array([event.fitness for event in history])
    accepted = np.array([event.accepted for event in history])
    best = np.fmin.accumulate(values)
    blocks = sorted({event.block for event in history})
    alt = (
        f"Fitness over {len(history)} evaluations: "
        f"it falls from {values[0]:.5f} to {best[-1]:.5f}; "
        f"{accepted[1:].sum()} candidates were accepted."
    )
    figure = new_figure(8, 4, alt)
    axes = figure.add_subplot()
    axes.step(
        np.arange(len(best)),
        best,
        where="post",
        color="0.25",
        lw=1.5,
        label="best so far",
        zorder=1,
    )
    colors = mpl.colormaps["cividis"](np.linspace(0, 0.95, len(blocks)))
    for i, block in enumerate(blocks):
        mine = np.array([event.block == block for event in history])
        style = {
            "color": colors[i],
            "marker": MARKERS[i % len(MARKERS)],
            "s": 26,
            "linewidths": 0.8,
        }
        axes.scatter(
            np.where(mine & accepted)[0], values[mine & accepted], label=block, zorder=3, **style
        )
        style |= {"facecolors": "none", "edgecolors": style.pop("color"), "alpha": 0.6}
        axes.scatter(np.where(mine & ~accepted)[0], values[mine & ~accepted], zorder=2, **style)
    finite = values[np.isfinite(values)]
    axes.set_ylim(
        finite.min() - 0.05 * np.ptp(finite) - 1e-9,
        max(values[0], np.quantile(finite, 0.98)) + 0.05 * np.ptp(finite) + 1e-9,
    )
    axes.set(xlabel="evaluation", ylabel="fitness on calibration images (lower is better)")
    axes.set_title("Filled: accepted. Hollow: rejected.", loc="left", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=2, fontsize="small")
    return figure


def top1_figure(
    results: Mapping[str, Accuracy],
    gain: Comparison | None = None,
    losses: Mapping[str, LossChange] | None = None,
) -> Picture:
    """Top-1 of several networks as points with 95 % intervals, best read from top to bottom.

    `gain` and `losses` (by the names of `LOSSES`) are told above it.
    """
    said = "; ".join(f"{name} {accuracy}" for name, accuracy in results.items())
    lines = [] if gain is None else [f"evolved against before: {gain}"]
    lines += [
        f"{LOSSES[name]}: {change.was:.4f} to {change.now:.4f}, {change}"
        for name, change in (losses or {}).items()
    ]
    height = 0.6 * len(results) + 1.2 + 0.2 * len(lines)
    figure = new_figure(7, height, f"Top-1 with 95 % intervals: {said}.")
    axes = figure.add_subplot()
    for i, (name, accuracy) in enumerate(results.items()):
        low, high = accuracy.interval
        error = [[100 * (accuracy.top1 - low)], [100 * (high - accuracy.top1)]]
        axes.errorbar(
            100 * accuracy.top1,
            i,
            xerr=error,
            fmt=MARKERS[i],
            color=PETROFF[i],
            capsize=4,
            markersize=8,
            label=name,
        )
        axes.annotate(
            f"{100 * accuracy.top1:.2f} %",
            (100 * accuracy.top1, i),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
        )
    axes.set_yticks(range(len(results)), list(results))
    axes.set_ylim(len(results) - 0.5, -0.7)
    images = next(iter(results.values())).images
    axes.set_xlabel(f"top-1 on {images:,} test images, %")
    axes.set_title("\n".join(lines), loc="left", fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    return figure


def bits_figure(before: Mapping[str, int], after: Mapping[str, int]) -> Picture:
    """Each layer's bits as a bar, from input to output; a line across it is where it started.

    Color and hatch tell the kind of layer, which is the last part of its name.
    """
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in after))
    alt = f"Bits of {len(after)} layers after the search: {sum_up_bits(before, after)}."
    figure = new_figure(max(6, 0.3 * len(after) + 2), 4, alt)
    axes = figure.add_subplot()
    for i, (name, bits) in enumerate(after.items()):
        kind = kinds.index(name.rpartition(".")[2])
        look = {"color": PETROFF[kind % 10], "hatch": HATCHES[kind % len(HATCHES)]}
        axes.bar(i, bits, width=0.8, edgecolor="white", label=kinds[kind], **look)
        axes.annotate(str(bits), (i, bits), xytext=(0, 2), textcoords="offset points", ha="center")
        axes.hlines(before[name], i - 0.4, i + 0.4, color="0.1", lw=1.5)
    axes.set_xticks(range(len(after)), list(after), rotation=90, fontsize="small")
    axes.set(ylabel="bits of weights", ylim=(0, max(after.values()) + 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Lines: where the search started.", loc="left", fontsize="medium")
    handles, labels = axes.get_legend_handles_labels()
    one_each = dict(zip(labels, handles))
    axes.legend(one_each.values(), one_each.keys(), fontsize="small", ncols=min(6, len(kinds)))
    return figure


def tiles(images: Tensor, titles: Sequence[str], columns: int, alt: str) -> Picture:
    """Characters (n, 1, 28, 28) as dark on white tiles, each under its title."""
    rows = max(1, -(-len(titles) // columns))
    figure = new_figure(1.0 * columns, 1.2 * rows, alt)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        axes.imshow(-image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title, fontsize="medium")
    return figure


def characters_figure(images: Tensor, classes: Tensor, columns: int = 10) -> Picture:
    """Characters (n, 1, 28, 28) under the names of classes (n,)."""
    names = [CHARACTERS[int(i)] for i in classes]
    shown = " ".join(names[:20]) + (" …" if len(names) > 20 else "")  # at most 40 words
    alt = f"{len(names)} characters, each under its class: {shown}."
    return tiles(images, names, columns, alt)


def changed_figure(
    images: Tensor, labels: Tensor, before: Tensor, after: Tensor, rows: int = 3, columns: int = 10
) -> Picture:
    """Characters (n, 1, 28, 28) that two networks (n,) label differently, right ones marked."""
    changed = (before != after).nonzero().flatten()
    if len(changed) == 0:
        return tiles(images[:0], [], columns, "No character's predicted label changed.")
    spread = changed[torch.linspace(0, len(changed) - 1, rows * columns).long().unique()]
    titles = []
    for i in spread.tolist():
        names = [CHARACTERS[int(k)] for k in (before[i], after[i])]
        marks = ["✓" if k == labels[i] else "✗" for k in (before[i], after[i])]
        titles.append(f"{names[0]}{marks[0]} → {names[1]}{marks[1]}")
    mended = int((after[spread] == labels[spread]).sum())
    spoiled = int((before[spread] == labels[spread]).sum())
    alt = (
        f"{len(titles)} of {len(changed)} characters whose predicted label changed, such as "
        f"{', '.join(titles[:3])}. Of those shown, {mended} became right and {spoiled} wrong."
    )
    return tiles(images[spread], titles, columns, alt)


def confusion_figure(predictions: Tensor, labels: Tensor) -> Picture:
    """The 62 x 62 confusion matrix: rows true, columns predicted; the worst pairs are named."""
    import seaborn  # half a second, which only this figure pays

    matrix = np.zeros((62, 62))
    np.add.at(matrix, (labels.numpy(), predictions.numpy()), 1)
    share = matrix / matrix.sum(1, keepdims=True)
    wrong = share - np.diag(np.diagonal(share))
    worst = np.dstack(np.unravel_index(np.argsort(-wrong, axis=None)[:8], wrong.shape))[0]
    named = [f"{CHARACTERS[i]} read as {CHARACTERS[j]} {100 * share[i, j]:.0f} %" for i, j in worst]
    alt = f"Confusion matrix of 62 characters. Most often confused: {', '.join(named[:4])}."
    figure = new_figure(8, 7.4, alt)
    axes = figure.add_subplot()
    look = {"cmap": "cividis", "vmin": 0, "vmax": 1, "square": True}
    look |= {"xticklabels": list(CHARACTERS), "yticklabels": list(CHARACTERS)}
    seaborn.heatmap(np.sqrt(share), ax=axes, cbar_kws={"shrink": 0.7}, **look)
    axes.tick_params(labelsize=6, labelrotation=0)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"Most often: {', '.join(named)}", fontsize=7, loc="left")
    bar = axes.collections[0].colorbar
    assert bar is not None
    marks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar.set_label("share of the row")
    bar.set_ticks([mark**0.5 for mark in marks], labels=[str(mark) for mark in marks])
    return figure


def operators_figure(operators: Sequence[tuple[str, str]], title: str, columns: int = 7) -> Picture:
    """Operators (name, kind) in the order in which they run, row by row, a color for each kind."""
    kinds = list(dict.fromkeys(kind for _, kind in operators))
    rows = -(-len(operators) // columns)
    alt = f"{title}: {len(operators)} operators in order; " + ", ".join(
        f"{sum(kind == k for _, k in operators)} {kind}" for kind in kinds
    )
    figure = new_figure(1.45 * columns, 0.55 * rows + 0.9, f"{alt}.")
    axes = figure.add_subplot()
    for i, (name, kind) in enumerate(operators):
        x, y = i % columns, -(i // columns)
        color = PETROFF[kinds.index(kind)]
        axes.add_patch(Rectangle((x - 0.46, y - 0.32), 0.92, 0.64, fc=color, ec="0.2", alpha=0.35))
        axes.text(x, y, name, ha="center", va="center", fontsize=8)
    handles = [
        Rectangle((0, 0), 1, 1, fc=PETROFF[i], ec="0.2", alpha=0.35) for i in range(len(kinds))
    ]
    figure.legend(handles, kinds, loc="outside lower center", ncols=len(kinds))
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(0.5 - rows, 0.5), title=title)
    axes.axis("off")
    return figure
