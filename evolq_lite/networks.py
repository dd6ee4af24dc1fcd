"""Any supported timm network, built as its checkpoint says.

timm knows a network by a name, and the name says how many classes and which image size it has. A
checkpoint that was fine-tuned has others, and the shapes of its tensors tell them: a head of 5 rows
has 5 classes; a position embedding of 1 + 24 x 24 entries, with patches of 16 pixels, takes images
of 384. So the network is first built without memory (on torch's "meta" device), compared with the
checkpoint's shapes, and then built for real. What the shapes leave open is asked for, not guessed.

What was found is returned as notes, a sentence each: the library prints nothing. The same arguments
give the same network, here and on a worker.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from math import isqrt
from pathlib import Path
from typing import Any

from evolq_lite import _torchvision  # noqa: F401  isort: skip  (before timm)

import timm
import torch
from timm.models.levit import Levit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.checkpoints import put_weights, read_state, strip_prefix

State = dict[str, Tensor]
Options = dict[str, Any]

# Where a network comes from, if not from timm's own list.
SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
OLD_SWIN = "layers.0.downsample.reduction.weight"  # the first stage has none today
BIAS_TABLE = "attn.relative_position_bias_table"  # Swin: ((2 window - 1)^2, heads)


@dataclass(frozen=True)
class Loaded:
    """A float network in evaluation mode, and what its user should know of how it was built."""

    model: nn.Module
    notes: tuple[str, ...] = ()


def load_network(
    name: str, checkpoint: Path | None = None, image_size: int | None = None
) -> Loaded:
    """A supported timm network from a safetensors checkpoint, or with timm's own weights (online).

    `image_size` is needed where the checkpoint's shapes do not tell it, and replaces timm's for
    networks that take any size. ValueError says what is wrong with the name, the family (before
    weights are asked for) or the checkpoint.
    """
    check_name(name)
    if image_size is not None and not 8 <= image_size <= 4096:
        raise ValueError(f"an image size of {image_size} is not possible; give 8 to 4096 pixels")
    skeleton = build_skeleton(name)
    chain_of(skeleton)  # raises for families that cannot be cut into blocks
    state: State | None = None
    notes: list[str] = []
    options: Options = {}
    if checkpoint is not None:
        state, notes = strip_prefix(read_state(checkpoint), _names(skeleton), checkpoint)
        if isinstance(skeleton, SwinTransformer) and OLD_SWIN in state:
            state = rename_old_swin(state)
            notes.append(f"{checkpoint.name}: names of Swin's first release, renamed")
        options = options_from_shapes(skeleton, state, checkpoint, image_size)
    elif not getattr(skeleton, "num_classes", 1):
        raise ValueError(
            f"timm's weights of {name} have no head, so it names no classes; "
            "give --checkpoint FILE of a network that was trained to classify"
        )
    elif image_size is not None:
        options = _resize(skeleton, image_size)
    notes += _say(skeleton, options)
    if state is not None and "size" not in options and not _tells_size(state):
        size = " x ".join(map(str, _usual_size(skeleton)))
        notes.append(f"No shape tells the image size: {size} pixels, as timm has it for this name.")
    model = _create(name, checkpoint is None, skeleton, options)
    if state is not None and checkpoint is not None:
        notes += put_weights(model, state, checkpoint)
    return Loaded(unfused(model).eval(), tuple(notes))


def unfused(model: nn.Module) -> nn.Module:
    """Use plain attention everywhere: fused kernels alter last digits and would skip quantizers."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def hash_weights(model: nn.Module) -> str:
    """What identifies weights, wherever they came from: a SHA-256 of their names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_name(name: str) -> None:
    """ValueError if timm has no network of that name; near names are suggested."""
    if name.lower().startswith(SOURCES):
        return
    if "/" in name:
        raise ValueError(
            f"timm has no network {name!r}; for one of the Hugging Face hub give hf-hub:{name}, "
            f"for a local folder local-dir:{name}"
        )
    if not timm.is_model(name.partition(".")[0]):
        near = get_close_matches(name, timm.list_models(), 3)
        hint = f"; near are {', '.join(near)}" if near else "; timm.list_models() names them all"
        raise ValueError(f"timm has no network {name!r}{hint}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of timm and of the hub's client off the terminal; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def build_skeleton(name: str) -> nn.Module:
    """The network that timm means by a name: shapes only, no memory, no weights."""
    try:
        with _quiet(), torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except Exception as error:
        if name.lower().startswith(SOURCES):
            raise ValueError(
                f"{name} cannot be fetched ({_line(error)}); offline, give timm's name of the "
                "architecture as --model and the file as --checkpoint"
            ) from None
    try:  # some networks compute with numbers while they are built
        with _quiet():
            return timm.create_model(name, pretrained=False)
    except Exception as error:
        raise ValueError(f"timm could not build {name} ({_line(error)})") from None


def _create(name: str, pretrained: bool, skeleton: nn.Module, options: Options) -> nn.Module:
    """The network for real. `options` are timm's, with "size" for what preprocessing shall do."""
    options = dict(options)
    config = _config(skeleton)
    height, width = options.pop("size", _usual_size(skeleton))
    channels = options.get("in_chans", getattr(skeleton, "in_chans", 3))
    overlay: Options = {"input_size": (channels, height, width)}
    if channels == 1:  # grey: the mean of what the three colours have
        overlay |= {k: (sum(config[k]) / len(config[k]),) for k in ("mean", "std")}
    try:
        with _quiet():
            return timm.create_model(
                name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options
            )
    except Exception as error:
        hint = "; offline, give --checkpoint FILE" if pretrained else ""
        raise ValueError(f"timm could not build {name} ({_line(error)}){hint}") from None


