# %% [markdown]
# # Assignment 1. Uniform quantization
#
# **You build** the scale and the zero point, fake quantization, one scale per channel, an observer
# that chooses what to clip, and a rule for how many bits a tensor needs. These are the pieces of
# `evolq_lite/numerics.py` and `observers.py`, written by you.
#
# **You need** lessons 1 and 2, and PyTorch tensors. **Time:** 2 to 4 hours. **Points:** 20.
# **Works offline:** yes.
#
# Each exercise has one cell to fill in: `# YOUR CODE HERE` marks each place. Write your code there and
# delete the line `raise NotImplementedError()` below it. The next cell holds public checks that say
# what is wrong; run it as often as you like. The cells after it are empty here and hold hidden tests
# when the assignment is graded: they try many random cases of what the text asks for, and nothing
# else. Test cells are restored before grading, so changing them changes nothing. The functions of
# `evolq_lite` that an exercise re-creates are not allowed in your answer.

# %% [markdown]
# ## About you and your work
#
# Assistants are allowed in this course if you name them here and say for what. You answer for every line that
# you hand in: your instructor may ask you to explain any of them, and what you cannot explain does not count.
# Write the answers to the questions in your own words. *(Release {release})*
#
# **Name:**
#
# **ID:**
#
# **Help received:** (people, books, sites, assistants; for which exercise; or "none")

# %% nbgrader={"grade": false, "grade_id": "A1-setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
import types
from contextlib import contextmanager

import torch

import evolq_lite as eq
from evolq_lite.figures import PETROFF, new_figure

EPS = torch.finfo(torch.float32).eps  # the smallest scale


def same(yours, expected, what, tolerance=1e-5):
    """Fail with a sentence unless two numbers or tensors agree."""
    assert yours is not None, f"{what}: None came back; is a return missing?"
    kind = type(yours).__name__
    try:
        yours = torch.as_tensor(yours)
        assert type(yours) in (torch.Tensor, torch.nn.Parameter)
        yours = yours.detach().double()
    except (TypeError, ValueError, RuntimeError, AssertionError):
        raise AssertionError(f"{what}: expected a number or a tensor, not {kind}") from None
    expected = torch.as_tensor(expected).double()
    shapes = f"shape {tuple(yours.shape)} instead of {tuple(expected.shape)}"
    assert yours.shape == expected.shape, f"{what}: {shapes}"
    far = ~((yours - expected).abs() <= tolerance * (1 + expected.abs()))
    if far.any():
        at = tuple(far.nonzero()[0].tolist())
        where = f" at index {at}" if at else ""
        raise AssertionError(
            f"{what}{where}: {float(yours[at]):.6g} instead of {float(expected[at]):.6g}"
        )


def own_work(thing, *names):
    """Fail if a function or class leaves its work to one of these names."""
    home = str(getattr(thing, "__module__", ""))
    assert not home.startswith("evolq_lite"), "write it yourself, without evolq_lite's own"
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    codes, used = [part.__code__ for part in parts if hasattr(part, "__code__")], set()
    while codes:
        code = codes.pop()
        used |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    assert not used & set(names), f"write it yourself, without {min(used & set(names))}"


@contextmanager
def trying(what):
    """Say which input it was if an answer raises an exception of its own."""
    try:
        yield
    except (AssertionError, NotImplementedError):
        raise
    except Exception as error:
        raise AssertionError(f"{what}: your code raised {type(error).__name__}") from error


# %% [markdown]
# ## Exercise 1: scale and zero point
#
# **Difficulty:** easy · **Minutes:** 30 · **Points:** 3 (public checks 1, hidden tests 2)
#
# Return a tuple `(scale, zero_point)` of two plain numbers for the real values from `lo` to `hi`. With
# $b$ bits the integers run from $-2^{b-1}$ (signed) or $0$ (unsigned), $2^b$ of them in all.
#
# - First widen the range so that it contains 0: `lo` is at most 0, `hi` at least 0.
# - Asymmetric: `lo` maps to the smallest integer and `hi` to the largest. The scale is the length of
#   the range divided by the number of *steps* between integers; the zero point is the integer onto which
#   0 falls, rounded to the nearest integer, half to even, as Python's `round` does.
# - Symmetric: the range is $[-m, m]$ with $m = \max(|lo|, |hi|)$. The scale is again its length divided by
#   the number of steps, so $2m / (2^b - 1)$; the zero point is 0 for signed and $2^{b-1}$ for unsigned
#   integers. (This follows the paper's code. PyTorch usually takes $m / (2^{b-1} - 1)$ for signed
#   integers, which leaves the smallest integer unused.)
# - Every scale is at least `EPS`: a range of zeros, or one that is nearly zero, must do no harm.
#
# <details><summary>Hint</summary>
#
# Eight integers have seven steps between them. For the zero point of the asymmetric case write
# down where `lo` must land: $q_{lo} = \mathrm{round}(lo / s) + z$. Solve for $z$.
#
# </details>
#
# **Expected** (3 bits, unsigned; grey: the range of values, -0.5 to 3):
#
# ![The 8 levels of 3 bits for values from -0.5 to 3: symmetric -3.43 to 2.57; asymmetric -0.50 to 3.00.](figures/A1-1.png)


