"""A run as a folder, written so that a stopped run can go on and a reader can check what was done.

| file | holds |
|---|---|
| `config.json` | model, data, quantization and search options |
| `environment.json` | versions, processor, threads, attention mode, dtype, data and weight hashes |
| `history.jsonl` | one line an evaluation |
| `scales.safetensors` | scales and zero points after the last finished visit, number of visits |
| `scales.previous.safetensors` | the same after the visit before |
| `summary.json` | the result, once the test images have been read |

Whole files are written under a temporary name and renamed, so none is ever half there; scales hold
a digest of themselves, and where it does not fit, the visit before is gone on from. The folder is
locked while a run is in it. Nothing here is a pickle: a file from a stranger can be wrong, but it
cannot run anything.
"""

import hashlib
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evolq_lite.config import parsed
from evolq_lite.convert import quantizers
from evolq_lite.evolve import Evaluation

OWN = (
    "config.json",
    "environment.json",
    "history.jsonl",
    "scales.previous.safetensors",
    "scales.safetensors",
    "summary.json",
    "fitness.png",
    "top1.png",
)
LOCK = ".lock"
LEFT = {LOCK, *(f".{name}.new" for name in OWN)}  # what a process that was killed may leave
SCALES = "scales.safetensors", "scales.previous.safetensors"  # the latest first
ANEW = "start anew with another --out"
log = logging.getLogger("evolq_lite")
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


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """A hash of what a file of scales says, names and shapes included."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_scales(path: Path | str, qmodel: nn.Module, **metadata: Any) -> None:
    """Write all scales and zero points of a calibrated model as one safetensors file."""
    tensors = {}
    for name, point in quantizers(qmodel).items():
        tensors[f"{name}.scale"] = point.scale.contiguous()
        tensors[f"{name}.zero_point"] = point.zero_point.contiguous()
    said = json.dumps({**metadata, "sha256": digest_of(tensors, metadata)})
    # One key: safetensors writes several in random order, and equal runs should be equal files.
    write_whole(Path(path), save(tensors, {"run": said}))


def load_scales(path: Path | str, qmodel: nn.Module) -> dict[str, Any]:
    """Put saved scales into a model quantized in the same way; returns the metadata.

    Shapes are compared with those of a calibrated model. Biases that `bias_correction` has changed
    are no part of the file: calibrate with the same images first. ValueError if the scales do not
    fit, or are not what was saved; the model is then as it was.
    """
    points = quantizers(qmodel)
    wanted = {f"{name}.{part}" for name in points for part in ("scale", "zero_point")}
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != wanted:
                raise ValueError(
                    f"the scales in {path} belong to another network or another quantization"
                )
            for name, point in points.items():  # before a tensor is made
                for part in ("scale", "zero_point") if point.frozen else ():
                    shape = tuple(file.get_slice(f"{name}.{part}").get_shape())
                    if shape != (own := tuple(getattr(point, part).shape)):
                        raise ValueError(f"{path}: {name}.{part} has shape {shape}, not {own}")
            # Copies: what safetensors returns is the mapped file, which may change under us.
            tensors = {name: file.get_tensor(name).clone() for name in sorted(wanted)}
            metadata = parsed((file.metadata() or {}).get("run", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable file of scales: {error}") from None
    if not isinstance(metadata, dict) or metadata.pop("sha256", "") != digest_of(tensors, metadata):
        raise ValueError(f"{path} is not as it was written: its digest differs")
    for name, value in tensors.items():
        if not (value.is_floating_point() and torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values, or none at all")
        if name.endswith(".scale") and not (value > 0).all():
            raise ValueError(f"{path}: {name} holds scales that are not positive")
    for name, point in points.items():
        device = point.scale.device
        point.scale = tensors[f"{name}.scale"].to(device)
        point.zero_point = tensors[f"{name}.zero_point"].to(device)
        point.frozen = True
    return metadata


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ValueError if it is damaged."""
    try:
        found = parsed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {ANEW}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (no JSON object); {ANEW}")
    return found


def nothing_to_resume(path: Path | str) -> ValueError:
    """The error of --resume where no run is."""
    return ValueError(f"{path} holds no run to resume; leave --resume away to start one")


class Busy(FileExistsError):
    """Another run is at work in a folder."""