def _line(error: Exception) -> str:
    """The first line of an error's text, of bounded length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _config(skeleton: nn.Module) -> dict[str, Any]:
    """What timm knows of a network: image size, statistics, the names of its ends."""
    config: dict[str, Any] = skeleton.pretrained_cfg  # type: ignore[assignment]
    return config


def _names(skeleton: nn.Module) -> set[str]:
    """All names that a checkpoint of the network can have; a headless one's head too."""
    heads = {f"{name}.{part}" for name in _classifiers(skeleton) for part in ("weight", "bias")}
    return heads | skeleton.state_dict().keys()


def _classifiers(skeleton: nn.Module) -> list[str]:
    """The modules that give logits: one, or two in distilled networks."""
    found = _config(skeleton).get("classifier") or ()
    return [found] if isinstance(found, str) else list(found)


def rename_old_swin(state: State) -> State:
    """Names of 2021 as today's: a stage now begins, and does not end, with its downsampling."""
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head" and len(parts) == 2:
            parts.insert(1, "fc")
        out[".".join(parts)] = value
    return out


# What the shapes tell


def options_from_shapes(
    skeleton: nn.Module, state: State, checkpoint: Path, image_size: int | None = None
) -> Options:
    """timm's arguments for a network of these shapes; ValueError where they leave a choice open."""
    options = _class_options(skeleton, state, checkpoint)
    own = skeleton.state_dict()
    first = _config(skeleton).get("first_conv")
    weight = f"{first}.weight"
    if isinstance(first, str) and weight in own and weight in state and state[weight].ndim == 4:
        channels = state[weight].shape[1]  # (out, in, height, width)
        if channels != own[weight].shape[1]:
            options["in_chans"] = channels
    sizes: dict[type[nn.Module], Callable[..., tuple[int | None, Options]]] = {
        VisionTransformer: _vit_size,
        SwinTransformer: _swin_size,
        Levit: _levit_size,
    }
    for family, size_of in sizes.items():
        if isinstance(skeleton, family):
            size, more = size_of(skeleton, state, checkpoint, image_size)
            if size is not None:
                options |= {"img_size": size, "size": (size, size)}
            return options | more
    return options | (_resize(skeleton, image_size) if image_size is not None else {})


