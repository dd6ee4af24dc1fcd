"""LandscapePanel and InfoNCEPanel without a browser: controls, bad values, cancel, errors."""

import asyncio
import math
import threading
import time
from functools import partial
from html import unescape

import ipywidgets as W
import pytest
import torch
from conftest import until
from traitlets import TraitError

from evolq_lite.fast import FastLinear
from evolq_lite.fitness import info_nce
from evolq_lite.landscape import layer_objective, noise_floor, other_ways
from evolq_lite.panels import InfoNCEPanel, LandscapePanel, Panel, base, infonce, landscape
from evolq_lite.panels.drawing import Drawing
from evolq_lite.panels.landscape import BLOCKS, FITNESS, LAYERS, LINE, PLANE, PROBE, USUAL, ZOOM

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")
SECONDS = 60  # a wait that ends earlier where all is well


@pytest.fixture(scope="module", autouse=True)
def few_images_and_points():
    """Everything as in a lesson, but small, and always computed."""
    caches = landscape.quantized, landscape.probe_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landscape, "IMAGES", 6)
        patch.setattr(landscape, "MOST_IMAGES", 12)
        patch.setattr(landscape, "POINTS", {LINE: 5, PLANE: 3, ZOOM: 5})
        patch.setattr(landscape, "FLOOR_POINTS", 2)
        for kind in (LandscapePanel, InfoNCEPanel):
            patch.setattr(kind, "shipped", False)
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    """One thread is enough for a few images."""
    torch.set_num_threads(1)


class Sketch(LandscapePanel):
    """The controls of a LandscapePanel, with a book of what it was asked for, and no picture."""

    def __init__(self, *args, **options):
        self.asked, self.hold = [], False
        super().__init__(*args, **options)

    def compute(self, tick, **values):
        self.asked.append(values)
        while self.hold:  # until it is cancelled
            time.sleep(0.005)
            tick(0.5)

    def draw(self, result, **values):
        return Drawing("A picture."), f"{values['network']} {values['block']}"


class Plain(InfoNCEPanel):
    """The controls of an InfoNCEPanel without its picture, which takes a while."""

    def compute(self, tick, **values):
        return None

    def draw(self, result, **values):
        return Drawing("A picture."), f"{values['batch']} images"


def done(panel: Panel) -> str:
    """The words of the status line when the job under way has ended."""
    panel.worker.wait_until_done(SECONDS)
    return panel.words


async def settled(panel: Panel) -> str:
    """The same inside an event loop, where a job waits for the next change before it starts."""
    end = time.monotonic() + SECONDS
    while panel.worker.timer is not None or not panel.worker.future.done():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    return panel.words


def alt(panel: Panel) -> str:
    """The alt text of the picture."""
    found = unescape(panel.view.value.split('aria-label="')[1].split('"')[0])
    assert len(found.split()) <= 40
    return found


# Every control


def moved(panel: Panel, name: str, value: object, expected: str) -> None:
    """A control gives another picture, whose alt text holds the status words."""
    view, words = panel.view.value, panel.words
    panel.controls[name].value = value
    said = done(panel)
    assert said != words and panel.view.value != view, name
    assert expected in said and alt(panel), (name, said)


def test_every_control_of_the_landscape_changes_picture_alt_text_and_words():
    panel = LandscapePanel()
    assert "ViT blocks.2.attn.qkv, W3A8, 144 scales" in panel.words
    for name, value, expected in [
        ("bits", 2, "W2A8"),
        ("bits", 8, "W8A8"),
        ("bits", 3, "W3A8"),
        ("seed", 7, "(seed 7)"),
        ("radius", 0.3, "a radius of 0.3:"),
        ("block", "blocks.0", "ViT blocks.0.attn.qkv"),
        ("layer", "mlp.fc2", "ViT blocks.0.mlp.fc2, W3A8, 48 scales"),
        ("images", PROBE, "the test loss (a probe) of"),
        ("what", PLANE, "along two random directions"),
        ("images", FITNESS, "the calibration fitness of"),
        ("network", "cnn", "CNN layer2.0.conv1, W3A8, 64 scales"),
        ("layer", "conv2", "CNN layer2.0.conv2"),
        ("what", LINE, "along a random direction"),
    ]:
        moved(panel, name, value, expected)
    assert "noise floor is" in panel.words and "Local minima: " in panel.words


