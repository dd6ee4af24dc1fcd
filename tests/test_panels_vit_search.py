"""ViTPanel and SearchPanel without a browser: controls, bad values, pause, cancel, resume."""

import contextlib
import json
import re
import threading
import time
from dataclasses import asdict
from html import unescape

import pytest
import torch
from conftest import until

from evolq_lite import QuantConfig, SearchConfig
from evolq_lite.cli import main
from evolq_lite.panels import Panel, SearchPanel, ViTPanel
from evolq_lite.panels import search as module
from evolq_lite.panels.drawing import BLUE, GRAY, ORANGE
from evolq_lite.panels.search import draw_bits

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")
SECONDS = 120  # a wait that ends earlier where all is well
LONG = {"passes": 20, "population": 1}


@pytest.fixture(autouse=True)
def pictures_come_often(monkeypatch):
    """A search draws more often than an eye needs."""
    monkeypatch.setattr(module, "DRAW_EVERY", 0.1)


def history(panel):
    """The lines of the run folder."""
    path = panel.out / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def search_panel(tmp_path, **values):
    """A panel with few images, whose run is long enough to be stopped."""
    return SearchPanel(out=tmp_path / "run", images=20, **{**LONG, **values})


def running(tmp_path, **values):
    """A panel that has evaluated some candidates, and goes on."""
    panel = search_panel(tmp_path, **values)
    panel.run_button.click()
    until(lambda: len(history(panel)) > 8 and "evaluations, blocks." in panel.words)
    return panel


def cancelled(panel):
    """Press Cancel and wait; returns the words."""
    panel.cancel_button.click()
    panel.worker.wait_until_done(SECONDS)
    return panel.words


# ViTPanel


@pytest.fixture(scope="module")
def few_images():
    """A tenth of the test subset, so that a picture is there in a second."""
    demo, trace, images, labels, found = ViTPanel.compute.__globals__["network"]()
    with pytest.MonkeyPatch.context() as patch:
        small = demo, trace, images[::10], labels[::10], found[::10]
        patch.setitem(ViTPanel.compute.__globals__, "network", lambda: small)
        yield


def settled(panel):
    """The words and alt text when the panel has answered."""
    panel.worker.wait_until_done(SECONDS)
    return panel.words, unescape(panel.view.value.split('aria-label="')[1].split('"')[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_bits", 2), ("act_bits", 4), ("weight_observer", "mse"), ("sums", "channel"),
     ("log2_attention", True)],
)  # fmt: skip
def test_every_control_of_the_vit_changes_picture_and_alt_text(few_images, name, value):
    panel = ViTPanel(act_bits=7)  # not the stored view
    _, alt = settled(panel)
    before = panel.view.value
    assert panel.values[name] != value
    panel.controls[name].value = value
    words, after = settled(panel)
    assert panel.view.value != before and after != alt and len(after.split()) <= 40
    assert "top-1" in words and "difference" in words


@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [("weight_bits", 1, 2), ("weight_bits", 99, 8), ("act_bits", 0, 3), ("act_bits", 10**9, 8)],
)
def test_bits_out_of_range_are_clamped_with_a_word(few_images, name, asked, taken):
    panel = ViTPanel(**{name: asked})
    words, _ = settled(panel)
    assert panel.values[name] == taken
    assert f"{asked:g} is outside" in words and f"using {taken:g}" in words


# SearchPanel


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_bits", 4), ("act_bits", 6), ("population", 7), ("passes", 3), ("cycles", 2),
     ("step", 1e-4), ("fitness", "mse"), ("seed", 5), ("search", "both")],
)  # fmt: skip
def test_every_control_of_the_search_reaches_its_option(tmp_path, name, value):
    panel = SearchPanel(out=tmp_path / "run")
    panel.controls[name].value = value
    quant, search = panel.options()
    assert getattr(quant if hasattr(quant, name) else search, name) == pytest.approx(value)
    assert "Press Run to search with these options." in panel.words
    assert not panel.out.exists()


