"""Lesson 2: a transformer block as a drawing, with a dot at each quantization point.

The error of a point is its own: what passes it in the float network, against what its integers tell
apart. It does not contain what earlier points have done.
"""

from functools import cache
from math import log10
from typing import Any

import torch
from matplotlib import colormaps
from torch import Tensor

from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, pass_floats, quantize, quantizers
from evolq_lite.data import DEMO_MODELS, Demo, load_demo
from evolq_lite.panels.base import IntSlider, Panel, control
from evolq_lite.panels.drawing import Drawing, text
from evolq_lite.panels.vit import make_quant_controls
from evolq_lite.panels.worker import Tick

IMAGES = 100  # to calibrate with; errors are of the first HEARD
HEARD = 20
LOWEST, HIGHEST = 1e-3, 1.0  # errors at the ends of the colors
# Where each point lies, in pixels, and where its words go: above (-1) or below (1).
POINTS = {
    "attn.qkv.input_quant": (146, 118, 1, "input"),
    "attn.qkv.weight_quant": (196, 66, -1, "weights"),
    "attn.products.q": (268, 66, -1, "q"),
    "attn.products.k": (268, 118, 1, "k"),
    "attn.products.v": (268, 176, 1, "v"),
    "attn.products.scores": (400, 92, -1, "scores"),
    "attn.products.probabilities": (522, 92, -1, "probabilities"),
    "attn.proj.input_quant": (640, 118, 1, "input"),
    "attn.proj.weight_quant": (690, 66, -1, "weights"),
    "sum1": (800, 118, 1, "sum"),
    "mlp.fc1.input_quant": (146, 326, 1, "input"),
    "mlp.fc1.weight_quant": (196, 274, -1, "weights"),
    "mlp.fc2.input_quant": (372, 326, 1, "input, after GELU"),
    "mlp.fc2.weight_quant": (422, 274, -1, "weights"),
    "sum2": (532, 326, 1, "sum"),
}
BOXES = [  # left, middle, width, words
    (60, 118, 56, "norm1"),
    (172, 118, 48, "qkv"),
    (312, 92, 54, "q kᵀ"),
    (430, 92, 64, "softmax"),
    (566, 118, 46, "p v"),
    (666, 118, 48, "proj"),
    (60, 326, 56, "norm2"),
    (172, 326, 48, "fc1"),
    (256, 326, 56, "GELU"),
    (398, 326, 48, "fc2"),
]
PLUSES = [(748, 118), (480, 326)]
WIRES = [
    "M20 118H60M116 118H172M220 118H300V100H312M244 118V66H300V84H312M244 118V176H589V132",
    "M366 92H430M494 92H580V104M612 118H666M714 118H738M758 118H830",
    "M196 66V104M690 66V104",
    "M36 118V24H748V108",  # past the attention
    "M830 118V226H36V326H60M116 326H172M220 326H256M312 326H398M446 326H470M490 326H570",
    "M196 274V312M422 274V312",
    "M46 326V386H480V336",  # past the MLP
]