# %% nbgrader={"grade": false, "grade_id": "A1-1", "locked": false, "schema_version": 3, "solution": true, "task": false}
def scale_and_zero_point(lo, hi, bits, signed, symmetric):
    """Scale and zero point, two numbers, for real values from lo to hi (numbers)."""
    ### BEGIN SOLUTION
    smallest = -(2 ** (bits - 1)) if signed else 0
    steps = 2**bits - 1
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if symmetric:
        scale = max(2 * max(-lo, hi) / steps, EPS)
        return scale, 0 if signed else 2 ** (bits - 1)
    scale = max((hi - lo) / steps, EPS)
    return scale, smallest - round(lo / scale)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A1-1-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(scale_and_zero_point, "affine_params")
for case, expected in {
    (-1.0, 2.5, 3, False, False): (0.5, 2),
    (-1.0, 2.5, 3, True, False): (0.5, -2),
    (1.0, 3.5, 3, False, False): (0.5, 0),
    (-3.5, -1.0, 3, False, False): (0.5, 7),
    (-0.8, 2.7, 3, False, False): (0.5, 2),
    (-0.6, 2.9, 3, False, False): (0.5, 1),
    (-0.75, 2.75, 3, False, False): (0.5, 2),
    (-1.25, 2.25, 3, False, False): (0.5, 2),
    (-1.0, 3.5, 3, True, True): (1.0, 0),
    (-3.5, 1.0, 3, False, True): (1.0, 4),
    (0.0, 0.0, 4, True, False): (EPS, -8),
    (0.0, 1e-9, 3, False, False): (EPS, 0),
    (0.0, 1e-9, 3, True, True): (EPS, 0),
}.items():
    said = "scale_and_zero_point(lo={}, hi={}, bits={}, signed={}, symmetric={})".format(*case)
    answer = scale_and_zero_point(*case)
    assert isinstance(answer, tuple) and len(answer) == 2, f"{said}: return a tuple of two numbers"
    same(answer[0] / expected[0], 1.0, f"scale of {said}, in units of {expected[0]:.3g}")
    same(answer[1], expected[1], f"zero point of {said}")
