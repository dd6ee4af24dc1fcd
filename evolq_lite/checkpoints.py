"""Checkpoints: files of weights, read without running anything that is in them.

The package reads safetensors: a table of names and shapes, then numbers. Most people have something
else, a pickle (.pth, .pt, .bin, .ckpt), which is a small program that runs when it is read.
`convert_checkpoint` reads only what torch itself calls safe in one: tensors, numbers, texts and
containers. Types that trainers leave beside the weights and that are known to be harmless (options
from argparse, numpy numbers, paths) are not even built: an inert stand-in takes their place. Any
other type is refused by name.

Names are a second matter. A checkpoint may hold several networks, an optimizer and an epoch; and a
wrapper (DistributedDataParallel, torch.compile, Lightning) puts a prefix before every name.
"""

import pickle
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from evolq_lite.files import mistake, write_whole

CONVERT = "convert it with: python -m evolq_lite convert FILE.pth FILE.safetensors"
SHOWN = 12  # names of what was left in a file
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What wrappers put before every name of the network inside.
WRAPPERS = (
    *("module", "_orig_mod", "model", "net", "network", "backbone", "encoder", "timm_model"),
    *("student", "teacher", "ema", "ema_model", "model_ema", "online_model"),
)


class Leftover:
    """Stands for an object of a harmless type that a trainer left in a checkpoint."""

    def __init__(self, *_: object) -> None:
        pass

    def __new__(cls, *_: object) -> "Leftover":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class LeftoverDict:
    """The same for types that are dicts; torch's reader fills dicts of exactly known types only."""

    def __new__(cls, *_: object) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
HARMLESS: dict[str, type] = {
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), Leftover),
    **{f"{module}.{name}": Leftover for module in _NUMPY for name in ("scalar", "_reconstruct")},
    **dict.fromkeys(("numpy.ndarray", "numpy.dtype"), Leftover),
    **{f"numpy.dtypes.{kind}DType": Leftover for kind in ("Float32", "Float64", "Int32", "Int64")},
    **{f"{module}.{x}": Leftover for module in ("pathlib", "pathlib._local") for x in _PATHS},
    **{f"datetime.{name}": Leftover for name in ("datetime", "date", "timedelta")},
    "torch.torch_version.TorchVersion": Leftover,
    "collections.defaultdict": LeftoverDict,
    **{f"builtins.{name}": Leftover for name in ("int", "float", "list", "dict", "str", "bool")},
    "yacs.config.CfgNode": LeftoverDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": LeftoverDict,
    "lightning.pytorch.utilities.parsing.AttributeDict": LeftoverDict,
    "lightning_fabric.utilities.data.AttributeDict": LeftoverDict,
    "lightning.fabric.utilities.data.AttributeDict": LeftoverDict,
}


# Safetensors


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError for whatever else a file may be."""
    if checkpoint.is_file() and checkpoint.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{checkpoint} is not a .safetensors file; others are pickles, which could run code, "
            f"and are refused; {CONVERT}"
        )
    try:
        return load_file(checkpoint)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} cannot be read as a checkpoint ({_reason(checkpoint, error)}); "
            "give a .safetensors file"
        ) from None


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, in one line."""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(64)
        if why := mistake(start):
            return why
        if start.startswith(b"PK") and path.suffix.lower() == ".safetensors":
            return f"it is a pickle with another name; {CONVERT}"
    return " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__


def load_weights(model: nn.Module, checkpoint: Path) -> list[str]:
    """Put a safetensors checkpoint into a network; returns what a reader should know of it.

    ValueError for other files, and for missing, foreign or differently shaped tensors.
    """
    state, notes = strip_prefix(read_state(checkpoint), model.state_dict().keys(), checkpoint)
    return notes + put_weights(model, state, checkpoint)


