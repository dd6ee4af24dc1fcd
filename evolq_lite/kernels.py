"""Integer execution: uint8 activations times int8 weights, summed in int32. Read with lesson 2.

`simulate` computes a quantized network in float and defines what is right; it runs everywhere and
has gradients. `integer` computes the same products on the integers themselves, which is exact,
needs a quarter of the memory traffic, and is what a deployed network does:

    simulate   y = (s_x (q_x - z)) . (s_w q_w) + b          float products of fake-quantized numbers
    integer    y = s_x s_w ((q_x - z) . q_w) + b            an integer product, scaled once

Weights that are s_w q_w + t, one shift t per output channel, add t times the sum of the inputs.

The kernel (oneDNN's quantized linear, in torch) also applies the activation function and the
next layer's quantizer before it writes, so that what travels from fc1 to fc2 is uint8. (q, k and v
could be written so too, but the kernel adds their zero point, about 128, before it rounds, which
costs seven bits of the fraction: twice as many values near a tie fell on the other side.)

Attention's products have no weights, and torch has no batched integer product for CPUs.
`multiply_batch` therefore calls one for each image and head, which `batch_pays` allows only where a
product is worth the call. Both ways give the same whole numbers.

Whether it can is a matter of the processor too. Without the VNNI instructions, kernels add two
products of 8 bits in 16 bits, which overflows for 8-bit weights (255 * 127 * 2 > 32767) and
silently clips. `missing` therefore tries the worst case on the spot and says what is wrong.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

EXECUTIONS = ("auto", "integer", "simulate", "plain")
WORTH_A_CALL = 2**20  # multiplications; a float product of so many takes 30 us, the integer one 10


@cache
def missing(weight_bits: int, device: str = "cpu") -> str:
    """What keeps this machine from integer execution with weights of these bits; "" if nothing."""
    if device != "cpu":
        return f"it runs on the CPU only, and the network is on {device}"
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    ):
        return "this build of torch has no oneDNN quantized linear"
    # The largest codes and weights: every pair of products overflows 16 bits if any does.
    codes = torch.full((16, 96), 255, dtype=torch.uint8)
    largest = 2 ** (weight_bits - 1)
    weight = torch.tensor([[-largest], [largest - 1]], dtype=torch.int8).repeat(16, 96)
    wanted = (codes.long() @ weight.long().T).float()
    try:
        found = multiply(codes, 1.0, 0, pack(weight, torch.ones(32)), None)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch's kernel refuses this processor ({str(error).splitlines()[0]})"
    if not torch.equal(found, wanted):
        return (
            f"this processor lacks VNNI, so its kernel overflows with {weight_bits}-bit weights; "
            "7 bits or fewer are exact"
        )
    return ""


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights (out, in) as the kernel wants them, and their scales (out,)."""

    weight: Tensor
    scale: Tensor
    zeros: Tensor


def pack(weight: Tensor, scale: Tensor) -> Packed:
    """Prepare int8 weights (out, in) with one scale per output channel (out,), zero point 0."""
    return Packed(
        torch.ops.onednn.qlinear_prepack(weight, None),
        scale.contiguous(),
        torch.zeros(len(scale), dtype=torch.int32),
    )


def multiply(
    codes: Tensor,
    scale: float,
    zero_point: int,
    packed: Packed,
    bias: Tensor | None,
    act: str = "none",
    act_form: str = "",
    out: tuple[float, int] | None = None,
) -> Tensor:
    """Codes (..., in) uint8 times packed weights (out, in): float (..., out), activation applied.

    `scale` and `zero_point` belong to the codes. With `out`, a scale and a zero point, the result
    is uint8 codes for them, rounded half to even and clamped to 0 ... 255.
    """
    weights = packed.weight, packed.scale, packed.zeros
    form = *(out or (1.0, 0)), torch.float32 if out is None else torch.uint8
    return torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero_point, *weights, bias, *form, act, [], act_form
    )


@cache
def batch_missing() -> bool:
    """Whether this machine lacks an exact product of signed 8-bit integers."""
    if missing(8) or not hasattr(torch, "_int_mm"):
        return True
    # The largest products, as in `missing`.
    left, right = torch.full((1, 32, 96), -128.0), torch.full((1, 96, 32), -128.0)
    right[..., ::2] = 127.0
    try:
        return not torch.equal(multiply_batch(left.clone(), 0, right.clone(), 0), left @ right)
    except (RuntimeError, NotImplementedError):
        return True


def batch_pays(left: Tensor, right: Tensor) -> bool:
    """Whether `multiply_batch` is faster than `@` for (..., rows, depth) and (..., depth, columns).

    With several threads it is not: they would meet at a barrier in every single product.
    """
    work = left.shape[-2] * left.shape[-1] * right.shape[-1]
    return work >= WORTH_A_CALL and torch.get_num_threads() == 1 and not batch_missing()


def multiply_batch(left: Tensor, left_middle: int, right: Tensor, right_middle: int) -> Tensor:
    """`left @ right` for whole numbers in floats, by integer products; uses up both buffers.

    (..., rows, depth) times (..., depth, columns); what is left of the numbers when their middle is
    subtracted fits into int8. With middles a and b,

        sum (x + a) (y + b) = sum x y + b sum (x + a) + a sum y
    """
    rows = left.sum(-1, keepdim=True).int()
    x, y = left.sub_(left_middle).to(torch.int8), right.sub_(right_middle).to(torch.int8)
    columns = right.sum(-2, keepdim=True).int()
    product = torch.empty((*left.shape[:-1], right.shape[-1]), dtype=torch.int32)
    parts = x.flatten(0, -3), y.flatten(0, -3), product.flatten(0, -3)
    for one, other, out in zip(*parts, strict=True):
        torch._int_mm(one, other, out=out)
    product.add_(rows, alpha=right_middle).add_(columns, alpha=left_middle)
    return product.view(torch.float32).copy_(product)  # in place: both take four bytes a number


def kernel_name(act: nn.Module) -> tuple[str, str] | None:
    """The kernel's name and form of an activation function; None if it has none."""
    match type(act).__name__:
        case "GELU":
            return "gelu", getattr(act, "approximate", "none")
        case "ReLU":
            return "relu", ""
        case _:
            return None
