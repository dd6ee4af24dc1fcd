"""What the page `play` plays: landscapes and a search, computed when the site is built.

`python docs/site/play.py OUT.js` evaluates four planes of lesson 3, and records the paper's search
of lesson 6, both on the embedded ViT with 3-bit weights. The page only draws these numbers: a
browser would need minutes for them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import torch

from evolq_lite.config import KINDS
from evolq_lite.evolve import Evaluated
from evolq_lite.landscape import direction, layer_objective, plane
from evolq_lite.rounding import freeze_integers

QUANT = eq.QuantConfig(weight_bits=3, act_bits=8)
BLOCK, LAYER = "blocks.2", "attn.qkv"
ACTIVATIONS = ",".join(kind for kind in KINDS if kind != "weights")
LANDSCAPES = {  # float activations, frozen integers
    "as it is: integers and activations jump": (False, False),
    "frozen integers: only activations jump": (False, True),
    "float activations: only integers jump": (True, False),
    "float activations, frozen integers: nothing jumps": (True, True),
}
RADIUS = 0.03  # of each scale, to both sides


def evaluate_plane(images: int, points: int, floats: bool, frozen: bool) -> list[list[float]]:
    """The change of the loss from the first scales, over two random directions (n, n)."""
    demo = eq.load_demo("vit", images)
    config = replace(QUANT, float_points=ACTIVATIONS) if floats else QUANT
    qmodel = eq.quantize(demo.model, config)
    eq.calibrate(qmodel, demo.calibration)
    if frozen:
        freeze_integers(qmodel)
    objective = layer_objective(qmodel, BLOCK, LAYER, demo.calibration, demo.targets)
    start = objective.start
    radii = torch.linspace(-RADIUS, RADIUS, points)
    values = plane(objective, start, (direction(start, 0), direction(start, 1)), radii)
    return [
        [round(v, 6) for v in row] for row in (values - values[points // 2, points // 2]).tolist()
    ]


def record_search(images: int, passes: int) -> list[list[object]]:
    """Block, loss, and whether it was accepted, of each evaluation of the paper's search."""
    demo = eq.load_demo("vit", images)
    qmodel = eq.quantize(demo.model, QUANT)
    eq.calibrate(qmodel, demo.calibration)
    events = eq.evolve(
        eq.chain_of(qmodel),
        demo.calibration,
        demo.targets,
        eq.SearchConfig(passes=passes, batch=min(100, images)),
    )
    return [
        [int(e.block.removeprefix("blocks.")), round(e.fitness, 5), int(e.accepted)]
        for e in events
        if isinstance(e, Evaluated)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write what the page `play` draws.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--points", type=int, default=21, help="of each side of a plane, odd")
    parser.add_argument("--passes", type=int, default=10, help="of the search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    few = min(100, options.images)
    told = {
        "where": f"{BLOCK}.{LAYER}",
        "percent": 100 * RADIUS,
        "planeImages": few,
        "searchImages": options.images,
        "landscapes": [
            {"name": name, "values": evaluate_plane(few, options.points, *how)}
            for name, how in LANDSCAPES.items()
        ],
        "search": record_search(options.images, options.passes),
    }
    text = json.dumps(told, separators=(",", ":"))
    options.out.write_text(f"const PLAY_DATA = {text};\n", encoding="utf-8")


if __name__ == "__main__":
    main()
