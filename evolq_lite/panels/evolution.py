"""Lesson 5: the paper's search at work, a candidate at a time, on a toy and on one real block."""

import torch

from evolq_lite.genome import Vector
from evolq_lite.objective import Population, Values

TOY, BLOCK = "toy: two scales", "blocks.5 of the ViT: 192 scales"
IMAGES = 100  # calibration images of the real block
PLAY = 100  # candidates that Play makes
PACE = 0.1  # seconds for a candidate while playing, so that an eye can follow
PICTURE = 0.2  # seconds between two pictures while playing


class JaggedBowl:
    """A toy objective of two scales: a bowl, and rounding errors that make it jagged.

    f(x) = |x - centre|^2 / reach^2 + depth * mean of (t - round(t) + 1/2) over the four t of
    waves @ (x - centre). Each t - round(t) is what rounding leaves of a sum in which both scales
    take part: a slope that jumps back where the rounding flips. Population (p, 2), values (p,).
    """

    centre = torch.tensor([0.080, 0.060])
    reach, depth = 0.01, 0.5
    waves = torch.tensor([[750.0, 130.0], [-260.0, 560.0], [-100.0, -650.0], [420.0, -330.0]])

    @property
    def start(self) -> Vector:
        """Where a search begins (2,), well up the wall of the bowl."""
        return torch.tensor([0.0735, 0.0655])

    def __call__(self, population: Population) -> Values:
        """Evaluate candidates, one a row."""
        away = population - self.centre
        errors = (away @ self.waves.T).frac_round() if False else away @ self.waves.T
        errors = errors - errors.round()
        return (away / self.reach).square().sum(1) + self.depth * (errors + 0.5).mean(1)
