"""A quantized network as an ONNX file, which other programs run as it ran here. Read with lesson 9.

ONNX knows no "fake quantization". It has two operators, and whoever runs the file makes integer
arithmetic of what stands between them:

    QuantizeLinear     q  = clamp(round(x / scale) + zero_point, 0, 255)        float to uint8
    DequantizeLinear   x' = (q - zero_point) * scale                            back to float

A point becomes such a pair (Q and DQ), a weight its integers and a DQ. Read as it stands, the
file computes in float what the plain layers compute; a runtime that sees "DQ, DQ, MatMul"
multiplies the integers instead. Which form one chooses decides whether it sees that:

- *A weight is stored transposed* (in, out), its DQ has scales along axis 1, and a MatMul follows.
- *Activations have one scale per tensor.* A DQ with a scale per channel is right on paper, slow in
  one runtime and wrong in another. Channels of their own get a factor before and after the pair:
  `x * (1 / f)`, Q and DQ, `x * f`. Powers of two change no digit.
- *Values are int8*, all other activations uint8. With uint8 on both sides of the second product,
  OpenVINO computes it in a way in which more codes flip.
- *Fewer than 8 bits* are uint8 whose ends are cut off before Q: Clip, then Q.
- *A convolution's bias is subtracted, negative, after it.* ONNX Runtime rounds a bias that is the
  convolution's own to the integers of its sums; at 3 bits that changes 1 of 100 labels.
- *The images' own point is written out*: x times 1 / scale, Round, Clip, times scale. Pixels lie on
  ties there (see `OnnxPixels`), and every runtime has its own way of dividing.
- *The bias of a layer that reads one row an image*, as the head does, is subtracted too: "MatMul,
  Add" on tables becomes a Gemm in float, which takes its weights out of their DQ for each image.
- *Queries, keys and values are cut along the last axis*, which spares three copies a block.
- *The scores keep a distance from softmax.* "DQ, Softmax, Q" would become one operator that looks
  its values up in a table and changes a quarter of the next codes. So the scores are quantized
  before they are multiplied by 1 / sqrt(d), with a scale that is larger by as much.
- *A mean keeps its axes*, which a Squeeze takes away: see `keep_axes_of_means`.
- *Weights of 2 to 4 bits* can be packed, two in a byte, before a Cast to int8. A runtime unpacks
  them once, when it loads the file; with a DQ right after them it would choose other arithmetic.

`export_onnx` copies the network, puts these forms in the place of the plain layers, and lets
`torch.onnx.export` write down what they do; any other module is written down as it computes. What
a receiver must know besides the arithmetic (how to prepare an image, what the classes are called,
how it was quantized) goes into the file too: without it, the file is right and its user is wrong.
"""

import ast
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from evolq_lite.config import EXPORTED_WEIGHTS, KINDS, QuantConfig
from evolq_lite.convert import Point, kind_of, twin
from evolq_lite.fast import set_execution
from evolq_lite.files import check_target, write_whole
from evolq_lite.layers import QuantAttention, QuantConv2d, QuantLinear, QuantProducts, QuantWeight
from evolq_lite.networks import hash_weights
from evolq_lite.numerics import along
from evolq_lite.quantizer import Quantizer

OPSET = 21  # the first with int4, and with Gelu and LayerNormalization as operators
FORMAT = 1  # of what the file says of itself
KEY = "evolq_lite"  # under which it says so
PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
EXTRA = "pip install 'evolq_lite[export]'"
NOTHING_TO_PACK = "no weight has 4 bits or fewer to pack as int4; export the weights as int8"


def operator(name: str, inputs: Sequence[Tensor], dtype: torch.dtype, **attributes: Any) -> Tensor:
    """An ONNX operator whose output has the shape of its first input; for tracing only."""
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=OPSET
    )