def test_every_control_of_info_nce_changes_picture_alt_text_and_words():
    panel = InfoNCEPanel()
    assert panel.words.startswith("W3A8, 32 images, T = 3: infoNCE ")
    for name, value, expected in [
        ("temperature", 0.03, "T = 0.03:"),
        ("batch", 2, "W3A8, 2 images"),
        ("bits", 2, "W2A8, 2 images"),
        ("temperature", 30.0, "T = 30:"),
        ("batch", 64, "W2A8, 64 images"),
        ("bits", 8, "W8A8, 64 images"),
    ]:
        moved(panel, name, value, expected)
        assert "nan" not in alt(panel)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Sketch, "network block layer bits radius seed what images frozen floats count"),
        (Plain, "temperature batch bits"),
    ],
)
def test_every_control_has_a_name_a_tooltip_and_a_class(kind, names):
    panel = kind()
    assert list(panel.controls) == names.split()
    for name, widget in panel.controls.items():
        assert widget.description and widget.tooltip
        assert f"evolq-{name}" in widget._dom_classes
        assert getattr(widget, "continuous_update", kind.live) is kind.live


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LandscapePanel, {"layer": "attn.proj", "seed": 3}),
        (LandscapePanel, {"network": "cnn", "what": PLANE, "images": PROBE}),
        (InfoNCEPanel, {"temperature": 0.1, "batch": 9}),
    ],
)
def test_the_same_values_give_the_same_picture_and_words(kind, values):
    one, other = kind("one", **values), kind("other", **values)
    assert one.words == other.words and one.view.value == other.view.value


# Blocks and layers follow the network


@pytest.mark.parametrize("network", list(BLOCKS))
def test_all_blocks_and_layers_on_offer_exist(network):
    demo, qmodel = landscape.quantized(network, 3)
    assert USUAL[network][0] in BLOCKS[network] and USUAL[network][1] in LAYERS[network]
    for block in BLOCKS[network]:
        for layer in LAYERS[network]:
            objective = layer_objective(qmodel, block, layer, demo.calibration, demo.targets)
            assert objective.genome.names == (f"{block}.{layer}.weight_quant.scale",)
    with pytest.raises(ValueError, match="no scales to search"):
        layer_objective(qmodel, "blocks.9", "fc", demo.calibration, demo.targets)


@pytest.mark.parametrize("browser", [False, True])
def test_another_network_brings_its_blocks_and_layers_and_is_computed_once(browser):
    panel = Sketch(block="blocks.5", layer="mlp.fc1")
    for index, network in enumerate(["vit", "cnn", "vit"][1:], 1):
        panel.asked.clear()
        if browser:
            panel.controls["network"].set_state({"index": index % 2})
        else:
            panel.controls["network"].value = network
        assert done(panel) == f"{network} {USUAL[network][0]}"
        assert panel.controls["block"].options == tuple(BLOCKS[network])
        assert panel.controls["layer"].options == tuple(LAYERS[network])
        assert [(v["network"], v["block"], v["layer"]) for v in panel.asked] == [
            (network, *USUAL[network])
        ]


def test_another_network_in_an_event_loop_is_computed_once():
    async def change():
        panel = Sketch()
        panel.asked.clear()
        panel.controls["network"].value = "cnn"
        assert panel.words == "Computing …"
        return await settled(panel), panel.asked

    words, asked = asyncio.run(change())
    assert words == "cnn layer2.0" and len(asked) == 1


def test_the_network_may_change_while_another_is_computed():
    async def change():
        panel = Sketch()
        panel.asked.clear()
        panel.hold = True  # the first job would never end by itself
        panel.controls["bits"].value = 5
        while not panel.asked:
            await asyncio.sleep(0.005)
        panel.controls["network"].value = "cnn"
        panel.controls["block"].value = "layer4.0"
        panel.controls["network"].value = "vit"
        panel.controls["network"].value = "cnn"
        while len(panel.asked) < 2:
            await asyncio.sleep(0.005)
        panel.hold = False
        return await settled(panel), panel.asked

    words, asked = asyncio.run(change())
    assert words == "cnn layer2.0"
    assert [(v["network"], v["block"], v["bits"]) for v in asked] == [
        ("vit", "blocks.2", 5),
        ("cnn", "layer2.0", 5),
    ]


def test_a_real_landscape_may_be_exchanged_while_it_is_computed(monkeypatch):
    monkeypatch.setattr(landscape, "POINTS", {LINE: 7, PLANE: 60})
    panel = LandscapePanel()
    panel.controls["what"].value = PLANE
    until(lambda: 0.005 < panel.bar.value < 1)
    panel.controls["what"].value = LINE
    panel.controls["network"].value = "cnn"
    assert "CNN layer2.0.conv1" in done(panel) and "along a random direction" in panel.words


