"""Lesson 9: an exported file reads what is typed, in a typeface that it has never seen."""

from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets as W
import torch
from torch import Tensor

from evolq_lite.data import CHARACTERS, Typefaces, read_typefaces
from evolq_lite.deployed import Deployed
from evolq_lite.panels.base import FloatSlider, IntSlider, Panel, control
from evolq_lite.panels.drawing import Drawing, Tiles
from evolq_lite.panels.worker import Tick

MOST = 12  # characters in one picture


@cache
def test_images() -> tuple[Typefaces, Tensor]:
    """The test part, and the numbers of its typefaces in order."""
    part = read_typefaces("test")
    return part, part.faces.unique()


def draw_text(text: str, typeface: int) -> tuple[str, Tensor]:
    """The characters of a text that the network knows, and their pixels (n, 1, 28, 28), 0 to 1."""
    part, faces = test_images()
    known = "".join(c for c in text if c in CHARACTERS)[:MOST]
    mine = part.faces == faces[typeface - 1]
    images, labels = part.images[mine], part.labels[mine]
    order = [int((labels == CHARACTERS.index(c)).nonzero()[0]) for c in known]
    return known, images[order].float() / 255


class GalleryPanel(Panel):
    """Text, typeface, and the mean and deviation with which images are prepared."""

    live = True
    presets = {
        "Right": {"mean": 0.5, "std": 0.5},
        "Look-alikes": {"text": "O0oIl1", "mean": 0.5, "std": 0.5},
        "Mean forgotten": {"mean": 0.0, "std": 1.0},
        "Deviation 1": {"mean": 0.5, "std": 1.0},
        "Deviation 0.25": {"mean": 0.5, "std": 0.25},
    }

    def __init__(self, file: Path | str, name: str | None = None, **values: Any) -> None:
        """`file` is an exported embedded network."""
        self.network = Deployed(file, threads=1)
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """Four controls."""
        mean, std = self.network.facts["mean"][0], self.network.facts["std"][0]
        return {
            "text": control(
                W.Text, "Text", f"Letters and digits; the first {MOST} are read", value="Quantize09"
            ),
            "typeface": control(
                IntSlider, "Typeface", "One of the test typefaces", value=4, min=1, max=160
            ),
            "mean": control(
                FloatSlider, "Mean", "Subtracted from pixels of 0 to 1", value=mean, min=0, max=1
            ),
            "std": control(
                FloatSlider, "Deviation", "Pixels are divided by it", value=std, min=0.1, max=1
            ),
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """What is drawn, and what the file reads."""
        text, pixels = draw_text(values["text"], values["typeface"])
        if not text:
            return text, pixels, torch.zeros(0, dtype=torch.long)
        found = self.network((pixels - values["mean"]) / values["std"]).argmax(1)
        return text, pixels, found

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """Each character over what it was read as."""
        text, pixels, found = result
        read = [CHARACTERS[int(i)] for i in found]
        right = sum(a == b for a, b in zip(text, read))
        setting = (
            f"typeface {values['typeface']}, mean {values['mean']:.2f}, "
            f"deviation {values['std']:.2f}"
        )
        if not text:
            return Drawing(
                "No character to read.", Tiles("Nothing", pixels[:, 0].numpy(), [])
            ), "Type letters of the English alphabet, or digits."
        said = f"Read as {''.join(read)}: {right} of {len(text)} right ({setting})."
        alt = f"{len(text)} characters in {setting}; {right} are read correctly."
        titles = [f"{a} → {b} {'✓' if a == b else '✗'}" for a, b in zip(text, read)]
        return Drawing(alt, Tiles("Typed → read", 2 * pixels[:, 0].numpy() - 1, titles)), said
