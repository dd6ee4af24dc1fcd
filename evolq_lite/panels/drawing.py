"""Pictures for panels as SVG: text in the page's font and color, sharp at any zoom, quick to make.

matplotlib takes a third of a second for a panel's picture, this a few thousandths, so that a
picture can follow a slider. Text and axes have the page's own color (`currentColor`), light or
dark; `COLORS` have a contrast of at least 3:1 to both JupyterLab's white and its black. A `Drawing`
holds several `Plot`s, which wrap where the page is narrow. Numbers appear when the pointer rests on
a mark (`<title>`).
"""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape, unescape
from io import BytesIO
from math import ceil, floor, log10
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

BLUE, ORANGE, GREEN, PINK = "#2f86d1", "#cf6d00", "#22965a", "#c0589b"
PURPLE, TEAL, RED, GRAY = "#9c5fcb", "#148f9c", "#d9482f", "#808080"
COLORS = (BLUE, ORANGE, GREEN, PINK, PURPLE, TEAL, RED, GRAY)
DASHES = ("", "7 4", "2 3", "9 3 2 3")
SHAPES = {  # outlines as large as a circle of radius 1
    "circle": "M1 0A1 1 0 1 1-1 0 1 1 0 1 1 1 0Z",
    "square": "M-.9-.9H.9V.9H-.9Z",
    "diamond": "M0-1.3L1.3 0 0 1.3-1.3 0Z",
    "up": "M0-1.1L1.1.9H-1.1Z",
    "down": "M0 1.1L1.1-.9H-1.1Z",
    "plus": "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "cross": "M-.9-.9L.9.9M-.9.9L.9-.9",
    "star": "M0-1.3L.3-.4H1.2L.5.15.75 1.05 0 .5-.75 1.05-.5.15-1.2-.4H-.3Z",
}
LETTER = 6.6  # about the width of a letter, in pixels
ROW = 18  # height of a row of the legend
CUT = "<!--plot-->"  # between the plots of a drawing
Numbers = Sequence[float] | np.ndarray
Ticks = Sequence[tuple[float, str]]


