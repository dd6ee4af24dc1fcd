"""A timm model as a chain of segments: a forward pass can stop at a block and go on from there.

Read with lesson 6.

    chain(x) == model(x)                                     bit for bit
    chain(chain(x, stop=i), start=i) == chain(x)             for every i

This is what makes a candidate cheap: when only block i's scales differ, the blocks before it need
not run again. So does `chunk`: a few images at a time keep all that passes between layers in the
processor's cache, where rounding and clamping cost a fraction of what they cost in memory.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.models.levit import Levit
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# Bytes that one segment's input may take in a chunk; layers inside are about four times as wide.
CHUNK_BYTES = 2**21

Segment = tuple[str, Callable[[Tensor], Tensor], bool]  # name, function, whether it is searchable

BY_HAND = (
    "supported are timm's VisionTransformer (ViT, DeiT), SwinTransformer, Levit, ResNet and "
    "RegNet; for another network build Chain(model, segments) by hand, segments being "
    "(name, function, searchable) whose composition is the model"
)


class Chain(nn.Module):
    """A model and its segments, in order; their names are prefixes of timm's parameter names.

    `chunk` is how many images are computed at a time, None for all. Kernels may round differently
    for other batch sizes, so it belongs to what defines a run.
    """

    def __init__(
        self, model: nn.Module, segments: Iterable[Segment], chunk: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.segments = tuple(segments)
        self.chunk = chunk

    @property
    def names(self) -> list[str]:
        """The names of all segments."""
        return [name for name, _, _ in self.segments]

    @property
    def searchable(self) -> list[str]:
        """The names of the segments that a search visits, first to last."""
        return [name for name, _, searchable in self.segments if searchable]

    def index(self, name: str) -> int:
        """The position of a segment; ValueError lists the names."""
        if name not in self.names:
            raise ValueError(f"no segment {name!r}; the segments are {', '.join(self.names)}")
        return self.names.index(name)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run segments start ... stop - 1 (default: to the end, giving logits) on their input."""
        return _joined([self._run(part, start, stop)[1] for part in self._parts(x)])

    @torch.no_grad()
    def trace(self, x: Tensor, last: int | None = None, start: int = 0) -> list[Tensor]:
        """The input of each segment, from one forward pass; float32, so that suffixes are exact.

        With `last`, of the segments up to that one, and nothing behind its input is computed. With
        `start`, from that segment on, which x enters.
        """
        inputs = []
        for part in self._parts(x):
            before, end = self._run(part, start, last, keep=True)
            inputs.append(before if last is None else [*before, end])
        return [_joined(list(parts)) for parts in zip(*inputs, strict=True)]

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut a batch into chunks."""
        return x.split(self.chunk or len(x))

    def _run(
        self, x: Tensor, start: int = 0, stop: int | None = None, keep: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Run segments on one chunk; returns their inputs, if they are to be kept, and the end."""
        inputs = []
        for _, function, _ in self.segments[start:stop]:
            if keep:
                inputs.append(x)
            x = function(x)
        return inputs, x

    def fit_chunk(self, image: Tensor) -> None:
        """Choose `chunk` by the size of what one image (1, channels, height, width) becomes.

        On other devices than the CPU there is nothing to gain: all at a time.
        """
        largest = max(x.numel() * x.element_size() for x in self.trace(image)[1:])
        self.chunk = max(1, CHUNK_BYTES // largest) if image.device.type == "cpu" else None


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _vit_stem(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def _norm_and_head(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_head(model.norm(x))  # type: ignore[operator]


def _levit_stem(model: Levit, x: Tensor) -> Tensor:
    x = model.stem(x)
    return x if model.use_conv else x.flatten(2).transpose(1, 2)


def _resnet_stem(model: ResNet, x: Tensor) -> Tensor:
    return model.maxpool(model.act1(model.bn1(model.conv1(x))))


def _vit(model: VisionTransformer) -> list[Segment]:
    blocks: list[Segment] = [(f"blocks.{i}", block, True) for i, block in enumerate(model.blocks)]
    return [
        ("stem", partial(_vit_stem, model), False),
        *blocks,
        ("head", partial(_norm_and_head, model), False),
    ]


def _stages(name: str, stages: Any) -> list[Segment]:
    """The segments of Swin's and LeViT's stages: a downsampling step, then blocks."""
    out: list[Segment] = []
    for i, stage in enumerate(stages):
        out.append((f"{name}.{i}.downsample", stage.downsample, False))
        out += [(f"{name}.{i}.blocks.{j}", block, True) for j, block in enumerate(stage.blocks)]
    return out


def _swin(model: SwinTransformer) -> list[Segment]:
    head: Segment = ("head", partial(_norm_and_head, model), False)
    return [("patch_embed", model.patch_embed, False), *_stages("layers", model.layers), head]


def _levit(model: Levit) -> list[Segment]:
    stem: Segment = ("stem", partial(_levit_stem, model), False)
    return [stem, *_stages("stages", model.stages), ("head", model.forward_head, False)]


def _resnet(model: ResNet) -> list[Segment]:
    blocks: list[Segment] = [
        (f"layer{i}.{j}", block, True)
        for i in range(1, 5)
        for j, block in enumerate(getattr(model, f"layer{i}"))
    ]
    return [
        ("stem", partial(_resnet_stem, model), False),
        *blocks,
        ("head", model.forward_head, False),
    ]


def _regnet(model: RegNet) -> list[Segment]:
    blocks: list[Segment] = [
        (f"{stage}.{name}", block, True)
        for stage in ("s1", "s2", "s3", "s4")
        for name, block in getattr(model, stage).named_children()
    ]
    return [
        ("stem", model.stem, False),
        *blocks,
        ("final_conv", model.final_conv, False),
        ("head", model.forward_head, False),
    ]


FAMILIES: dict[type[nn.Module], Callable[..., list[Segment]]] = {
    VisionTransformer: _vit,
    SwinTransformer: _swin,
    Levit: _levit,
    ResNet: _resnet,
    RegNet: _regnet,
}


def chain_of(model: nn.Module) -> Chain:
    """The chain of a timm ViT, DeiT, Swin, LeViT, ResNet or RegNet, float or quantized.

    ValueError says what to do for others.
    """
    for family, segments in FAMILIES.items():
        if isinstance(model, family):
            return Chain(model, segments(model))
    raise ValueError(f"no chain for {type(model).__name__}: {BY_HAND}")
