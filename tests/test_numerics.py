"""Lesson 1's functions against torch's own, and against arithmetic by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolq_lite.numerics import (
    IntRange,
    affine_params,
    fake_quantize,
    log2_fake_quantize,
    round_ste,
)


@st.composite
def problems(draw):
    """A tensor, an axis, bits, scales and zero points."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    integers = IntRange(draw(st.integers(2, 8)), draw(st.booleans()))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 10 ** draw(st.floats(-3, 3))
    scale = torch.rand(shape[axis], generator=g) * 10 ** draw(st.floats(-3, 2)) + 1e-6
    zero = torch.randint(integers.lo, integers.hi + 1, (shape[axis],), generator=g)
    return x, axis, integers, scale, zero


@settings(deadline=None, max_examples=300)
@given(problems())
def test_equals_torch_bit_for_bit(problem):
    x, axis, integers, scale, zero = problem
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale, zero.int(), axis, integers.lo, integers.hi
    )
    ours = fake_quantize(x, scale, zero.float(), integers, axis)
    assert torch.equal(ours, theirs)
    single = torch.fake_quantize_per_tensor_affine(
        x, scale[:1].squeeze(), zero[0].int(), integers.lo, integers.hi
    )
    assert torch.equal(fake_quantize(x, scale[0], zero[0].float(), integers), single)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_gradient_path_gives_the_same_numbers(problem):
    x, axis, integers, scale, zero = problem
    plain = fake_quantize(x, scale, zero.float(), integers, axis)
    traced = fake_quantize(x, scale.requires_grad_(), zero.float(), integers, axis)
    assert torch.allclose(traced, plain, rtol=1e-5, atol=1e-7)
    assert traced.requires_grad


def test_by_hand():
    """3 bits, signed, scale 0.5: levels -2 ... 1.5; halves go to even."""
    x = torch.tensor([-9.0, -0.25, 0.25, 0.3, 0.75, 9.0])
    expected = torch.tensor([-2.0, 0.0, 0.0, 0.5, 1.0, 1.5])
    assert torch.equal(
        fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), IntRange(3, True)), expected
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_affine_params_cover_the_range(bits, symmetric):
    integers = IntRange(bits, signed=symmetric)
    lo, hi = torch.tensor([-1.0, 0.2, -3.0, 0.0]), torch.tensor([2.0, 5.0, -1.0, 0.0])
    scale, zero = affine_params(lo, hi, integers, symmetric)
    assert (scale > 0).all()
    assert ((zero >= integers.lo) & (zero <= integers.hi) & (zero == zero.round())).all()
    ends = torch.stack([lo, hi, torch.zeros(4)], 1)
    error = (fake_quantize(ends, scale, zero, integers, axis=0) - ends).abs()
    assert (error <= 0.5001 * scale[:, None] + 0.5 * scale[:, None] * (not symmetric)).all()
    assert (error[:, 2] == 0).all(), "zero must be exact"


def test_input_is_not_written_to():
    x = torch.randn(5)
    kept = x.clone()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), IntRange(4, True))
    assert torch.equal(x, kept)


def test_round_ste_gradient_is_one():
    x = torch.tensor([0.2, 1.7], requires_grad=True)
    round_ste(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def test_scale_gradient_by_hand():
    """Inside the range d x'/d scale = round(x / s) - x / s; outside it is the end of the range."""
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([0.6, 9.0])
    out = fake_quantize(x, scale, torch.tensor(0.0), IntRange(3, True))
    inside = torch.autograd.grad(out[0], scale, retain_graph=True)[0]
    outside = torch.autograd.grad(out[1], scale)[0]
    assert inside == pytest.approx(1 - 1.2, abs=1e-6)
    assert outside == pytest.approx(3.0)


def test_log2_keeps_powers_of_two_and_drops_the_tiny():
    x = torch.tensor([1.0, 0.5, 0.25, 0.3, 2**-15.0, 2**-16.0, 0.0])
    expected = torch.tensor([1.0, 0.5, 0.25, 0.25, 2**-15.0, 0.0, 0.0])
    assert torch.equal(log2_fake_quantize(x, 4), expected)


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 4.0, "4"])
def test_bits_out_of_range(bits):
    with pytest.raises((ValueError, Exception), match=r"bits|beartype|type"):
        IntRange(bits, True)
