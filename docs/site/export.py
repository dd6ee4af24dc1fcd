"""The embedded ViT as a file that a web page can load: `python docs/site/export.py OUT.js`.

The page `try` computes the network in JavaScript (`static/vit.js`). What it needs comes from here:
float weights as committed, a few hundred test images, the product's own scales for each bit-width,
and the integers that GPTQ chooses for 2, 3 and 4 bits.

The file is a script that sets one variable, with the numbers as base64, and not a data file that
the page would fetch: a browser refuses to fetch anything for a page that was opened from a folder.
"""

from __future__ import annotations

import argparse
import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import numpy as np
import torch
from torch import Tensor, nn

from evolq_lite.convert import quantizers
from evolq_lite.data import CHARACTERS, Demo, load_demo, read_typefaces
from evolq_lite.rounding import integers_of, quant_layers, round_weights

EVERY = 33  # test image: 301 of all typefaces and, as 33 and 62 have no divisor, all characters
BITS = range(2, 9)
OBSERVERS = ("minmax", "mse")  # of the first weight scales
GPTQ_BITS = (2, 3, 4)
GPTQ_CONFIG = eq.QuantConfig(act_bits=8, weight_observer="mse")


class Numbers:
    """Arrays of one type, one behind the other, and where each of them is."""

    def __init__(self, kind: str) -> None:
        self.kind = np.dtype(kind)
        self.parts: list[np.ndarray] = []
        self.places: dict[str, tuple[int, int]] = {}  # name: first number, how many
        self.length = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of any shape, row by row."""
        part = tensor.detach().numpy().astype(self.kind).ravel()
        self.places[name] = (self.length, part.size)
        self.parts.append(part)
        self.length += part.size

    def to_json(self) -> dict[str, object]:
        """Places, and the numbers as base64, little-endian."""
        data = np.concatenate(self.parts).astype(self.kind.newbyteorder("<"))
        return {"places": self.places, "base64": b64encode(data.tobytes()).decode()}


def calibrated(demo: Demo, config: eq.QuantConfig) -> nn.Module:
    """The embedded network, quantized and calibrated."""
    qmodel = eq.quantize(demo.model, config)
    eq.calibrate(qmodel, demo.calibration)
    return qmodel


def add_scales(floats: Numbers, demo: Demo) -> None:
    """Scales of weights by observer and bits, and of activations by bits.

    All are found in float, so those of weights do not depend on the bits of activations.
    """
    for bits in BITS:
        for observer in OBSERVERS:
            config = eq.QuantConfig(weight_bits=bits, act_bits=bits, weight_observer=observer)
            # Scales of weights look at no images, so one is enough where only they are wanted.
            images = demo.calibration if observer == OBSERVERS[0] else demo.calibration[:1]
            qmodel = calibrated(replace(demo, calibration=images), config)
            for name, point in quantizers(qmodel).items():
                if name.endswith("weight_quant"):
                    floats.add(f"{observer}.{bits}.{name}", point.scale)
                elif observer == OBSERVERS[0]:
                    floats.add(f"act.{bits}.{name}.scale", point.scale)
                    floats.add(f"act.{bits}.{name}.zero_point", point.zero_point)


def add_gptq(floats: Numbers, integers: Numbers, demo: Demo) -> None:
    """Integers, scales and biases that GPTQ chooses beside 8-bit activations."""
    for bits in GPTQ_BITS:
        qmodel = calibrated(demo, replace(GPTQ_CONFIG, weight_bits=bits))
        for _ in round_weights(qmodel, demo.calibration, "gptq"):
            pass
        for name, tensor in integers_of(qmodel).items():
            numbers = integers if name.endswith(".integers") else floats
            numbers.add(f"gptq.{bits}.{name}", tensor)


def export(images: int) -> dict[str, object]:
    """All that the page needs; `images` calibration images choose scales and integers."""
    torch.set_num_threads(1)
    demo = load_demo("vit", images)
    floats, integers, pixels = Numbers("float32"), Numbers("int8"), Numbers("uint8")
    for name, tensor in demo.model.state_dict().items():
        floats.add(name, tensor)
    add_scales(floats, demo)
    add_gptq(floats, integers, demo)
    test = read_typefaces("test")
    pixels.add("images", test.images[::EVERY])
    qmodel, first = eq.quantize(demo.model, GPTQ_CONFIG), demo.model.blocks[0]
    points = [name for name in quantizers(qmodel) if not name.endswith("weight_quant")]
    return {
        "layers": list(quant_layers(qmodel)),
        "points": points,
        "tokens": demo.model.pos_embed.shape[1],
        "channels": demo.model.embed_dim,
        "depth": len(demo.model.blocks),
        "heads": first.attn.num_heads,
        "epsilon": first.norm1.eps,
        "side": test.images.shape[-1],
        "patch": demo.model.patch_embed.patch_size[0],
        "characters": CHARACTERS,
        "labels": test.labels[::EVERY].tolist(),
        "calibration": images,
        "gptqBits": GPTQ_BITS,
        "floats": floats.to_json(),
        "integers": integers.to_json(),
        "pixels": pixels.to_json(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write what the live page computes with.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    options = parser.parse_args()
    told = json.dumps(export(options.images), separators=(",", ":"))
    options.out.write_text(f"const VIT_DATA = {told};\n", encoding="utf-8")


if __name__ == "__main__":
    main()