print("Exercise 1: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A1-1-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
levels = {}
for kind, symmetric in (("symmetric", True), ("asymmetric", False)):
    scale, zero_point = scale_and_zero_point(-0.5, 3.0, 3, False, symmetric)
    levels[kind] = [(q - zero_point) * scale for q in range(8)]
said = "; ".join(f"{kind} {values[0]:.2f} to {values[-1]:.2f}" for kind, values in levels.items())
figure = new_figure(6.4, 1.8, f"The 8 levels of 3 bits for values from -0.5 to 3: {said}.")
axes = figure.add_subplot()
for i, values in enumerate(levels.values()):
    axes.plot(values, [i] * 8, "sD"[i], color=PETROFF[i])
axes.axvspan(-0.5, 3.0, color="0.9", zorder=0)
axes.set(yticks=[0, 1], yticklabels=list(levels), ylim=(-0.6, 1.6), xlabel="real value")
figure


# %% nbgrader={"grade": true, "grade_id": "A1-1-hidden", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_scales(cases=300, seed=11):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        a, b = (3 * torch.randn(2, generator=generator, dtype=torch.float64)).tolist()
        lo, hi = min(a, b), max(a, b)
        bits = int(torch.randint(2, 9, (), generator=generator))
        signed, symmetric = torch.randint(2, (2,), generator=generator).bool().tolist()
        ends = torch.tensor([lo, hi], dtype=torch.float64)
        integers = eq.IntRange(bits, signed)
        scale, zero_point = eq.affine_params(ends[0], ends[1], integers, symmetric)
        said = f"lo {lo:.4f}, hi {hi:.4f}, {bits} bits, signed {signed}, symmetric {symmetric}"
        with trying(said):
            yours = scale_and_zero_point(lo, hi, bits, signed, symmetric)
        same(yours[0], scale, f"scale for {said}")
        same(yours[1], zero_point, f"zero point for {said}")


check_scales()
same(scale_and_zero_point(0.0, 0.0, 8, False, False)[0] / EPS, 1.0, "scale of zeros over EPS")
same(scale_and_zero_point(0.0, 0.0, 2, True, True)[0] / EPS, 1.0, "scale of zeros over EPS")
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 2: there and back
#
# **Difficulty:** easy · **Minutes:** 30 · **Points:** 2 (public checks 1, hidden tests 1)
#
# *Fake quantization* is quantizing and going back at once:
#
# $$q = \mathrm{clamp}(\mathrm{round}(x / s) + z,\; q_{lo},\; q_{hi}), \qquad x' = (q - z)\, s$$
#
# Return $x'$ as a new tensor of the shape of `x`; `x` itself must not change. Round to the nearest
# integer, half to even, as `torch.round` does, then add the zero point, then clamp.
#
# <details><summary>Hint</summary>
#
# One line for each of the two formulas. The clamp acts on the integer, after the zero point was
# added. `torch.clamp(t, a, b)` returns a new tensor.
#
# </details>
#
# **Expected** (scale 0.5, zero point 3, integers 0 to 7):
#
# ![Real values from -2 to 3 and what is left at scale 0.5: 8 levels from -1.5 to 2.0.](figures/A1-2.png)


# %% nbgrader={"grade": false, "grade_id": "A1-2", "locked": false, "schema_version": 3, "solution": true, "task": false}
def quantize_and_back(x, scale, zero_point, smallest, largest):
    """What remains of x (any shape) after integers from smallest to largest; the other arguments
    are numbers."""
    ### BEGIN SOLUTION
    q = torch.clamp(torch.round(x / scale) + zero_point, smallest, largest)
    return (q - zero_point) * scale
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A1-2-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(quantize_and_back, "fake_quantize", "fake_quantize_per_tensor_affine")
x = torch.tensor([-1.5, -0.75, -0.4, 0.0, 0.2, 0.25, 0.4, 0.75, 1.25])
before = x.clone()
same(
    quantize_and_back(x, 0.5, 0, -8, 7),
    [-1.5, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0],
    "x to nearest level, half to even, scale 0.5, zero point 0",
)
same(x, before, "the argument x itself, which must not change")
on_grid = torch.tensor([-1.0, 0.0, 0.5])
quantize_and_back(on_grid, 0.5, 0, -8, 7).add_(1)
same(on_grid, [-1.0, 0.0, 0.5], "x after the result was changed: return a new tensor, not x")
x = torch.tensor([-100.0, -4.0, -3.0, 0.0, 0.5, 1.5, 11.0, 12.0, 13.0, 100.0])
same(
    quantize_and_back(x, 1.0, 3, 0, 15),
    [-3.0, -3.0, -3.0, 0.0, 0.0, 2.0, 11.0, 12.0, 12.0, 12.0],
    "x from -100 to 100, integers 0 to 15, zero point 3, scale 1",
)
same(quantize_and_back(torch.zeros(2, 3), 0.1, -5, -8, 7), torch.zeros(2, 3), "a tensor of zeros")
print("Exercise 2: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A1-2-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
x = torch.linspace(-2, 3, 501)
stairs = quantize_and_back(x, 0.5, 3, 0, 7)
said = f"{len(stairs.unique())} levels from {stairs.min():.1f} to {stairs.max():.1f}"
figure = new_figure(6.4, 3.0, f"Real values from -2 to 3 and what is left at scale 0.5: {said}.")
axes = figure.add_subplot()
axes.plot(x, x, "--", color="0.5", label="x")
axes.plot(x, stairs, color=PETROFF[0], label="there and back")
axes.set(xlabel="x", ylabel="x'")
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A1-2-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_quantize(cases=200, seed=12):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        shape = torch.randint(1, 6, (case % 4,), generator=generator).tolist()
        integers = eq.IntRange(
            int(torch.randint(2, 9, (), generator=generator)),
            bool(torch.randint(2, (), generator=generator)),
        )
        zero_point = int(torch.randint(integers.lo, integers.hi + 1, (), generator=generator))
        scale = 2.0 ** int(torch.randint(-6, 3, (), generator=generator))  # dividing is exact
        halves = torch.randint(-300, 300, shape, generator=generator) / 2  # with ties
        x = scale * halves
        expected = eq.fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point), integers)
        said = f"scale {scale}, zero point {zero_point}, integers {integers.lo} to {integers.hi}"
        said += f", x = {x.flatten()[:12].tolist()} of shape {tuple(x.shape)}"
        with trying(said):
            found = quantize_and_back(x.clone(), scale, zero_point, integers.lo, integers.hi)
        same(found, expected, said)


