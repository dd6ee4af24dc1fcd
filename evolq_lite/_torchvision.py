"""Let timm import where torchvision's compiled extension cannot load.

timm needs torchvision for transforms only, but `import torchvision` also registers fake kernels for
`torchvision::nms`. Beside a CPU-only torch the PyPI build of torchvision cannot load its extension,
so the operator does not exist and the import fails (`operator torchvision::nms does not exist`).
Declaring the two operators, without a body, is enough. Import this module before timm; where the
extension loads, it does nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_NAMES = ("nms", "qnms")
_library: torch.library.Library | None = None  # kept alive: the declarations end with the object


def ensure_torchvision() -> None:
    """Declare torchvision's two operators if its extension cannot provide them."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C*.so"))))
    except (OSError, RuntimeError, StopIteration):
        _library = torch.library.Library("torchvision", "DEF")
        for name in _NAMES:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


ensure_torchvision()
