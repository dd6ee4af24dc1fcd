"""Accuracy with an interval, and paired comparison of networks: only here are test images read.

Two networks are compared on the same images. Only the images on which one is right and the other
wrong tell them apart; under the hypothesis of no difference, each such image is a fair coin:
McNemar's exact test is a binomial test on them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn


@dataclass(frozen=True)
class Accuracy:
    """Top-1: how many of how many images are right."""

    correct: int
    images: int

    @property
    def top1(self) -> float:
        """Share of right images, 0 to 1."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        ci = binomtest(self.correct, self.images).proportion_ci(0.95, "wilson")
        return float(ci.low), float(ci.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.top1:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


class Gain(ABC):
    """A difference of top-1 with its interval and test, in words."""

    test: ClassVar[str]

    @property
    @abstractmethod
    def gain(self) -> float:
        """Difference of top-1, 0 to 1, positive if the second network is better."""

    @property
    @abstractmethod
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain."""

    @property
    @abstractmethod
    def p_value(self) -> float:
        """Two-sided."""

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance would give, at 5 %."""
        return self.p_value < 0.05

    @property
    def verdict(self) -> str:
        """The result in words."""
        if not self.significant:
            return f"no significant difference ({self.test}, 5 %)"
        return f"significantly {'better' if self.gain > 0 else 'worse'} ({self.test}, 5 %)"

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{100 * self.gain:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], "
            f"p {'< 1e-99' if self.p_value < 1e-99 else f'= {self.p_value:.2g}'}"
            f"{', seeds differ in sign' if self.p_value < 0.05 and not self.significant else ''}"
        )


@dataclass(frozen=True)
class Comparison(Gain):
    """Paired difference of two networks on the same images."""

    test = "McNemar exact test"
    gained: int  # wrong before, right after
    lost: int  # right before, wrong after
    images: int

    @classmethod
    def of(cls, was: Tensor, now: Tensor) -> "Comparison":
        """From which images (n,) were right before and which are right after."""
        return cls(int((~was & now).sum()), int((was & ~now).sum()), len(was))

    @property
    def gain(self) -> float:
        """Difference of top-1, 0 to 1, positive if the second network is better."""
        return (self.gained - self.lost) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain: Wald, each cell plus half a count (Agresti and Min, 2005)."""
        n, b, c = self.images + 2, self.gained + 0.5, self.lost + 0.5
        middle, half = (b - c) / n, 1.96 * sqrt((b + c) - (b - c) ** 2 / n) / n
        return middle - half, middle + half

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test."""
        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed).pvalue) if changed else 1.0


@dataclass(frozen=True)
class SeedComparison(Gain):
    """Paired difference of two methods, each with several seeds, on the same images.

    The images are the sample: what the seeds gain on one image is averaged first, because two seeds
    that get the same image right are no two observations. Images that come in groups (the
    characters of one typeface) are alike, so it is the groups that are drawn: the error is that of
    a sum over groups. Three seeds are too few for an error of their own; `gains` shows how they
    scatter, and a difference whose sign depends on the seed is never called significant.
    """

    test = "normal test over typefaces or images, all seeds of one sign"
    gains: tuple[float, ...]  # of each seed
    error: float  # standard error of their mean, over groups of images
    images: int

    @classmethod
    def of(cls, was: Tensor, now: Tensor, groups: Tensor | None = None) -> "SeedComparison":
        """From which images (seeds, n) were right before and which are right after.

        `groups` (n,) numbers the group of each image; without it, each is its own.
        """
        change = now.float() - was.float()
        n = change.shape[1]
        each = change.mean(0) - change.mean()
        if groups is not None:
            _, numbers = groups.unique(return_inverse=True)
            each = torch.zeros(int(numbers.max()) + 1).index_add_(0, numbers, each)
        error = sqrt(len(each) / (len(each) - 1) * float(each.square().sum())) / n
        return cls(tuple(change.mean(1).tolist()), error, n)

    @property
    def gain(self) -> float:
        """Mean difference of top-1 over seeds, 0 to 1, positive if the second method is better."""
        return sum(self.gains) / len(self.gains)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean gain for other images (groups of them), with these seeds."""
        return self.gain - 1.96 * self.error, self.gain + 1.96 * self.error

    @property
    def p_value(self) -> float:
        """Two-sided normal test of the mean over images or groups of them."""
        if not self.error:
            return 0.0 if self.gain else 1.0
        return 2 * float(norm.sf(abs(self.gain) / self.error))

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance would give, at 5 %, and every seed has it."""
        return self.p_value < 0.05 and len({gain > 0 for gain in self.gains}) == 1


@torch.no_grad()
def predict(
    models: Mapping[str, nn.Module],
    images: Iterable[Tensor],
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Tensor]:
    """The classes (n,) that each model predicts; the batches of images are read once for all."""
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    for x in images:
        for name, model in models.items():
            found[name].append(model(x).argmax(1))
        progress(len(x))
    return {name: torch.cat(parts) for name, parts in found.items()}


def accuracy(predictions: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 of predictions (n,) against labels (n,)."""
    return Accuracy(int((predictions == labels).sum()), len(labels))


def compare(before: Tensor, after: Tensor, labels: Tensor) -> Comparison:
    """Compare two networks by their predictions (n,) for the same images with labels (n,)."""
    return Comparison.of(before == labels, after == labels)


def packed(correct: Tensor) -> str:
    """Which images (n,) are right, as hexadecimal bits: results can be compared image by image."""
    return np.packbits(correct.numpy().astype(bool)).tobytes().hex()


def unpacked(text: str, images: int) -> Tensor:
    """The reverse of `packed`."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:images]
    return torch.from_numpy(bits.astype(bool))