check_quantize()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 3: one scale per channel
#
# **Difficulty:** medium · **Minutes:** 40 · **Points:** 3 (public checks 1, hidden tests 2)
#
# Return a tuple `(integers, scales)`: the integers as `torch.int8` in the shape of `x`, and the scales, of
# shape `(channels,)`, one for each channel along `axis`. `x` has two or more dimensions. Quantize to
# signed integers of `bits` bits, symmetric: in each channel the scale is that of exercise 1, from the
# largest magnitude in this channel (and at least `EPS`). Round half to even and clamp.
#
# Why clamp? With these scales a positive extreme falls half a step beyond the largest integer. A
# negative one lies halfway between the two smallest.
#
# <details><summary>Hint</summary>
#
# `x.movedim(axis, 0).flatten(1)` has one row per channel. For the way back to the shape of `x`,
# give the scales a shape of ones with `-1` at `axis`: `(1, -1, 1)` for the axis 1 of three.
# Conversion to `int8` cuts off decimals; round before.
#
# </details>
#
# **Expected** (first 12 of the 144 output channels of `blocks.0.attn.qkv` in the embedded ViT):
#
# ![Scales of the first 12 channels at 3 bits: 0.029 to 0.082; one scale for the whole tensor would be 0.125.](figures/A1-3.png)


