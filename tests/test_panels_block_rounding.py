"""BlockPanel and RoundingPanel without a browser: what they show is what the network does."""

import re
from html import unescape

import pytest
import torch

from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize, quantizers
from evolq_lite.panels import BlockPanel, Panel, RoundingPanel, block, rounding
from evolq_lite.panels.rounding import BARE, GPTQ, MINMAX, MSE

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")
SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Everything as in a lesson, but small, and always computed."""
    caches = [block.network, rounding.network, rounding.calibrated, rounding.float_outputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "IMAGES", 20)
        patch.setattr(block, "HEARD", 4)
        patch.setattr(rounding, "IMAGES", 24)
        patch.setattr(rounding, "HELD_OUT", 40)
        patch.setattr(RoundingPanel, "shipped", False)
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    """One thread is enough for a few images."""
    torch.set_num_threads(1)


def done(panel: Panel) -> tuple[str, str]:
    """The words and the alt text when the panel has answered."""
    panel.worker.wait_until_done(SECONDS)
    alt = unescape(panel.view.value.split('aria-label="')[1].split('"')[0])
    assert len(alt.split()) <= 40
    return panel.words, alt


# BlockPanel


@torch.no_grad()
def test_the_error_of_a_point_is_that_of_its_own_rounding():
    config = QuantConfig(weight_bits=3, act_bits=8, execution="plain")
    errors = block.point_errors(config, lambda fraction: None)
    demo = block.network()
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration)
    layer = qmodel.blocks[1].mlp.fc1
    lost = layer.weight_quant(layer.weight) - layer.weight
    expected = float(lost.norm() / layer.weight.norm())
    assert errors["blocks.1.mlp.fc1.weight_quant"] == pytest.approx(expected, rel=1e-5)
    assert errors.keys() == quantizers(qmodel).keys()
    assert all(0 < error < 1 for error in errors.values())


def test_every_point_of_a_block_has_its_dot_and_its_number():
    panel = BlockPanel()
    words, alt = done(panel)
    result = panel.compute(lambda fraction: None, **panel.values)
    names = [name for name in result if name.startswith("blocks.2.")]
    assert {f"blocks.2.{name}" for name in block.POINTS} == set(names)
    assert panel.view.value.count(' r="9" ') == len(names) == 15
    for name in names:
        assert f"{100 * result[name]:.2g} %" in panel.view.value
    assert "15 points" in words and "W3A8, block 2" in alt


@pytest.mark.parametrize(
    ("name", "value"),
    [("block", 0), ("weight_bits", 8), ("act_bits", 4), ("weight_observer", "mse"),
     ("sums", "tensor")],
)  # fmt: skip
def test_every_control_of_the_block_changes_picture_and_words(name, value):
    panel = BlockPanel()
    before = done(panel)[0], panel.view.value
    panel.controls[name].value = value
    done(panel)
    assert panel.view.value != before[1]


def test_a_color_says_more_error_the_brighter_it_is():
    def brightness(error: float) -> int:
        color = block.color_of(error)
        return sum(int(color[i : i + 2], 16) for i in (1, 3, 5))

    values = [brightness(error) for error in (0, 1e-3, 1e-2, 0.1, 1.0)]
    assert values[0] == values[1] and values[1:] == sorted(set(values[1:]))
    assert brightness(7.0) == values[-1]


# RoundingPanel


def test_gptq_moves_integers_and_nearest_moves_none():
    panel = RoundingPanel(rounding=MINMAX)
    words, _ = done(panel)
    assert "0% of the weights do not become the nearest integer" in words
    panel.controls["rounding"].value = GPTQ
    words, alt = done(panel)
    moved = re.search(r"(\d+)% of the weights do not become", words)
    assert moved and 5 < int(moved[1]) < 95
    assert "to nearest with MinMax" in alt
    assert "became another" in panel.view.value


@pytest.mark.parametrize("name", [MINMAX, MSE, BARE, GPTQ])
def test_integers_fit_the_bits_and_errors_are_those_of_the_network(name):
    look = rounding.look(3, name, lambda fraction: None)
    assert look.errors.keys() == look.integers.keys() == set(rounding.LAYERS)
    assert all(q.min() >= -4 and q.max() <= 3 for q in look.integers.values())
    assert look.same.images == 40 and look.divergence > 0
    assert all(0 < error < 1 for error in look.errors.values())


def test_another_layer_costs_nothing_and_shows_other_integers(monkeypatch):
    panel = RoundingPanel()
    done(panel)
    before = panel.view.value
    monkeypatch.setattr(rounding, "look", lambda *args: 1 / 0)
    panel.controls["layer"].value = "blocks.0.attn.qkv"
    words, _ = done(panel)
    assert "in blocks.0.attn.qkv" in words and panel.view.value != before


def test_all_roundings_that_were_tried_at_these_bits_are_compared():
    panel = RoundingPanel(rounding=MSE)
    done(panel)
    panel.controls["rounding"].value = GPTQ
    done(panel)
    for name in (MINMAX, MSE, GPTQ):
        assert f">{name}</text>" in panel.view.value
    panel.controls["bits"].value = 4
    done(panel)
    assert f">{MSE}</text>" not in panel.view.value


def test_the_float_network_is_left_as_it_was():
    demo, _, _ = rounding.network()
    before = {name: value.clone() for name, value in demo.model.state_dict().items()}
    done(RoundingPanel(bits=3))
    assert all(torch.equal(before[name], value) for name, value in demo.model.state_dict().items())
