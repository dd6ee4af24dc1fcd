"""PAPER: the whole grid, on small random networks of every family and a handful of images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from commands import call, make_photos, sentence
from conftest import SMALL_LEVIT, SMALL_REGNET, enliven
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from evolq_lite.data import DATA
from evolq_lite.experiments import paper_cost, paper_grid
from evolq_lite.experiments.results import VERSION, ResultFile
from evolq_lite.files import seal
from evolq_lite.networks import unfused
from evolq_lite.runs import environment

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 3)}
CNN = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
SMALL: dict[str, tuple[int, dict[str, object]]] = {  # image size, options
    "deit_tiny_patch16_224": (32, VIT),
    "vit_base_patch16_224": (32, VIT),
    "swin_tiny_patch4_window7_224": (32, SWIN),
    "levit_256": (64, SMALL_LEVIT),
    "resnet18": (32, CNN),
    "resnet50": (32, CNN),
    "regnetx_032": (32, SMALL_REGNET),
    "regnety_032": (32, SMALL_REGNET),
}


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """ImageNet with 3 classes of 2 images in each part, and a checkpoint of each small network."""
    real = timm.create_model

    def create(name, **options):
        size, few = SMALL.get(name.partition(".")[0], (224, {}))
        overlay = {"input_size": (3, size, size), **options.pop("pretrained_cfg_overlay", {})}
        options = {"num_classes": 3, **few, **options}
        return real(name.partition(".")[0], pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(paper_grid, "CALIBRATION", 4)
    monkeypatch.setattr(paper_grid, "BITS", (3,))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in SMALL:
        torch.manual_seed(0)
        file = tmp_path / "weights" / f"{name}.safetensors"
        save_file(enliven(create(name, pretrained=False)).state_dict(), file)
    for part in ("train", "val"):
        make_photos(tmp_path / "imagenet" / part)
    return tmp_path / "imagenet"


def command(imagenet: Path, *more: object) -> tuple[object, ...]:
    weights = imagenet.parent / "weights"
    base = ("reproduce", "PAPER", "--imagenet", imagenet, "--weights", weights, "--device", "cpu")
    return (*base, "--passes", 1, "--seeds", 1, "--out", imagenet.parent / "out", *more)


def results_in(folder: Path) -> list[dict]:
    """The lines of cells, without what a clock or the memory says."""
    lines = [line for _, line in ResultFile(folder, "PAPER").whole_lines() if "cell" in line]
    for line in lines:
        del line["seconds"], line["environment"]
        for key in ("search_seconds", "peak_memory_mib"):
            del line["result"][key]
    return sorted(lines, key=lambda line: json.dumps(line["cell"]))


def test_every_family_goes_through_the_whole_grid(imagenet, monkeypatch):
    few = {name: start for name, start in paper_grid.STARTS.items() if name != "MSE"}
    monkeypatch.setattr(paper_grid, "STARTS", few)  # MSE is MinMax with other scales; others try it
    assert call(*command(imagenet, "--networks", *SMALL)) == 0
    out = imagenet.parent / "out"
    lines = results_in(out)
    starts = list(paper_grid.STARTS)
    assert len(lines) == len(SMALL) * len(starts)
    for line in lines:
        assert line["result"]["images"] == 6
        assert line["result"]["evaluations"] == 3 * blocks_of(line["cell"]["network"]) + 1
        assert line["result"]["fitness_after"] <= line["result"]["fitness_before"]
    page = (out / "README.md").read_text()
    assert f"{len(lines)} of {len(lines)} cells" in page and paper_grid.MISSING not in page
    assert "6-image check, not the ImageNet validation set" in page and "published" in page
    assert "70.94" not in page
    header = next(line for line in page.splitlines() if line.startswith("| top-1"))
    for name in ("DeiT-T", "ViT-B", "Swin-T", "LeViT", "ResNet-18", "RegNet-3.2GF", "regnety_032"):
        assert f" {name} |" in header


def test_cells_of_other_images_are_no_part_of_a_table(imagenet, monkeypatch, capsys):
    monkeypatch.setattr(paper_grid, "STARTS", {"MinMax": paper_grid.STARTS["MinMax"]})
    assert call(*command(imagenet, "--networks", "resnet18")) == 0
    others = shutil.copytree(imagenet, imagenet.parent / "others")
    photo = min(others.glob("val/*/*.png"))
    photo.write_bytes(photo.read_bytes() + b"\0")
    capsys.readouterr()
    assert call(*command(others, "--networks", "resnet18", "resnet50")) == 2
    said = sentence(capsys.readouterr().err)
    assert "other validation images" in said and "another --out" in said
    assert len(results_in(imagenet.parent / "out")) == 1
    assert call(*command(imagenet, "--networks", "resnet18", "resnet50")) == 0


def blocks_of(network: str) -> int:
    """How many blocks a small network has."""
    return {"deit": 2, "vit_": 2, "swin": 2, "levi": 3}.get(network[:4], 4)


def test_a_stopped_grid_goes_on_within_the_cell(imagenet, monkeypatch):
    wanted = command(imagenet, "--networks", "resnet-18", "RegNet-3.2GF")
    assert call(*wanted) == 0
    whole, out = results_in(imagenet.parent / "out"), imagenet.parent / "out"
    out.rename(imagenet.parent / "finished")
    seen = []
    first = paper_grid.Grid.run

    def run(grid, cell):
        def watch(event):
            seen.append(event)
            if len(seen) == 20:  # in the second cell
                raise KeyboardInterrupt

        return first(replace(grid, watch=watch), cell)

    monkeypatch.setattr(paper_grid.Grid, "run", run)
    assert call(*wanted) == 130
    assert len(results_in(out)) == 1
    assert call(*wanted) == 0
    assert results_in(out) == whole
    assert len(seen) == len(whole) * 13  # no evaluation twice

    def again(grid, cell):
        raise AssertionError("a cell was computed twice")

    monkeypatch.setattr(paper_grid.Grid, "run", again)
    assert call(*wanted) == 0


def test_cells_are_shared_among_workers(tmp_path, monkeypatch):
    """With the same results as alone. The network is timm's own, as a worker makes it too."""
    monkeypatch.setattr(paper_grid, "CALIBRATION", 4)
    monkeypatch.setattr(paper_grid, "BITS", (3,))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    network = enliven(timm.create_model("test_resnet"))
    save_file(network.state_dict(), tmp_path / "weights" / "test_resnet.safetensors")
    for part in ("calibration", "validation"):  # the smaller layout, with a class map
        make_photos(tmp_path / "imagenet" / part)
    (tmp_path / "imagenet" / "wnids.txt").write_text(
        "\n".join(["b", "a", "c", *map(str, range(997))])
    )
    wanted = command(tmp_path / "imagenet", "--networks", "test_resnet")
    torch.set_num_threads(1)
    assert call(*wanted) == 0
    alone = results_in(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "alone")
    assert call(*wanted, "--workers", 2) == 0
    assert results_in(tmp_path / "out") == alone and len(alone) == len(paper_grid.STARTS)