class Plot:
    """A pair of axes, in pixels outside and data coordinates inside; what lies outside is cut off.

    `log` names the logarithmic axes: "x", "y", "xy". `rows` are lines of legend above the axes,
    `left` and `bottom` margins. Ticks are chosen where none are given.
    """

    def __init__(
        self,
        title: str,
        xlim: tuple[float, float],
        ylim: tuple[float, float],
        xlabel: str = "",
        ylabel: str = "",
        log: str = "",
        width: int = 310,
        height: int = 280,
        rows: int = 1,
        left: int = 56,
        bottom: int = 42,
        xticks: Ticks | None = None,
        yticks: Ticks | None = None,
    ) -> None:
        self.title, self.xlabel, self.ylabel = title, xlabel, ylabel
        self.xlim, self.ylim, self.log = xlim, ylim, log
        self.width, self.height, self.left, self.top = width, height, left, 24 + ROW * rows
        self.across, self.down = width - left - 12, height - self.top - bottom
        self.xticks = choose_ticks(*xlim, "x" in log) if xticks is None else xticks
        self.yticks = choose_ticks(*ylim, "y" in log) if yticks is None else yticks
        self.marks: list[str] = []
        self.legend: list[tuple[str, str]] = []  # a swatch, words

    def x(self, values: Any) -> Any:
        """Pixels from the left edge of the axes."""
        return self.across * share(values, self.xlim, "x" in self.log)

    def y(self, values: Any) -> Any:
        """Pixels from the upper edge of the axes."""
        return self.down * (1 - share(values, self.ylim, "y" in self.log))

    def line(
        self,
        xs: Numbers,
        ys: Numbers,
        color: str = BLUE,
        dash: str = "",
        label: str = "",
        width: float = 2,
        edge: str = "",
    ) -> None:
        """Points joined in their order; `edge` is a color beneath, where the ground varies."""
        looks = [f'stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"']
        if edge:
            looks.insert(0, f'stroke="{edge}" stroke-width="{width + 1}"')
        path = pairs(self.x(xs), self.y(ys))
        for look in looks:
            style = f'fill="none" {look} stroke-linejoin="round"'
            self.marks.append(f'<polyline points="{path}" {style}/>')
        if label:
            swatch = "".join(f'<path d="M0 0H20" fill="none" {look}/>' for look in looks)
            self.legend.append((swatch, label))

    def steps(self, xs: Numbers, ys: Numbers, **style: Any) -> None:
        """A line on which each y holds until the next x."""
        self.line(np.repeat(xs, 2)[1:], np.repeat(ys, 2)[:-1], **style)

    def points(
        self,
        xs: Numbers,
        ys: Numbers,
        color: str = BLUE,
        shape: str = "circle",
        size: float = 4,
        hollow: bool = False,
        titles: Sequence[str] = (),
        label: str = "",
        edge: str = "",
    ) -> None:
        """Marks; `titles` are what they say when the pointer rests on them."""
        fill = "none" if hollow or shape == "cross" else color
        style = f'fill="{fill}" stroke="{edge or color}" vector-effect="non-scaling-stroke"'
        style += f' stroke-width="{1.8 if fill == "none" else 1}"'
        for i, (x, y) in enumerate(zip(np.atleast_1d(self.x(xs)), np.atleast_1d(self.y(ys)))):
            if np.isfinite(x) and np.isfinite(y):
                words = f"<title>{escape(titles[i])}</title>" if titles else ""
                at = f'transform="translate({x:.1f} {y:.1f}) scale({size})"'
                self.marks.append(f'<path d="{SHAPES[shape]}" {at} {style}>{words}</path>')
        if label:
            at = 'transform="translate(10 0) scale(4.5)"'
            self.legend.append((f'<path d="{SHAPES[shape]}" {at} {style}/>', label))

    def bars(
        self,
        edges: Numbers,
        heights: Numbers,
        color: str,
        titles: Sequence[str],
        label: str = "",
    ) -> None:
        """Bars between edges (n + 1,), from the lower limit up."""
        xs, ys = self.x(edges), self.y(heights)
        for left, right, top, words in zip(xs, xs[1:], ys, titles):
            self.rectangle(left, top, max(right - left - 0.5, 0.5), self.down - top, color, words)
        if label:
            swatch = f'<rect y="-5" width="20" height="10" fill="{color}" fill-opacity="0.9"/>'
            self.legend.append((swatch, label))

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, words: str = ""
    ) -> None:
        """A rectangle in pixels; with fill "" it is seen by the pointer only."""
        style = f'fill="{fill}" fill-opacity="0.9"' if fill else 'fill="#000" fill-opacity="0"'
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}" '
            f"{style}><title>{escape(words)}</title></rect>"
        )

    def hint(self, x: float, y: float, size: float, words: str) -> None:
        """What the pointer is told on a square of `size` around a place of the data."""
        half = size / 2
        (left, right), (top, under) = (
            self.x([x - half, x + half]),
            sorted(self.y([y - half, y + half])),
        )
        self.rectangle(left, top, right - left, under - top, "", words)

    def band(self, low: float, high: float, label: str) -> None:
        """A gray band across."""
        style = 'fill="currentColor" fill-opacity="0.25" stroke="currentColor"'
        style += ' stroke-opacity="0.7" stroke-dasharray="2 3"'
        top, under = self.y(high), self.y(low)
        self.marks.append(
            f'<rect x="-2" y="{top:.1f}" width="{self.across + 4}" '
            f'height="{under - top:.1f}" {style}/>'
        )
        self.legend.append((f'<rect y="-5" width="20" height="10" {style}/>', label))

    def uprights(self, xs: Numbers, color: str, dash: str = "", label: str = "") -> None:
        """Lines from top to bottom."""
        style = f'fill="none" stroke="{color}" stroke-width="1.2" stroke-dasharray="{dash}"'
        path = "".join(f"M{x:.1f} 0V{self.down}" for x in np.atleast_1d(self.x(xs)))
        self.marks.append(f'<path d="{path}" {style}/>')
        if label:
            self.legend.append((f'<path d="M10-6V6" {style}/>', label))

    def interval(self, low: float, high: float, y: float, color: str) -> None:
        """A line from low to high, with ends."""
        a, b, at = self.x(low), self.x(high), self.y(y)
        path = f"M{a:.1f} {at:.1f}H{b:.1f}M{a:.1f} {at - 5:.1f}v10M{b:.1f} {at - 5:.1f}v10"
        self.marks.append(f'<path d="{path}" stroke="{color}" stroke-width="2" fill="none"/>')

    def cells(
        self,
        values: np.ndarray,
        limits: tuple[float, float],
        xs: Numbers,
        ys: Numbers,
    ) -> None:
        """A heat map: values (rows, columns) around ys (rows,) and xs (columns,), evenly spaced."""
        shares = np.clip((values - limits[0]) / (limits[1] - limits[0] or 1), 0, 1)
        colors = (255 * colormaps["cividis"](shares)[..., :3]).round().astype(np.uint8)
        x, y = self.x(xs), self.y(ys)
        width, height = abs(x[1] - x[0]), abs(y[1] - y[0])
        if y[-1] < y[0]:  # the first row is the lowest
            colors = colors[::-1]
        self.marks.append(
            f'<image x="{x.min() - width / 2:.1f}" y="{y.min() - height / 2:.1f}" '
            f'width="{width * len(x):.1f}" height="{height * len(y):.1f}" href="{png(colors)}" '
            'preserveAspectRatio="none" style="image-rendering: pixelated"/>'
        )

    def polygon(self, xs: Numbers, ys: Numbers, fill: str) -> None:
        """A filled outline."""
        path = pairs(self.x(xs), self.y(ys))
        self.marks.append(
            f'<polygon points="{path}" fill="{fill}" stroke="#444" stroke-width="0.5"/>'
        )

    def words(self, x: float, y: float, words: str, anchor: str = "middle") -> None:
        """Text just above a place of the data, on a patch of the page's own color."""
        self.marks.append(
            f'<text x="{self.x(x):.1f}" y="{self.y(y) - 9:.1f}" text-anchor="{anchor}" '
            f'class="evolq-words">{escape(words)}</text>'
        )

    def __str__(self) -> str:
        frame = (
            f'<rect x="{self.left}" y="{self.top}" width="{self.across}" height="{self.down}" '
            'fill="none" stroke="currentColor" stroke-opacity="0.6"/>'
        )
        inside = (
            f'<svg x="{self.left}" y="{self.top}" width="{self.across}" height="{self.down}">'
            f"{''.join(self.marks)}</svg>"
        )
        return (
            f'<svg width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-size="12" fill="currentColor" '
            f'aria-hidden="true">{self.labels()}{inside}{frame}</svg>'
        )

    def labels(self) -> str:
        """Title, legend, ticks and the names of the axes."""
        middle, floor_ = self.left + self.across / 2, self.top + self.down
        out = [text(middle, 14, self.title, 'font-weight="bold"')]
        x, y = float(self.left), 33.0
        for swatch, words in self.legend:
            wide = 40 + LETTER * len(words)
            if x + wide > self.width + 8 and x > self.left:
                x, y = float(self.left), y + ROW
            out.append(f'<g transform="translate({x:.0f} {y - 4:.0f})">{swatch}</g>')
            out.append(text(x + 25, y, words, "", "start"))
            x += wide
        for value, words in self.xticks:
            at = self.left + float(self.x(value))
            out.append(f'<path d="M{at:.1f} {floor_}v5" stroke="currentColor"/>')
            out.append(text(at, floor_ + 17, words))
        for value, words in self.yticks:
            at = self.top + float(self.y(value))
            out.append(f'<path d="M{self.left} {at:.1f}h-5" stroke="currentColor"/>')
            out.append(text(self.left - 8, at + 4, words, "", "end"))
        out.append(text(middle, self.height - 6, self.xlabel))
        down = f'transform="translate(12 {self.top + self.down / 2:.0f}) rotate(-90)"'
        out.append(text(0, 0, self.ylabel, down))
        return "".join(out)