@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [("population", 0, 1), ("population", 10**6, 40), ("passes", -3, 1), ("weight_bits", 1, 2),
     ("step", 7.0, 0.1)],
)  # fmt: skip
def test_options_out_of_range_are_clamped_with_a_word(tmp_path, name, asked, taken):
    panel = SearchPanel(out=tmp_path / "run", **{name: asked})
    assert panel.values[name] == pytest.approx(taken) and f"{taken:g}" in panel.words


@pytest.mark.parametrize(
    ("search", "idle"),
    [
        ("scales", {"mean_bits", "evaluations"}),
        ("bits", {"weight_bits", "passes", "cycles", "step"}),
        ("both", {"weight_bits"}),
    ],
)
def test_options_without_effect_on_the_chosen_search_are_disabled_and_left_out(
    tmp_path, search, idle
):
    moved = {"weight_bits": 5, "passes": 3, "cycles": 2, "step": 1e-2, "mean_bits": 3.3}
    panel = SearchPanel(out=tmp_path / "run", evaluations=9, **moved)
    panel.controls["search"].value = search
    assert {key for key, widget in panel.controls.items() if widget.disabled} == idle
    quant, found = panel.options()
    usual = {**asdict(QuantConfig(weight_bits=3)), **asdict(SearchConfig())}
    taken = {**asdict(quant), **asdict(found)}
    assert found.search == search
    for key, value in {**moved, "evaluations": 9}.items():
        assert taken[key] == (usual[key] if key in idle else pytest.approx(value)), key
    panel.busy(True)
    assert all(widget.disabled for widget in panel.controls.values())
    panel.busy(False)
    assert {key for key, widget in panel.controls.items() if widget.disabled} == idle


def test_while_a_run_is_under_way_no_button_changes_its_options(tmp_path):
    panel = search_panel(tmp_path)
    buttons = [panel.run_button, panel.resume_button, panel.reset_button, *panel.preset_buttons]
    assert len(buttons) == 3 + len(panel.presets) > 3
    for yes in (True, False):
        panel.busy(yes)
        assert all(button.disabled is yes for button in buttons)


def test_bits_are_drawn_layer_by_layer():
    before = {"patch_embed.proj": 4, "blocks.0.attn.qkv": 2, "blocks.0.mlp.fc1": 3}
    after = {"patch_embed.proj": 3, "blocks.0.attn.qkv": 4, "blocks.0.mlp.fc1": 3}
    drawn = str(draw_bits(before, after))
    for name, bits in before.items():
        assert f"<title>{name}: {bits} before, {after[name]} evolved</title>" in drawn
    colors = {ORANGE: "blocks.0.attn.qkv", BLUE: "patch_embed.proj", GRAY: "blocks.0.mlp.fc1"}
    for color, name in colors.items():
        (rest,) = re.findall(f'fill="{color}" fill-opacity="0.9"><title>([^:]*):', drawn)
        assert rest == name
    tall = {
        name: float(height)
        for height, name in re.findall(r'height="([\d.]+)"[^>]*><title>([^:]*):', drawn)
    }
    assert tall["blocks.0.attn.qkv"] > tall["patch_embed.proj"] == tall["blocks.0.mlp.fc1"]
    assert ">patch_embed<" in drawn and ">0<" in drawn


def test_a_whole_search_of_bits_shows_what_it_chose_and_resumes_with_its_options(tmp_path):
    panel = SearchPanel(out=tmp_path / "run", images=20, search="bits", evaluations=4)
    panel.run_button.click()
    panel.worker.wait_until_done(10 * SECONDS)
    assert "W2.5A8, 5 evaluations" in panel.words and "Gain" in panel.words
    alt = unescape(panel.view.value.split('aria-label="')[1].split('"')[0])
    assert re.search(r"Bits: \d in \S+, 2 in \S+; \d+ went up, \d+ down\.$", alt)
    assert len(alt.split()) <= 40 and panel.view.value.count("<svg width=") == 3
    panel.controls["mean_bits"].value = 3.0
    panel.controls["passes"].value = 2  # of no effect on bits
    panel.resume_button.click()
    assert "has other options (Mean bits 2.5). Press Resume again" in panel.words