@pytest.mark.parametrize(
    "values",
    [
        {"layer": "conv2", "block": "layer4.0", "network": "cnn"},
        {"network": "cnn", "block": "layer4.0", "layer": "conv2"},
    ],
)
def test_the_order_of_arguments_does_not_matter(values):
    assert values.items() <= Sketch(**values).values.items()


@pytest.mark.parametrize(
    "values", [{"block": "layer1.0"}, {"network": "cnn", "layer": "attn.qkv"}, {"what": "cube"}]
)
def test_what_does_not_fit_the_network_is_refused_and_leaves_nothing_behind(values):
    before = set(W.widget._instances)
    with pytest.raises(ValueError, match=r"(layer1\.0|attn\.qkv|cube)'; give one of: "):
        Sketch(**values)
    assert set(W.widget._instances) == before and not Panel.alive


# Values out of range


@pytest.mark.parametrize(
    ("kind", "name", "asked", "taken"),
    [
        (Sketch, "bits", 99, 8),
        (Sketch, "bits", -1, 2),
        (Sketch, "seed", -3, 0),
        (Sketch, "seed", 10**9, 99),
        (Sketch, "radius", 0.0, 1e-5),
        (Sketch, "radius", -2.0, 1e-5),
        (Sketch, "radius", math.inf, 0.3),
        (Plain, "temperature", 0.0, 0.03),
        (Plain, "temperature", 1e9, 30.0),
        (Plain, "temperature", -math.inf, 0.03),
        (Plain, "batch", 1, 2),
        (Plain, "batch", 1000, 64),
        (Plain, "bits", 0, 2),
    ],
)
@pytest.mark.parametrize("browser", [False, True])
def test_values_are_clamped_with_a_word(kind, name, asked, taken, browser):
    panel = kind()
    if browser:
        panel.controls[name].set_state({"value": asked})
    else:
        panel.controls[name].value = asked
    said = done(panel)
    assert math.isclose(panel.values[name], taken)
    assert f"{panel.controls[name].description.lower()} {asked:g} is outside" in said
    assert said.count("; using") == 1


@pytest.mark.parametrize(("kind", "name"), [(Sketch, "radius"), (Plain, "temperature")])
@pytest.mark.parametrize("browser", [False, True])
def test_nan_leaves_a_value_as_it_is(kind, name, browser):
    panel = kind()
    before = panel.values
    if browser:
        panel.controls[name].set_state({"value": math.nan})
    else:
        panel.controls[name].value = math.nan
    assert "nan is outside" in done(panel) and panel.values == before


@pytest.mark.parametrize(
    ("kind", "name", "state"),
    [
        (Sketch, "network", {"index": 7}),
        (Sketch, "block", {"index": 6}),
        (Sketch, "bits", {"value": "three"}),
        (Sketch, "seed", {"value": None}),
        (Plain, "temperature", {"value": "warm"}),
        (Plain, "batch", {"value": math.nan}),
    ],
)
def test_what_is_no_value_is_refused_and_changes_nothing(kind, name, state):
    panel = kind()
    values = panel.values
    with pytest.raises(TraitError):
        panel.controls[name].set_state(state)
    assert panel.values == values


@pytest.mark.parametrize("temperature", [0.03, 30.0])
@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("bits", [2, 8])
def test_info_nce_has_words_at_all_its_ends(temperature, batch, bits):
    panel = Plain()
    values = {"temperature": temperature, "batch": batch, "bits": bits}
    result = InfoNCEPanel.compute(panel, lambda fraction: None, **values)
    _, words = InfoNCEPanel.draw(panel, result, **values)
    assert words.startswith(f"W{bits}A8, {batch} images") and "nan" not in words


# Cancel


def test_cancel_stops_a_landscape_soon_and_the_panel_goes_on(monkeypatch):
    monkeypatch.setattr(landscape, "POINTS", {LINE: 7, PLANE: 60})
    panel = LandscapePanel()
    view = panel.view.value
    panel.controls["what"].value = PLANE
    until(lambda: 0.005 < panel.bar.value < 1)
    assert panel.bar.layout.visibility == "visible" and not panel.cancel_button.disabled
    clicked = time.monotonic()
    panel.cancel_button.click()
    until(lambda: "Cancelled" in panel.words)
    assert time.monotonic() - clicked < 0.5
    done(panel)
    assert panel.view.value == view and panel.cancel_button.disabled
    panel.controls["what"].value = LINE
    assert "along a random direction" in done(panel)


