"""Lesson 3: the loss over the scales of one layer, along a line or in a plane, and its noise."""

from functools import cache, partial
from itertools import count
from typing import Any

import ipywidgets as W
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize, twin
from evolq_lite.data import DEMO_MODELS, Demo, load_demo
from evolq_lite.figures import Picture, new_figure
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
from evolq_lite.panels.pictures import draw_lines
from evolq_lite.panels.worker import Tick

IMAGES = 100
BLOCKS = {
    "vit": [f"blocks.{i}" for i in range(DEMO_MODELS["vit"]["depth"])],
    "cnn": [f"layer{i}.0" for i in range(1, 5)],
}
LAYERS = {"vit": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], "cnn": ["conv1", "conv2"]}
USUAL = {"vit": ("blocks.2", "attn.qkv"), "cnn": ("layer2.0", "conv1")}
FITNESS, PROBE = "fitness", "test loss (probe)"
LINE, PLANE = "line", "plane"
FLOOR_POINTS = 5  # where the noise floor is measured, on the line
POINTS = {LINE: 21, PLANE: 11}
CHUNKS = {"vit": (10,), "cnn": (1,)}  # other chunk sizes for the noise floor


@cache
def quantized(network: str, bits: int) -> tuple[Demo, nn.Module]:
    """An embedded network with 100 calibration images, and its quantized form, to be copied."""
    demo = load_demo(network, IMAGES)
    qmodel = quantize(demo.model, QuantConfig(weight_bits=bits))
    calibrate(qmodel, demo.calibration)
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
    following = False  # while blocks and layers become those of another network

    def make_controls(self) -> dict[str, Any]:
        """Eight controls; those for block and layer follow that for the network."""
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
            self.following = True
            try:
                block.options, layer.options = BLOCKS[network.value], LAYERS[network.value]
                block.value, layer.value = USUAL[network.value]
            finally:
                self.following = False

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
                "A line of 21 points or a plane of 11 by 11",
                options=[LINE, PLANE],
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
        }

    def set_controls(self, values: Values) -> None:
        """The network first: it decides which blocks and layers there are."""
        super().set_controls({key: values[key] for key in sorted(values, key="network".__ne__)})

    def changed(self, change: Any) -> None:
        """A control has moved; block and layer that only follow the network do not count."""
        if not self.following:
            super().changed(change)

    def compute(self, tick: Tick, **values: Any) -> Any:
        """Values on the line (21,) or in the plane (11, 11), radii, noise floor, scales."""
        demo, kept = quantized(values["network"], values["bits"])
        tick(0.0)
        images, targets = demo.calibration, demo.targets
        fitness: Fitness = info_nce
        if values["images"] == PROBE:
            (images, targets), fitness = probe_images(), F.cross_entropy
        make = partial(
            layer_objective,
            block=values["block"],
            layer=values["layer"],
            images=images,
            targets=targets,
            fitness=fitness,
        )
        # Evaluating swaps tensors for a moment, so no two panels may share a network.
        objective = make(twin(kept))
        tick(0.0)
        ways = [objective, *other_ways(objective, make, CHUNKS[values["network"]])]
        tick(0.0)
        points = POINTS[values["what"]]
        cells = points if values["what"] == LINE else points**2
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

        if values["what"] == LINE:
            return line(objective, start, along, radii, on_cell=on_cell), radii, floor, len(start)
        found = plane(objective, start, (along, across), radii, on_cell=on_cell)
        return found, radii, floor, len(start)

    def draw(self, result: Any, **values: Any) -> tuple[Picture, str]:
        """The line with its noise floor, or the plane as a map and as a surface."""
        found, radii, floor, scales = result
        middle = float(found[len(radii) // 2] if found.ndim == 1 else found[*[len(radii) // 2] * 2])
        of = "calibration fitness" if values["images"] == FITNESS else "test loss (a probe)"
        where = (
            f"{values['network'].upper().replace('VIT', 'ViT')} {values['block']}."
            f"{values['layer']}, W{values['bits']}A8"
        )
        low, high = float(found.min()) - middle, float(found.max()) - middle
        ways = "a random direction" if found.ndim == 1 else "two random directions"
        said = (
            f"{where}, {scales} scales moved along {ways} (seed {values['seed']}) up to a radius "
            f"of {values['radius']:.2g}: the {of} of {middle:.4f} changes by {low:+.2g} to "
            f"{high:+.2g}; the noise floor is {floor:.1g}. {self.shape(found, floor)}"
        )
        if found.ndim == 1:
            figure = new_figure(6.8, 3.2, f"Line through the landscape. {said}")
            axes = figure.add_subplot()
            draw_lines(axes, radii, {"along the line": found}, middle, floor)
            axes.set(ylabel=f"change of {of}", title=where)
            axes.legend(fontsize="small")
            return figure, said
        figure = new_figure(9.6, 4.0, f"Plane through the landscape, map and surface. {said}")
        draw_plane(figure, (found - middle).numpy(), 100 * radii.numpy(), floor, f"change of {of}")
        return figure, said

    @staticmethod
    def shape(found: Tensor, floor: float) -> str:
        """How jagged it is, in words."""
        if found.ndim == 1:
            return (
                f"Local minima: {local_minima(found)}, deeper than the noise floor: "
                f"{local_minima(found, floor)}. Total variation {total_variation(found):.1f} times "
                "the range; a slope has 1, one valley at most 2."
            )
        rows = [*found, *found.T]
        bare, deep = (sum(local_minima(row, f) for row in rows) / len(rows) for f in (0.0, floor))
        return (
            f"Local minima in a row or column: {bare:.1f} on average, deeper than the noise floor: "
            f"{deep:.1f}."
        )


def draw_plane(
    figure: Picture, values: np.ndarray, radii: np.ndarray, floor: float, label: str
) -> None:
    """A plane (n, n) as a heat map, the noise floor on its colour bar, and as a surface."""
    left: Any = figure.add_subplot(1, 2, 1)
    half = float(radii[1] - radii[0]) / 2
    edge = float(radii[-1]) + half
    image = left.imshow(
        values, cmap="cividis", origin="lower", extent=(-edge, edge, -edge, edge), aspect="equal"
    )
    lowest = np.unravel_index(int(values.argmin()), values.shape)
    left.plot(0, 0, "P", color="white", mec="black", ms=9, label="first scales")
    left.plot(*radii[[lowest[1], lowest[0]]], "v", color="white", mec="black", ms=9, label="lowest")
    left.set(xlabel="second direction, %", ylabel="first direction, %")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False)
    bar: Any = figure.colorbar(image, ax=left, shrink=0.8, label=f"{label}; dashed: noise floor")
    bar.formatter.set_powerlimits((-2, 2))
    for side in (-floor / 2, floor / 2):
        bar.ax.axhline(side, color="white", lw=2.5)
        bar.ax.axhline(side, color="black", lw=1, ls="--")
    right: Any = figure.add_subplot(1, 2, 2, projection="3d")
    grid = np.meshgrid(radii, radii)
    right.plot_surface(*grid, values, cmap="cividis", edgecolor="0.3", lw=0.3)
    ticks = radii[[0, len(radii) // 2, -1]].tolist()
    right.set(xlabel="second, %", ylabel="first, %", xticks=ticks, yticks=ticks)
    right.ticklabel_format(axis="z", scilimits=(-2, 2))
    right.tick_params(labelsize="small")