class OnnxPoint(Quantizer):
    """A quantization point as Q and DQ, with factors per channel around them if it needs them."""

    factors: Tensor | None  # what one channel's step is worth in the others'; its inverse beside it
    inverse: Tensor | None
    shift: Tensor | None  # zero points per channel, less the one of Q and DQ
    ends: tuple[float, float] | None  # of the clamp, for fewer than 8 bits

    @classmethod
    def convert(cls, point: Any, signed: bool = False) -> None:
        """Make a calibrated point one of these; codes count from 0 (uint8), or from -128 (int8)."""
        low, levels = point.integers.lo, 2**point.integers.bits
        step, zero, factors, shift = point.scale.detach(), point.zero_point - low, None, None
        if step.ndim:
            ratio = step / step.min()
            exact = bool((ratio.log2() == ratio.log2().round()).all())
            step, factors = (step.min(), ratio) if exact else (torch.ones(()), step)
            if zero.ndim and bool((zero != zero[0]).any()):
                shift, zero = zero - levels // 2, torch.tensor(levels // 2)
            zero = zero.reshape(-1)[0]
        axis = -1 if point.axis is None else point.axis
        if axis not in (-1, 3) and factors is not None:
            raise ValueError(f"its channels lie along axis {axis}, which is not the last one")
        if factors is not None and not bool((factors != 1).any()):
            factors = None
        point.ends = (
            None if levels == 256 else (float(-zero * step), float((levels - 1 - zero) * step))
        )
        point.register_buffer("factors", factors)
        point.register_buffer("inverse", None if factors is None else factors.reciprocal())
        point.register_buffer("shift", shift)
        zero = (zero - 128).to(torch.int8) if signed else zero.to(torch.uint8)
        point.scale, point.zero_point = step.clone(), zero
        point.__class__ = cls

    def forward(self, x: Tensor, unit: Tensor | float = 1.0, gain: float = 1.0) -> Tensor:
        """x / unit, quantized as if it were x: whoever gave the unit multiplies by it.

        What comes out is `gain` times as large, at no cost.
        """
        step, ends = self.scale, self.ends
        if unit != 1.0:
            step = step / unit
            ends = None if ends is None else (ends[0] / float(unit), ends[1] / float(unit))
        if self.inverse is not None:
            x = x * self.inverse
        if self.shift is not None:
            x = x + self.shift
        if ends is not None:
            x = x.clamp(*ends)
        codes = operator("QuantizeLinear", (x, step, self.zero_point), self.zero_point.dtype)
        step = step if gain == 1.0 else step * gain
        x = operator("DequantizeLinear", (codes, step, self.zero_point), torch.float32)
        if self.shift is not None:
            x = x - self.shift
        return x if self.factors is None else x * self.factors


