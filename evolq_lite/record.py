"""A run as a folder, written so that a stopped run can go on and a reader can check what was done.

| file | holds |
|---|---|
| `config.json` | model, data, quantization and search options |
| `environment.json` | versions, processor, threads, attention mode, dtype, data and weight hashes |
| `history.jsonl` | one line an evaluation |
| `scales.safetensors` | scales and zero points after the last finished visit, number of visits |
| `summary.json` | the result, once the test images have been read |

Whole files are written under a temporary name and renamed, so none is ever half there.
"""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from evolq_lite.convert import quantizers
from evolq_lite.evolve import Evaluation

OWN = (
    "config.json",
    "environment.json",
    "history.jsonl",
    "scales.safetensors",
    "summary.json",
    "fitness.png",
    "top1.png",
)
ANEW = "start anew with another --out"
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
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        **more,
    }


def peak_memory() -> int | None:
    """The most memory that this process ever had, in MiB; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def fix_kernels() -> None:
    """Full float32 products on every device: TF32 would move the fitness more than a mutation."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def save_scales(path: Path | str, qmodel: nn.Module, **metadata: Any) -> None:
    """Write all scales and zero points of a calibrated model as one safetensors file."""
    tensors = {}
    for name, point in quantizers(qmodel).items():
        tensors[f"{name}.scale"] = point.scale.contiguous()
        tensors[f"{name}.zero_point"] = point.zero_point.contiguous()
    # One key: safetensors writes several in random order, and equal runs should be equal files.
    write_whole(Path(path), save(tensors, {"run": json.dumps(metadata)}))