def small_grid(folder: Path, **options: object) -> paper_grid.Grid:
    """A grid that nobody computes."""
    networks = ("deit_tiny_patch16_224.fb_in1k", "resnet18.tv_in1k", "vit_tiny_patch16_224")
    places = {key: str(folder) for key in ("training", "validation", "weights", "out")}
    numbers = {"calibration_images": 4, "test_images": 8, "class_map": None}
    return paper_grid.Grid(**places, **numbers, networks=networks, **options)


def measured(grid: paper_grid.Grid, right: dict[str, str]) -> pd.DataFrame:
    """Results of DeiT-T at 8 bits from MinMax, two seeds of three, with these hexadecimal bits."""
    share = {name: bin(int(bits, 16)).count("1") / 8 for name, bits in right.items()}
    cells = [c for c in grid.cells() if c["network"].startswith("deit") and c["seed"] < 2]
    cells = [c for c in cells if (c["weight_bits"], c["start"]) == (8, "MinMax")]
    top1 = {"float_top1": "float", "before_top1": "before", "after_top1": "evolved"}
    numbers = {column: share[name] for column, name in top1.items()}
    change = {"before": 0.5, "evolved": 0.25, "change": -0.25, "p_value": 0.03, "significant": True}
    more = {"correct": right, "losses": {"kl": change}, "gain": -0.5, "significant": False}
    more["p_value"] = 0.2
    return pd.DataFrame([{**cell, **numbers, **more} for cell in cells])


