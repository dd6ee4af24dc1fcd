"""The embedded data and networks are what data/README.md says."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from evolq_lite import accuracy, load_demo, predict
from evolq_lite.data import (
    CHARACTERS,
    DATA,
    load_images,
    read_typefaces,
    subset,
    transform_of,
)
from evolq_lite.folders import label_images, list_folder

FLOAT_TOP1 = {"vit": 0.84, "cnn": 0.86}


def test_parts_have_the_promised_size_and_balance():
    train, test = read_typefaces("train"), read_typefaces("test")
    assert len(train.labels) >= 50_000 and len(test.labels) >= 9_000
    for part in (train, test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (1, 28, 28)
        assert len(part.labels.bincount().unique()) == 1 and part.labels.max() == 61
        assert (part.images.amax((1, 2, 3)) >= 100).all()
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 62


def test_test_typefaces_are_not_in_training():
    """No group, family or identical drawing is on both sides; confusable glyphs may coincide."""
    train, test = read_typefaces("train"), read_typefaces("test")
    assert not set(train.groups.tolist()) & set(test.groups.tolist())
    rows = list(csv.DictReader(io.StringIO((DATA / "typefaces.csv").read_text())))
    families = {
        part: {r["family"] for r in rows if r["split"] == part} for part in ("train", "test")
    }
    assert not families["train"] & families["test"]
    assert all(r["licence"] and r["package"].startswith("fonts-") for r in rows)
    counts = {part: sum(r["split"] == part for r in rows) for part in families}
    assert counts == {"train": len(train.labels) // 62, "test": len(test.labels) // 62}
    faces = {face.numpy().tobytes() for face in train.images.view(-1, 62 * 784)}
    assert not any(face.numpy().tobytes() in faces for face in test.images.view(-1, 62 * 784))


def test_files_are_small_and_need_no_pickle():
    files = [*DATA.glob("*.npz"), *DATA.glob("*.safetensors")]
    assert all(file.stat().st_size < 8e6 for file in files)
    for file in DATA.glob("*.npz"):
        with np.load(file, allow_pickle=False) as arrays:
            assert all(arrays[key].dtype != object for key in arrays)
    for file in DATA.glob("*.safetensors"):
        assert file.stat().st_size <= 6e6


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT_TOP1)
def test_float_networks_reach_the_promised_top1_on_unseen_typefaces(name):
    demo = load_demo(name, calibration=2)
    images, labels = demo.test
    assert (
        accuracy(predict({"float": demo.model}, images.split(248))["float"], labels).top1
        >= (FLOAT_TOP1[name])
    )


def test_calibration_subset_depends_on_seed_only():
    one, two, three = (load_demo("cnn", 20, seed) for seed in (1, 1, 2))
    assert torch.equal(one.calibration, two.calibration)
    assert not torch.equal(one.calibration, three.calibration)
    assert torch.equal(one.targets, two.targets)
    assert len(set(subset(100, 100, 0).tolist())) == 100


def test_teacher_is_timms_own_float_network():
    demo = load_demo("vit", 6)
    with torch.no_grad():
        assert torch.equal(demo.targets, demo.model(demo.calibration))
    assert type(demo.model).__module__.startswith("timm.")
    assert all(type(m).__module__.startswith(("timm.", "torch.")) for m in demo.model.modules())


def test_image_folders_use_timms_transform_and_class_map(tmp_path):
    for name in ("n02", "n07"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (300, 260), (255, 0, 0)).save(tmp_path / name / "a.png")
    (tmp_path / "map.txt").write_text("n01\nn02\nn05\nn07\n")
    listing = label_images(list_folder(tmp_path), 4, tmp_path / "map.txt")
    assert listing.names == ["n02", "n07"] and listing.labels.tolist() == [1, 3]
    images = load_images(listing.paths, transform_of(load_timm_offline()))
    assert images.shape == (2, 3, 224, 224)
    assert images[0, :, 0, 0].tolist() == pytest.approx([1.0, -1.0, -1.0], abs=1e-2)


def load_timm_offline():
    """ViT-Tiny with random weights, whose mean and standard deviation are 0.5."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", pretrained=False)
