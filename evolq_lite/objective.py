"""What a search minimizes: the fitness of a vector of scales, seen at the network's output.

Read with lesson 6.

`Objective` is the one interface of the package: optimizers, landscapes and remote workers all
speak it. `BlockObjective` is its main form. The loss is global (the logits), but only the
scales of one block differ, so the inputs of that block are kept and every candidate runs just the
blocks from there on. A candidate never writes to the model: `functional_call` evaluates the model
*as if* the vector were in it, and can be differentiated.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from evolq_lite.chain import Chain
from evolq_lite.fitness import Fitness, info_nce
from evolq_lite.genome import Genome, Vector, genome_of

Population = Float[Tensor, "p d"]
Values = Float[Tensor, "p"]


@runtime_checkable
class Objective(Protocol):
    """To minimize: `start` (d,) and a call from candidates (p, d) to values (p,), NaN if failed."""

    @property
    def start(self) -> Vector:
        """The current scales."""
        ...

    def __call__(self, population: Population) -> Values:
        """Evaluate candidates, one a row."""
        ...


class BlockObjective:
    """Mean fitness over calibration batches, as a function of the scales of one or more segments.

    `images` (n, channels, height, width) and `targets` (n, classes; the float network's logits) are
    cut into batches of `batch` in the given order; `inputs`, where known, are the batches that
    enter the first of the segments. ValueError if the numbers do not match, or if a batch would
    hold fewer than two images: infoNCE needs negatives.
    """

    def __init__(
        self,
        chain: Chain,
        blocks: str | Sequence[str],
        images: Tensor,
        targets: Tensor,
        fitness: Fitness = info_nce,
        batch: int = 100,
        scales: str = "attention",
        genome: Genome | None = None,
        inputs: list[Tensor] | None = None,
    ) -> None:
        self.chain, self.fitness = chain, fitness
        names = [blocks] if isinstance(blocks, str) else list(blocks)
        self.genome = genome or genome_of(chain.model, names, scales)
        self.first = min(chain.index(name) for name in names)
        self.targets = list(batches(targets, batch))
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images but {len(targets)} targets")
        if inputs is None:
            with torch.no_grad():
                inputs = [chain(x, stop=self.first) for x in batches(images, batch)]
        self.inputs = inputs

    @property
    def start(self) -> Vector:
        """The scales that are in the model now."""
        return self.genome.read(self.chain.model)

    def loss(self, vector: Vector) -> Float[Tensor, ""]:
        """The fitness of one vector, differentiable by `torch.func.grad(objective.loss)`."""
        return torch.stack(list(self.batch_losses(vector))).mean()

    def batch_losses(self, vector: Vector) -> Iterator[Float[Tensor, ""]]:
        """The fitness of one vector on each batch, computed as it is asked for."""
        named = self.named(vector)  # once: the same tensors in all batches, so weights are kept
        for i in range(len(self.inputs)):
            yield self._batch_loss(i, named)

    def gradient(self, vector: Vector) -> tuple[Vector, float]:
        """Gradient (d,) and value of `loss`, batch by batch."""
        vector = vector.detach().requires_grad_()
        gradient, value = torch.zeros_like(vector), 0.0
        for i in range(len(self.inputs)):
            part, loss = self._batch_gradient(i, vector)
            gradient += part / len(self.inputs)
            value += loss / len(self.inputs)
        return gradient.detach(), value

    def named(self, vector: Vector) -> dict[str, Tensor]:
        """A vector as the buffers of the chain that `functional_call` exchanges."""
        parts = self.genome.unpack(vector.to(self.targets[0].device))
        return {f"model.{name}": values for name, values in parts.items()}

    def _batch_loss(self, i: int, named: dict[str, Tensor]) -> Tensor:
        """The fitness on batch i with these scales."""
        return self.fitness(self._logits(self.inputs[i], named), self.targets[i])

    @torch.enable_grad()
    def _batch_gradient(self, i: int, vector: Vector) -> tuple[Vector, float]:
        """Gradient (d,) and value of the fitness on batch i.

        A graph is many times as large as what passes through it (12 GB for 100 images of
        DeiT-Tiny), so that of one chunk of images is kept. Where a batch has several, each chunk
        runs once for the logits, which infoNCE wants together, and once for its share of the
        gradient.
        """
        chunks = self.inputs[i].split(self.chain.chunk or len(self.inputs[i]))
        if len(chunks) == 1:
            loss = self._batch_loss(i, self.named(vector))
            return torch.autograd.grad(loss, vector)[0], float(loss.detach())
        parts = [self._logits(x, self.named(vector)).detach() for x in chunks]
        logits = torch.cat(parts).requires_grad_()
        loss = self.fitness(logits, self.targets[i])
        gradient = torch.zeros_like(vector)
        slopes = torch.autograd.grad(loss, logits)[0].split(len(chunks[0]))
        for x, slope in zip(chunks, slopes, strict=True):
            gradient += torch.autograd.grad(self._logits(x, self.named(vector)), vector, slope)[0]
        return gradient, float(loss.detach())

    def _logits(self, inputs: Tensor, named: dict[str, Tensor]) -> Tensor:
        """Logits (n, classes) with these scales, from what enters the first segment."""
        # The chain as if these scales were in it; it starts at the first searched segment, whose
        # inputs (images, tokens, channels) are kept: what is before it does not run again.
        return functional_call(self.chain, named, (inputs, self.first), tie_weights=False)

    @torch.no_grad()
    def __call__(self, population: Population) -> Values:
        """Evaluate candidates one after another: on a CPU a loop is faster than vmap."""
        return torch.stack([self.loss(vector) for vector in population]).cpu()

    def commit(self, vector: Vector) -> None:
        """Write a vector into the model."""
        self.genome.write(self.chain.model, vector)


def batches(x: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Cut into batches of the given size; a last one of a single image joins its neighbor."""
    if len(x) < 2:
        raise ValueError(
            f"{len(x)} calibration images; give at least 2: infoNCE compares images with each other"
        )
    if batch < 2:
        raise ValueError(
            f"a batch of {batch} images; give at least 2: infoNCE compares images with each other"
        )
    parts = x.split(batch)
    if len(parts[-1]) == 1:
        parts = (*parts[:-2], torch.cat(parts[-2:]))
    return parts