def test_the_table_has_published_numbers_ours_and_what_was_not_run(tmp_path):
    grid = small_grid(tmp_path)
    results = measured(grid, {"float": "ff", "before": "0f", "evolved": "3f"})
    table = paper_grid.tabulate(results, grid, 8, published=True).set_index("top-1")
    assert list(table.columns) == ["DeiT-T", "ResNet-18", "vit_tiny_patch16_224"]
    told = table["DeiT-T"]
    assert told["float, published"] == "72.21" and told["float"] == "100.00"
    assert told["MinMax, published"] == "70.94" and told["FQ-ViT, published"] == "71.61"
    assert told["MinMax"] == "50.00 (2 of 3 seeds)"
    assert told["Evol-Q from MinMax"] == "75.00 (2 of 3 seeds)"
    assert told["gain from MinMax"].startswith("+25.00 [")
    assert told["gain from MinMax"].endswith("] (p = 0.2, p = 0.2)")
    assert told["float, cropped as by the script"] == paper_grid.MISSING
    assert told["KL from MinMax"] == "0.500 to 0.250 (p = 0.03, p = 0.03)"
    assert told["MSE"] == told["gain from MSE"] == paper_grid.MISSING
    assert table["ResNet-18"]["MinMax, published"] == paper_grid.UNKNOWN
    assert table["ResNet-18"]["MinMax"] == paper_grid.MISSING
    script = results.assign(start=paper_grid.SCRIPT)  # whose images are cropped otherwise
    told = paper_grid.tabulate(script, grid, 8, published=True).set_index("top-1")["DeiT-T"]
    assert told["float"] == paper_grid.MISSING
    assert told["float, cropped as by the script"] == "100.00"
    four = paper_grid.tabulate(results, grid, 4, published=True).set_index("top-1")
    assert four["ResNet-18"]["gain of Evol-Q, published"] == "+0.5 (summary)"
    assert four["DeiT-T"]["MinMax"] == paper_grid.MISSING and "OMSE, published" not in four.index
    check = paper_grid.tabulate(results, grid, 8, published=False)
    assert not check["top-1"].str.contains("published").any()


def test_what_the_search_has_surely_changed_is_counted(tmp_path):
    grid = small_grid(tmp_path)
    results = measured(grid, {"float": "ff", "before": "0f", "evolved": "3f"})
    assert paper_grid.tell_changes(results).startswith(
        "In 2 of these 2 cells KL is significantly lower after the search, in 0 higher; top-1 is "
        "significantly higher in 0, and lower in 0. ("
    )
    results["significant"] = [True, False]
    assert "higher in 0, and lower in 1. (" in paper_grid.tell_changes(results)


def test_a_grid_without_results_is_a_table_of_what_was_not_run(tmp_path):
    page = small_grid(tmp_path, seeds=1).write_page().read_text()
    cells = 9 * len(paper_grid.STARTS)
    assert f"0 of {cells} cells" in page and page.count(f" {paper_grid.MISSING} |") > cells


def test_the_whole_grid_is_the_papers():
    options = {key: "x" for key in ("training", "validation", "weights", "out")}
    networks = tuple(paper_grid.NETWORKS.values())
    grid = paper_grid.Grid(
        **options, class_map=None, calibration_images=1000, test_images=50_000, networks=networks
    )
    cells, starts = grid.cells(), paper_grid.STARTS
    assert len(cells) == 11 * 3 * len(starts) * 3
    known = set(timm.list_pretrained())
    assert set(networks) <= known
    for cell in cells:
        quant, search = paper_grid.configs_of(cell)
        assert (quant.weight_bits, quant.act_bits) == (cell["weight_bits"], 8)
        assert (search.passes, search.seed) == (10, cell["seed"])
        # The official script's points at outputs are those of ViT and DeiT.
        plain = name_starts(cell, "deit", "vit")
        assert quant.outputs == (cell["start"] == "official" and plain)
        source = grid.source(cell["network"], cell["seed"], cell["start"])
        cropped = cell["start"] == "official" and name_starts(cell, "deit", "levit")
        assert source.crop == (0.875 if cropped else None) and source.seed == cell["seed"]
    assert {paper_grid.find_network(n) for n in ("deit-t", "DeiT-T", networks[0])} == {networks[0]}
    assert paper_grid.find_network("resnet18") == "resnet18.tv_in1k"
    assert paper_grid.find_network("resnet18.a1_in1k") == "resnet18.a1_in1k"


def name_starts(cell: dict, *prefixes: str) -> bool:
    return cell["network"].startswith(prefixes)


def empty(imagenet: Path) -> None:
    (imagenet / "val").rename(imagenet / "test")


def thin_out(imagenet: Path) -> None:
    for path in [*(imagenet / "train").rglob("*.png")][:3]:
        path.unlink()


def map_of(*lines: str):
    return lambda imagenet: (imagenet / "wnids.txt").write_text("\n".join(lines))


def damage(imagenet: Path) -> None:
    next((imagenet / "val").rglob("*.png")).write_bytes(b"no image")


def leave_old_results(imagenet: Path) -> None:
    line = {"claim": "PAPER", "cell": {}, "result": {}, "seconds": 1.0, "environment": 0}
    (imagenet.parent / "out").mkdir()
    file = imagenet.parent / "out" / "PAPER.jsonl"
    file.write_bytes(seal({**line, "version": VERSION + 1}))


