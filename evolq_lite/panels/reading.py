"""Lesson 0: 60 characters and a bit slider; labels flip as it moves.

The slider answers at once because nothing is computed: what each network reads is stored in
`data/panels/ReadingPanel.json`, which `python -m evolq_lite.panels ReadingPanel` makes.
"""

import json
from functools import cache
from typing import Any

from torch import Tensor

from evolq_lite.config import DEMO_IMAGES, QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import CHARACTERS, load_demo, normalised, read_typefaces
from evolq_lite.evaluate import predict
from evolq_lite.experiments.report import load_results
from evolq_lite.experiments.results import where
from evolq_lite.files import DATA, write_whole
from evolq_lite.panels.base import IntSlider, Panel, control
from evolq_lite.panels.drawing import BLUE, DASHES, ORANGE, PURPLE, Drawing, Plot, Sheet
from evolq_lite.panels.worker import Tick

BITS = range(2, 9)
EVERY = 165  # test image: 165 and 62 have no divisor, so these are 60 different characters
COUNT = 60
SHOWN = slice(0, EVERY * COUNT, EVERY)
FLIPPED, BEFORE = "now wrong", "wrong in float, too"
FRAMES = {FLIPPED: (ORANGE, ""), BEFORE: (PURPLE, DASHES[2])}
STORED = DATA / "panels" / "ReadingPanel.json"


def compute_readings() -> dict[str, Any]:
    """What the float and the quantized networks read in the 60, and how many they get right of all.

    Scales by MinMax on 500 calibration images, 8-bit activations: cells of C1, whose results are
    stored and say what share of all test images each network gets right.
    """
    demo = load_demo("vit", DEMO_IMAGES)
    images, labels = demo.test
    measured = where(load_results("C1"), network="vit")
    rows = {"float": where(measured, observer="none")}
    networks = {"float": demo.model}
    for bits in BITS:
        rows[str(bits)] = where(measured, observer="minmax", weight_bits=bits, act_bits=8)
        networks[str(bits)] = quantize(demo.model, QuantConfig(weight_bits=bits, act_bits=8))
        calibrate(networks[str(bits)], demo.calibration)
    found = predict(networks, [images[SHOWN]])
    return {
        "images": len(labels),
        "read": {name: spell(classes) for name, classes in found.items()},
        "top1": {name: round(100 * row["top1"].item(), 2) for name, row in rows.items()},
    }


def store_readings() -> str:
    """Compute and keep them; says what was written."""
    readings = compute_readings()
    write_whole(STORED, (json.dumps(readings, indent=1) + "\n").encode())
    return f"top-1 {readings['top1']}"


def spell(classes: Tensor) -> str:
    """Classes (n,) as a word of n characters."""
    return "".join(CHARACTERS[int(i)] for i in classes)


@cache
def shown() -> tuple[str, str]:
    """The 60 images as one, and what they are."""
    part = read_typefaces("test")
    images = normalised(part.images[SHOWN].float() / 255)[:, 0].numpy()
    return Sheet.sprite(images), spell(part.labels[SHOWN])


@cache
def readings() -> dict[str, Any]:
    """The stored readings; ValueError if they are missing or damaged."""
    try:
        found = json.loads(STORED.read_text(encoding="utf-8"))
        whole = all(len(found["read"][name]) == COUNT for name in ("float", *map(str, BITS)))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{STORED} is missing or damaged; restore it with: git checkout -- data, or make it "
            "with: python -m evolq_lite.panels ReadingPanel"
        )
    return dict(found)


class ReadingPanel(Panel):
    """Weight bits; what the network reads in 60 characters, and how much of all it gets right."""

    live = True

    def make_controls(self) -> dict[str, Any]:
        """One control."""
        return {
            "bits": control(
                IntSlider,
                "Weight bits",
                "Bits of every weight; activations have 8",
                value=8,
                min=BITS[0],
                max=BITS[-1],
            )
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """Look it up."""
        return readings()

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """The characters under what is read in them, and top-1 over the bits."""
        name, total = str(values["bits"]), result["images"]
        images, truth = shown()
        now, was = result["read"][name], result["read"]["float"]
        labels, looks = zip(*map(judge, now, was, truth))
        right = sum(a == b for a, b in zip(now, truth))
        before = sum(a == b for a, b in zip(was, truth))
        flips = sum(a != b for a, b in zip(now, was))
        top1 = result["top1"]
        said = (
            f"{name} bits: {right} of these {COUNT} characters are read correctly, {before} by the "
            f"float network; {flips} labels differ from the float network's. On all {total:,} test "
            f"images: {top1[name]:.1f} % right, float {top1['float']:.1f} %."
        )
        alt = (
            f"{COUNT} characters over the labels of the network with {name}-bit weights: {right} "
            f"right, {flips} flipped. Beside: top-1 over bits, {top1[name]:.1f} % here, "
            f"{top1['float']:.1f} % in float."
        )
        title = f"What the network reads with {name}-bit weights"
        sheet = Sheet(title, images, labels, looks, FRAMES)
        return Drawing(alt, sheet, draw_top1(top1, values["bits"])), said


def judge(now: str, was: str, truth: str) -> tuple[str, str]:
    """A label for a character, and its frame."""
    if now == truth:
        return now, ""
    return (f"{truth} → {now}", FLIPPED) if was == truth else (f"{truth} → {now}", BEFORE)


def draw_top1(top1: dict[str, float], bits: int) -> Plot:
    """Top-1 over bits, with the present ones marked."""
    plot = Plot(
        "All test images",
        (1.6, 8.4),
        (0, 100),
        "weight bits",
        "read correctly, %",
        width=330,
        height=380,
        rows=2,
        xticks=[(b, str(b)) for b in BITS],
    )
    values = [top1[str(b)] for b in BITS]
    plot.line((1.6, 8.4), [top1["float"]] * 2, "currentColor", DASHES[1], "float network", 1.2)
    titles = [f"{b} bits: {value:.1f} %" for b, value in zip(BITS, values)]
    plot.line(BITS, values, BLUE, label="quantized")
    plot.points(BITS, values, BLUE, titles=titles)
    here = top1[str(bits)]
    plot.points([bits], [here], ORANGE, "diamond", 7, titles=[f"{here:.1f} %"], label="here")
    plot.words(bits, max(here - 16, 2), f"{here:.1f} %", "end" if bits > 6 else "middle")
    return plot
