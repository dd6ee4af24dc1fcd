"""The scales of a quantized network as one safetensors file, to keep or to give away.

Where a search has given layers bits of their own, these are in its metadata.

A run writes one after each visit, and never reads it: its history is enough. Nothing here is a
pickle: a file from a stranger can be wrong, but it cannot run anything.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evolq_lite.bits import fits_layers, mixed_bits, set_mixed_bits
from evolq_lite.convert import quantizers
from evolq_lite.files import parse_json, write_whole


def scales_of(qmodel: nn.Module) -> dict[str, Tensor]:
    """All scales and zero points of a calibrated model, by name."""
    tensors = {}
    for name, point in quantizers(qmodel).items():
        tensors[f"{name}.scale"] = point.scale.detach().cpu().contiguous()
        tensors[f"{name}.zero_point"] = point.zero_point.detach().cpu().contiguous()
    return tensors


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """A hash of what a file of scales says, names and shapes included."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_scales(path: Path | str, qmodel: nn.Module, **metadata: Any) -> None:
    """Write all scales and zero points of a calibrated model."""
    tensors = scales_of(qmodel)
    if bits := mixed_bits(qmodel):
        metadata["bits"] = bits
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
            metadata = parse_json((file.metadata() or {}).get("run", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable file of scales: {error}") from None
    if not isinstance(metadata, dict) or metadata.pop("sha256", "") != digest_of(tensors, metadata):
        raise ValueError(f"{path} is not as it was written: its digest differs")
    for name, value in tensors.items():
        if not (value.is_floating_point() and torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinite values, or none at all")
        if name.endswith(".scale") and not (value > 0).all():
            raise ValueError(f"{path}: {name} holds scales that are not positive")
    bits = metadata.get("bits", {})
    if not fits_layers(qmodel, bits):
        raise ValueError(f"the bits in {path} belong to another network")
    set_mixed_bits(qmodel, bits)
    for name, point in points.items():
        device = point.scale.device
        point.scale = tensors[f"{name}.scale"].to(device)
        point.zero_point = tensors[f"{name}.zero_point"].to(device)
        point.frozen = True
    return metadata
