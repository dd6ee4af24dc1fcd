"""Lesson 3: the loss over the scales of one layer, along a line or in a plane, and its noise."""

from functools import cache, partial
from itertools import count
from typing import Any

import ipywidgets as W
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn

from evolq_lite.config import KINDS, QuantConfig
from evolq_lite.convert import calibrate, quantize, twin
from evolq_lite.data import DEMO_MODELS, Demo, load_demo
from evolq_lite.fitness import Fitness, info_nce
from evolq_lite.landscape import (
    direction,
    layer_objective,
    line,
    local_minima,
    noise_floor,
    other_ways,
    plane,
    total_variation,
)
from evolq_lite.objective import BlockObjective
from evolq_lite.panels.base import IntSlider, LogSlider, Panel, Values, control
from evolq_lite.panels.drawing import BLUE, DASHES, ORANGE, Drawing, Plot, short_power
from evolq_lite.panels.worker import Tick
from evolq_lite.rounding import freeze_integers

IMAGES, MOST_IMAGES = 100, 500
BLOCKS = {
    "vit": [f"blocks.{i}" for i in range(DEMO_MODELS["vit"]["depth"])],
    "cnn": [f"layer{i}.0" for i in range(1, 5)],
}
LAYERS = {"vit": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], "cnn": ["conv1", "conv2"]}
USUAL = {"vit": ("blocks.2", "attn.qkv"), "cnn": ("layer2.0", "conv1")}
FITNESS, PROBE = "fitness", "test loss (probe)"
LINE, PLANE, ZOOM = "line", "plane", "zoom from 10 % to 0.001 %"
ZOOMS = (0.1, 0.01, 1e-3, 1e-4, 1e-5)
AWAY = 0.003  # where a zoom looks: beside the first scales, which lie on an edge
FLOOR_POINTS = 5  # where the noise floor is measured, on the line
POINTS = {LINE: 21, PLANE: 11, ZOOM: 11}
FLOATS = ",".join(kind for kind in KINDS if kind != "weights")  # all activations
CHUNKS = {"vit": (10,), "cnn": (1,)}  # other chunk sizes for the noise floor


@cache
def quantized(network: str, bits: int, float_activations: bool = False) -> tuple[Demo, nn.Module]:
    """An embedded network with calibration images, and its quantized form, to be copied."""
    demo = load_demo(network, MOST_IMAGES)
    floats = FLOATS if float_activations else ""
    qmodel = quantize(demo.model, QuantConfig(weight_bits=bits, float_points=floats))
    calibrate(qmodel, demo.calibration[:IMAGES])
    return demo, qmodel


@cache
def probe_images() -> tuple[Tensor, Tensor]:
    """100 test images and their labels (100,), for looking only: every 99th, of all characters."""
    images, labels = load_demo("cnn", 2).test
    every = len(labels) // IMAGES
    return images[::every][:IMAGES].clone(), labels[::every][:IMAGES].clone()