# %% nbgrader={"grade": false, "grade_id": "A1-3", "locked": false, "schema_version": 3, "solution": true, "task": false}
def quantize_per_channel(x, bits, axis):
    """Integers (int8, the shape of x) and scales (channels,), one for each channel along axis."""
    ### BEGIN SOLUTION
    largest = 2 ** (bits - 1) - 1
    rows = x.movedim(axis, 0).flatten(1)
    scales = (2 * rows.abs().amax(1) / (2**bits - 1)).clamp(min=EPS)
    shape = [1] * x.ndim
    shape[axis] = -1
    q = torch.round(x / scales.view(shape)).clamp(-largest - 1, largest)
    return q.to(torch.int8), scales
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A1-3-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(quantize_per_channel, "affine_params", "fake_quantize")
x = torch.tensor([[3.5, -1.0, 0.6], [-7.0, 4.0, 1.2], [0.0, 0.0, 0.0]])
q, scales = quantize_per_channel(x, 3, 0)
assert q.dtype == torch.int8, f"the integers must be torch.int8, not {q.dtype}"
same(scales / torch.tensor([1.0, 2.0, EPS]), torch.ones(3), "scales of three rows over 1, 2, EPS")
same(q, [[3, -1, 1], [-4, 2, 1], [0, 0, 0]], "integers of three rows at 3 bits")
q, scales = quantize_per_channel(x, 3, 1)
same(scales, [2.0, 8 / 7, 2.4 / 7], "scales of three columns at 3 bits")
same(q, [[2, -1, 2], [-4, 3, 3], [0, 0, 0]], "integers of three columns at 3 bits")
ties = torch.tensor([[3.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [1e-9, 0, 0, 0, 0, 0, 0]])
q, scales = quantize_per_channel(ties, 3, 0)
same(q[0], [3, 0, 2, 2, 0, -2, -2], "integers of 3.5, 0.5, 1.5, 2.5, ... at scale 1: half to even")
same(scales[1] / EPS, 1.0, "the scale of a channel that is nearly zero, over EPS")
q, scales = quantize_per_channel(torch.ones(2, 3, 4, 5), 8, 1)
assert q.shape == (2, 3, 4, 5), f"four dimensions: the integers have shape {tuple(q.shape)}"
same(scales, [2 / 255] * 3, "scales of three channels along axis 1 of four")
same(q.unique(), [127], "integers of a tensor of ones at 8 bits")
print("Exercise 3: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A1-3-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
weight = eq.load_demo("vit", calibration=2).model.blocks[0].attn.qkv.weight.detach()
integers, scales = quantize_per_channel(weight, 3, 0)
figure = new_figure(
    6.4,
    2.8,
    f"Scales of the first 12 channels at 3 bits: {scales[:12].min():.3f} to "
    f"{scales[:12].max():.3f}; one scale for the whole tensor would be {scales.max():.3f}.",
)
axes = figure.add_subplot()
axes.bar(range(12), scales[:12], color=PETROFF[0], label="per channel")
axes.axhline(float(scales.max()), ls="--", color="0.3", label="per tensor")
axes.set(xlabel="output channel", ylabel="scale", xticks=range(12))
axes.legend(loc=(0.02, 0.6))
figure


# %% nbgrader={"grade": true, "grade_id": "A1-3-hidden", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_channels(cases=150, seed=13):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        dims = 2 + case % 3
        shape = torch.randint(1, 7, (dims,), generator=generator).tolist()
        axis = int(torch.randint(dims, (), generator=generator))
        bits = int(torch.randint(2, 9, (), generator=generator))
        x = torch.randn(shape, generator=generator)
        x = x * torch.randn(shape[axis], generator=generator).exp().view(
            [-1 if i == axis else 1 for i in range(dims)]
        )
        rows = x.movedim(axis, 0).flatten(1)
        integers = eq.IntRange(bits, True)
        scale, zero = eq.affine_params(rows.amin(1), rows.amax(1), integers, symmetric=True)
        back = eq.fake_quantize(x, scale, zero, integers, axis)
        said = f"shape {tuple(shape)}, axis {axis}, {bits} bits"
        with trying(said):
            q, yours = quantize_per_channel(x.clone(), bits, axis)
        same(yours, scale, f"scales for {said}")
        wide = scale.view([-1 if i == axis else 1 for i in range(dims)])
        steps = x / wide
        sure = (steps - steps.floor() - 0.5).abs() > 1e-3  # rounding is not on the edge
        same(q[sure] * wide.expand(shape)[sure], back[sure], f"integers times scales for {said}")
        assert q.dtype == torch.int8, f"integers must be torch.int8, not {q.dtype}"
        within = int(q.max()) <= integers.hi and int(q.min()) >= integers.lo
        assert within, f"integers from {integers.lo} to {integers.hi} are possible, for {said}"


check_channels()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 4: an observer that clips
#
# **Difficulty:** hard · **Minutes:** 50 · **Points:** 4 (public checks 1, hidden tests 3: memory 1, least error 1, limits 1)
#
# Complete the class: `update(x)` sees a batch; `params()` returns a tuple `(scale, zero_point)` of two
# tensors of shape `()`, for the clip with the least squared error.
#
# - Remember every value of all batches. `params` may be called at any time and more than once, and more
#   batches may follow.
# - Candidates are the range from the smallest to the largest value seen, times a share of 1.00,
#   0.99, 0.98, ..., 0.20: both ends times the share.
# - The error of a candidate is the mean of $(x' - x)^2$ over *all* values seen. The least error wins;
#   among equal ones, the larger share.
# - `params` also stores the share that was chosen in `self.share`.
# - `params` before the first `update` raises a `ValueError`.
#
# Here `eq.affine_params(lo, hi, integers, symmetric)` and
# `eq.fake_quantize(x, scale, zero_point, integers)` are allowed, so a mistake in exercises 1 and 2
# does not cost points again. The observers of `evolq_lite` are not.
#
# <details><summary>Hint</summary>
#
# Keep a list of batches, flattened; join it with `torch.cat` in `params`. Begin with the share
# 1.00 as the best so far, and replace it only by a *smaller* error. `1 - 0.01 * i` for `i` from 0
# to 80 gives all shares.
#
# </details>
#
# **Expected** (inputs of `blocks.5.mlp.fc2`, every 7th value of 20 images, 3 bits; the cross is the share that was chosen):
#
# ![Mean squared error against the share of the range that is kept: 0.0149 at 1.00, least 0.0104; the observer chose 0.54.](figures/A1-4.png)


# %% nbgrader={"grade": false, "grade_id": "A1-4", "locked": false, "schema_version": 3, "solution": true, "task": false}
class ClippingObserver:
    """Chooses the clip with the least squared error over all values seen; asymmetric."""

    def __init__(self, integers):
        """integers: an eq.IntRange."""
        self.integers = integers
        self.share = None  # set it in params to the share that was chosen
        ### BEGIN SOLUTION
        self.seen = []
        ### END SOLUTION

    def update(self, x):
        """See one batch, a tensor of any shape."""
        ### BEGIN SOLUTION
        self.seen.append(x.detach().flatten())
        ### END SOLUTION

    def params(self):
        """Scale and zero point, two tensors of shape ()."""
        ### BEGIN SOLUTION
        if not self.seen:
            raise ValueError("no data was seen")
        values = torch.cat(self.seen)
        lo, hi = values.min(), values.max()
        least, best = math.inf, None
        for i in range(81):
            share = 1 - 0.01 * i
            params = eq.affine_params(lo * share, hi * share, self.integers, symmetric=False)
            error = float(((eq.fake_quantize(values, *params, self.integers) - values) ** 2).mean())
            if error < least:
                least, best, self.share = error, params, share
        return best
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A1-4-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(ClippingObserver, "OBSERVERS", "MeanSquaredError", "observers")


def observed(batches, bits=2):
    """Share, scale and zero point after some batches."""
    observer = ClippingObserver(eq.IntRange(bits, False))
    for batch in batches:
        observer.update(batch)
    answer = observer.params()
    assert isinstance(answer, tuple) and len(answer) == 2, "params returns a tuple of two tensors"
    assert observer.share is not None, "set self.share in params"
    return observer.share, *answer


try:
    ClippingObserver(eq.IntRange(2, False)).params()
    raise AssertionError("params before update must raise a ValueError")
except ValueError:
    pass
flat = torch.tensor([0.0, 1.0, 2.0, 3.0])
share, scale, zero_point = observed([flat])
same(share, 1.0, "the share for 0, 1, 2, 3 at 2 bits, where nothing needs clipping")
same(scale, 1.0, "the scale for 0, 1, 2, 3 at 2 bits")
many, outlier = flat.repeat(1000), torch.tensor([6.0])
share, scale, zero_point = observed([many, outlier])
same(share, 0.5, "the share for 4,000 values up to 3 and then one of 6")
same(observed([outlier, many])[0], share, "the share when the outlier comes first")
same(observed([torch.cat([many, outlier])])[0], share, "the share when all comes in one batch")
same(observed([-many, -outlier])[0], 0.5, "the share of the same values, all negative")
share, scale, zero_point = observed([many, torch.tensor([[15.0]])])
same(share, 0.2, "the share for 4,000 values up to 3 and then one of 15")
observer = ClippingObserver(eq.IntRange(2, False))
observer.update(flat)
with trying("params called a second time, after one batch"):
    first, again = observer.params(), observer.params()
same(again[0], first[0], "the scale when params is called a second time")
observer.update(outlier)
observer.update(many)
observer.params()
same(observer.share, 0.5, "the share when batches follow after params was called")
same(observed([torch.zeros(5)])[0], 1.0, "the share for zeros, where all shares are equal")
print("Exercise 4: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A1-4-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
demo, inputs = eq.load_demo("vit", calibration=20), []
hook = demo.model.blocks[5].mlp.fc2.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
with torch.no_grad():
    demo.model(demo.calibration)
hook.remove()
values, three = inputs[0].flatten()[::7], eq.IntRange(3, False)
observer = ClippingObserver(three)
observer.update(values)
observer.params()
shares = [1 - 0.01 * i for i in range(81)]
errors = []
for share in shares:
    params = eq.affine_params(values.min() * share, values.max() * share, three, symmetric=False)
    errors.append(float(((eq.fake_quantize(values, *params, three) - values) ** 2).mean()))
figure = new_figure(
    6.4,
    3.0,
    f"Mean squared error against the share of the range that is kept: {errors[0]:.4f} at 1.00, "
    f"least {min(errors):.4f}; the observer chose {observer.share:.2f}.",
)
axes = figure.add_subplot()
axes.plot(shares, errors, color=PETROFF[0])
chosen = errors[round((1 - observer.share) / 0.01)]
axes.plot(observer.share, chosen, "X", color=PETROFF[1], markersize=11)
axes.set(xlabel="share of the range", ylabel="mean squared error", ylim=(0, None))
figure


# %% nbgrader={"grade": true, "grade_id": "A1-4-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded: what the observer remembers.
### BEGIN HIDDEN TESTS
def batches_of(generator):
    """Four batches with long tails."""
    sizes = torch.randint(1, 60, (4,), generator=generator).tolist()
    return [torch.randn(n, 3, generator=generator) ** 3 + 0.3 for n in sizes]


def least_error(values, integers):
    """For each share the mean squared error."""
    lo, hi = values.min(), values.max()
    errors = {}
    for i in range(81):
        share = 1 - 0.01 * i
        params = eq.affine_params(lo * share, hi * share, integers, symmetric=False)
        back = eq.fake_quantize(values, *params, integers)
        errors[share] = float(((back - values).double() ** 2).mean())
    return errors


def check_memory(cases=15, seed=14):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        integers = eq.IntRange(int(torch.randint(2, 7, (), generator=generator)), False)
        parts = batches_of(generator)
        said = f"4 batches of {[len(part) for part in parts]} rows, {integers}"
        whole, pieces = ClippingObserver(integers), ClippingObserver(integers)
        with trying(said):
            whole.update(torch.cat(parts))
            expected = whole.params()
            for part in parts:
                pieces.update(part)
                found = pieces.params()
        same(found[0], expected[0], f"scale of {said}, against all in one batch", 1e-3)
        same(found[1], expected[1], f"zero point of {said}, against all in one batch", 1e-3)


check_memory()
### END HIDDEN TESTS


# %% nbgrader={"grade": true, "grade_id": "A1-4-hidden-2", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests: the least error.
### BEGIN HIDDEN TESTS
def check_least(cases=25, seed=15):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        bits = int(torch.randint(2, 7, (), generator=generator))
        integers = eq.IntRange(bits, bool(torch.randint(2, (), generator=generator)))
        parts = batches_of(generator)
        said = f"4 batches of {[len(part) for part in parts]} rows, {integers}"
        observer = ClippingObserver(integers)
        with trying(said):
            for part in parts:
                observer.update(part.clone())
            scale, zero_point = map(torch.as_tensor, observer.params())
        values = torch.cat(parts).flatten()
        best = min(least_error(values, integers).values())
        back = eq.fake_quantize(values, scale.float(), zero_point.float(), integers)
        found = float(((back - values).double() ** 2).mean())
        assert found <= best * (1 + 1e-4), f"{said}: error {found:.6g}, {best:.6g} is possible"
        ends = values.min() * observer.share, values.max() * observer.share
        mine = eq.affine_params(*ends, integers, symmetric=False)[0]
        same(scale, mine, f"{said}: the scale of self.share = {observer.share:.2f}", 1e-4)


check_least()
### END HIDDEN TESTS


# %% nbgrader={"grade": true, "grade_id": "A1-4-hidden-3", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests: equal errors, and the last share.
### BEGIN HIDDEN TESTS
observer = ClippingObserver(eq.IntRange(3, True))
with trying("five zeros, 3 bits"):
    observer.update(torch.zeros(5))
    observer.params()
same(observer.share, 1.0, "the share for zeros, where all shares are equal")
for bits in (2, 3, 4):  # the last share is the best one
    end = 2.0**bits - 1
    said = f"{bits} bits: the scale with one value 5 times as large as the others' largest"
    observer = ClippingObserver(eq.IntRange(bits, False))
    with trying(said):
        observer.update(torch.arange(end + 1).repeat(2000))
        observer.update(torch.tensor([5 * end]))
        found = observer.params()[0]
    same(found, 1.0, said, 1e-4)
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 5: how many bits?
#
# **Difficulty:** easy · **Minutes:** 20 · **Points:** 2 (public checks 1, hidden tests 1)
#
# The signal-to-noise ratio in decibels is $10 \log_{10} \big(\sum x^2 / \sum (x' - x)^2\big)$.
# Return the smallest number of bits, an integer from 2 to 8, with which the ratio is at least `decibels`,
# with one signed symmetric scale for the whole tensor. Return `None` if 8 bits are not enough.
#
# `eq.affine_params` and `eq.fake_quantize` are allowed.
#
# <details><summary>Hint</summary>
#
# Try 2 to 8 in order and return the first that suffices. The factor is 10, not 20: the squares are
# inside the logarithm.
#
# </details>
#
# **Expected** (normally distributed values):
#
# ![Bits needed for 10,000 normal values: 2 for 0 dB, 4 for 10 dB, 5 for 20 dB, 7 for 30 dB.](figures/A1-5.png)


# %% nbgrader={"grade": false, "grade_id": "A1-5", "locked": false, "schema_version": 3, "solution": true, "task": false}
def bits_needed(x, decibels):
    """The fewest bits from 2 to 8 that reach so many decibels, or None."""
    ### BEGIN SOLUTION
    for bits in range(2, 9):
        integers = eq.IntRange(bits, True)
        params = eq.affine_params(x.min(), x.max(), integers, symmetric=True)
        noise = eq.fake_quantize(x, *params, integers) - x
        if 10 * torch.log10((x**2).sum() / (noise**2).sum()) >= decibels:
            return bits
    return None
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A1-5-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
for decibels, expected in {0: 2, 10: 4, 20: 5, 25: 6, 30: 7, 37: 8}.items():
    found = bits_needed(x, decibels)
    assert type(found) is int, f"return an integer, not {type(found).__name__}"
    assert found == expected, f"{decibels} dB for normal values: {found} bits, not {expected}"
found = bits_needed(4 + 0.5 * x, 30)
assert found == 5, f"30 dB for values around 4: {found} bits, not 5 (sums of squares, no variance)"
exact = torch.tensor([-1.5] + 97 * [1.0] + 12 * [0.25])  # 2 bits: signal 100, noise 1
found = bits_needed(exact, 20)
assert found == 2, f"exactly 20 dB is at least 20 dB: {found} bits, not 2"
assert bits_needed(x, 90) is None, "90 dB cannot be reached with 8 bits: None is expected"
print("Exercise 5: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A1-5-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
wanted = list(range(0, 41, 2))
needed = [bits_needed(x, decibels) for decibels in wanted]
figure = new_figure(
    6.4,
    2.6,
    f"Bits needed for 10,000 normal values: {needed[0]} for 0 dB, {needed[5]} for 10 dB, "
    f"{needed[10]} for 20 dB, {needed[15]} for 30 dB.",
)
axes = figure.add_subplot()
shown = [(d, b) for d, b in zip(wanted, needed) if b is not None]
axes.plot(*zip(*shown), "o", color=PETROFF[0])
axes.set(xlabel="signal to noise, dB", ylabel="bits needed", ylim=(1.5, 8.5))
figure


# %% nbgrader={"grade": true, "grade_id": "A1-5-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_bits(cases=40, seed=15):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        x = torch.randn(500, generator=generator) ** (1 + 2 * (case % 2)) + case % 3
        ratios = {}
        for bits in range(2, 9):
            integers = eq.IntRange(bits, True)
            params = eq.affine_params(x.min(), x.max(), integers, symmetric=True)
            noise = eq.fake_quantize(x, *params, integers) - x
            ratios[bits] = float(10 * torch.log10((x**2).sum() / (noise**2).sum()))
        decibels = float(60 * torch.rand((), generator=generator)) - 5
        if min(abs(ratio - decibels) for ratio in ratios.values()) < 0.01:
            continue  # too close to call
        expected = next((bits for bits, ratio in ratios.items() if ratio >= decibels), None)
        said = f"500 values from {x.min():.3f} to {x.max():.3f}, {decibels:.2f} dB"
        with trying(said):
            found = bits_needed(x.clone(), decibels)
        assert type(found) in (int, type(None)), f"{said}: {type(found).__name__}, no integer"
        assert found == expected, f"{said}: {found} bits instead of {expected}"


check_bits()
### END HIDDEN TESTS

# %% [markdown]
# ## Question 1
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. With few bits, the share of the range with the least error is far below 1; with
# many bits it comes close to 1. Why? Name the two errors, and say which of them more bits reduce.

# %% [markdown] nbgrader={"grade": true, "grade_id": "A1-6", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: names rounding (inside the range, at most half a scale) and clipping (outside it).
# - 1 point: the balance. More bits shrink the rounding error and leave the clipping error as it is, so
#   giving up the extremes for a finer scale pays less and less.
#
# Accept: "Clipping trades range for resolution; with 8 bits the resolution is fine anyway." (2)
#
# Accept: "Two errors; with more bits only the error inside gets smaller." (2)
#
# Reject: "With more bits the numbers are more precise." (0: no second error, no balance)
#
# Reject: "The outliers matter more with more bits because the scale is smaller." (1 at most: clipping is
# named, the reason is wrong)

# %% [markdown]
# ## Question 2
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. A colleague gives each *input* channel $c$ of a weight its own scale $s_c$. Write the
# output sum with it: what is lost? Name a way in which such scales can still be used.

# %% [markdown] nbgrader={"grade": true, "grade_id": "A1-7", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: $\sum_c s_c q_c k_c$ is no longer a sum of integers with one factor outside, so the
#   product cannot be computed in integers.
# - 1 point: powers of two, which are shifts, or folding $s_c$ into the layer before (its weights, or a
#   LayerNorm's).
#
# Accept: "The factor sits inside the sum; divide the previous LayerNorm's weight by it instead." (2)
#
# Reject: "It needs more memory." (0)
#
# Reject: "Each output channel then has its own scale." (0: that is the usual case)

# %% [markdown]
# ## Question 3
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. For values from $-m$ to $m$ and $b$ signed bits, this course takes the scale
# $2m / (2^b - 1)$; PyTorch usually takes $m / (2^{b-1} - 1)$. Which real values do the smallest and the
# largest integer stand for in each? What does each convention give up?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A1-8", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: here the integers stand for $-2^{b-1} s$ to $(2^{b-1} - 1) s$, half a step beyond $-m$ and half a
#   step short of $m$; with PyTorch's, $\pm (2^{b-1} - 1)$ stand for exactly $\pm m$.
# - 1 point: here the positive extreme is off by half a step (clamped), but the steps are smaller and all
#   integers are used; PyTorch's keeps both ends and leaves one of $2^b$ integers unused (a quarter of them
#   at 2 bits).
#
# Accept: "Ours clips +m by half a step; theirs wastes the code -2^(b-1)." (2)
#
# Reject: "PyTorch's is more exact." (0: which values, and at what price?)
