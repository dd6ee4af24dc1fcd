"""What the last digits of a result depend on: versions, processor, threads, kernels."""

import platform
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("evolq-lite", "torch", "torchvision", "timm", "numpy", "scipy", "safetensors")


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


def processor() -> str:
    """The processor's name, as well as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """The most memory that this process ever had, in MiB; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def device_of(name: str) -> torch.device:
    """The device of that name, "auto" being CUDA if there is one; ValueError if torch has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that torch is giving up
            probe = torch.zeros(1, device=name)
            float(probe)  # "meta" has no numbers
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # then comes advice to developers
        if "INTERNAL ASSERT" in why:
            why = "torch has no such device"
        raise ValueError(f"--device {name} is not possible ({why}); give cpu, or auto") from None


def device_here(name: str) -> torch.device:
    """The device for a cell; the workers of this machine take its GPUs in turn.

    Workers of a cluster see the GPU that they were started with (CUDA_VISIBLE_DEVICES).
    """
    device = device_of(name)
    number = worker_number()
    if device.type != "cuda" or ":" in name or number is None:
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def worker_number() -> int | None:
    """The number of the local worker that this process is, None if it is none."""
    from distributed import get_worker

    try:
        name = get_worker().name
    except ValueError:
        return None
    return name if isinstance(name, int) else None


def tell_device(device: torch.device) -> str:
    """A device as results name it: `cpu`, or `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def fix_kernels() -> None:
    """Full float32 products on every device: TF32 would move the fitness more than a mutation."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


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
