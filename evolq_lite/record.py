"""A run as a folder, written so that a stopped run can go on and a reader can check what was done.

| file | holds |
|---|---|
| `config.json` | model, data, quantization and search options |
| `environment.json` | versions, processor, threads, attention mode, dtype, hashes of data and weights |
| `history.jsonl` | one line an evaluation |
| `scales.safetensors` | every scale and zero point after the last finished visit, with the number of visits |
| `summary.json` | the result, once the test images have been read |

Whole files are written under a temporary name and renamed, so none is ever half there.
"""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from evolq_lite.convert import quantizers
from evolq_lite.evolve import Evaluation

PACKAGES = ("evolq-lite", "torch", "torchvision", "timm", "numpy", "scipy", "safetensors")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, make sure it is on the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def processor() -> str:
    """The processor's name, as well as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(**more: Any) -> dict[str, Any]:
    """What a result depends on besides its config; `more` is added as it is."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "processor": processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "attention": "unfused",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "execution": "simulate",
        **more,
    }


def save_scales(path: Path | str, qmodel: nn.Module, **metadata: Any) -> None:
    """Write all scales and zero points of a calibrated model as one safetensors file."""
    tensors = {}
    for name, point in quantizers(qmodel).items():
        tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = point.scale.contiguous(), point.zero_point.contiguous()
    write_whole(Path(path), save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def load_scales(path: Path | str, qmodel: nn.Module) -> dict[str, Any]:
    """Put saved scales into a model quantized in the same way; returns the metadata. ValueError if they do not fit."""
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable file of scales: {error}") from None
    points = quantizers(qmodel)
    if set(tensors) != {f"{name}.{part}" for name in points for part in ("scale", "zero_point")}:
        raise ValueError(f"the scales in {path} belong to another network or another quantization")
    for name, point in points.items():
        scale, zero_point = tensors[f"{name}.scale"], tensors[f"{name}.zero_point"]
        if point.frozen and scale.shape != point.scale.shape:
            raise ValueError(f"{path}: {name}.scale has shape {tuple(scale.shape)}, not {tuple(point.scale.shape)}")
        point.scale, point.zero_point, point.frozen = scale, zero_point, True
    return metadata


class RunFolder:
    """The folder of one run. `create` refuses one that exists; `resume` refuses one with another config."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path | str, config: dict[str, Any]) -> "RunFolder":
        """Make the folder and write its config; FileExistsError if it already holds a run."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists; give another --out, add --resume to go on, or remove it")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write("config.json", config)
        return folder

    @classmethod
    def resume(cls, path: Path | str, config: dict[str, Any]) -> "RunFolder":
        """Open the folder of a stopped run; ValueError if it holds none, or one with another config."""
        folder = cls(Path(path))
        file = folder.path / "config.json"
        if not file.is_file():
            raise ValueError(f"{path} holds no run to resume; leave --resume away to start one")
        try:
            old = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}); start anew with another --out") from None
        new = json.loads(json.dumps(config))
        if old != new:
            differ = ", ".join(sorted(set(_differences(old, new))))
            raise ValueError(f"{path} was run with other options ({differ}); resume with the same ones")
        return folder

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_whole(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def append(self, evaluation: Evaluation) -> None:
        """Add a line to the history."""
        with open(self.path / "history.jsonl", "a") as file:
            file.write(json.dumps(evaluation.as_dict()) + "\n")

    def save(self, qmodel: nn.Module, visits: int, fitness: float) -> None:
        """Save the scales after a finished visit."""
        save_scales(self.path / "scales.safetensors", qmodel, visits=visits, fitness=fitness)

    def restore(self, qmodel: nn.Module) -> tuple[int, float | None]:
        """Load the last finished visit into the model, and cut the history back to it; (0, None) if there is none."""
        scales = self.path / "scales.safetensors"
        visits, fitness = 0, None
        if scales.is_file():
            metadata = load_scales(scales, qmodel)
            visits, fitness = int(metadata["visits"]), float(metadata["fitness"])
        kept = [line for line in self.history() if line["visit"] < visits]
        write_whole(self.path / "history.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
        return visits, fitness

    def history(self) -> list[dict[str, Any]]:
        """All whole lines of the history; a last line that was cut off is left out."""
        file = self.path / "history.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The names under which two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    out = []
    for key in {*old, *new}:
        out += _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    return out