class OnnxPixels(Quantizer):
    """The point that reads the images, as plain arithmetic in the order in which it is done here.

    Pixels had 8 bits before they became numbers from -1 to 1. With a range of 8 bits once more,
    each lies halfway between two integers, where the last digit decides: no runtime that divides
    in another order sees the same image.
    """

    ends: tuple[int, int]  # of the integers, counted from the zero point

    @classmethod
    def convert(cls, point: Any) -> None:
        """Make a calibrated point with one scale one of these."""
        zero = int(point.zero_point)
        point.ends = point.integers.lo - zero, point.integers.hi - zero
        point.__class__ = cls

    def forward(self, x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        return (x * self.scale.reciprocal()).round().clamp(*self.ends) * self.scale


class OnnxWeight(QuantWeight):
    """Common to both layers: integers (int8) behind a DQ, one scale per output channel."""

    codes: Tensor | None  # of the weight's shape, for MatMul transposed; None: it stays float
    scale: Tensor
    zero_point: Tensor | None  # None for symmetric weights
    output_axis: int

    @classmethod
    def convert(cls, layer: Any) -> None:
        """Make a calibrated layer one of these."""
        point = layer.weight_quant
        if not point.passing:
            zero = point.zero_point.expand_as(point.scale)
            codes = point.to_integers(layer.weight.detach()) + along(zero, layer.weight.ndim, 0)
            middle = 0 if point.integers.signed else 2 ** (point.integers.bits - 1)
            codes, zero = (codes - middle).to(torch.int8), (zero - middle).to(torch.int8)
            if cls.output_axis == 1:
                codes = codes.T.contiguous()  # (in, out)
            layer.register_buffer("codes", codes)
            layer.register_buffer("scale", point.scale.detach().clone())
            layer.register_buffer("zero_point", zero if bool(zero.any()) else None)
            layer.weight = None
        else:
            layer.codes = None
        layer.__class__ = cls

    def take_weight(self) -> Tensor:
        """The weight in float, as the file computes it."""
        assert self.codes is not None
        inputs = [t for t in (self.codes, self.scale, self.zero_point) if t is not None]
        return operator("DequantizeLinear", inputs, torch.float32, axis=self.output_axis)


class OnnxLinear(OnnxWeight, QuantLinear):  # type: ignore[misc]
    output_axis = 1
    negative_bias: Tensor | None  # (out,)

    @classmethod
    def convert(cls, layer: Any) -> None:
        super().convert(layer)
        layer.register_buffer("negative_bias", None if layer.bias is None else -layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quant(x)
        if self.codes is None:
            return F.linear(x, self.weight, self.bias)
        y = x @ self.take_weight()  # (..., in) times (in, out)
        if self.bias is None or self.negative_bias is None:
            return y
        # Of a table (n, in) times a matrix, plus a bias, ONNX Runtime makes a Gemm in float.
        return y - self.negative_bias if y.ndim == 2 else y + self.bias


class OnnxConv2d(OnnxWeight, QuantConv2d):  # type: ignore[misc]
    output_axis = 0
    negative_bias: Tensor | None  # (out, 1, 1)

    @classmethod
    def convert(cls, layer: Any) -> None:
        super().convert(layer)
        bias = None if layer.bias is None else -layer.bias.detach().view(-1, 1, 1)
        layer.register_buffer("negative_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.codes is None:
            return self._conv_forward(self.input_quant(x), self.weight, self.bias)
        y = self._conv_forward(self.input_quant(x), self.take_weight(), None)
        # Added, the bias would be moved into the convolution and rounded to its integers.
        return y if self.negative_bias is None else y - self.negative_bias


class OnnxProducts(QuantProducts):
    """Attention's two products between pairs of Q and DQ."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As the plain one."""
        if self.scores.passing and isinstance(self.q, OnnxPoint) and not self.q.passing:
            scores = self.q(q, gain=scale) @ self.k(k).transpose(-2, -1)
            scores = scores if bias is None else scores + bias
        else:
            scores = self.q(q) @ self.k(k).transpose(-2, -1)
            scores = scores if bias is None else scores + bias / scale
            if not self.scores.passing:
                scores = self.scores(scores, unit=scale)
            scores = scores * scale  # what keeps Q and DQ away from softmax
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        shares, point = scores.softmax(-1), self.probabilities
        # Powers of two are written out in float: no pair of Q and DQ can hold them.
        shares = point(shares) if isinstance(point, Quantizer) else point.to_integers(shares)
        return (shares @ self.v(v)).transpose(1, 2).flatten(2)


class OnnxAttention(QuantAttention):
    """Queries, keys and values cut along the last axis, where no copy moves what is cut."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(images, tokens, channels) to the same."""
        parts = self.qkv(x).chunk(3, -1)  # each (images, tokens, heads * head dim)
        q, k, v = (
            part.view(*part.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for part in parts
        )
        x = self.products(self.q_norm(q), self.k_norm(k), v, self.scale, mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(x)))


FORMS: dict[type[nn.Module], type[OnnxWeight]] = {
    QuantLinear: OnnxLinear,
    QuantConv2d: OnnxConv2d,
}


def check_point(name: str, point: Quantizer) -> None:
    """ValueError for a point without a scale, or with one that the format cannot hold."""
    if not point.frozen:
        raise ValueError("this network is not calibrated; call calibrate(qmodel, images) first")
    scale, zero, integers = point.scale, point.zero_point, point.integers
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{name} has a scale that is not a positive number; calibrate again")
    if not (((zero >= integers.lo) & (zero <= integers.hi) & (zero == zero.round())).all()):
        raise ValueError(
            f"{name} has a zero point that is not a whole number from {integers.lo} to "
            f"{integers.hi}, which the format cannot hold; calibrate again"
        )


def make_exportable(qmodel: nn.Module, float_kinds: Sequence[str]) -> nn.Module:
    """A copy with the forms above in the place of the plain layers; points of these kinds float."""
    copy = twin(qmodel)
    set_execution(copy, "plain")
    for name, module in copy.named_modules():
        if isinstance(module, Point) and kind_of(name) in float_kinds:
            module.stay_float()
    points = {n: m for n, m in copy.named_modules() if isinstance(m, Quantizer) and not m.passing}
    for name, point in points.items():
        check_point(name, point)
    for name, module in list(copy.named_modules()):
        if (form := FORMS.get(type(module))) is not None:
            if cast(Tensor, module.weight).dtype != torch.float32:
                raise ValueError(f"{name} is not float32; export the network in float32")
            points.pop(f"{name}.weight_quant", None)
            form.convert(module)
        elif type(module) is QuantProducts:
            module.__class__ = OnnxProducts
        elif type(module) is QuantAttention:
            module.__class__ = OnnxAttention
    first = next((m for m in copy.modules() if isinstance(m, OnnxConv2d)), None)
    for name, point in points.items():
        if first is not None and point is first.input_quant and point.axis is None:
            OnnxPixels.convert(point)
        elif type(point) is Quantizer:
            try:
                OnnxPoint.convert(point, signed=name.endswith("products.v"))
            except ValueError as error:
                raise ValueError(f"{name} cannot be exported: {error}") from None
    return copy


def packable_bits(qmodel: nn.Module) -> dict[str, int]:
    """The bits of each layer's weight that has at most 4 of them, by the layer's name."""
    return {
        name: layer.weight_quant.integers.bits
        for name, layer in qmodel.named_modules()
        if isinstance(layer, QuantWeight)
        and not layer.weight_quant.passing
        and layer.weight_quant.integers.bits <= 4
    }


def check_request(config: QuantConfig, weights: str, float_points: str) -> list[str]:
    """The kinds of points to leave out. ValueError for what no calibration makes exportable."""
    if weights not in EXPORTED_WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; known: {', '.join(EXPORTED_WEIGHTS)}")
    kinds = [kind.strip() for kind in float_points.split(",") if kind.strip()]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind of point {unknown[0]!r}; known: {', '.join(KINDS)}")
    if config.moment_correction:
        raise ValueError(
            "moment_correction (preset official) adds a shift to each weight, for which a weight "
            "behind DequantizeLinear has no place; export a network quantized without it"
        )
    return kinds


def check_packing(config: QuantConfig, float_kinds: Sequence[str]) -> None:
    """ValueError if no network that is quantized so has weights that fit into int4."""
    fewest = min(config.weight_bits, config.edge_bits or config.weight_bits)
    if fewest > 4 or "weights" in (*float_kinds, *config.float_kinds):
        raise ValueError(NOTHING_TO_PACK)


def export_onnx(
    qmodel: nn.Module,
    path: Path | str,
    example: Tensor,
    *,
    weights: str = "int8",
    float_points: str = "",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a calibrated network as an ONNX file that is whole or not there.

    `example` is one image or more (n, channels, height, width), prepared as the network wants it;
    the file takes any number of them, of that size. `weights` "int4" packs those of 2 to 4 bits.
    `float_points` names kinds of points to leave out, as `QuantConfig.float_points` does. `facts`
    adds to what the file says of itself ("classes", a list of names, is one) and wins over what the
    network says. Needs the extra `export`. ValueError says why a network cannot be exported.
    """
    require_extra()
    path = Path(path)
    check_target(path)
    if not any(isinstance(module, QuantWeight) for module in qmodel.modules()):
        raise ValueError("the network has no quantized layers; call quantize(model, config) first")
    kinds = check_request(cast(QuantConfig, qmodel.quant_config), weights, float_points)
    if example.ndim != 4 or not len(example):
        raise ValueError(
            f"example must be images (n, channels, height, width), not {tuple(example.shape)}"
        )
    packed = packable_bits(qmodel) if weights == "int4" and "weights" not in kinds else {}
    if weights == "int4" and not packed:
        raise ValueError(NOTHING_TO_PACK)
    model = trace(make_exportable(qmodel, kinds), example.detach().cpu())
    name_nodes(model)
    if packed:
        pack_weights(model, packed)
    told = {
        **describe_network(qmodel, example),
        "weights": weights,
        "float_points": ",".join(kinds),
        **(facts or {}),
    }
    model.metadata_props[KEY] = json.dumps(told)
    write_whole(path, serialize(model))


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns of its own use of torch, and logs what it is doing."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def require_extra() -> None:
    """ValueError without the extra `export`."""
    for package in ("onnx", "onnxscript", "onnx_ir", "ml_dtypes"):
        try:
            import_module(package)
        except ImportError as error:
            raise ValueError(missing_extra(package, "exporting", error)) from None


def missing_extra(package: str, purpose: str, error: ImportError) -> str:
    """What to say if a package of the extra is not there, or there and cannot be loaded."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name or package} is not installed, which {purpose} needs; {EXTRA}"
    why = str(error).splitlines()[0]
    return f"{package}, which {purpose} needs, cannot be imported ({why}); install it anew: {EXTRA}"


@torch.no_grad()
def trace(model: nn.Module, example: Tensor) -> Any:
    """What a network does to images (any number), as a graph (an `onnx_ir.Model`)."""
    images = (
        example if len(example) > 1 else example.repeat(2, 1, 1, 1)
    )  # 1 would be taken as fixed
    try:
        with quiet():
            program = torch.onnx.export(
                model.cpu().eval(),
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        why = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
        raise ValueError(f"torch cannot export this {type(model).__name__} ({why})") from None
    assert program is not None
    keep_axes_of_means(program.model)
    return program.model


def keep_axes_of_means(model: Any) -> None:
    """Make of each mean one that keeps its axes, and a Squeeze that takes them.

    OpenVINO moves a DQ behind a mean that drops axes; where two points then read the mean, as those
    of LeViT's two heads do, it loses their zero points, and the logits are arbitrary.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        drops = node.op_type == "ReduceMean" and not node.attributes.get_int("keepdims", 1)
        if not drops or node.outputs[0].is_graph_output():
            continue
        users, output = list(node.outputs[0].uses()), node.outputs[0]
        squeeze = ir.node("Squeeze", [output, node.inputs[1]])
        squeeze.outputs[0].type, squeeze.outputs[0].shape = output.type, output.shape
        squeeze.metadata_props.update(node.metadata_props)  # its place in the network
        node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
        output.shape = None
        model.graph.insert_after(node, squeeze)
        for user, i in users:
            user.replace_input_with(i, squeeze.outputs[0])


def name_nodes(model: Any) -> None:
    """Call each node by its place in the network, as blocks.0.attn.qkv/MatMul; forget the rest.

    torch notes there which line of which file made the node: no business of the receiver.
    """
    count: Counter[str] = Counter()
    outputs = set(model.graph.outputs)
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        place = scopes[-2] if len(scopes) > 1 else ""  # the last is torch's name for the node
        name = f"{place}/{node.op_type}" if place and place[0] != "_" else node.op_type
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name]}"
        node.doc_string = None
        node.metadata_props.clear()
        for i, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value not in outputs:
                value.name = f"{node.name}:{i}" if i else node.name
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name, model.producer_name, model.producer_version = "network", KEY, None
    model.doc_string = model.graph.doc_string = None


def pack_weights(model: Any, layers: Mapping[str, int]) -> None:
    """Store the codes of these layers as int4, two in a byte, and unpack them by a Cast."""
    import ml_dtypes
    import onnx_ir as ir

    graph = model.graph
    for layer in layers:
        codes = graph.initializers[f"{layer}.codes"]
        users = [(node, i) for node, i in codes.uses()]
        narrow = ir.Value(
            name=f"{layer}.packed",
            shape=codes.shape,
            type=ir.TensorType(ir.DataType.INT4),
            const_value=ir.Tensor(
                codes.const_value.numpy().astype(ml_dtypes.int4), name=f"{layer}.packed"
            ),
        )
        graph.register_initializer(narrow)
        cast_up = ir.node(
            "Cast", [narrow], attributes={"to": ir.DataType.INT8}, name=f"{layer}/Cast"
        )
        cast_up.outputs[0].name = f"{layer}/Cast"
        cast_up.outputs[0].type, cast_up.outputs[0].shape = codes.type, codes.shape
        graph.insert_before(users[0][0], cast_up)
        for node, i in users:
            node.replace_input_with(i, cast_up.outputs[0])
        del graph.initializers[f"{layer}.codes"]


def serialize(model: Any) -> bytes:
    """The file's bytes, once ONNX's own checker has found nothing wrong with them."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def describe_network(qmodel: nn.Module, example: Tensor) -> dict[str, Any]:
    """What the network itself says that a receiver must know."""
    known = resolve_model_data_config(qmodel)
    config = cast(QuantConfig, qmodel.quant_config)
    facts = cast(dict[str, Any], getattr(qmodel, "pretrained_cfg", {}) or {})
    return {
        "format": FORMAT,
        "network": str(facts.get("architecture") or type(qmodel).__name__),
        "input_size": list(example.shape[1:]),
        **{key: known[key] for key in PREPARATION if key in known},
        "classes": None,
        "quantization": asdict(config),
        "digest": hash_weights(qmodel),
    }