def strip_prefix(
    state: dict[str, Tensor], own: Collection[str], checkpoint: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The state under the names of a network, whose own names tell which prefix is a wrapper's.

    A prefix is one if more names fit the network behind it than behind any other. Tensors that do
    not have it lie outside the network (a loss, a metric) and are left out.
    """
    hits: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        hits.update(
            ".".join([*parts[:i], ""]) if i else ""
            for i in range(len(parts))
            if ".".join(parts[i:]) in own
        )
    (prefix, most), *others = hits.most_common(2) or [("", 0)]
    if not prefix or most <= len(own) // 2:
        prefix = ""
    if others and others[0][1] == most > len(own) // 2:
        raise ValueError(
            f"{checkpoint} holds two networks, under {prefix or 'no prefix'!r} and "
            f"{others[0][0] or 'no prefix'!r}; keep one of them in the file"
        )
    if not prefix:
        return state, []
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    notes = [f"{checkpoint.name}: all names without their prefix {prefix!r}"]
    if outside := [k for k in state if not k.startswith(prefix)]:
        notes.append(f"{checkpoint.name}: left out, outside of the network: {_some(outside)}")
    return inside, notes


def put_weights(model: nn.Module, state: dict[str, Tensor], checkpoint: Path) -> list[str]:
    """Load a state with the network's own names, strictly; returns notes, raises ValueError."""
    own, notes = model.state_dict(), []
    # BatchNorm counts its batches in training only; many checkpoints do not have the counts.
    counts = {k for k in own.keys() - state.keys() if k.endswith(".num_batches_tracked")}
    state = {**state, **{k: own[k] for k in counts}}
    # Older versions stored tables that the network computes itself. Other values, another network.
    tables = {k: v for k, v in model.named_buffers() if k in state and k not in own}
    for key, table in tables.items():
        value = state.pop(key)
        if value.shape != table.shape or not torch.equal(value.to(table.dtype), table):
            raise ValueError(
                f"{checkpoint}: {key} differs from what this network computes; "
                "is --model the right network, at the right image size?"
            )
    if tables:
        notes.append(f"{checkpoint.name}: left out, because computed anew: {_some(list(tables))}")
    for what, keys in (
        ("lacks", own.keys() - state.keys()),
        ("has the foreign key", state.keys() - own.keys()),
    ):
        if keys:
            raise ValueError(
                f"{checkpoint} {what} {_some(sorted(keys))}; "
                f"it must have timm's key names for this network{_other_names(state)}"
            )
    for key, value in state.items():
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)} instead of {tuple(own[key].shape)}"
            raise ValueError(
                f"{checkpoint}: {key} has shape {shapes}; is --model the right network?"
            )
        if own[key].is_floating_point():
            if value.dtype not in FLOATS:
                raise ValueError(
                    f"{checkpoint}: {key} is {_dtype(value)}; give a float network, not one that "
                    "is quantized already"
                )
            if not torch.isfinite(value.to(own[key].dtype)).all():
                raise ValueError(f"{checkpoint}: {key} holds NaN or infinite values")
    others = {_dtype(v) for k, v in state.items() if own[k].is_floating_point()} - {"float32"}
    if others:
        notes.append(f"{checkpoint.name}: {', '.join(sorted(others))} weights, used as float32")
    model.load_state_dict(state)
    return notes


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _other_names(state: Mapping[str, Tensor]) -> str:
    """A hint where the names are those of another well-known library."""
    if any(".encoder.layer." in f".{name}" or name == "classifier.weight" for name in state):
        return " (these look like the names of Hugging Face transformers)"
    if any(name.startswith("encoder.layers.encoder_layer_") for name in state):
        return " (these look like the names of torchvision's transformers)"
    return ""