def load_scales(path: Path | str, qmodel: nn.Module) -> dict[str, Any]:
    """Put saved scales into a model quantized in the same way; returns the metadata.

    ValueError if they do not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get("run", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable file of scales: {error}") from None
    points = quantizers(qmodel)
    if set(tensors) != {f"{name}.{part}" for name in points for part in ("scale", "zero_point")}:
        raise ValueError(f"the scales in {path} belong to another network or another quantization")
    for name, point in points.items():
        scale, zero_point = tensors[f"{name}.scale"], tensors[f"{name}.zero_point"]
        if not (torch.isfinite(scale).all() and torch.isfinite(zero_point).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
        if point.frozen and scale.shape != point.scale.shape:
            raise ValueError(
                f"{path}: {name}.scale has shape {tuple(scale.shape)}, "
                f"not {tuple(point.scale.shape)}"
            )
        point.scale, point.zero_point, point.frozen = scale, zero_point, True
    return metadata


def nothing_to_resume(path: Path | str) -> ValueError:
    """The error of --resume where no run is."""
    return ValueError(f"{path} holds no run to resume; leave --resume away to start one")


class RunFolder:
    """A run's folder. `create` refuses one that exists, `resume` one with another config."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path | str, config: dict[str, Any]) -> "RunFolder":
        """Make the folder and write its config; FileExistsError if it already holds a run."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path} exists; give another --out, add --resume to go on, or remove it"
            )
        made, folder = not path.exists(), cls(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            folder.write("config.json", config)
        except BaseException:
            if made:
                path.rmdir()
            raise
        return folder

    @classmethod
    def claim(cls, path: Path, resume: bool, replace: bool) -> None:
        """Raise if a run could not be begun, resumed or replaced here; changes nothing."""
        config = path / "config.json"
        try:
            old = json.loads(config.read_bytes()) if config.is_file() else None
            run = isinstance(old, dict) and {"quantization", "search"} <= old.keys()
        except ValueError:
            run = resume  # `resume` says that it is damaged
        if resume:
            if not (run or (config.is_file() and not isinstance(old, dict))):
                raise nothing_to_resume(path)
            return
        above = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not above.is_dir():
            raise FileExistsError(
                f"{above} is a file, so {path} cannot be a run folder; give another --out"
            )
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        names -= {f".{name}.new" for name in OWN}  # left by a process that was killed
        if run and not replace:
            raise FileExistsError(f"{path} holds a run; give another --out, --resume or --replace")
        if foreign := names - set(OWN if run else ()):
            raise FileExistsError(
                f"{path} holds {min(foreign)}, which no run wrote; move it, or give another --out"
            )

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a run: the files that it wrote, and no others."""
        for name in OWN[::-1]:  # config.json last
            (path / f".{name}.new").unlink(missing_ok=True)
            (path / name).unlink(missing_ok=True)

    @classmethod
    def resume(cls, path: Path | str, config: dict[str, Any]) -> "RunFolder":
        """Open the folder of a stopped run; ValueError for none, or one with another config."""
        folder = cls(Path(path))
        file = folder.path / "config.json"
        if not file.is_file():
            raise nothing_to_resume(path)
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); {ANEW}") from None
        if not isinstance(old, dict):
            raise ValueError(f"{file} is damaged (no JSON object); {ANEW}")
        new = json.loads(json.dumps(config))
        if old != new:
            differ = ", ".join(sorted(set(_differences(old, new))))
            raise ValueError(
                f"{path} was run with other options ({differ}); resume with the same ones"
            )
        return folder

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_whole(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def enter(self, state: dict[str, Any]) -> None:
        """Write environment.json; ValueError if the run was begun with other kernels."""
        file = self.path / "environment.json"
        try:
            old = json.loads(file.read_text()) if file.is_file() else state
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); {ANEW}") from None
        if not isinstance(old, dict):
            raise ValueError(f"{file} is damaged (no JSON object); {ANEW}")
        for key in ("execution", "device", "chunk"):
            if (was := old.get(key)) != state[key]:
                raise ValueError(
                    f"{file}: the run began with {key} {was}, here it is {state[key]}; "
                    f"resume on such a machine, or {ANEW}"
                )
        self.write("environment.json", state)

    def append(self, evaluation: Evaluation) -> None:
        """Add a line to the history, on the disk before any scales that came after it."""
        with open(self.path / "history.jsonl", "a") as file:
            file.write(json.dumps(evaluation.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, qmodel: nn.Module, visits: int, fitness: float) -> None:
        """Save the scales after a finished visit."""
        save_scales(self.path / "scales.safetensors", qmodel, visits=visits, fitness=fitness)

    def restore(self, qmodel: nn.Module) -> tuple[int, float | None]:
        """Load the last finished visit into the model, cut the history to it; else (0, None)."""
        scales = self.path / "scales.safetensors"
        visits, fitness = 0, None
        if scales.is_file():
            try:
                metadata = load_scales(scales, qmodel)
                visits, fitness = int(metadata["visits"]), float(metadata["fitness"])
            except (KeyError, TypeError):
                raise ValueError(
                    f"{scales} does not say how many visits it holds; {ANEW}"
                ) from None
            except ValueError as error:
                raise ValueError(f"{error}; {ANEW}") from None
        kept = [line for line in self.history() if line["visit"] < visits]
        if {line["visit"] for line in kept} != set(range(visits)):
            raise ValueError(
                f"{self.path / 'history.jsonl'} lacks visits that scales.safetensors holds; {ANEW}"
            )
        write_whole(
            self.path / "history.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode()
        )
        return visits, fitness

    def history(self) -> list[dict[str, Any]]:
        """All whole lines of the history; a last line that was cut off is left out."""
        file = self.path / "history.jsonl"
        try:
            lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
            found = [json.loads(line) for line in lines if line.endswith("}\n")]
            kinds = {"visit": int, "accepted": bool}
            if not all(
                isinstance(line, dict) and all(isinstance(line.get(k), t) for k, t in kinds.items())
                for line in found
            ):
                raise ValueError("a line without its visit, or whether it was accepted")
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); {ANEW}") from None
        return found


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The names under which two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    out = []
    for key in {*old, *new}:
        out += _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    return out
