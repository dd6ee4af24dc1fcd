"""The searched scales of a block as one flat vector, and back. Read with lesson 6.

A genome is a list of buffer names and shapes. It holds no model, so it can be sent to another
process, and a vector can be applied without writing to the model: `unpack` gives what
`torch.func.functional_call` takes.
"""

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from evolq_lite.quantizer import Quantizer

Vector = Float[Tensor, "d"]


@dataclass(frozen=True)
class Genome:
    """Names and shapes of searched scales, in vector order; names as in `model.named_buffers()`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each name takes."""
        return [prod(shape) for shape in self.shapes]

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, model: nn.Module) -> Vector:
        """The model's current scales, as a new vector on the CPU, where searches live."""
        return torch.cat([model.get_buffer(name).reshape(-1).cpu() for name in self.names])

    def write(self, model: nn.Module, vector: Vector) -> None:
        """Put a vector into the model; nothing else changes it. ValueError for a wrong length."""
        with torch.no_grad():
            for name, values in self.unpack(vector).items():
                model.get_buffer(name).copy_(values)

    def unpack(self, vector: Vector) -> dict[str, Tensor]:
        """Cut a vector into named tensors; ValueError for a wrong length."""
        if vector.shape != (len(self),):
            raise ValueError(
                f"this genome has {len(self)} scales, the vector has shape {tuple(vector.shape)}"
            )
        parts = vector.split(self.sizes)  # views: nothing is copied
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def describe(self, i: int) -> str:
        """Say which scale number i is: `blocks.5.attn.qkv.weight_quant.scale[17]`."""
        if not 0 <= i < len(self):
            raise IndexError(f"this genome has scales 0 to {len(self) - 1}, not {i}")
        for name, size in zip(self.names, self.sizes):
            if i < size:
                return f"{name}[{i}]"
            i -= size
        raise AssertionError


def genome_of(model: nn.Module, prefixes: list[str], scales: str = "attention") -> Genome:
    """The genome of some segments of a calibrated model.

    `scales`: "attention" for the weights inside attention (all weights in blocks that have none, as
    in CNNs), "weights" for all weights, "all" for weights and activations. ValueError if nothing is
    left to search.
    """
    names: list[str] = []
    for prefix in prefixes:
        found = [
            f"{name}.scale"
            for name, module in model.named_modules()
            if isinstance(module, Quantizer) and f"{name}.".startswith(f"{prefix}.")
        ]
        weights = [name for name in found if name.endswith("weight_quant.scale")]
        attention = [name for name in weights if ".attn." in name]
        names += {"attention": attention or weights, "weights": weights, "all": found}[scales]
    if not names:
        raise ValueError(f"no scales to search in {', '.join(prefixes)}; is the model quantized?")
    return Genome(tuple(names), tuple(tuple(model.get_buffer(name).shape) for name in names))