def remove_weights(imagenet: Path) -> None:
    (imagenet.parent / "weights" / "resnet18.safetensors").unlink()


def leave_notes(imagenet: Path) -> None:
    folder = imagenet.parent / "out" / "runs" / "resnet18.tv_in1k-3-MinMax-0-1-6"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")


def leave_a_file(imagenet: Path) -> None:
    (imagenet.parent / "out").mkdir()
    (imagenet.parent / "out" / "runs").write_text("mine")


def do_nothing(imagenet: Path) -> None:
    """The arguments are wrong enough."""


WRONG = {
    "no validation images": (empty, (), ["neither train/ and val/ nor calibration/", "--imagenet"]),
    "too few images": (thin_out, (), ["holds 3 images", "calibrates with 4"]),
    "a short class map": (map_of("a", "b"), (), ["lists 2 class folders", "list all of them"]),
    "another class map": (map_of("x", "y", "z"), (), ["does not list the class folder 'a'"]),
    "a damaged image": (damage, (), ["cannot be read as an image"]),
    "results of another version": (
        *(leave_old_results, ()),
        [f"version {VERSION + 1}", f"version {VERSION}", "--out"],
    ),
    "no weights": (
        remove_weights,
        (),
        ["no weights of resnet18", "--weights FOLDER with resnet18"],
    ),
    "somebody's notes among the runs": (leave_notes, (), ["notes.txt, which no run wrote"]),
    "a file where runs shall be": (leave_a_file, (), ["runs is a file", "give another --out"]),
    "a network that is not supported": (
        do_nothing,
        ("--networks", "mixer_s16_224"),
        ["no chain for MlpMixer", "supported are"],
    ),
    "an unknown network": (do_nothing, ("--networks", "ViT-H"), ["'ViT-H'", "DeiT-T, DeiT-S"]),
    "no pass": (do_nothing, ("--passes", 0), ["--passes must be at least 1"]),
    "no seed": (do_nothing, ("--seeds", 0), ["--seeds must be at least 1"]),
    "seeds without end": (do_nothing, ("--seeds", 10**9), ["--seeds", "at most 1,000"]),
    "no such device": (do_nothing, ("--device", "abacus"), ["--device abacus is not possible"]),
    "something quick": (do_nothing, ("--quick",), ["--passes 1"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_computed(imagenet, refused, monkeypatch, case):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spoil, more, words = WRONG[case]
    spoil(imagenet)
    refused(command(imagenet, "--networks", "ResNet-18", *more), *words)


def test_options_of_the_grid_are_refused_elsewhere(refused, tmp_path):
    refused(("reproduce", "C1", "--device", "cuda", "--out", tmp_path / "out"), "and PAPER")
    refused(("reproduce", "PAPER", "C1"), "omit the other experiments")
    refused(("reproduce", "PAPER"), "--imagenet DIR")


def test_local_workers_take_the_gpus_in_turn(monkeypatch):
    """Acted out, because a test machine has none."""
    monkeypatch.setattr(environment, "device_of", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for number, name, device in (
        (0, "cuda", "cuda:0"),
        (3, "cuda", "cuda:1"),
        (3, "cuda:0", "cuda:0"),
        (None, "cuda", "cuda"),
        (3, "cpu", "cpu"),
    ):
        monkeypatch.setattr(environment, "worker_number", lambda number=number: number)
        assert str(environment.device_here(name)) == device


def test_the_cost_of_a_cell_is_counted():
    cost = paper_cost.count("deit_tiny_patch16_224", passes=10)
    assert (cost.blocks, cost.evaluations) == (12, 361)
    assert cost.forwards == 1000 * (1 + 1 + 10 + 361) + 3 * 50_000
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unfused(timm.create_model("deit_tiny_patch16_224")).eval()(torch.zeros(1, 3, 224, 224))
    assert cost.operations == counter.get_total_flops()
    assert cost.test == 150_000 * cost.operations
    # A candidate at block b runs blocks b to 11: 6.5 of 12 on average.
    wanted = 1000 * cost.operations * (2 + 10 + 360 * 6.5 / 12 + 1 / 12)
    assert cost.search == pytest.approx(wanted, rel=0.03)


def test_the_page_tells_the_cost_that_is_counted(capsys):
    assert call("reproduce", "PAPER", "--cost", "--networks", "DeiT-T", "ResNet-18") == 0
    page = (DATA.parent / "docs" / "paper-grid.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 5  # a header, a rule, two networks, the sum
    for row in rows[:4]:
        assert row in page
