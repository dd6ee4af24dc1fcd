"""evolq_lite: post-training quantization of vision transformers by evolution (Evol-Q, ICCV 2023).

A quantized model is a float model plus a vector of scales; Evol-Q searches that vector. Read the
modules in this order: numerics, observers, quantizer, layers, convert, landscape, fitness, search,
descent, chain, genome, objective, evolve, racing, evaluate, gptq, rounding, learned, bits, export,
deployed, runs.

The public names below are loaded when they are first asked for. Together with timm and SciPy they
take longer to load than torch does, and `python -m evolq_lite --help` needs none of them.
"""

from evolq_lite import _memory, _openmp, _torchvision  # isort: skip  (before torch, before timm)

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and mypy; `_HOMES` says the same to Python, and a test compares
    from evolq_lite.chain import Chain, chain_of
    from evolq_lite.config import PRESETS, QuantConfig, SearchConfig
    from evolq_lite.convert import calibrate, describe, quantize, twin
    from evolq_lite.data import Demo, load_demo
    from evolq_lite.deployed import Deployed
    from evolq_lite.evaluate import Accuracy, Comparison, accuracy, compare, predict
    from evolq_lite.evolve import Committed, Evaluated, evolve
    from evolq_lite.export import export_onnx
    from evolq_lite.fast import set_execution
    from evolq_lite.fitness import FITNESS, cosine, fisher, info_nce, kl, mse
    from evolq_lite.genome import Genome, genome_of
    from evolq_lite.numerics import (
        IntRange,
        affine_params,
        fake_quantize,
        log2_fake_quantize,
        round_ste,
    )
    from evolq_lite.objective import BlockObjective, Objective
    from evolq_lite.observers import OBSERVERS
    from evolq_lite.rounding import round_weights
    from evolq_lite.runs.scales import load_scales, save_scales
    from evolq_lite.search import EvolQ, RandomSearch, minimize
    from evolq_lite.sensitivity import sensitivity

__version__ = "0.2.0"

# Public names by the modules that define them.
_NAMES = {
    "chain": "Chain chain_of",
    "config": "PRESETS QuantConfig SearchConfig",
    "convert": "calibrate describe quantize twin",
    "data": "Demo load_demo",
    "deployed": "Deployed",
    "evaluate": "Accuracy Comparison accuracy compare predict",
    "evolve": "Committed Evaluated evolve",
    "export": "export_onnx",
    "fast": "set_execution",
    "fitness": "FITNESS cosine fisher info_nce kl mse",
    "genome": "Genome genome_of",
    "numerics": "IntRange affine_params fake_quantize log2_fake_quantize round_ste",
    "objective": "BlockObjective Objective",
    "observers": "OBSERVERS",
    "rounding": "round_weights",
    "runs.scales": "load_scales save_scales",
    "search": "EvolQ RandomSearch minimize",
    "sensitivity": "sensitivity",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


class _Package(ModuleType):
    """A package that finds its public names when they are asked for (PEP 562, and one thing more).

    Python puts a module that it has imported into its package under the module's name. Two
    functions, `evolve` and `sensitivity`, have the name of their module: the function stays.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)
            setattr(self, name, value)  # the next time it is there
            return value
        if not name.startswith("_") and find_spec(f"{self.__name__}.{name}") is not None:
            return import_module(f"{self.__name__}.{name}")  # a module, as in `eq.data.CHARACTERS`
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOMES.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