def _resize(skeleton: nn.Module, image_size: int) -> Options:
    """The options of another image size: of the network, if it has one, and of preprocessing."""
    takes = isinstance(skeleton, VisionTransformer | SwinTransformer | Levit)
    return {"size": (image_size, image_size)} | ({"img_size": image_size} if takes else {})


def _class_options(skeleton: nn.Module, state: State, checkpoint: Path) -> Options:
    """How many classes the head has; ValueError if there is none."""
    names = _classifiers(skeleton)
    weights = [f"{name}.weight" for name in names]
    missing = [weight for weight in weights if weight not in state]
    if names and len(missing) == len(names):
        raise ValueError(
            f"{checkpoint} has no head ({missing[0]} is not in it), so its network names no "
            "classes; give the checkpoint of a network that was trained to classify"
        )
    if missing:
        raise ValueError(
            f"{checkpoint} lacks {missing[0]}, so it is of a network that was not distilled; "
            "give timm's name of that one as --model"
        )
    classes = {state[weight].shape[0] for weight in weights if state[weight].ndim}
    if len(classes) != 1:  # two heads that differ: the strict comparison of shapes names them
        return {}
    number = classes.pop()
    if number < 2:
        raise ValueError(
            f"{checkpoint} has a head of {number} class; top-1 needs a network of at least 2"
        )
    return {} if number == skeleton.num_classes else {"num_classes": number}


def _vit_size(
    skeleton: VisionTransformer, state: State, checkpoint: Path, image_size: int | None
) -> tuple[int | None, Options]:
    """ViT: one position embedding for each patch, and for class and register tokens before them."""
    own = skeleton.state_dict()
    more: Options = {}
    if "dist_token" in state and "dist_token" not in own:
        raise ValueError(
            f"{checkpoint} is of a distilled network (it has a dist_token); "
            "give timm's name of that one as --model"
        )
    if "fc_norm.weight" in state and "norm.weight" not in state and "norm.weight" in own:
        more["global_pool"] = "avg"  # the norm is behind the pooling: masked autoencoders
    weight = "patch_embed.proj.weight"
    if "pos_embed" not in state or "pos_embed" not in own or weight not in state:
        return image_size, more
    patch, was = tuple(state[weight].shape[2:]), tuple(own[weight].shape[2:])
    entries, grid = state["pos_embed"].shape[1], skeleton.patch_embed.grid_size
    if patch == was and entries == own["pos_embed"].shape[1]:
        _agree(_usual_size(skeleton), image_size, checkpoint)
        return None, more
    prefix = own["pos_embed"].shape[1] - grid[0] * grid[1]
    side = isqrt(max(entries - prefix, 0))
    if len(patch) != 2 or patch[0] != patch[1] or side < 1 or side * side != entries - prefix:
        raise ValueError(
            f"{checkpoint}: pos_embed has {entries} entries and patches are "
            f"{' x '.join(map(str, patch))} pixels, which is not a square image for this network; "
            "is --model the right network?"
        )
    if patch != was:
        more["patch_size"] = patch[0]
    size = side * patch[0]
    _agree((size, size), image_size, checkpoint)
    return size, more


