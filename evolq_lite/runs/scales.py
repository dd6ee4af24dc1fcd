"""The scales of a quantized network as one safetensors file, to keep or to give away.

Where the integers of weights were chosen (`rounding`), they are in it too, and where a
search has given layers bits of their own, these are in its metadata. A run writes one after
each visit. Its history is enough to resume: of this file it reads the integers only, which took
time to choose, and chooses them anew if they are not what they were. Nothing here is a pickle: a
file from a stranger can be wrong, but it cannot run anything.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evolq_lite.bits import (
    BitsTable,
    fits_layers,
    layer_bits,
    mixed_bits,
    set_mixed_bits,
    tensors_of,
)
from evolq_lite.convert import factors_of, quantizers, set_factors
from evolq_lite.files import parse_json, write_whole
from evolq_lite.rounding import (
    are_frozen,
    check_integers,
    freeze_integers,
    integers_of,
    quant_layers,
    set_integers,
)

log = logging.getLogger("evolq_lite")


def scales_of(qmodel: nn.Module) -> dict[str, Tensor]:
    """All scales and zero points of a calibrated model, by name."""
    tensors = {}
    for name, point in quantizers(qmodel).items():
        tensors[f"{name}.scale"] = point.scale.detach().cpu().contiguous()
        tensors[f"{name}.zero_point"] = point.zero_point.detach().cpu().contiguous()
    return tensors


def extras_of(qmodel: nn.Module) -> dict[str, Tensor]:
    """What else was chosen on calibration images: integers of weights, factors of channels."""
    factors = {f"{name}.factors": value.cpu() for name, value in factors_of(qmodel).items()}
    return {**integers_of(qmodel), **factors}


def put_extras(qmodel: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `extras_of` says into a model that is quantized and calibrated in the same way.

    ValueError for integers that do not fit; the model is then as it was.
    """
    factors = {
        name: tensors[f"{name}.factors"]
        for name, own in factors_of(qmodel).items()
        if not torch.equal(tensors[f"{name}.factors"], own.cpu())
    }
    integers = without_factors(tensors)
    check_integers(qmodel, integers)
    set_factors(qmodel, factors)  # of the weights, whose integers come after
    set_integers(qmodel, integers)


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """A hash of what a file of scales says, names and shapes included."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_start(qmodel: nn.Module, table: BitsTable) -> str:
    """A hash of what a run begins with: scales, integers, factors, and the table of bits if any."""
    return digest_of({**scales_of(qmodel), **extras_of(qmodel), **tensors_of(table)}, {})


def save_scales(path: Path | str, qmodel: nn.Module, **metadata: Any) -> None:
    """Write all scales and zero points of a calibrated model.

    Where integers were chosen (see `rounding`), they are written too, as int16 with the scale and
    the bias of then; and so are the factors of `gelu_factors`.
    """
    tensors = {**scales_of(qmodel), **extras_of(qmodel)}
    if are_frozen(qmodel):
        metadata["frozen"] = True
    if bits := mixed_bits(qmodel):
        metadata["bits"] = bits
    said = json.dumps({**metadata, "sha256": digest_of(tensors, metadata)})
    # One key: safetensors writes several in random order, and equal runs should be equal files.
    write_whole(Path(path), save(tensors, {"run": said}))


def load_scales(path: Path | str, qmodel: nn.Module) -> dict[str, Any]:
    """Put saved scales and integers into a model quantized in the same way; returns the metadata.

    Shapes are compared with those of a calibrated model. Biases that `bias_correction` has changed
    are no part of the file: calibrate with the same images first. ValueError if the scales do not
    fit, or are not what was saved; the model is then as it was.
    """
    points = quantizers(qmodel)
    tensors, metadata = read_scales(path, qmodel)
    frozen, bits = metadata.pop("frozen", False), metadata.get("bits", {})
    if not fits_layers(qmodel, bits):
        raise ValueError(f"the bits in {path} belong to another network")
    extras = without_scales(tensors, qmodel)
    widths = layer_bits(qmodel)
    before = {name: (p.scale, p.zero_point, p.frozen) for name, p in points.items()}
    put_scales(qmodel, tensors)
    set_mixed_bits(qmodel, bits)
    try:
        check_integers(qmodel, without_factors(extras))
    except ValueError as error:
        for name, point in points.items():
            point.scale, point.zero_point, point.frozen = before[name]
        set_mixed_bits(qmodel, widths)
        raise ValueError(f"{path}: {error}") from None
    for layer in quant_layers(qmodel).values():
        if layer.rounded:
            layer.forget_rounding()
    put_extras(qmodel, extras)
    if frozen:
        freeze_integers(qmodel)
    put_scales(qmodel, tensors)  # those of weights have moved on since their integers were chosen
    return metadata


def put_scales(qmodel: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the scales and zero points of a model these."""
    for name, point in quantizers(qmodel).items():
        device = point.scale.device
        point.scale = tensors[f"{name}.scale"].to(device)
        point.zero_point = tensors[f"{name}.zero_point"].to(device)
        point.frozen = True


