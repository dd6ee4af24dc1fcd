"""Lesson 0's panel: what is stored is what networks read, and the slider shows it at once."""

import json
from html import unescape

import pytest
import torch

from evolq_lite.config import DEMO_IMAGES, QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import load_demo
from evolq_lite.panels import ReadingPanel, reading

pytestmark = pytest.mark.usefixtures("no_silent_callbacks", "panels_are_closed")


@torch.no_grad()
def test_the_stored_labels_are_those_of_the_networks():
    """Other kernels have other last digits: a label may differ."""
    demo = load_demo("vit", DEMO_IMAGES)
    images = demo.test[0][reading.SHOWN]
    qmodel = quantize(demo.model, QuantConfig(weight_bits=3, act_bits=8))
    calibrate(qmodel, demo.calibration)
    for name, model in (("float", demo.model), ("3", qmodel)):
        found = reading.spell(model(images).argmax(1))
        stored = reading.readings()["read"][name]
        assert sum(map(str.__eq__, found, stored)) >= reading.COUNT - 3, name


def test_the_characters_are_all_different_and_their_labels_known():
    image, truth = reading.shown()
    assert len(set(truth)) == reading.COUNT
    assert image.startswith("data:image/png") and len(image) < 60_000  # sent with every answer


def test_every_bit_width_has_its_labels_alt_text_and_words():
    panel, seen = ReadingPanel(), set()
    stored = reading.readings()
    for bits in reading.BITS:
        panel.controls["bits"].value = bits
        panel.worker.wait_until_done(30)
        alt = unescape(panel.view.value.split('aria-label="')[1].split('"')[0])
        assert f"{bits} bits: " in panel.words
        assert f"{stored['top1'][str(bits)]:.1f} % right" in panel.words
        assert len(alt.split()) <= 40 and panel.view.value.count("<image ") == 1
        wrong = panel.view.value.count(" → ")
        _, truth = reading.shown()
        assert wrong == sum(map(str.__ne__, stored["read"][str(bits)], truth))
        seen.add(panel.view.value)
    assert len(seen) == len(reading.BITS)


def test_a_wrong_label_is_marked_by_words_and_by_whose_fault_it_is():
    assert reading.judge("O", "O", "O") == ("O", "")
    assert reading.judge("0", "O", "O") == ("O → 0", reading.FLIPPED)
    assert reading.judge("0", "0", "O") == ("O → 0", reading.BEFORE)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"read": {"float": "ABC"}}'])
def test_a_damaged_file_is_said_in_the_status_line(tmp_path, monkeypatch, text):
    path = tmp_path / "readings.json"
    path.write_text(text)
    monkeypatch.setattr(reading, "STORED", path)
    reading.readings.cache_clear()
    panel = ReadingPanel()
    assert "restore it with: git checkout -- data" in panel.words
    reading.readings.cache_clear()


def test_storing_writes_a_small_file_that_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "STORED", tmp_path / "readings.json")
    monkeypatch.setattr(reading, "compute_readings", lambda: {"top1": {"2": 1.5}})
    assert "1.5" in reading.store_readings()
    assert json.loads((tmp_path / "readings.json").read_text()) == {"top1": {"2": 1.5}}