def _swin_size(
    skeleton: SwinTransformer, state: State, checkpoint: Path, image_size: int | None
) -> tuple[int | None, Options]:
    """Swin: its tables tell the windows; a window never exceeds its stage, which may tell the size.

    Tables of stage i are ((2 w_i - 1)^2, heads), where w_i is the smaller of window and stage.
    """
    own = skeleton.state_dict()
    tables = [f"layers.{i}.blocks.0.{BIAS_TABLE}" for i in range(len(skeleton.layers))]
    if any(name not in state for name in tables):
        return image_size, {}
    windows = [(isqrt(state[name].shape[0]) + 1) // 2 for name in tables]
    before = [(isqrt(own[name].shape[0]) + 1) // 2 for name in tables]
    patch = own["patch_embed.proj.weight"].shape[-1]
    stride = patch * 2 ** (len(tables) - 1)  # pixels of the image for one of the last stage
    mask = state.get("layers.0.blocks.1.attn_mask")  # old files: (number of windows, w^2, w^2)
    if windows[-1] < windows[0]:  # the last stage is smaller than a window
        size = windows[-1] * stride
        _agree((size, size), image_size, checkpoint)
    elif mask is not None and mask.ndim == 3:
        size = isqrt(mask.shape[0]) * windows[0] * patch
        _agree((size, size), image_size, checkpoint)
    elif image_size is not None:
        size = image_size
    elif windows == before:  # so the name says
        return None, {}
    else:
        raise ValueError(
            f"{checkpoint} has windows of {windows[0]} x {windows[0]}, which fit images of "
            f"{windows[0] * stride} pixels and of more; give --image-size"
        )
    return size, {} if windows[0] == before[0] else {"window_size": windows[0]}


def _levit_size(
    skeleton: Levit, state: State, checkpoint: Path, image_size: int | None
) -> tuple[int | None, Options]:
    """LeViT: a bias for each position of a stage, whose pixels are 16 x 16 of the image."""
    name = "stages.0.blocks.0.attn.attention_biases"  # (heads, positions)
    own = skeleton.state_dict()
    if name not in state or name not in own:
        return image_size, {}
    positions = state[name].shape[1]
    if positions == own[name].shape[1]:
        _agree(_usual_size(skeleton), image_size, checkpoint)
        return None, {}
    size = isqrt(positions) * 16
    if isqrt(positions) ** 2 != positions:
        raise ValueError(f"{checkpoint}: {name} has {positions} positions, which is not a square")
    _agree((size, size), image_size, checkpoint)
    return size, {}


def _usual_size(skeleton: nn.Module) -> tuple[int, int]:
    """Height and width of the images that timm means by a name."""
    _, height, width = _config(skeleton)["input_size"]
    return height, width


def _agree(told: tuple[int, int], image_size: int | None, checkpoint: Path) -> None:
    """ValueError if a size was asked for that the checkpoint's shapes rule out."""
    if image_size is not None and told != (image_size, image_size):
        raise ValueError(
            f"{checkpoint} is for images of {told[0]} x {told[1]} pixels, not of "
            f"{image_size}; omit --image-size"
        )


def _tells_size(state: State) -> bool:
    """Whether another image size would have given a checkpoint other shapes."""
    return any(
        name == "pos_embed" or name.endswith(("attention_biases", "attn_mask")) for name in state
    )


def _say(skeleton: nn.Module, options: Mapping[str, Any]) -> list[str]:
    """What differs from the network that timm means by the name, a sentence each."""
    notes = []
    if (number := options.get("num_classes")) is not None:
        usual = skeleton.num_classes or "none"
        notes.append(f"The head has {number} classes (timm's has {usual}).")
    if (size := options.get("size")) is not None:
        usual = " x ".join(map(str, _usual_size(skeleton)))
        now = " x ".join(map(str, size))
        if now != usual:
            notes.append(f"Images are {now} pixels (timm's are {usual}).")
    if (patch := options.get("patch_size")) is not None:
        notes.append(f"Patches are {patch} x {patch} pixels.")
    if (window := options.get("window_size")) is not None:
        notes.append(f"Windows are {window} x {window}.")
    if (channels := options.get("in_chans")) is not None:
        grey = "; images are made grey, with the colours' mean statistics" if channels == 1 else ""
        notes.append(f"Images have {channels} channel{'s' if channels > 1 else ''}{grey}.")
    if "global_pool" in options:
        notes.append("Its norm is behind the pooling (fc_norm), so patches are averaged.")
    return notes