# Pickles


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` took from a file and what it left there; `print` says it."""

    source: Path
    target: Path
    part: str  # where in the file the weights were: "state_dict", or "" for the file itself
    prefix: str  # what was removed from all names
    tensors: int
    parameters: int
    shared: int  # tensors that shared memory with another, stored on their own now
    left: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"Taken from {self.source}{f', {self.part}' if self.part else ''}: "
            f"{self.tensors} tensors, {self.parameters:,} numbers"
            + (f", all names without {self.prefix!r}" if self.prefix else "")
            + (f"; {self.shared} shared memory, each is stored now" if self.shared else "")
            + "."
        ]
        if self.left:
            names = [" ".join(name.split())[:60] for name in self.left]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"Left there: {', '.join(names[:SHOWN])}{more}.")
        return "\n".join([*lines, f"Written to {self.target}."])


def convert_checkpoint(
    source: Path, target: Path, ema: bool = False, key: str | None = None, replace: bool = False
) -> Conversion:
    """Write the weights of any checkpoint as safetensors, running nothing that is in it.

    `ema` takes the averaged weights instead of the trained ones, `key` those under a name in the
    file. ValueError if the file cannot be read safely, or if it is not clear which weights are
    meant; the target is then as it was. An existing target is refused unless `replace`.
    """
    if target.suffix.lower() != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors, so that it can be told from a pickle")
    if not source.exists():
        raise ValueError(f"{source} does not exist; give a checkpoint")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the file to convert; give another name for the result")
    if target.exists() and not (replace and target.is_file()):
        raise ValueError(f"{target} exists; give another name, or --replace to write over it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder; make it first, or give another place")
    if ema and key is not None:
        raise ValueError("--ema and --key both say which weights to take; give one of them")
    whole = _read(source)
    part, found = _choose(source, dict(_states(whole)), ema, key)
    state, left = _tensors(source, part, found)
    prefix = _wrapper(state)
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    memory = Counter(v.untyped_storage().data_ptr() for v in state.values() if v.numel())
    content = {name: value.detach().clone().contiguous() for name, value in state.items()}
    write_whole(target, save(content, {"format": "pt"}))
    return Conversion(
        source=source,
        target=target,
        part=part,
        prefix=prefix,
        tensors=len(content),
        parameters=sum(value.numel() for value in content.values()),
        shared=sum(n for n in memory.values() if n > 1),
        left=(*_beside(whole, part), *left),
    )


def _read(source: Path) -> Any:
    """What a file holds: plain values, containers and tensors."""
    if source.suffix.lower() == ".safetensors":
        return read_state(source)
    stand_ins = [(stand_in, name) for name, stand_in in HARMLESS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        text = str(error)
        if named := re.search(r"GLOBAL (\S+)", text) or re.search(r"but got <class '(.+?)'>", text):
            raise ValueError(
                f"{source} holds an object of type {named[1]}, and reading it could run code; "
                "where the file was made, store only the weights: "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        if "TorchScript" in text:
            why = "it is a TorchScript program"
        elif isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in text:
            why = _reason(source, ValueError("it is not a checkpoint of torch"))
        else:
            why = _reason(source, error)
        raise ValueError(f"{source} cannot be read as a checkpoint ({why})") from None


def _states(value: Any, name: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The state dicts in a checkpoint and where they are: dicts with some "layer.weight"."""
    if not isinstance(value, Mapping) or "param_groups" in value:  # the latter: an optimizer
        return
    if any(
        isinstance(k, str) and "." in k and k.endswith("weight") and isinstance(v, Tensor)
        for k, v in value.items()
    ):
        parts = _side_by_side(value)
        yield from ((f"{name}.{part}".strip("."), inner) for part, inner in parts.items())
        if not parts:
            yield name, value
    elif depth:
        for key, inner in value.items():
            if isinstance(key, str) and "optim" not in key.lower():
                yield from _states(inner, f"{name}.{key}" if name else key, depth - 1)


def _side_by_side(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Networks of the same names under several wrappers in one state dict: a model and its mean."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        first, _, rest = str(name).partition(".")
        if first in WRAPPERS and rest:
            parts.setdefault(first, {})[rest] = value
    alike = len(parts) > 1 and len({frozenset(inner) for inner in parts.values()}) == 1
    return dict(parts) if alike else {}


def _averaged(name: str) -> bool:
    """Whether a part of a checkpoint is an average over training."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)  # of state_dict_ema, or of modelEMA
    return any(word.lower() in ("ema", "averaged", "average", "avg", "swa") for word in words)


def _choose(
    source: Path, states: dict[str, Mapping[str, Any]], ema: bool, key: str | None
) -> tuple[str, Mapping[str, Any]]:
    """The one state dict that is meant; ValueError if that is not clear."""
    if not states:
        raise ValueError(f"{source} holds no weights of a network (no tensor named like fc.weight)")
    named = ", ".join(name or "(the file itself)" for name in states)
    if key is not None:
        if key not in states:
            raise ValueError(f"{source} has no weights under {key!r}; it has {named}")
        return key, states[key]
    fitting = {name: state for name, state in states.items() if _averaged(name) == ema}
    if not fitting and ema:
        raise ValueError(f"{source} holds no averaged weights, only {named}; omit --ema")
    if not fitting:
        raise ValueError(f"{source} holds only averaged weights ({named}); take them with --ema")
    if len(fitting) > 1:
        raise ValueError(f"{source} holds several networks ({', '.join(fitting)}); choose by --key")
    return next(iter(fitting.items()))


def _tensors(
    source: Path, part: str, found: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state dict, and the names of what else is in it."""
    state = {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor)
        and isinstance(name, str)
        and name != "n_averaged"  # torch's AveragedModel counts
    }
    for name, value in state.items():
        special = {
            "nested": value.is_nested,
            "quantized": value.is_quantized,
            "sparse": value.layout != torch.strided,
            "without values": value.is_meta,
            f"a {type(value).__name__}": type(value) not in (Tensor, nn.Parameter),
        }
        for kind, holds in special.items():
            if holds:
                raise ValueError(f"{source}: {name} is {kind}; a dense float network is needed")
    return state, [f"{part}.{name}".strip(".") for name in found if name not in state]


def _wrapper(state: Mapping[str, Tensor]) -> str:
    """The prefix that wrappers put before all names."""
    prefix = ""
    while True:
        first = {name.removeprefix(prefix).partition(".")[0] for name in state}
        if len(first) > 1 or not first <= set(WRAPPERS):
            return prefix
        prefix += f"{first.pop()}."


def _beside(whole: Any, part: str) -> list[str]:
    """What a checkpoint holds beside the part that was taken."""
    out: list[str] = []
    while part and isinstance(whole, Mapping):
        inside = next((k for k in whole if part == k or part.startswith(f"{k}.")), None)
        if inside is None:  # networks side by side in one state dict
            others = [k for k in whole if not str(k).startswith(f"{part}.")]
            return [*out, f"{len(others)} tensors outside of {part}"]
        for key, value in whole.items():
            if key != inside:
                inner = value.values() if isinstance(value, Mapping) else ()
                n = sum(isinstance(v, Tensor) for v in inner)
                out.append(f"{key} ({n} tensors)" if n else str(key))
        whole, part = whole[inside], part[len(inside) + 1 :]
    return out