def test_a_pause_holds_the_search_and_is_no_part_of_its_time(tmp_path):
    panel = running(tmp_path)
    panel.pause_button.click()
    time.sleep(0.5)
    stood = len(history(panel))
    time.sleep(5)
    assert len(history(panel)) == stood and panel.words.startswith("Paused.")
    paused = panel.words
    panel.resume_button.click()
    assert not panel.words.startswith("Paused.") and panel.words  # at once
    until(lambda: len(history(panel)) > stood + 3)
    assert re.search(r"evaluations, blocks.\d; \d+% accepted; .* about \d+ s left\.", paused)
    assert max(line["seconds"] for line in history(panel)[stood - 1 :]) < 5
    assert cancelled(panel).startswith("Cancelled. Resume continues the run in")


def test_a_paused_search_can_be_cancelled(tmp_path):
    panel = running(tmp_path)
    panel.pause_button.click()
    assert cancelled(panel).startswith("Cancelled.")
    assert not panel.run_button.disabled and panel.pause_button.disabled


def test_a_cancelled_search_goes_on_where_it_was(tmp_path):
    panel = running(tmp_path)
    cancelled(panel)
    kept = history(panel)
    panel.resume_button.click()
    until(lambda: len(history(panel)) > len(kept) + 3)
    cancelled(panel)
    assert kept and history(panel)[: len(kept)] == kept


def test_a_cancelled_search_goes_on_on_the_command_line(tmp_path):
    """With the options as the sliders show them, the width rounded as it reads."""
    panel = running(tmp_path, passes=2, step=0.00123456)
    cancelled(panel)
    kept = history(panel)
    options = "--calibration-images 20 --batch 20 --passes 2 --population 1 --step 0.0012"
    threads = f"--threads {torch.get_num_threads()}"
    command = f"demo --resume --out {panel.out} {options} {threads}"
    assert main(command.split()) == 0
    assert len(history(panel)) == 37 and history(panel)[: len(kept)] == kept
    assert (panel.out / "summary.json").is_file()


def test_resume_without_a_run_says_what_to_press(tmp_path):
    panel = search_panel(tmp_path)
    panel.resume_button.click()
    panel.worker.wait_until_done(SECONDS)
    assert "contains no run to resume; press Run" in panel.words


def test_run_right_after_the_cell_was_run_again_waits_for_the_folder(tmp_path):
    running(tmp_path)
    other = search_panel(tmp_path)  # closes the first, whose thread may hold the folder still
    other.run_button.click()
    other.run_button.click()
    until(lambda: len(history(other)) > 2 and "evaluations, blocks." in other.words)
    assert cancelled(other).startswith("Cancelled.")


@pytest.mark.parametrize("name", ["weight_bits", "population", "step", "seed"])
@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), -1e300, "<b>7</b>", None, [3]])
def test_what_a_browser_may_send_leaves_good_options(tmp_path, name, hostile):
    panel = SearchPanel(out=tmp_path / "run")
    with contextlib.suppress(Exception):  # as a message that ipywidgets refuses
        panel.controls[name].set_state({"value": hostile})
    quant, search = panel.options()
    assert quant.weight_bits in range(2, 9) and 1e-5 <= search.step <= 0.1


def test_the_second_of_two_clicks_on_run_takes_the_place_of_the_first(tmp_path):
    panel = search_panel(tmp_path)
    panel.run_button.click()
    panel.start(resume=False)  # a click that came before the button was seen to be disabled
    until(lambda: len(history(panel)) > 2)
    assert cancelled(panel).startswith("Cancelled.")
    assert len(history(panel)) < 200  # of 361, neither run went on to its end


