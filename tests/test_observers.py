"""What each observer promises."""

import pytest

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import timm
import torch

from evolq_lite import observers
from evolq_lite.numerics import IntRange, fake_quantize
from evolq_lite.observers import MeanSquaredError, MinMax, MovingAverage, Percentile, PowerOfTwo


def heavy(seed: int = 0) -> torch.Tensor:
    """Weights with outliers, (channels, values)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 400, generator=g) ** 3 * torch.logspace(-1, 1, 16)[:, None]


def error(observer, x, axis=0):
    """Squared error per channel after quantizing with the observer's parameters."""
    observer.update(x)
    scale, zero = observer.params()
    return (fake_quantize(x, scale, zero, observer.integers, axis) - x).square().mean(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_is_never_worse_than_minmax_in_any_channel(bits, symmetric):
    integers = IntRange(bits, signed=symmetric)
    best = error(MeanSquaredError(integers, 0, symmetric), heavy())
    plain = error(MinMax(integers, 0, symmetric), heavy())
    assert (best <= plain).all()
    assert bits == 8 or (best < plain).any()


def test_minmax_remembers_all_batches_and_moving_average_mostly_the_past():
    integers = IntRange(8, False)
    minmax, moving = MinMax(integers), MovingAverage(integers)
    for top in (1.0, 11.0):
        for observer in (minmax, moving):
            observer.update(torch.tensor([0.0, top]))
    assert minmax.params()[0] == pytest.approx(11 / 255)
    assert moving.params()[0] == pytest.approx(2 / 255)


def test_percentile_ignores_an_outlier():
    x = torch.rand(100_000)
    x[0] = 1e6
    observer = Percentile(IntRange(8, False))
    observer.update(x)
    assert observer.params()[0] < 2 / 255


def test_power_of_two_factors():
    x = torch.randn(1000, 4) * torch.tensor([0.1, 0.3, 1.0, 3.0])
    observer = PowerOfTwo(IntRange(8, False), axis=-1)
    observer.update(x)
    scale, zero = observer.params()
    assert set((scale / scale.max()).log2().tolist()) <= {0.0, -1.0, -2.0, -3.0}
    assert scale[0] < scale[3] and zero.unique().numel() == 1
    one = MinMax(IntRange(8, False))
    one.update(x)
    ours = (fake_quantize(x, scale, zero, observer.integers, -1) - x).square().mean(0)
    theirs = (fake_quantize(x, *one.params(), one.integers) - x).square().mean(0)
    assert (ours <= theirs + 1e-12).all() and ours[0] < theirs[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        MinMax(IntRange(8, False)).update(torch.tensor([1.0, bad]))


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="seen no data"):
        MinMax(IntRange(8, False)).params()


def test_samples_stay_few_however_much_is_seen(monkeypatch):
    """Thinned evenly: every batch keeps its share, and the percentile stays close."""
    monkeypatch.setattr(observers, "SAMPLES", 1000)
    torch.manual_seed(0)
    seen = torch.randn(20, 3, 400)
    for axis, rows in ((0, 3), (None, 1)):
        observer = observers.MeanSquaredError(IntRange(8, True), axis, True)
        for x in seen:
            observer.update(x)
        assert sum(part.numel() for part in observer.samples) <= 1000
        assert len(observer.samples) == 20 and observer.samples[0].shape[0] == rows
        assert len({part.shape for part in observer.samples}) == 1
        lo, hi = observer.range()
        assert (hi > 2).all() and (lo < -2).all()
    single = observers.PowerOfTwo(IntRange(8, False), 0)
    single.update(torch.rand(2000, 5))  # more channels than samples: one value of each stays
    assert single.samples[0].shape == (2000, 1)


@pytest.mark.parametrize("channel", [0, 1, 7])
@pytest.mark.parametrize("kind", [Percentile, MeanSquaredError])
def test_samples_are_of_all_channels(monkeypatch, kind, channel):
    """Channels lie side by side in memory: taking one value in 2^k would miss most of them."""
    monkeypatch.setattr(observers, "SAMPLES", 2**12)
    x = torch.randn(2000, 48, generator=torch.Generator().manual_seed(0))
    x[:, channel] *= 50
    observer = kind(IntRange(8, signed=False))
    for part in x.split(500):
        observer.update(part)
    lo, hi = observer.range()
    assert lo < -20 and hi > 20


def test_weights_are_seen_once(monkeypatch):
    """The same weights in every batch would crowd out each other's samples."""
    monkeypatch.setattr(observers, "SAMPLES", 2**12)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2
    )
    config = eq.QuantConfig(weight_bits=4, weight_observer="mse")
    few, many = eq.quantize(model, config), eq.quantize(model, config)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    eq.calibrate(few, x, config)
    eq.calibrate(many, x.repeat(10, 1, 1, 1), config, batch=2)
    for (name, one), two in zip(few.named_buffers(), many.buffers(), strict=True):
        if "weight_quant" in name:
            assert torch.equal(one, two), name
