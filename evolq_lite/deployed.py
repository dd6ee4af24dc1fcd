"""An exported network as its receiver has it: one file, and a runtime that knows nothing of torch.

`Deployed(path)` opens what `export_onnx` wrote in ONNX Runtime, on the CPU. The file says how it
wants its images prepared; `prepare` does that. Read with lesson 9.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn

from evolq_lite.data import DEMO_MODELS
from evolq_lite.export import FORMAT, KEY, PREPARATION, missing_extra
from evolq_lite.files import mistake, parse_json

OURS = "give an ONNX file that python -m evolq_lite export wrote"
CROPS = ("center", "squash", "border")  # timm's crop modes


class Deployed(nn.Module):
    """An exported network, computed by ONNX Runtime; a module, so that it can be tested as one.

    `facts` is what the file says of itself. ValueError for a file that is none, or that says
    nothing of itself, and without the extra `export`.
    """

    facts: dict[str, Any]

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        """`threads`: of the processor; None: as many as torch takes."""
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            told = missing_extra("onnxruntime", "running an ONNX file", error)
            raise ValueError(told) from None
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error}); {OURS}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4  # what is wrong is raised
        # Threads that wait sleep: beside other processes, spinning is many times as slow.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            # From memory: a file cannot make the runtime read others beside it.
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            told = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        except Exception as error:  # it raises classes of its own, of many kinds
            why = mistake(content[:512]) or explain(error)
            raise ValueError(
                f"{path} is not an ONNX file that can be run here ({why}); {OURS}"
            ) from None
        self.facts = read_facts(path, told)
        reads, gives = self.session.get_inputs(), self.session.get_outputs()
        size, shapes = self.facts["input_size"], [part.shape for part in (*reads, *gives)]
        if (
            [part.name for part in reads] != ["images"]
            or [len(shape) for shape in shapes] != [4, 2]
            or shapes[0][1:] != size
            or not isinstance(shapes[1][1], int)
        ):
            raise ValueError(
                f"{path} says that it reads images {size}, but its network does not; "
                "export it again"
            )
        if (names := self.facts.get("classes")) and len(names) != self.classes:
            raise ValueError(
                f"{path} names {len(names)} classes, but its network tells {self.classes} apart; "
                "export it again"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Prepared images (n, channels, height, width) to logits (n, classes).

        ValueError for images of another size.
        """
        if images.ndim != 4 or list(images.shape[1:]) != self.facts["input_size"]:
            raise ValueError(
                f"the file reads images (n, {', '.join(map(str, self.facts['input_size']))}), not "
                f"{tuple(images.shape)}; make them with prepare"
            )
        found = self.session.run(None, {"images": images.detach().cpu().float().numpy()})
        return torch.from_numpy(found[0])

    @property
    def classes(self) -> int:
        """How many classes it tells apart."""
        return int(self.session.get_outputs()[0].shape[1])

    @property
    def prepare(self) -> Callable[[Image.Image], Tensor]:
        """An image as the network wants it: (channels, height, width)."""
        said = {key: self.facts[key] for key in PREPARATION if key in self.facts}
        size = tuple(self.facts["input_size"])
        transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=size, is_training=False, **said
        )
        return transform if size[0] != 1 else lambda image: transform(image.convert("L"))


def explain(error: Exception) -> str:
    """Why ONNX Runtime does not load a file, in plain words where the reason is a usual one."""
    told = str(error) or type(error).__name__
    if "INVALID_PROTOBUF" in told:
        return "it is cut short, or of another format"
    if re.search("model IR version|opset", told, re.IGNORECASE):
        return "it needs a newer onnxruntime"
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", told).splitlines()[0][:200]


def known_test(said: Any) -> bool:
    """Whether this is what `runs.shipping.test_facts` writes."""
    return said is None or (
        isinstance(said, dict)
        and isinstance(said["images"], int)
        and said["images"] > 0
        and len(bytes.fromhex(said["correct"])) == -(-said["images"] // 8)
        and (said.get("subset") is None or int(said["subset"]) >= 2)
    )


def known_preparation(facts: Any, channels: int) -> bool:
    """Whether images can be prepared so."""
    mean, std = ([float(x) for x in facts[key]] for key in ("mean", "std"))
    str_to_interp_mode(facts.get("interpolation", "bicubic"))  # KeyError for unknown ones
    return (
        len(mean) == len(std) == channels
        and all(map(math.isfinite, (*mean, *std)))
        and min(std) > 0
        and 0.1 <= float(facts.get("crop_pct", 1.0)) <= 10
        and facts.get("crop_mode", CROPS[0]) in CROPS
    )


def read_facts(path: Path, told: str | None) -> dict[str, Any]:
    """What a file says of itself; ValueError if that is nothing, or of another kind."""
    if told is None:
        raise ValueError(
            f"{path} does not say how its images are prepared: python -m evolq_lite export did not "
            "write it; give a file that it wrote"
        )
    try:
        facts = parse_json(told)
        known = isinstance(facts, dict) and facts["format"] == FORMAT
        if known:
            size, names = facts["input_size"], facts.get("classes") or []
            known = (
                len(size) == 3
                and all(isinstance(n, int) and n > 0 for n in size)
                and known_preparation(facts, size[0])
                and facts.get("embedded") in (None, *DEMO_MODELS)
                and isinstance(names, list)
                and all(isinstance(name, str) for name in names)
                and isinstance(facts.get("quantization") or {}, dict)
                and known_test(facts.get("test"))
            )
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path} says of itself what this version does not understand; export it again"
        )
    return dict(facts)