class LandscapePanel(Panel):
    """A layer's scales and how far to move them; a line or a plane; calibration or test images."""

    slow = True
    shipped = True
    presets = {
        "8 bits": {"bits": 8, "radius": 0.01},
        "Tiny radius": {"bits": 3, "radius": 1e-5},
        "Test loss": {"bits": 3, "radius": 0.01, "images": PROBE},
        "Frozen integers": {"frozen": True, "floats": False},
        "Float activations": {"frozen": False, "floats": True},
        "Both": {"frozen": True, "floats": True},
        "Zoom": {"what": ZOOM},
    }

    def __init__(self, name: str | None = None, **values: Any) -> None:
        self.plane: tuple[Any, Values] | None = None  # what the picture shows, if it is a plane
        self.known: dict[tuple[Any, ...], Any] = {}  # what has been computed
        self.turn = control(
            W.IntSlider,
            "Turn surface",
            "Look at the surface from another side, in degrees; nothing is computed for that",
            value=45,
            max=355,
            step=5,
            disabled=True,
        )
        self.turn.add_class("evolq-turn")
        super().__init__(name, **values)
        self.turn.observe(self.turn_surface, names="value")

    def make_controls(self) -> dict[str, Any]:
        """Eleven controls; those for block and layer follow that for the network."""
        network = control(
            W.Dropdown,
            "Network",
            "Which of the two networks that ship with the course",
            options=[("ViT", "vit"), ("CNN", "cnn")],
        )
        block = control(W.Dropdown, "Block", "The block that contains the layer")
        layer = control(W.Dropdown, "Layer", "The layer whose weight scales are moved")

        def follow(change: Any = None) -> None:
            """Offer the blocks and layers of the network; one change, so one computation."""
            outer, self.setting = self.setting, True
            try:
                block.options, layer.options = BLOCKS[network.value], LAYERS[network.value]
                block.value, layer.value = USUAL[network.value]
            finally:
                self.setting = outer

        follow()
        network.observe(follow, names="value")
        return {
            "network": network,
            "block": block,
            "layer": layer,
            "bits": control(
                IntSlider, "Weight bits", "Bits of every weight", value=3, min=2, max=8
            ),
            "radius": control(
                LogSlider,
                "Radius",
                "How far each scale moves, as a share of its size",
                value=0.01,
                low=1e-5,
                high=0.3,
                step=0.1,
                readout_format=".1e",
            ),
            "seed": control(
                IntSlider, "Seed", "Seed of the random directions", value=0, min=0, max=99
            ),
            "what": control(
                W.Dropdown,
                "Show",
                "A line of 21 points, a plane of 11 by 11, or one line at five radii",
                options=[LINE, PLANE, ZOOM],
            ),
            "images": control(
                W.Dropdown,
                "Of what",
                "The fitness that a search sees, or the test loss, a probe that it must never see",
                options=[
                    ("fitness, 100 calibration images", FITNESS),
                    ("test loss, a probe", PROBE),
                ],
            ),
            "frozen": control(
                W.Checkbox,
                "Freeze integers",
                "Hold the weights' integers: a weight is integer times scale, and none flips",
                value=False,
                indent=True,
            ),
            "floats": control(
                W.Checkbox,
                "Float activations",
                "Leave all activations in float, so that none of their integers flips",
                value=False,
                indent=True,
            ),
            "count": control(
                IntSlider,
                "Images",
                f"How many images the loss is averaged over; the probe has {IMAGES} at most",
                value=IMAGES,
                min=min(20, IMAGES),
                max=MOST_IMAGES,
                step=20,
            ),
        }

    def own(self) -> list[W.Widget]:
        return [*super().own(), self.turn]

    def arrange(self) -> W.Widget:
        """The turn stands under the other controls: it is none, because nothing is computed."""
        page = super().arrange()
        page.children = (page.children[0], self.turn, *page.children[1:])
        return page

    def show_stored(self) -> bool:
        shown = super().show_stored()
        if shown:
            self.offer_turn(None)
        return shown

    def offer_turn(self, plane: tuple[Any, Values] | None) -> None:
        """Remember what can be turned; without it there is nothing to move."""
        self.plane, self.turn.disabled = plane, plane is None

    def turn_surface(self, change: Any) -> None:
        """The same numbers, seen from elsewhere."""
        if self.plane is not None:
            result, values = self.plane
            self.view.value = self.draw(result, **values)[0].html()

    def set_controls(self, values: Values) -> None:
        """The network first: it decides which blocks and layers there are."""
        super().set_controls({key: values[key] for key in sorted(values, key="network".__ne__)})

    def compute(self, tick: Tick, **values: Any) -> Any:
        """Values on the line (21,) or in the plane (11, 11), radii, noise floor, scales."""
        if (key := tuple(values.values())) not in self.known:
            self.known[key] = self.probe(tick, **values)
        return self.known[key]

    def probe(self, tick: Tick, **values: Any) -> Any:
        """What `compute` returns, computed."""
        demo, kept = quantized(values["network"], values["bits"], values["floats"])
        tick(0.0)
        images, targets = demo.calibration, demo.targets
        fitness: Fitness = info_nce
        if values["images"] == PROBE:
            (images, targets), fitness = probe_images(), F.cross_entropy
        images, targets = images[: values["count"]], targets[: values["count"]]
        make = partial(
            layer_objective,
            block=values["block"],
            layer=values["layer"],
            images=images,
            targets=targets,
            fitness=fitness,
        )
        # Evaluating swaps tensors for a moment, so no two panels may share a network.
        qmodel = twin(kept)
        if values["frozen"]:
            freeze_integers(qmodel)
        objective = make(qmodel)
        tick(0.0)
        ways = [objective, *other_ways(objective, make, CHUNKS[values["network"]])]
        tick(0.0)
        points = POINTS[values["what"]]
        cells = {LINE: points, PLANE: points**2, ZOOM: points * len(ZOOMS)}[values["what"]]
        done, total = count(1), FLOOR_POINTS * len(ways) + cells + 1

        def stepped(way: BlockObjective) -> Any:
            """The same objective, ticking after every point."""

            def one_by_one(population: Tensor) -> Tensor:
                found = []
                for vector in population:
                    found.append(way(vector[None]))
                    tick(next(done) / total)
                return torch.cat(found)

            return one_by_one

        start, radius = objective.start, values["radius"]
        along, across = (direction(start, values["seed"] + i) for i in (0, 1))
        some = torch.linspace(-radius, radius, FLOOR_POINTS)[:, None]
        floor, _ = noise_floor([stepped(way) for way in ways], (start + some * along).abs())
        radii = radius * torch.arange(-(points // 2), points // 2 + 1) / (points // 2)  # one is 0

        def on_cell(found: Tensor) -> None:
            tick(next(done) / total)

        if values["what"] == ZOOM:
            beside = start * (1 + AWAY * direction(torch.ones_like(start), values["seed"] + 2))
            steps = torch.linspace(-1, 1, points)
            lines = [line(objective, beside, along, r * steps, on_cell=on_cell) for r in ZOOMS]
            return torch.stack(lines), steps, floor, len(start)
        if values["what"] == LINE:
            return line(objective, start, along, radii, on_cell=on_cell), radii, floor, len(start)
        found = plane(objective, start, (along, across), radii, on_cell=on_cell)
        return found, radii, floor, len(start)

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """The line with its noise floor, or the plane as a map and as a surface."""
        found, radii, floor, scales = result
        self.offer_turn((result, values) if values["what"] == PLANE else None)
        if values["what"] == ZOOM:
            return self.draw_zooms(found, radii, floor, values)
        middle = float(found[len(radii) // 2] if found.ndim == 1 else found[*[len(radii) // 2] * 2])
        of = "calibration fitness" if values["images"] == FITNESS else "test loss (a probe)"
        where = spoken(values)
        low, high = float(found.min()) - middle, float(found.max()) - middle
        ways = "a random direction" if found.ndim == 1 else "two random directions"
        said = (
            f"{where}, {scales} scales moved along {ways} (seed {values['seed']}) up to a radius "
            f"of {values['radius']:.2g}: the {of} of {middle:.4f} changes by {low:+.2g} to "
            f"{high:+.2g}. The noise floor is {floor:.1g}. {self.shape(found, floor)}"
        )
        kind = "Line" if found.ndim == 1 else "Plane"
        alt = (
            f"{kind} through the landscape of {where}, seed {values['seed']}, radius "
            f"{values['radius']:.2g}: the {of} changes by {low:+.2g} to {high:+.2g}; noise floor "
            f"{floor:.1g}."
        )
        moved, percent = (found - middle).numpy(), 100 * radii.numpy()
        if found.ndim == 1:
            return Drawing(alt, draw_line(moved, percent, floor, f"change of {of}")), said
        return Drawing(
            alt,
            draw_map(moved, percent, floor, f"change of {of}"),
            draw_surface(moved, self.turn.value),
        ), said

    def draw_zooms(
        self, found: Tensor, steps: Tensor, floor: float, values: Values
    ) -> tuple[Drawing, str]:
        """One line at five radii (5, n), each beside a parabola: does it straighten out, too?"""
        middles = found[:, [found.shape[1] // 2]]
        moved = (found - middles).numpy()
        wide = np.polyfit(ZOOMS[0] * steps.numpy(), moved[0], 2)  # fitted to the widest line
        smooth = [np.polyval(wide, r * steps.numpy()) for r in ZOOMS]
        smooth = [ys - ys[len(ys) // 2] for ys in smooth]
        heights = [float(np.ptp(ys)) for ys in moved]
        falls = ", ".join(f"{r:.3%} {h:.1g}" for r, h in zip(ZOOMS, heights)).replace("0%", "%")
        said = (
            f"{spoken(values)}, from a neighbor of the first scales: highest minus lowest within "
            f"{falls}; noise floor {floor:.1g}. A smooth function would become a straight line "
            f"and lose nine tenths of its height at each step; here the last step leaves "
            f"{heights[-1] / max(heights[-2], 1e-30):.0%}."
        )
        alt = (
            f"One line of {spoken(values)} at five radii beside a smooth function. Height at 10 %: "
            f"{heights[0]:.1g}, at 0.001 %: {heights[-1]:.1g}; noise floor {floor:.1g}."
        )
        plots = [
            draw_look(100 * r * steps.numpy(), ys, parabola, f"within {100 * r:g} %")
            for r, ys, parabola in zip(ZOOMS, moved, smooth)
        ]
        return Drawing(alt, *plots), said

    @staticmethod
    def shape(found: Tensor, floor: float) -> str:
        """How jagged it is, in words."""
        if found.ndim == 1:
            return (
                f"Local minima: {local_minima(found)}, deeper than the noise floor: "
                f"{local_minima(found, floor)}. Total variation {total_variation(found):.1f} times "
                "the range (a slope has 1, a single valley at most 2)."
            )
        rows = [*found, *found.T]
        bare, deep = (sum(local_minima(row, f) for row in rows) / len(rows) for f in (0.0, floor))
        return (
            f"Local minima per row or column: {bare:.1f} on average, deeper than the noise floor: "
            f"{deep:.1f}."
        )


def images_of(values: Values) -> int:
    """How many images the loss is averaged over."""
    return min(values["count"], IMAGES if values["images"] == PROBE else MOST_IMAGES)


def spoken(values: Values) -> str:
    """Network, layer, bits and switches in words."""
    switches = [
        *(["weights' integers frozen"] if values["frozen"] else []),
        *(["activations float"] if values["floats"] else []),
        *([f"{count} images"] if (count := images_of(values)) != IMAGES else []),
    ]
    network = values["network"].upper().replace("VIT", "ViT")
    bits = f"W{values['bits']}" + ("" if values["floats"] else "A8")
    return ", ".join([f"{network} {values['block']}.{values['layer']}, {bits}", *switches])


def draw_look(radii: np.ndarray, values: np.ndarray, smooth: np.ndarray, title: str) -> Plot:
    """A line at one radius, and a parabola; the axes are this picture's own."""
    unit, power = short_power(values)
    high = 1.1 * float(np.abs(values).max() / unit) or 1.0
    edge = float(radii[-1])
    plot = Plot(
        title,
        (-1.05 * edge, 1.05 * edge),
        (-high, high),
        "% of every scale",
        f"change{power}",
        width=192,
        height=230,
        rows=2,
        left=50,
        xticks=[(-edge, f"{-edge:g}"), (0, "0"), (edge, f"{edge:g}")],
    )
    plot.line(radii, smooth / unit, ORANGE, DASHES[1], "a smooth function")
    plot.line(radii, values / unit, BLUE, label="loss")
    plot.points(radii, values / unit, BLUE, size=3)
    return plot


def draw_line(values: np.ndarray, radii: np.ndarray, floor: float, label: str) -> Plot:
    """Changes along a line, and the noise floor as a band."""
    unit, power = short_power(values)
    low, high = min(values.min(), -floor / 2) / unit, max(values.max(), floor / 2) / unit
    room = 0.06 * (high - low) or 1.0
    edge = float(radii[-1])
    plot = Plot(
        "Along the line",
        (-1.04 * edge, 1.04 * edge),
        (low - room, high + room),
        "radius, % of every scale",
        label + power,
        width=640,
        height=340,
    )
    plot.band(-floor / 2 / unit, floor / 2 / unit, "noise floor")
    plot.line(radii, values / unit, BLUE, label="loss")
    titles = [f"{value:+.3g} at {radius:.3g} %" for radius, value in zip(radii, values)]
    plot.points(radii, values / unit, BLUE, titles=titles)
    return plot


def draw_map(values: np.ndarray, radii: np.ndarray, floor: float, label: str) -> Plot:
    """A plane (n, n) as a map: the first direction upwards, the second to the right."""
    edge = float(radii[-1]) + float(radii[1] - radii[0]) / 2
    ends = -edge, edge
    plot = Plot(
        f"{label.capitalize()}: dark {values.min():+.2g}, bright {values.max():+.2g}",
        ends,
        ends,
        "second direction, % of every scale",
        "first direction, % of every scale",
        width=440,
        height=420,
        rows=1,
    )
    plot.cells(values, (float(values.min()), float(values.max())), radii, radii)
    for j, i in np.ndindex(values.shape):
        words = f"{values[j, i]:+.3g} at {radii[j]:.3g} % and {radii[i]:.3g} %"
        plot.hint(float(radii[i]), float(radii[j]), float(radii[1] - radii[0]), words)
    lowest = np.unravel_index(int(values.argmin()), values.shape)
    plot.points([0], [0], "#fff", "plus", 6, label="first scales", edge="#000")
    plot.points(
        [radii[lowest[1]]], [radii[lowest[0]]], "#fff", "down", 6, label="lowest", edge="#000"
    )
    return plot


def draw_surface(values: np.ndarray, turn: float = 45.0) -> Plot:
    """A plane (n, n) as a surface, turned by so many degrees, high values above."""
    heights = (values - values.min()) / (np.ptp(values) or 1)
    side, angle = np.linspace(-1, 1, len(values)), np.radians(turn)
    first, second = np.meshgrid(side, side, indexing="ij")
    xs = (second * np.cos(angle) - first * np.sin(angle)) / np.sqrt(2)
    depth = (second * np.sin(angle) + first * np.cos(angle)) / np.sqrt(2)
    ys = 0.55 * depth + 0.65 * heights
    colors = (255 * colormaps["cividis"](heights)[..., :3]).astype(int)
    plot = Plot(
        "As a surface", (-1.05, 1.05), (-0.62, 1.25), width=440, height=420, xticks=(), yticks=()
    )
    cells = [(i, j, i + 1, j + 1) for i, j in np.ndindex(len(values) - 1, len(values) - 1)]
    # What is behind is drawn first, and what is before it covers it.
    for i, j, k, m in sorted(cells, key=lambda c: -depth[c[0], c[1]] - depth[c[2], c[3]]):
        corners = [i, i, k, k], [j, m, m, j]
        fill = "#{:02x}{:02x}{:02x}".format(*colors[corners].mean(0).astype(int))
        plot.polygon(xs[corners], ys[corners], fill)
    middle = [len(values) // 2] * 2
    lowest = [int(i) for i in np.unravel_index(int(values.argmin()), values.shape)]
    for (i, j), shape, words in ((middle, "plus", "first scales"), (lowest, "down", "lowest")):
        plot.points([xs[i, j]], [ys[i, j]], "#fff", shape, 6, label=words, edge="#000")
    return plot