def test_the_bar_moves_forward_to_its_end():
    panel, seen = LandscapePanel(), []
    panel.bar.observe(lambda change: seen.append(change.new), names="value")
    panel.controls["seed"].value = 5
    done(panel)
    assert seen == sorted(seen) and seen[-1] == 1.0


# Errors


@pytest.mark.parametrize(
    ("kind", "module", "cached", "control", "value"),
    [
        (LandscapePanel, landscape, "quantized", "seed", 1),
        (InfoNCEPanel, infonce, "logits", "batch", 8),
    ],
)
def test_an_error_of_the_data_is_told_and_the_panel_goes_on(
    monkeypatch, kind, module, cached, control, value
):
    def missing(*args):
        raise ValueError("<data> is missing; restore it with: git checkout -- data")

    getattr(module, cached).cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_demo", missing)
        panel = kind()
        assert panel.words == (
            "ValueError: <data> is missing; restore it with: git checkout -- data. "
            "Change a control to try again."
        )
        assert panel.view.value == "" and "<data>" not in panel.status.value
    panel.controls[control].value = value
    assert "Error" not in done(panel) and "<svg" in panel.view.value


def test_an_error_of_the_test_images_keeps_the_picture(monkeypatch):
    landscape.probe_images.cache_clear()
    panel = LandscapePanel()
    view = panel.view.value
    with monkeypatch.context() as patch:
        patch.setattr(landscape, "load_demo", lambda *args: 1 / 0)
        panel.controls["images"].value = PROBE
        assert done(panel).startswith("ZeroDivisionError") and panel.view.value == view
    panel.controls["images"].value = FITNESS
    assert "calibration fitness" in done(panel)


# Nothing is left behind, nothing is changed


@pytest.mark.parametrize("kind", [LandscapePanel, InfoNCEPanel])
def test_running_a_cell_again_leaks_nothing(kind):
    def alive() -> tuple[int, int]:
        names = [t.name for t in threading.enumerate()]
        return len(W.widget._instances), sum(n.startswith("evolq-panel") for n in names)

    before = alive()
    panel = kind(bits=3)
    first = alive()
    for _ in range(3):
        last, panel = panel, kind(bits=3)
        last.close()  # closed before: nothing happens
        until(lambda: alive() == first)
    panel.close()
    until(lambda: alive() == before)
    assert not Panel.alive


def test_other_networks_leak_no_widgets():
    panel = Sketch()
    before = len(W.widget._instances)
    for network in ("cnn", "vit", "cnn"):
        panel.controls["network"].value = network
    done(panel)
    assert len(W.widget._instances) == before


@pytest.mark.parametrize("network", list(BLOCKS))
def test_the_network_that_is_kept_stays_as_it_was(network):
    _, qmodel = landscape.quantized(network, 3)
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    integer = [m.integer for m in qmodel.modules() if isinstance(m, FastLinear)]
    LandscapePanel(network=network)
    after = qmodel.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert integer == [m.integer for m in qmodel.modules() if isinstance(m, FastLinear)]


def test_without_the_probe_no_test_image_is_read(monkeypatch):
    monkeypatch.setattr(landscape, "probe_images", lambda: 1 / 0)
    assert "calibration fitness" in LandscapePanel(network="cnn").words
    assert "probe" not in Panel.alive[0].view.value


def test_the_probe_has_images_of_many_characters(monkeypatch):
    monkeypatch.setattr(landscape, "IMAGES", 100)
    landscape.probe_images.cache_clear()
    images, labels = landscape.probe_images()
    assert images.shape == (100, 1, 28, 28) and len(labels.unique()) == 62
    landscape.probe_images.cache_clear()


# Where the jumps come from: switches and zoom


def height(panel: LandscapePanel) -> float:
    """Highest minus lowest of what a panel shows."""
    found, *_ = panel.compute(lambda fraction: None, **panel.values)
    return float(found.max() - found.min())


@pytest.mark.parametrize("network", list(BLOCKS))
def test_with_integers_frozen_and_float_activations_a_landscape_is_flat(network):
    both = {"frozen": True, "floats": True}
    as_usual, calm = (LandscapePanel("x", network=network, **v) for v in ({}, both))
    done(calm)
    assert "weights' integers frozen, activations float" in calm.words
    assert height(calm) < 0.5 * height(as_usual)


def test_more_images_are_asked_for_and_said():
    panel = LandscapePanel()
    assert "images" not in panel.words.partition(" scales")[0]
    panel.controls["count"].value = 12
    done(panel)
    assert "W3A8, 12 images" in panel.words