class Listener:
    """Stands where an observer would, and keeps what passes."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.heard.append(x)


@cache
def network() -> Demo:
    """The embedded ViT with calibration images."""
    return load_demo("vit", IMAGES)


@torch.no_grad()
def point_errors(config: QuantConfig, tick: Tick) -> dict[str, float]:
    """The relative error of every point of the ViT, by name."""
    demo = network()
    qmodel = quantize(demo.model, config)
    tick(0.3)
    calibrate(qmodel, demo.calibration)
    tick(0.6)
    points = quantizers(qmodel)
    listeners = {name: Listener() for name in points}
    with pass_floats(qmodel):
        for name, point in points.items():
            point.observer = listeners[name]  # type: ignore[assignment]
        qmodel(demo.calibration[:HEARD])
    errors = {}
    for name, point in points.items():
        point.observer = None
        x = torch.cat([heard.flatten() for heard in listeners[name].heard])
        after = torch.cat([point(heard).flatten() for heard in listeners[name].heard])
        errors[name] = float((after - x).norm() / x.norm())
    return errors


class BlockPanel(Panel):
    """Bits, observer and kind of residual sums; the error of each point of a block."""

    presets = {
        "W8A8": {"weight_bits": 8, "act_bits": 8},
        "W3A8": {"weight_bits": 3, "act_bits": 8},
        "W8A4": {"weight_bits": 8, "act_bits": 4},
    }

    def __init__(self, name: str | None = None, **values: Any) -> None:
        self.known: dict[QuantConfig, dict[str, float]] = {}  # what has been computed
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """A block, and four options of QuantConfig."""
        last = DEMO_MODELS["vit"]["depth"] - 1
        return {
            "block": control(IntSlider, "Block", "Which block", value=2, min=0, max=last),
            **make_quant_controls(),
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """The errors of all points; another block costs nothing."""
        config = QuantConfig(
            **{key: value for key, value in values.items() if key != "block"}, execution="plain"
        )
        if config not in self.known:
            self.known[config] = point_errors(config, tick)
        return self.known[config]

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """The block."""
        prefix = f"blocks.{values['block']}."
        errors = {name: result[prefix + name] for name in POINTS if prefix + name in result}
        worst = sorted(errors, key=lambda name: -errors[name])[:3]
        setting = f"W{values['weight_bits']}A{values['act_bits']}, block {values['block']}"
        named = ", ".join(f"{spoken(name)} {errors[name]:.1%}" for name in worst)
        best = min(errors, key=lambda name: errors[name])
        said = (
            f"{setting}: {len(errors)} points. Largest relative errors: {named}; smallest: "
            f"{spoken(best)} {errors[best]:.2%}."
        )
        alt = f"A transformer block with a dot at each quantization point, {setting}. {named}."
        return Drawing(alt, Scheme(f"{setting}: the error that each point makes", errors)), said


def spoken(name: str) -> str:
    """A point's name without what only code needs."""
    return (
        name.removeprefix("attn.")
        .removeprefix("mlp.")
        .removeprefix("products.")
        .replace(".input_quant", " input")
        .replace(".weight_quant", " weights")
    )


class Scheme:
    """A transformer block: boxes, wires, and a dot for each point, dark if its error is small."""

    def __init__(self, title: str, errors: dict[str, float]) -> None:
        width, height = 850, 434
        parts = [text(4, 14, title, 'font-weight="bold"', "start")]
        wires = "".join(WIRES)
        style = 'fill="none" stroke="currentColor" stroke-opacity="0.6" stroke-width="1.4"'
        parts.append(f'<path d="{wires}" {style}/>')
        for left, middle, wide, words in BOXES:
            parts.append(
                f'<rect x="{left}" y="{middle - 14}" width="{wide}" height="28" rx="4" '
                'fill="var(--jp-layout-color1, #fff)" stroke="currentColor"/>'
            )
            parts.append(text(left + wide / 2, middle + 4, words))
        for x, y in PLUSES:
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="10" fill="var(--jp-layout-color1, #fff)" '
                'stroke="currentColor"/>'
            )
            parts.append(text(x, y + 5, "+"))
        parts += [text(16, 112, "x", "", "end"), text(576, 330, "next block", "", "start")]
        parts += [dot(*POINTS[name], spoken(name), error) for name, error in errors.items()]
        parts.append(legend(580, 408))
        self.svg = (
            f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-size="12" '
            f'fill="currentColor" aria-hidden="true">{"".join(parts)}</svg>'
        )

    def __str__(self) -> str:
        return self.svg


def color_of(error: float) -> str:
    """Cividis over the logarithm of an error."""
    place = (log10(max(error, LOWEST)) - log10(LOWEST)) / (log10(HIGHEST) - log10(LOWEST))
    red, green, blue, _ = colormaps["cividis"](min(place, 1.0), bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"


def dot(x: int, y: int, side: int, words: str, name: str, error: float) -> str:
    """A dot with its words and its error above or below."""
    upper = y - 30 if side < 0 else y + 25
    return (
        f'<circle cx="{x}" cy="{y}" r="9" fill="{color_of(error)}" stroke="currentColor" '
        f'stroke-width="1.5"><title>{name}: {error:.2%}</title></circle>'
        + text(x, upper, words, 'class="evolq-words"')
        + text(x, upper + 14, f"{100 * error:.2g} %", 'class="evolq-words" font-weight="bold"')
    )


def legend(x: int, y: int) -> str:
    """The colors and their errors."""
    parts = [text(x, y, "relative error", "", "start")]
    for i, error in enumerate((0.001, 0.01, 0.1, 1.0)):
        at = x + 100 + 42 * i
        parts.append(
            f'<circle cx="{at}" cy="{y - 4}" r="7" fill="{color_of(error)}" stroke="currentColor"/>'
        )
        parts.append(text(at, y + 16, f"{100 * error:g} %"))
    return "".join(parts)