def without_scales(tensors: Mapping[str, Tensor], qmodel: nn.Module) -> dict[str, Tensor]:
    """The part of a file that `put_extras` takes."""
    return {name: t for name, t in tensors.items() if name not in scale_names(qmodel)}


def without_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of it that `set_integers` takes."""
    return {name: t for name, t in tensors.items() if not name.endswith(".factors")}


def scale_names(qmodel: nn.Module) -> set[str]:
    """The names that `scales_of` gives."""
    return {f"{name}.{part}" for name in quantizers(qmodel) for part in ("scale", "zero_point")}


def read_scales(path: Path | str, qmodel: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and its metadata; ValueError if it is damaged, or of another network.

    Integers may be in it or not.
    """
    factors = {f"{name}.factors": value for name, value in factors_of(qmodel).items()}
    wanted = scale_names(qmodel) | factors.keys()
    shapes = {name: tuple(value.shape) for name, value in factors.items()}
    for name, point in quantizers(qmodel).items():
        if point.frozen:
            shapes[f"{name}.scale"] = tuple(point.scale.shape)
            shapes[f"{name}.zero_point"] = tuple(point.zero_point.shape)
    optional: dict[str, tuple[int, ...]] = {}
    for name, layer in quant_layers(qmodel).items():
        rows, *_ = shape = tuple(layer.weight.shape)
        optional |= {f"{name}.integers": shape, f"{name}.scale": (rows,), f"{name}.bias": (rows,)}
    shapes |= optional
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if names - optional.keys() != wanted:
                raise ValueError(
                    f"the scales in {path} belong to another network or another quantization"
                )
            for name in sorted(names & shapes.keys()):  # before a tensor is made
                shape = tuple(file.get_slice(name).get_shape())
                if shape != shapes[name]:
                    raise ValueError(f"{path}: {name} has shape {shape}, not {shapes[name]}")
            # Copies: what safetensors returns is the mapped file, which may change under us.
            tensors = {name: file.get_tensor(name).clone() for name in sorted(names)}
            metadata = parse_json((file.metadata() or {}).get("run", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable file of scales: {error}") from None
    if not isinstance(metadata, dict) or metadata.pop("sha256", "") != digest_of(tensors, metadata):
        raise ValueError(f"{path} is not as it was written: its digest differs")
    for name, value in tensors.items():
        if name.endswith(".integers"):
            if value.dtype != torch.int16:
                raise ValueError(f"{path}: {name} holds {value.dtype} instead of torch.int16")
            continue
        if not (value.is_floating_point() and torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values, or none at all")
        if name.endswith((".scale", ".factors")) and not (value > 0).all():
            raise ValueError(f"{path}: {name} holds scales that are not positive")
    return tensors, metadata


def restore_integers(path: Path, qmodel: nn.Module, calibrated: str | None) -> bool:
    """Put the integers in a file into a model that was just calibrated; whether it could be done.

    `calibrated` is the digest of the scales and integers that are wanted. The log says why a file
    with integers is no good; an older one has none.
    """
    if not path.exists():
        return False
    try:
        integers = without_factors(without_scales(read_scales(path, qmodel)[0], qmodel))
        check_integers(qmodel, integers)
    except ValueError as error:
        log.warning("%s; the integers of weights are chosen again", error)
        return False
    scales = {
        f"{name}.weight_quant.scale": integers[f"{name}.scale"]
        for name in quant_layers(qmodel)
        if f"{name}.scale" in integers
    }
    wanted = {**scales_of(qmodel), **scales, **extras_of(qmodel), **integers}
    same = digest_of(wanted, {}) == calibrated
    if same:
        set_integers(qmodel, integers)
    elif integers:
        log.warning("%s holds other integers than the run began with; they are chosen again", path)
    return same
