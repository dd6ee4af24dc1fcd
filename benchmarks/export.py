"""What an exported network weighs and takes: `python benchmarks/export.py`.

For the embedded ViT and for DeiT-Tiny's geometry (with its trained weights, if `--checkpoint` names
a file of them), at W8A8 or as `--weight-bits` says, the benchmark writes

- the float network, every point left out,
- int8, int8 with the scores left float, and int4 (where weights have 4 bits or fewer),

and takes turns between them in ONNX Runtime and the same network here, in integers. Times are
medians for one image, in batches of 1 and of 32, ratios are to the float file in ONNX Runtime, all
in one run. Needs the extra `export`. Run it on an idle machine.

`--profile` says instead which operators the time of each file goes to, batch 1, by ONNX Runtime's
own profiler. It keeps each node's least time, which hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import onnxruntime
import timm
import torch
from torch import Tensor, nn

from evolq_lite.config import KINDS
from evolq_lite.layers import QuantWeight
from evolq_lite.networks import load_network, unfused

GEOMETRY = "deit_tiny_patch16_224"


def bits_on_paper(qmodel: nn.Module) -> int:
    """What the weights' integers and everything else in float take, without a file's overhead."""
    layers = [m for m in qmodel.modules() if isinstance(m, QuantWeight)]
    integers = sum(m.weight.numel() * m.weight_quant.integers.bits for m in layers)
    others = sum(p.numel() for p in qmodel.parameters()) - sum(m.weight.numel() for m in layers)
    scales = sum(b.numel() for name, b in qmodel.named_buffers() if name.endswith("scale"))
    return integers + 32 * (others + scales)


def write_files(qmodel: nn.Module, example: Tensor, folder: Path) -> dict[str, Path]:
    """The forms to compare, by name."""
    forms: dict[str, dict[str, str]] = {
        "float": {"float_points": ",".join(KINDS)},
        "int8": {},
        "int8, float scores": {"float_points": "scores"},
    }
    layers = [m for m in qmodel.modules() if isinstance(m, QuantWeight)]
    if any(layer.weight_quant.integers.bits <= 4 for layer in layers):
        forms["int4"] = {"weights": "int4"}
    files = {}
    for name, options in forms.items():
        files[name] = folder / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
        eq.export_onnx(qmodel, files[name], example, **options)  # type: ignore[arg-type]
    return files


def time_in_turns(
    networks: dict[str, Callable[[Tensor], Any]], images: Tensor, repeats: int
) -> dict[str, float]:
    """Median seconds an image; each round runs every network once, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(repeats + 1):
        for name, network in networks.items():
            began = perf_counter()
            network(images)
            if i:
                times[name].append((perf_counter() - began) / len(images))
    return {name: statistics.median(found) for name, found in times.items()}