class RunFolder:
    """A run's folder. `create` refuses one that exists, `resume` one with another config.

    Both lock it until `close`, or until the process ends, whatever ends it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, FileLock(path / LOCK, 0, thread_local=False)

    def close(self) -> None:
        """Let others in. The lock's file stays: who removed it could remove the next one's lock."""
        self._lock.release(force=True)

    def _enter(self) -> None:
        """Lock the folder; Busy while another run is in it."""
        try:
            self._lock.acquire()
        except Timeout:
            raise Busy(
                f"another run is at work in {self.path}; wait for it, or give another --out"
            ) from None

    @classmethod
    def create(cls, path: Path | str, config: dict[str, Any], replace: bool = False) -> "RunFolder":
        """Make the folder and write its config; FileExistsError if it already holds a run.

        `replace` removes that run first.
        """
        path = Path(path)
        made, folder = not path.exists(), cls(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            folder._enter()
            if replace:
                cls.remove(path)
            if {p.name for p in path.iterdir()} - LEFT:
                raise FileExistsError(
                    f"{path} exists; give another --out, add --resume to go on, or remove it"
                )
            folder.write("config.json", config)
        except BaseException:
            if folder._lock.is_locked:
                folder.close()
            if made:
                with suppress(OSError):  # somebody else is in it by now
                    (path / LOCK).unlink(missing_ok=True)
                    path.rmdir()
            raise
        return folder

    @classmethod
    def claim(cls, path: Path, resume: bool, replace: bool) -> None:
        """Raise if a run could not be begun, resumed or replaced here; changes nothing."""
        config = path / "config.json"
        try:
            old = parsed(config.read_bytes()) if config.is_file() else None
            run = isinstance(old, dict) and {"quantization", "search"} <= old.keys()
        except ValueError:
            run = resume  # `resume` says that it is damaged
        if (path / LOCK).exists():
            folder = cls(path)
            folder._enter()
            folder.close()
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
        names -= LEFT
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
        old, new = read_object(file), json.loads(json.dumps(config))
        if old != new:
            differ = ", ".join(sorted(set(_differences(old, new))))
            raise ValueError(
                f"{path} was run with other options ({differ}); resume with the same ones"
            )
        folder._enter()
        return folder

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_whole(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def enter(self, state: dict[str, Any]) -> None:
        """Write environment.json; ValueError if the run was begun with other kernels or files.

        `workers` is what the pool's workers say of themselves, None for a run without a pool; it is
        missing before that is known. What a run began with is never written over.
        """
        file = self.path / "environment.json"
        old = read_object(file) if file.is_file() else state
        if old.get("sha256") != state["sha256"]:
            differ = ", ".join(sorted(set(_differences(old.get("sha256"), state["sha256"]))))
            raise ValueError(
                f"{file}: the run began with other files ({differ or 'unknown ones'}); put them "
                f"back, or {ANEW}"
            )
        try:
            mine, theirs = kernels_of(state, old), kernels_of(old, state)
            keys = sorted({*mine, *theirs})
        except (TypeError, ValueError, KeyError, IndexError):
            raise ValueError(f"{file} is damaged; {ANEW}") from None
        for key in keys:
            if (was := theirs.get(key)) != (now := mine.get(key)):
                hint = f"give --threads {was}" if key == "threads" else "resume on such a machine"
                raise ValueError(
                    f"{file}: the run began with {key} {was}, here it is {now}; {hint}, or {ANEW}"
                )
        if not file.is_file() or ("workers" in state and "workers" not in old):
            self.write("environment.json", state)

    def append(self, evaluation: Evaluation) -> None:
        """Add a line to the history, on the disk before any scales that came after it."""
        with open(self.path / "history.jsonl", "a") as file:
            file.write(json.dumps(evaluation.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, qmodel: nn.Module, visits: int, fitness: float) -> None:
        """Save the scales after a finished visit, and keep those of the visit before."""
        last, before = (self.path / name for name in SCALES)
        if last.is_file():
            os.replace(last, before)
        save_scales(last, qmodel, visits=visits, fitness=fitness)

    def restore(self, qmodel: nn.Module) -> tuple[int, float | None]:
        """Load the last finished visit into the model, cut the history to it; else (0, None).

        If its file is damaged, the log says so and it is the visit before.
        """
        visits, fitness = 0, None
        paths = [path for name in SCALES if (path := self.path / name).is_file()]
        for path in paths:
            try:
                metadata = load_scales(path, qmodel)
                visits, fitness = int(metadata["visits"]), float(metadata["fitness"])
                if visits < 1 or not math.isfinite(fitness):
                    raise ValueError(f"{path} holds {visits} visits and the fitness {fitness}")
                break
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                said = error if isinstance(error, ValueError) else f"{path} is no part of a run"
                if path == paths[-1]:
                    raise ValueError(f"{said}; {ANEW}") from None
                log.warning("%s; going on from the visit before", said)
        kept = [line for line in self.history() if line["visit"] < visits]
        cycles = max([1, *(line["cycle"] for line in kept)])
        whole = [(v, c) for v in range(visits) for c in range(v > 0, cycles + 1)]
        if [(line["visit"], line["cycle"]) for line in kept] != whole:
            raise ValueError(
                f"{self.path / 'history.jsonl'} has not each evaluation of the visits that "
                f"scales.safetensors holds once; {ANEW}"
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
            found = [parsed(line) for line in lines if line.endswith("}\n")]
            if not all(isinstance(line, dict) and is_evaluation(line) for line in found):
                raise ValueError("a line that is no evaluation")
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); {ANEW}") from None
        return found


def kernels_of(state: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how candidates were rounded, of an environment that is compared with another.

    Workers have one thread each, and a processor of their own; who computes is compared only where
    both say it.
    """
    found = {key: state.get(key) for key in ("execution", "device", "chunk")}
    found |= dict(state.get("versions", {}))
    if "workers" in state and "workers" in other:
        workers = state["workers"]
        alone = state.get("threads"), state.get("vector_instructions")
        found["threads"], found["vector_instructions"] = (1, workers[2]) if workers else alone
        if workers and other["workers"]:
            found["workers"] = workers
    return found


def is_evaluation(line: dict[str, Any]) -> bool:
    """Whether a line of a history has the fields of `Evaluation`, of the right kinds."""
    kinds: dict[str, Any] = {f.name.rstrip("_"): f.type for f in fields(Evaluation)}
    return line.keys() == kinds.keys() and all(type(line[k]) is t for k, t in kinds.items())


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The names under which two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    out = []
    for key in {*old, *new}:
        out += _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    return out