class Tiles:
    """Small gray pictures (n, height, width) of values -1 (white) to 1, under their titles."""

    def __init__(self, title: str, pictures: np.ndarray, titles: Sequence[str]) -> None:
        size, across = 56, 76
        parts = [text(4, 14, title, 'font-weight="bold"', "start")]
        for i, (picture, words) in enumerate(zip(pictures, titles)):
            gray = ((1 - picture) * 127.5).clip(0, 255).astype(np.uint8)
            x = 4 + across * i
            parts.append(text(x + size / 2, 34, words))
            parts.append(
                f'<image x="{x}" y="40" width="{size}" height="{size}" href="{png(gray)}" '
                'class="evolq-paper" style="image-rendering: pixelated"/>'
            )
        width = max(8 + across * len(titles), 12 + round(7.5 * len(title)))
        self.svg = (
            f'<svg width="{width}" height="102" viewBox="0 0 {width} 102" font-size="13" '
            f'fill="currentColor" aria-hidden="true">{"".join(parts)}</svg>'
        )

    def __str__(self) -> str:
        return self.svg


class Sheet:
    """Many small pictures, each over a label; `pictures` is what `sprite` has made of them.

    `looks` name what is to be seen of each besides its label: "" is plain, others are keys of
    `frames`, which holds a color and a dash.
    """

    SIZE, WIDE, TALL, COLUMNS = 42, 58, 72, 10  # of a picture, of its cell, cells in a row

    def __init__(
        self,
        title: str,
        pictures: str,
        labels: Sequence[str],
        looks: Sequence[str],
        frames: Mapping[str, tuple[str, str]],
    ) -> None:
        columns = self.COLUMNS
        rows = ceil(len(labels) / columns)
        width, top = 8 + self.WIDE * columns, 48
        height = top + self.TALL * rows
        parts = [text(4, 14, title, 'font-weight="bold"', "start")]
        x = 4.0
        for look, (color, dash) in frames.items():
            style = f'fill="none" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dash}"'
            parts.append(f'<rect x="{x:.0f}" y="24" width="16" height="14" {style}/>')
            parts.append(text(x + 22, 36, look, "", "start"))
            x += 40 + LETTER * len(look)
        parts.append(
            f'<image x="4" y="{top}" width="{self.WIDE * columns}" height="{self.TALL * rows}" '
            f'href="{pictures}" class="evolq-paper" preserveAspectRatio="none"/>'
        )
        for i, (label, look) in enumerate(zip(labels, looks, strict=True)):
            x, y = 4 + self.WIDE * (i % columns), top + self.TALL * (i // columns)
            middle, under = x + self.WIDE / 2, y + self.SIZE + 20
            if look:
                color, dash = frames[look]
                style = f'fill="none" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dash}"'
                left = middle - self.SIZE / 2 - 2
                side = self.SIZE + 4
                parts.append(
                    f'<rect x="{left:.0f}" y="{y - 2}" width="{side}" height="{side}" {style}/>'
                )
            parts.append(text(middle, under, label, 'font-weight="bold"' if look else ""))
        self.svg = (
            f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-size="13" '
            f'fill="currentColor" aria-hidden="true">{"".join(parts)}</svg>'
        )

    @classmethod
    def sprite(cls, pictures: np.ndarray) -> str:
        """Gray pictures (n, height, width), -1 (white) to 1, as one image with gaps between them.

        It stays the same while labels change, so make it once: it is most of a sheet's bytes.
        """
        size, wide, tall = (2 * n for n in (cls.SIZE, cls.WIDE, cls.TALL))  # for sharp screens
        rows = ceil(len(pictures) / cls.COLUMNS)
        canvas = np.full((tall * rows, wide * cls.COLUMNS), 16, np.uint8)  # 16 grays, and a gap
        for i, picture in enumerate(pictures):
            gray = ((1 - picture) * 127.5).clip(0, 255).astype(np.uint8)
            tile = Image.fromarray(gray).resize((size, size), Image.Resampling.BILINEAR)
            top, left = tall * (i // cls.COLUMNS), wide * (i % cls.COLUMNS) + (wide - size) // 2
            canvas[top : top + size, left : left + size] = np.asarray(tile) // 16
        image = Image.new("P", canvas.shape[::-1])
        image.putdata(canvas.ravel())
        image.putpalette([17 * level for level in range(16) for _ in "rgb"] + [0, 0, 0])
        out = BytesIO()
        image.save(out, "PNG", transparency=16, optimize=True)
        return f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"

    def __str__(self) -> str:
        return self.svg


class Drawing:
    """Plots side by side, with one alt text for all."""

    def __init__(self, alt: str, *plots: object) -> None:
        """`plots` are Plots, Tiles, or others whose `str` is an SVG of a width and a height."""
        self.alt, self.plots = alt, plots

    def html(self) -> str:
        """A figure for a page."""
        return (
            f'<figure class="evolq-drawing" role="img" aria-label="{escape(self.alt)}">'
            f"{CUT}{CUT.join(map(str, self.plots))}{CUT}</figure>"
        )


def as_image(html: str, most: int = 960) -> str:
    """A drawing's figure as an `<img>` on white, for pages that strip SVG or have no style."""
    found = re.search('aria-label="([^"]*)"', html)
    x, y, row, width, parts = 0, 0, 0, 0, []
    for plot in html.split(CUT)[1:-1]:
        wide, tall = (int(n) for n in re.findall(r'(?:width|height)="(\d+)"', plot)[:2])
        if x + wide > most and x:
            x, y, row = 0, y + row, 0
        parts.append(plot.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
        x, row = x + wide, max(row, tall)
        width = max(width, x)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + row}" '
        f'width="{width}" height="{y + row}" font-family="sans-serif">'
        "<style>.evolq-words { paint-order: stroke; stroke: #fff; stroke-width: 3px }</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )
    data = b64encode(svg.encode()).decode()
    alt = escape(unescape(found[1])) if found else ""
    return (
        f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{data}" '
        'style="max-width: 100%"></figure>'
    )


def share(values: Any, limits: tuple[float, float], log: bool) -> Any:
    """Where values lie between two limits, 0 to 1 inside."""
    values, (low, high) = np.asarray(values, float), limits
    if log:
        values, low, high = np.log10(np.maximum(values, 1e-300)), log10(low), log10(high)
    return (values - low) / (high - low)


def pairs(xs: np.ndarray, ys: np.ndarray) -> str:
    """Points of a path, those that are finite."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys) if np.isfinite(x + y))


def text(x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(words)}</text>'


def png(pixels: np.ndarray) -> str:
    """Pixels (height, width) or (height, width, 3) of bytes as the address of an image."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"


def choose_ticks(low: float, high: float, log: bool = False) -> list[tuple[float, str]]:
    """Round numbers between two limits: about five, or powers of ten where they are enough."""
    low, high = sorted((low, high))
    if log:
        powers = range(floor(log10(low)), ceil(log10(high)) + 1)
        digits = (1, 2, 5) if log10(high / low) < 2.5 else (1,)
        values = [digit * 10.0**power for power in powers for digit in digits]
        values = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        return [(v, f"{v:g}".replace("e-0", "e-")) for v in values]
    rough = (high - low) / 5
    size = 10.0 ** floor(log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough)
    values = [step * i for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
    largest = max(map(abs, values), default=1.0)
    places = max(3, ceil(log10(largest / step)) + 2)  # enough to tell neighbors apart
    return [(v, f"{v:.{places}g}".replace("e-0", "e-")) for v in values]


def short_power(values: np.ndarray) -> tuple[float, str]:
    """A power of ten for an axis whose values would have many zeros, and words that name it."""
    top = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    if top == 0 or 0.01 <= top < 1000:
        return 1.0, ""
    power = floor(log10(top))
    return 10.0**power, f", 1e{power}"
