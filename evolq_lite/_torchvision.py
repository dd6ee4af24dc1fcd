"""Let timm import where torchvision's compiled extension cannot load.

timm needs torchvision for transforms only, but `import torchvision` also registers fake kernels for
`torchvision::nms`. Beside a CPU-only torch the PyPI build of torchvision cannot load its extension,
so the operator does not exist and the import fails (`operator torchvision::nms does not exist`).
Declaring the two operators, without a body, is enough. Import this module before timm; where the
extension loads, it does nothing. A program that imports timm or torchvision first is out of reach:
it fails before this package is asked. `torchvision_advice` says what its owner can do.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_NAMES = ("nms", "qnms")
_SUFFIXES = (".so", ".pyd", ".dylib")
_library: torch.library.Library | None = None  # kept alive: the declarations end with the object


def ensure_torchvision() -> None:
    """Declare torchvision's two operators if its extension cannot provide them."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    try:
        files = sorted(Path(spec.origin).parent.glob("_C*"))
        torch.ops.load_library(str(next(file for file in files if file.suffix in _SUFFIXES)))
    except (OSError, RuntimeError, StopIteration):
        _library = torch.library.Library("torchvision", "DEF")
        for name in _NAMES:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def torchvision_advice() -> str:
    """What to do where torchvision's extension does not load beside this torch, otherwise ""."""
    if _library is None:
        return ""
    try:
        installed = version("torchvision")
    except PackageNotFoundError:
        installed = "of unknown version"
    return (
        f"torchvision {installed} was built for another torch than {torch.__version__}: evolq_lite "
        "works, but `import timm` fails in a program that does not import evolq_lite first; import "
        "evolq_lite before timm and torchvision, or reinstall torchvision from the same package "
        "index as torch"
    )


ensure_torchvision()
