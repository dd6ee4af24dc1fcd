"""What test images say of networks, with intervals and paired tests: only here are they read.

Read with lesson 7.

Two networks are compared on the same images. By top-1, only the images on which one is right and
the other wrong tell them apart; under the hypothesis of no difference, each such image is a fair
coin: McNemar's exact test is a binomial test on them.

Few images change sides, so top-1 needs many of them to decide anything. Two losses say something of
every image: the KL divergence from the float network's prediction, which needs no label, and the
cross-entropy of the label. Their mean change over the same images is told beside top-1. They answer
other questions, too: KL asks how much of the float network is left, cross-entropy how likely the
right class is, top-1 how often it is first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf, sqrt
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
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
        from scipy.stats import binomtest  # takes half as long to load as torch

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
            f"p {tell_p(self.p_value)}"
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
        from scipy.stats import binomtest

        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed).pvalue) if changed else 1.0


def agree_in_sign(changes: Sequence[float]) -> bool:
    """Whether all are above 0 or all below it; 0 is neither."""
    return all(c > 0 for c in changes) or all(c < 0 for c in changes)


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
        error = error_of_mean(change, groups)
        return cls(tuple(change.mean(1).tolist()), error, change.shape[1])

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
        return p_value_of(self.gain, self.error)

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance would give, at 5 %, and every seed has it."""
        return self.p_value < 0.05 and agree_in_sign(self.gains)


@dataclass(frozen=True)
class LossChange:
    """Paired change of a loss, a mean over the same images in nats; negative is better.

    Seeds and groups of images count as in `SeedComparison`.
    """

    was: float  # mean loss of the first network
    now: float  # of the second
    changes: tuple[float, ...]  # of each seed
    error: float  # standard error of their mean, over groups of images
    images: int

    @classmethod
    def of(cls, was: Tensor, now: Tensor, groups: Tensor | None = None) -> "LossChange":
        """From losses by image, (n,) or (seeds, n), of the first and of the second network.

        `groups` (n,) numbers the group of each image; without it, each is its own.
        """
        was, now = torch.atleast_2d(was.double()), torch.atleast_2d(now.double())
        change = now - was
        error = error_of_mean(change, groups)
        means = tuple(change.mean(1).tolist())
        return cls(float(was.mean()), float(now.mean()), means, error, change.shape[1])

    @property
    def change(self) -> float:
        """Mean change over seeds, in nats."""
        return sum(self.changes) / len(self.changes)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the change for other images (groups of them), with these seeds."""
        return self.change - 1.96 * self.error, self.change + 1.96 * self.error

    @property
    def p_value(self) -> float:
        """Two-sided normal test of the mean over images or groups of them."""
        return p_value_of(self.change, self.error)

    @property
    def significant(self) -> bool:
        """Whether the change is more than chance would give, at 5 %, and every seed has it."""
        return self.p_value < 0.05 and agree_in_sign(self.changes)

    @property
    def better(self) -> bool:
        """Whether the loss fell significantly."""
        return self.significant and self.change < 0

    @property
    def worse(self) -> bool:
        """Whether the loss rose significantly."""
        return self.significant and self.change > 0

    @property
    def verdict(self) -> str:
        """The result in words."""
        if not self.significant:
            return "no significant change"
        return "significantly better" if self.better else "significantly worse"

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.change:+.4f} [{low:+.4f}, {high:+.4f}], p {tell_p(self.p_value)}"


def error_of_mean(change: Tensor, groups: Tensor | None = None) -> float:
    """Standard error over images of the mean of changes (seeds, n), averaged over seeds first.

    Images of one group (n,) count as one draw. Infinite for a single image or group, which says
    nothing of others.
    """
    each = change.mean(0) - change.mean()
    if groups is not None:
        _, numbers = groups.unique(return_inverse=True)
        each = each.new_zeros(int(numbers.max()) + 1).index_add_(0, numbers, each)
    if len(each) < 2:
        return inf
    return sqrt(len(each) / (len(each) - 1) * float(each.square().sum())) / change.shape[1]


def tell_p(p_value: float) -> str:
    """What follows "p" in a text: "= 0.03", or "< 1e-99"."""
    return "< 1e-99" if p_value < 1e-99 else f"= {p_value:.2g}"


def p_value_of(mean: float, error: float) -> float:
    """Two-sided normal test of a mean against 0."""
    if not error:
        return 0.0 if mean else 1.0
    from scipy.stats import norm

    return 2 * float(norm.sf(abs(mean) / error))


@dataclass(frozen=True)
class Scores:
    """What a network makes of each of n test images."""

    right: Tensor  # (n,) bool: the label has the largest logit
    agrees: Tensor  # (n,) bool: it predicts the class that the float network predicts
    kl: Tensor  # (n,) nats, KL(float network's prediction || this network's)
    cross_entropy: Tensor  # (n,) nats, of the label


LOSSES = {"kl": "KL to the float network", "cross_entropy": "Cross-entropy of the label"}


@torch.no_grad()
def score(
    models: Mapping[str, nn.Module],
    images: Iterable[Tensor],
    labels: Tensor,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Scores]:
    """Score each model on images with labels (n,); the batches of images are read once for all.

    The first model is the float network, with which the others are compared.
    """
    found: dict[str, list[Scores]] = {name: [] for name in models}
    seen = 0
    for x in images:
        teacher: Tensor | None = None
        for name, model in models.items():
            logits = model(x).float().cpu()
            teacher = logits if teacher is None else teacher
            found[name].append(score_batch(logits, teacher, labels[seen : seen + len(x)]))
        seen += len(x)
        progress(len(x))
    return {name: join(parts) for name, parts in found.items()}


def join(parts: list[Scores]) -> Scores:
    """Scores of batches as those of all images."""
    columns = ([getattr(part, field.name) for part in parts] for field in fields(Scores))
    return Scores(*map(torch.cat, columns))


def score_batch(logits: Tensor, teacher: Tensor, labels: Tensor) -> Scores:
    """Scores of logits (n, classes) against those of the float network and labels (n,)."""
    classes, ours, wanted = logits.argmax(1), logits.log_softmax(1), teacher.log_softmax(1)
    return Scores(
        right=classes == labels,
        agrees=classes == teacher.argmax(1),
        kl=F.kl_div(ours, wanted, reduction="none", log_target=True).sum(1),
        cross_entropy=F.nll_loss(ours, labels, reduction="none"),
    )


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


def pack_values(values: Tensor) -> str:
    """Losses (n,) as hexadecimal float16 numbers, three digits each: for paired tests later."""
    return values.numpy().astype("<f2").tobytes().hex()


def unpack_values(text: str) -> Tensor:
    """The reverse of `pack_values`, float64."""
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), "<f2").astype(np.float64))