def test_a_zoom_shows_one_line_at_five_radii_beside_a_smooth_function():
    panel = LandscapePanel(what=ZOOM)
    done(panel)
    assert panel.view.value.count("<svg width=") == 5
    assert all(f"within {r:g} %" in panel.view.value for r in (10, 1, 0.1, 0.01, 0.001))
    assert panel.view.value.count("a smooth function</text>") == 5
    assert "from a neighbor of the first scales" in panel.words
    assert len(alt(panel).split()) <= 40


# What the pictures show


@pytest.mark.parametrize("network", list(BLOCKS))
def test_other_ways_are_the_same_objective_up_to_noise(network):
    demo, qmodel = landscape.quantized(network, 3)
    block, layer = USUAL[network]
    make = partial(
        layer_objective,
        block=block,
        layer=layer,
        images=demo.calibration,
        targets=demo.targets,
    )
    objective = make(qmodel)
    ways = other_ways(objective, make, landscape.CHUNKS[network])
    assert len(ways) == 3
    points = torch.stack([objective.start, 1.003 * objective.start])
    floor, values = noise_floor([objective, *ways], points)
    assert values.shape == (4, 2) and floor < 0.05
    assert abs(float(values[0, 0] - values[0, 1])) > 0
    assert objective.chain.model is qmodel and ways[1].chain.model is not qmodel


@pytest.mark.parametrize("temperature", [0.02, 0.3, 3.0, 10.0])
@pytest.mark.parametrize("images", [2, 33, 64])
def test_pull_and_push_are_the_gradient_and_the_mean_is_the_loss(temperature, images):
    outputs, targets = (part[:images] for part in infonce.logits(3))
    free = outputs.clone().requires_grad_()
    loss = info_nce(free, targets, temperature)
    loss.backward()
    pull, push = infonce.pull_and_push(outputs, targets, temperature)
    assert torch.allclose(pull + push, free.grad, rtol=1e-6, atol=1e-15)
    each = infonce.each_loss(outputs, targets, temperature)
    assert each.shape == (images,) and float(each.mean()) == pytest.approx(float(loss.detach()))
    share, hardest = infonce.shares(outputs, targets, temperature)
    assert 0 < share < 1 and 1 / (images - 1) <= hardest + 1e-12 <= 1 + 1e-9


def test_a_hot_loss_weighs_all_negatives_alike_and_a_cold_one_only_the_hardest():
    outputs, targets = infonce.logits(3)
    assert infonce.shares(outputs, targets, 1e6)[1] == pytest.approx(1 / 63, rel=1e-4)
    assert infonce.shares(outputs, targets, 1e-4)[1] > 0.99
    assert infonce.shares(targets, targets, 3.0)[0] == pytest.approx(1)  # nothing left to pull


def test_a_surface_turns_without_computing(monkeypatch):
    panel = LandscapePanel(what=PLANE, count=6)

    def compute(*_, **__):
        raise AssertionError("turning computes nothing")

    monkeypatch.setattr(panel, "compute", compute)
    pictures = [panel.view.value]
    for turn in (90, 200, 45):
        panel.turn.value = turn
        pictures.append(panel.view.value)
    assert len(set(pictures[:3])) == 3 and pictures[3] == pictures[0]
    maps = {picture.split("As a surface")[0].rpartition("<svg")[0] for picture in pictures}
    assert len(maps) == 1, "the map stays"
    assert not panel.turn.disabled


def test_a_line_has_nothing_to_turn():
    panel = LandscapePanel(what=LINE, count=6)
    picture = panel.view.value
    panel.turn.value = 90
    assert panel.view.value == picture and panel.turn.disabled


def test_a_stored_line_after_a_plane_has_nothing_to_turn(monkeypatch):
    panel = LandscapePanel(what=PLANE, count=6)
    monkeypatch.setattr(LandscapePanel, "shipped", True)
    monkeypatch.setattr(base, "first_view", lambda kind: ("<p>stored</p>", "Words."))
    panel.use(panel.defaults())
    panel.turn.value = 90
    assert panel.view.value == "<p>stored</p>" and panel.turn.disabled


def test_high_values_stand_above_low_ones_from_every_side():
    heights = torch.zeros(3, 3).numpy()
    heights[1, 1] = 1.0
    for turn in (0, 45, 200):
        marks = landscape.draw_surface(heights, turn).marks
        polygons = [mark for mark in marks if mark.startswith("<polygon")]
        points = [pair.split(",") for m in polygons for pair in m.split('"')[1].split()]
        peak = min(points, key=lambda point: float(point[1]))  # pixels count downwards
        others = [float(y) for x, y in points if (x, y) != tuple(peak)]
        assert float(peak[1]) < min(others)
