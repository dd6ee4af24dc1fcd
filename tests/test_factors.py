"""Factors for the channels of GELU's output: another network on paper, the same in numbers."""

import pytest
import torch
from conftest import toy, toy_images
from timm.layers import Mlp

from evolq_lite import QuantConfig, calibrate, quantize, set_execution
from evolq_lite.convert import factors_of, pass_floats
from evolq_lite.fitness import mse
from evolq_lite.layers import ChannelFactors
from evolq_lite.rounding import round_weights


def factored(name="vit", images=None, execution="simulate", **options):
    config = QuantConfig(8, 8, gelu_factors=True, execution=execution, **options)
    qmodel = quantize(toy(name), config)
    calibrate(qmodel, toy_images(name) if images is None else images)
    return qmodel


def with_outliers():
    """A ViT of which a few hidden channels are a hundred times as large as the others."""
    model = toy("vit")
    for module in model.modules():
        if isinstance(module, Mlp):
            with torch.no_grad():
                module.fc1.bias[:3] = torch.tensor([60.0, 80.0, 100.0])
                module.fc2.weight[:, :3] *= 0.01
    return model


def test_float_numbers_stay_bit_for_bit():
    x, qmodel = toy_images("vit"), factored()
    plain = quantize(toy("vit"), QuantConfig(8, 8, execution="simulate"))
    calibrate(plain, x)
    factors = torch.cat(list(factors_of(qmodel).values()))
    assert factors.unique().numel() > 2 and torch.equal(factors.log2(), factors.log2().round())
    with torch.no_grad(), pass_floats(qmodel), pass_floats(plain):
        assert torch.equal(qmodel(x), plain(x))


def test_calibrating_again_begins_with_the_float_weights():
    x, qmodel = toy_images("vit"), factored(images=5 * toy_images("vit", 3))
    calibrate(qmodel, x)
    with torch.no_grad():
        assert torch.equal(qmodel(x), factored(images=x)(x))


def test_outliers_cost_less():
    model, x = with_outliers(), toy_images("vit", 16)
    errors = {}
    with torch.no_grad():
        for on in (False, True):
            qmodel = quantize(model, QuantConfig(8, 8, gelu_factors=on))
            calibrate(qmodel, x)
            errors[on] = float(mse(qmodel(x), model(x)))
    assert errors[True] < 0.5 * errors[False]


def test_every_execution_computes_the_same():
    x, qmodel = toy_images("vit"), factored(execution="plain")
    with torch.no_grad():
        plain = qmodel(x)
        set_execution(qmodel, "simulate")
        assert torch.equal(qmodel(x), plain)
        set_execution(qmodel, "auto")
        torch.testing.assert_close(qmodel(x), plain, rtol=0.05, atol=0.05)


def test_rounding_sees_the_multiplied_weights():
    x, qmodel = toy_images("vit", 24), factored(weight_observer="mse")
    events = list(round_weights(qmodel, x))
    assert all(event.after <= event.before * (1 + 1e-9) for event in events)
    calibrate(qmodel, x)
    with torch.no_grad():
        assert torch.equal(qmodel(x), factored(images=x, weight_observer="mse")(x))


@pytest.mark.parametrize("name", ["resnet", "levit"])
def test_networks_without_gelu_are_as_before(name):
    assert not factors_of(factored(name))


def test_silent_channels_have_factor_one():
    factors = ChannelFactors(3)
    factors.seen = []
    factors(torch.tensor([[0.0, 1.0, -4.0]]))
    assert factors.even_out(1.0).tolist() == [1, 1, 4]
    assert factors.even_out(0.5).tolist() == [1, 1, 2]
    assert factors.even_out(0.0).tolist() == [1, 1, 1]
    factors.seen = [torch.zeros(2, 3)]
    assert factors.even_out(1.0).tolist() == [1, 1, 1]