def profile(path: Path, images: Tensor, repeats: int) -> dict[str, tuple[int, float]]:
    """How many nodes of each operator there are, and what they take together, in seconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    options.enable_profiling, options.profile_file_prefix = True, str(path)
    session = onnxruntime.InferenceSession(path, options)
    for _ in range(repeats + 1):
        session.run(None, {"images": images.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    least: dict[tuple[str, str], float] = {}  # by operator and node
    for event in events:
        if event["name"].endswith("_kernel_time"):
            node = event["args"]["op_name"], event["name"]
            least[node] = min(least.get(node, math.inf), event["dur"] / 1e6)
    operators = {operator for operator, _ in least}
    return {
        operator: (
            sum(name == operator for name, _ in least),
            sum(seconds for (name, _), seconds in least.items() if name == operator),
        )
        for operator in operators
    }


def tell_profile(name: str, profiles: dict[str, dict[str, tuple[int, float]]]) -> str:
    """A table: operators by row, files by column, milliseconds and number of nodes."""
    operators = sorted(
        {operator for found in profiles.values() for operator in found},
        key=lambda operator: -max(found.get(operator, (0, 0.0))[1] for found in profiles.values()),
    )
    lines = [f"{name}, batch 1: ms (nodes)", f"{'':24}" + "".join(f"{x:>20}" for x in profiles)]
    for operator in operators:
        cells = [found.get(operator, (0, 0.0)) for found in profiles.values()]
        line = "".join(f"{f'{1e3 * t:.3f} ({n})' if n else '':>20}" for n, t in cells)
        lines.append(f"{operator:24}{line}")
    sums = [sum(t for _, t in found.values()) for found in profiles.values()]
    return "\n".join([*lines, f"{'together':24}" + "".join(f"{1e3 * t:>20.2f}" for t in sums)])


@torch.no_grad()
def profile_forms(
    name: str, model: nn.Module, images: Tensor, config: eq.QuantConfig, repeats: int
) -> str:
    """Where the time of each form of one network goes."""
    qmodel = eq.quantize(model, config)
    eq.calibrate(qmodel, images)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(qmodel, images[:2], Path(folder))
        found = {form: profile(path, images[:1], repeats) for form, path in files.items()}
    return tell_profile(name, found)


@torch.no_grad()
def measure(
    name: str, model: nn.Module, images: Tensor, config: eq.QuantConfig, repeats: int
) -> dict[str, Any]:
    """Sizes in bytes, and seconds an image, of every form of one network."""
    qmodel = eq.quantize(model, config)
    eq.calibrate(qmodel, images)
    execution = eq.set_execution(qmodel, "auto")
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(qmodel, images[:2], Path(folder))
        sizes = {form: path.stat().st_size for form, path in files.items()}
        networks: dict[str, Callable[[Tensor], Any]] = {
            form: eq.Deployed(path) for form, path in files.items()
        }
    networks[f"here, {execution}"] = qmodel
    networks["here, float"] = model
    batches = {
        batch: time_in_turns(networks, images[:batch], repeats)
        for batch in (1, 32)
        if batch <= len(images)
    }
    return {
        "network": name,
        "setting": f"W{config.weight_bits}A{config.act_bits}",
        "bytes": sizes,
        "bytes_on_paper": bits_on_paper(qmodel) / 8,
        "seconds": batches,
        "over_float": {
            batch: {form: value / found["float"] for form, value in found.items()}
            for batch, found in batches.items()
        },
    }


def tell(result: dict[str, Any]) -> str:
    """A table of one network."""
    lines = [
        f"{result['network']}, {result['setting']}: "
        f"{result['bytes_on_paper'] / 1e6:.2f} MB on paper",
        f"{'':24}{'MB':>8}"
        + "".join(f"{f'ms, batch {b}':>16}{'of float':>10}" for b in result["seconds"]),
    ]
    for form in next(iter(result["seconds"].values())):
        size = result["bytes"].get(form)
        line = f"{form:24}{f'{size / 1e6:.2f}' if size else '':>8}"
        for batch, found in result["seconds"].items():
            line += f"{1e3 * found[form]:>16.2f}{result['over_float'][batch][form]:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def deit(checkpoint: Path | None, images: int) -> tuple[nn.Module, Tensor]:
    """DeiT-Tiny, trained if there is a file, and noise: time does not depend on values."""
    if checkpoint is None:
        torch.manual_seed(0)
        model = unfused(timm.create_model(GEOMETRY, pretrained=False)).eval()
    else:
        model = load_network(GEOMETRY, checkpoint).model
    return model, torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=["embedded", "deit"])
    parser.add_argument("--checkpoint", type=Path, help=f"weights of {GEOMETRY} (default: random)")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="by operator, instead of by batch")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = eq.QuantConfig(weight_bits=arguments.weight_bits)
    results = []
    for name in arguments.networks:
        if name == "embedded":
            demo = eq.load_demo("vit", 32)
            model, images = demo.model, demo.calibration
        else:
            model, images = deit(arguments.checkpoint, 32)
        if arguments.profile:
            print(profile_forms(name, model, images, config, arguments.repeats), flush=True)
            continue
        results.append(measure(name, model, images, config, arguments.repeats))
        print(tell(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