def test_cancel_before_the_run_began_promises_no_resume(tmp_path, monkeypatch):
    panel = running(tmp_path)
    cancelled(panel)
    kept, gate, real = history(panel), threading.Event(), module.load

    def slow(*arguments):
        gate.wait(SECONDS)
        return real(*arguments)

    monkeypatch.setattr(module, "load", slow)
    panel.controls["weight_bits"].value = 4
    panel.run_button.click()
    panel.run_button.click()
    panel.cancel_button.click()
    gate.set()
    panel.worker.wait_until_done(SECONDS)
    assert panel.words == "Cancelled before the run started." and history(panel) == kept


def test_resume_with_other_options_brings_those_of_the_run_back_when_pressed_again(tmp_path):
    panel = running(tmp_path)
    cancelled(panel)
    kept = history(panel)
    panel.controls["weight_bits"].value = 4
    panel.resume_button.click()
    assert "has other options (Weight bits 3). Press Resume again" in panel.words
    assert history(panel) == kept and panel.values["weight_bits"] == 4
    panel.resume_button.click()
    until(lambda: len(history(panel)) > len(kept))
    assert panel.values["weight_bits"] == 3
    assert cancelled(panel).startswith("Cancelled.")
    assert history(panel)[: len(kept)] == kept


def test_run_asks_before_it_replaces_a_run(tmp_path):
    panel = running(tmp_path)
    cancelled(panel)
    kept = history(panel)
    panel.run_button.click()
    assert "an unfinished run, which Resume continues. Press Run again to replace" in panel.words
    panel.controls["population"].value = 2  # another thought
    panel.run_button.click()
    assert "Press Run again" in panel.words and history(panel) == kept
    panel.run_button.click()
    until(lambda: history(panel)[:1] and history(panel) != kept and len(history(panel)) < len(kept))
    assert cancelled(panel).startswith("Cancelled.")


def test_an_error_is_words_and_the_panel_goes_on(tmp_path, monkeypatch):
    panel = search_panel(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load", lambda *a: (_ for _ in ()).throw(OSError("<disk>")))
        panel.run_button.click()
        panel.worker.wait_until_done(SECONDS)
    assert "<disk>" in panel.words and "&lt;disk&gt;" in panel.status.value
    panel.run_button.click()
    until(lambda: len(history(panel)) > 2)
    assert cancelled(panel).startswith("Cancelled.")


def test_closing_stops_the_search_and_frees_the_folder(tmp_path):
    panel = running(tmp_path)
    panel.close()
    panel.worker.pool.shutdown(wait=True)
    other = search_panel(tmp_path)  # the same cell again: it may use the folder
    other.run_button.click()
    other.run_button.click()
    until(lambda: len(history(other)) > 2 and "evaluations, blocks." in other.words)
    assert cancelled(other).startswith("Cancelled.")
    assert Panel.alive == [other]


def test_a_whole_search_ends_with_gain_picture_and_summary(tmp_path):
    panel = search_panel(tmp_path, passes=1, cycles=1)
    panel.run_button.click()
    panel.worker.wait_until_done(10 * SECONDS)
    assert "7 evaluations" in panel.words and "Gain" in panel.words and "float" in panel.words
    assert panel.view.value.count("<svg width=") == 2
    assert json.loads((panel.out / "summary.json").read_text())["images"] == 9920
    offered = [value for _, value in panel.character.options if value is not None]
    assert offered and panel.character.layout.display == "" and panel.detail.value == ""
    panel.character.value = offered[0]
    assert panel.detail.value.count("<svg width=") == 4  # the character, and three networks
    alt = unescape(panel.detail.value.split('aria-label="')[1].split('"')[0])
    assert re.fullmatch(
        r"Character ., now (right|wrong)\. Likeliest label: float . \d+%, before . \d+%, "
        r"evolved . \d+%\.",
        alt,
    )
    right = "now right" in alt
    character, evolved = alt[len("Character ")], alt.split("evolved ")[1][0]
    assert right == (character == evolved)
    panel.character.value = None
    assert panel.detail.value == ""
