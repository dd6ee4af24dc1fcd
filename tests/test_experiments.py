"""Experiments: results are kept line by line, never trusted blindly; reports follow from them."""

import copy
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from commands import sentence
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from evolq_lite.cli import main
from evolq_lite.config import PRESETS
from evolq_lite.data import DATA
from evolq_lite.data import test_faces as typefaces
from evolq_lite.evaluate import SeedComparison, pack_values, packed, unpack_values, unpacked
from evolq_lite.experiments import (
    CLAIMS,
    KNOWN,
    c3_rivals,
    c8_beyond,
    c9_origin,
    c12_starts,
    real,
    real_bits,
    real_cells,
    real_gradients,
    real_landscape,
    real_losses,
    real_options,
    real_racing,
    real_settings,
    real_starts,
    real_whole,
    report,
)
from evolq_lite.experiments.c6_selection import Selection
from evolq_lite.experiments.cells import compute_with_one_thread, measure_gain
from evolq_lite.experiments.results import VERSION, ResultFile, by, row_of, where
from evolq_lite.experiments.verdicts import (
    UNDECIDED,
    WORDS,
    Row,
    Verdict,
    decide,
    tabulate,
    to_markdown,
)
from evolq_lite.files import seal, unseal
from evolq_lite.landscape import noise_of_lines
from evolq_lite.rounding import integers_of


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """All claims, quickly, by the command itself."""
    folder = tmp_path_factory.mktemp("results")
    assert main(["reproduce", "--quick", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copied(quick, tmp_path):
    """The same in a folder that a test may change."""
    return shutil.copytree(quick, tmp_path / "copied")


def lines_of(folder, claim):
    return [json.loads(line) for line in (folder / f"{claim}.jsonl").read_text().splitlines()]


def content(cell, **more):
    """What a computation hands over."""
    return {
        "claim": "C1",
        "cell": cell,
        "result": {"top1": 0.5},
        "seconds": 1.0,
        "environment": {"threads": 1},
        "version": VERSION,
        **more,
    }


# Files


def test_quick_writes_a_line_per_cell_and_the_report(quick):
    for name, claim in CLAIMS.items():
        machine, *cells = lines_of(quick, name)
        assert machine["machine"]["versions"]["torch"]
        assert [line["cell"] for line in cells] == claim.cells(True)
        assert all(line["seconds"] > 0 and line["environment"] == 0 for line in cells)
        assert (quick / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((quick / "claims.json").read_text())
    assert [row["claim"] for row in told] == list(CLAIMS)
    page = (quick / "README.md").read_text()
    for row in told:
        assert row["verdict"] in (*WORDS, UNDECIDED) and row["sentence"] in page
        assert f"![{row['alt']}]({row['figure']})" in page


def test_cells_that_are_there_are_not_computed_again(copied, monkeypatch):
    monkeypatch.setattr(report, "compute", lambda *_: pytest.fail("computed again"))
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert main(["reproduce", "c1", "C3", "--quick", "--out", str(copied)]) == 0
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_values), st.dictionaries(st.text(), json_values))
def test_a_line_says_what_was_written(cell, result):
    line = {**content(cell), "result": result, "environment": 0}
    sealed = seal(line)
    assert unseal(sealed) == line and sealed.count(b"\n") == 1
    assert json.loads(sealed)["result"] == result  # any reader of JSON can read it


def damage_line(line, how):
    """A line of a file, spoiled."""
    return {
        "cut": line[:-40] + b"\n",
        "empty": b"\n",
        "another JSON": b"{}\n",
        "a flipped bit": bytes([*line[:60], line[60] ^ 1, *line[61:]]),
        "a changed number": line.replace(b'"top1":0.', b'"top1":1.'),
        "no checksum": line[: line.rindex(b',"crc32"')] + b"}\n",
        "not text": b"\x00\xff" * 30 + b"\n",
    }[how]


KINDS = ["cut", "empty", "another JSON", "a flipped bit", "a changed number", "no checksum"]


@pytest.mark.parametrize("kind", [*KINDS, "not text"])
def test_a_damaged_line_is_named_omitted_and_computed_again(copied, caplog, monkeypatch, kind):
    path = copied / "C1.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:2], damage_line(whole[2], kind), *whole[3:]]))
    asked = []
    compute = report.compute
    monkeypatch.setattr(report, "compute", lambda *task: asked.append(task[1]) or compute(*task))
    assert main(["reproduce", "C1", "--quick", "--out", str(copied)]) == 0
    assert "line 3 of" in caplog.text and "computed again" in caplog.text
    again = lines_of(copied, "C1")  # all lines are JSON again
    assert asked == [json.loads(whole[2])["cell"]]
    assert [line["cell"] for line in again[1:]] == [
        json.loads(line)["cell"] for line in (whole[1], *whole[3:], whole[2])
    ]
    assert again[-1]["result"] == json.loads(whole[2])["result"]


@pytest.mark.parametrize("left", range(1, 200, 37))
def test_a_last_line_that_was_cut_anywhere_is_computed_again(tmp_path, left):
    file = ResultFile(tmp_path, "C1")
    first, second = {"seed": 0}, {"seed": 1}
    file.append(content(first))
    before = file.path.read_bytes()
    file.append(content(second))
    last = file.path.read_bytes()[len(before) :]
    file.path.write_bytes(before + last[: min(left, len(last) - 2)])
    assert [line is None for line in file.find([first, second])] == [False, True]
    file.repair()
    assert file.path.read_bytes() == before
    file.append(content(second))
    assert file.path.read_bytes() == before + last


@pytest.mark.parametrize("ending", [b"\r\n", b"\r"])
def test_lines_that_end_in_another_way_are_whole(tmp_path, ending, caplog):
    """As git may check them out on Windows; and the last one may have lost its end."""
    file, cells = ResultFile(tmp_path, "C1"), [{"seed": 0}, {"seed": 1}]
    for cell in cells:
        file.append(content(cell))
    before = file.path.read_bytes()
    for changed in (before.replace(b"\n", ending), before[:-1]):
        file.path.write_bytes(changed)
        assert None not in file.find(cells) and not caplog.text
        file.repair()
        assert file.path.read_bytes() == before
    assert not list(tmp_path.glob("*.damaged"))


def test_lines_of_somebody_else_are_kept_beside_the_results(tmp_path, caplog):
    file = ResultFile(tmp_path, "C1")
    theirs = b'{"my": "data"}\n' * 50
    file.path.write_bytes(theirs)
    assert file.find([{"seed": 0}]) == [None]
    assert "line 1, 2, 3 and 47 more of" in caplog.text and len(caplog.records) == 1
    file.repair()
    assert file.path.read_bytes() == b""
    (kept,) = tmp_path.glob("*.damaged")
    assert kept.read_bytes() == theirs and str(kept) in caplog.text


def put_file(folder, name):
    folder.mkdir()
    (folder / name).write_text("mine")


def put_folder(folder, name):
    (folder / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("put", "name", "said"),
    [
        (put_file, "README.md", "is not one that this command has written"),
        (put_folder, "README.md", "cannot be written"),
        (put_folder, "claims.json", "cannot be written"),
        (put_folder, "C1.jsonl", "cannot be written"),
        (put_folder, "C1.png", "cannot be written"),
        (put_folder, ".lock", "Is a directory"),
    ],
)
def test_what_is_in_the_way_is_found_before_any_cell(
    tmp_path, capsys, monkeypatch, put, name, said
):
    monkeypatch.setattr(report, "compute", lambda *_: pytest.fail("a cell was computed"))
    out = tmp_path / "out"
    put(out, name)
    assert main(["reproduce", "C1", "--quick", "--out", str(out)]) == 2
    error = sentence(capsys.readouterr().err)
    assert said in error and name in error and "--out" in error
    assert [path.name for path in out.iterdir()] == [name]


def test_a_report_of_nothing_is_refused_and_nothing_is_left(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "new"):
        assert main(["reproduce", "--report", "--out", str(out)]) == 2
        assert "holds no results" in capsys.readouterr().err
    assert main(["reproduce", "--report", "--out", ""]) == 2
    assert "it is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_of_parts_is_refused_and_no_report_is_replaced(copied, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert main(["reproduce", "--report", "--out", str(copied)]) == 2  # its cells are quick ones
    assert "add --quick" in sentence(capsys.readouterr().err)
    told = json.loads((copied / "claims.json").read_text())
    whole = [{**row, "command": row["command"].removesuffix(" --quick")} for row in told]
    (copied / "claims.json").write_text(json.dumps(whole))
    assert main(["reproduce", "C1", "--quick", "--out", str(copied)]) == 2
    assert "a report of whole claims" in sentence(capsys.readouterr().err)
    (copied / "claims.json").write_bytes(before["claims.json"])
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_a_claim_with_a_part_of_its_results_is_told_to_be_left_out(copied, caplog):
    *cells, last = (copied / "C1.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "C1.jsonl").write_bytes(b"".join([*cells, b"x" + last]))
    assert main(["reproduce", "--report", "--quick", "--out", str(copied)]) == 0
    assert "C1 is left out of the report" in caplog.text
    assert "python -m evolq_lite reproduce C1 --quick" in caplog.text


def test_results_of_other_photographs_are_not_pooled(photographs, monkeypatch, capsys):
    """Files that differ in one byte are others; a folder keeps what its results are about."""
    out, photo = photographs / "out", photographs / "validation" / "b" / "3.png"
    out.mkdir()
    monkeypatch.setattr(real_cells, "wanted_by", lambda cells: 4)
    monkeypatch.setattr(report, "reproduce", lambda *_: pytest.fail("computed"))
    place = real_cells.Place(photographs, photographs)
    report.keep_inputs(out, real_cells.check_folders([], place))
    kept = (out / "inputs.json").read_bytes()
    report.keep_inputs(out, real_cells.check_folders([], place))
    assert (out / "inputs.json").read_bytes() == kept
    photo.write_bytes(photo.read_bytes() + b"\0")
    folders = ["--weights", str(photographs), "--photographs", str(photographs)]
    assert main(["reproduce", "R3", "--out", str(out), *folders]) == 2
    said = sentence(capsys.readouterr().err)
    assert "other photographs in validation" in said and "another --out" in said
    assert (out / "inputs.json").read_bytes() == kept
    for wrong, why in (
        (b'{"weights"', "is damaged"),
        (b"[]", "not a JSON object"),
        (b'{"x": 1}', "is not one that this command has written"),
    ):
        (out / "inputs.json").write_bytes(wrong)
        assert main(["reproduce", "R3", "--out", str(out), *folders]) == 2
        said = sentence(capsys.readouterr().err)
        assert why in said and "another --out" in said and str(out / "inputs.json") in said
        assert (out / "inputs.json").read_bytes() == wrong


def test_folders_are_looked_at_where_all_results_are_there(tmp_path, capsys):
    shutil.copytree(DATA / "results", tmp_path / "results")
    nowhere = ["--weights", "/nowhere", "--photographs", "/nowhere"]
    assert main(["reproduce", "R1", "--out", str(tmp_path / "results"), *nowhere]) == 2
    assert "/nowhere/vit_tiny" in sentence(capsys.readouterr().err)


def test_a_full_disk_is_no_lost_worker():
    """An OSError of a cell would have healthy workers restarted, and be tried again."""

    def fill(cell):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device"):
        compute_with_one_thread((replace(CLAIMS["C1"], run=fill), {}))


def test_folders_that_were_made_for_nothing_go_again(tmp_path, capsys):
    out = tmp_path / "a" / "b" / "c"
    nowhere = str(tmp_path / "nowhere")
    assert main(["reproduce", "R1", "--photographs", nowhere, "--out", str(out)]) == 2
    assert "--photographs FOLDER" in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("C1", "--quick", "--passes", "0"), "--passes is for PAPER"),
        (("C1", "--quick", "--weights", "x"), "--weights is for REAL"),
        (("C1", "--quick", "--photographs", "x"), "--photographs is for REAL"),
        (("C1", "--quick", "--device", ""), "--device is for REAL"),
        (("--report", "--device", "cpu"), "omit --device"),
        (("R1", "--device", "hpu"), "--device hpu is not possible"),
        (("C1", "--quick", "--scheduler", "ucx://127.0.0.1:1"), "begins with tcp://"),
        (("PAPER", "--photographs", "x"), "PAPER reads --imagenet"),
        (("PAPER", "--cost", "--passes", "0"), "--passes must be at least 1"),
        (("PAPER", "--cost", "--seeds", "2"), "--seeds has no effect with --cost"),
        (("PAPER", "--cost", "--networks", "vit_tiny_patch16_224.none"), "could not build"),
    ],
)
def test_options_that_have_no_effect_or_cannot_be_are_refused(tmp_path, capsys, options, said):
    out = tmp_path / "out"
    where_to = () if "--cost" in options else ("--out", str(out))
    assert main(["reproduce", *options, *where_to]) == 2
    assert said in sentence(capsys.readouterr().err) and not out.exists()


def test_results_of_another_version_are_said_kept_and_not_used(copied, caplog):
    path = copied / "C1.jsonl"
    machine, *cells = path.read_bytes().splitlines(keepends=True)
    old = [seal({**unseal(line), "version": VERSION + 1}) for line in cells]
    path.write_bytes(b"".join([machine, *old]))
    assert main(["reproduce", "C1", "--quick", "--out", str(copied)]) == 0
    assert f"{len(cells)} results of version {VERSION + 1}" in caplog.text
    after = path.read_bytes()
    assert after.startswith(b"".join([machine, *old]))
    assert [line["version"] for line in lines_of(copied, "C1")[1:]] == [
        *[VERSION + 1] * len(old),
        *[VERSION] * len(cells),
    ]


def test_results_of_another_claim_are_not_taken_for_ones_own(tmp_path):
    file = ResultFile(tmp_path, "C1")
    file.append(content({"seed": 0}, claim="C2"))
    assert file.find([{"seed": 0}]) == [None]


def test_a_machine_is_named_once_and_a_new_one_gets_a_number(tmp_path):
    file = ResultFile(tmp_path, "C1")
    for seed, threads in enumerate((1, 1, 2, 1)):
        file.append(content({"seed": seed}, environment={"threads": threads}))
    lines = [line for _, line in file.whole_lines()]
    assert [line["environment"] for line in lines if "cell" in line] == [0, 0, 1, 0]
    machines = [line["machine"]["threads"] for line in lines if "machine" in line]
    assert machines == [1, 2]


def test_a_stopped_reproduction_loses_the_cell_in_work_only(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second cell: the first is there, and the same command continues."""
    claim, done = CLAIMS["C1"], []

    def run(cell):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(cell)
        return claim.run(cell)

    out = tmp_path / "results"
    with monkeypatch.context() as patch:
        patch.setitem(KNOWN, "C1", replace(claim, run=run))
        assert main(["reproduce", "C1", "--quick", "--out", str(out)]) == 130
    assert "the same command" in capsys.readouterr().err
    assert [line["cell"] for line in lines_of(out, "C1")[1:]] == done
    assert main(["reproduce", "C1", "--quick", "--out", str(out)]) == 0
    assert [line["cell"] for line in lines_of(out, "C1")[1:]] == claim.cells(True)


def test_a_second_reproduction_in_a_folder_is_refused(tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert main(["reproduce", "C1", "--quick", "--out", str(tmp_path)]) == 2
    said = sentence(capsys.readouterr().err)
    assert str(tmp_path) in said and "--out" in said
    assert not (tmp_path / "C1.jsonl").exists()


def test_a_folder_of_version_0_1_is_refused(tmp_path, capsys):
    (tmp_path / "C1").mkdir()
    assert main(["reproduce", "C1", "--quick", "--out", str(tmp_path)]) == 2
    said = sentence(capsys.readouterr().err)
    assert "0.1" in said and str(tmp_path / "C1") in said
    assert [path.name for path in tmp_path.iterdir()] == ["C1"]


@pytest.mark.slow
def test_workers_compute_the_same_cells(quick, tmp_path):
    out = tmp_path / "results"
    assert main(["reproduce", "C1", "C5", "--quick", "--workers", "2", "--out", str(out)]) == 0
    for name in ("C1", "C5"):
        one, two = (
            {json.dumps(line["cell"]): line["result"] for line in lines_of(folder, name)[1:]}
            for folder in (quick, out)
        )
        assert one.keys() == two.keys()
        for cell, result in one.items():
            # Float kernels round differently with as many threads as there are cores, and with one.
            gap = abs(two[cell]["top1"] - result["top1"])
            assert gap <= 5 / result["images"]


def test_cells_can_be_told_apart():
    for claim in KNOWN.values():
        for mode in (False, True):
            cells = [json.dumps(cell, sort_keys=True) for cell in claim.cells(mode)]
            assert len({*cells}) == len(cells)


# Tables and verdicts


def test_the_interval_of_a_power_counts_the_means_that_were_taken_out():
    """As a regression with an intercept for each line has it."""
    generator = np.random.default_rng(0)
    images = (50, 200, 1000)
    rough = generator.lognormal(0, 0.3, (len(images), 2, 4)) / np.sqrt(images)[:, None, None]
    how = {"look": "line", "integers": "free", "activations": "8", "network": "vit", "seed": 0}
    rows = [
        {**how, "layer": layer, "images": n, "roughness": rough[i, k].tolist()}
        for i, n in enumerate(images)
        for k, layer in enumerate(("attn.qkv", "mlp.fc1"))
    ]
    power, (low, high) = c9_origin.slope(pd.DataFrame(rows), "free", "8")
    y = np.log(rough).reshape(len(images), 8)
    x = np.repeat(np.log(images), 8)
    design = np.column_stack([x, np.tile(np.eye(8), (len(images), 1))])
    solved, (rest,), _, _ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    error = np.sqrt(rest / (24 - 9) * np.linalg.inv(design.T @ design)[0, 0])
    assert power == pytest.approx(solved[0])
    assert high - power == pytest.approx(1.96 * error) == power - low


def test_results_are_grouped_in_the_order_of_cells_and_seeds():
    rows = [
        {"method": method, "bits": bits, "seed": seed}
        for seed in (1, 0)
        for method in ("b", "a")
        for bits in (4, 3)
    ]
    found = by(pd.DataFrame(rows), "method", "bits")
    assert list(found) == [("b", 4), ("b", 3), ("a", 4), ("a", 3)]
    assert all(list(group["seed"]) == [0, 1] for group in found.values())
    assert list(by(pd.DataFrame(rows), "bits")) == [4, 3]


def test_results_pair_image_by_image_and_seed_by_seed():
    torch.manual_seed(0)
    faces = typefaces()[::3]
    was, now = torch.rand(3, len(faces)) > 0.41, torch.rand(3, len(faces)) > 0.4
    assert torch.equal(unpacked(packed(was[0]), len(faces)), was[0])
    before, after = (
        pd.DataFrame({"correct": map(packed, right), "test_images": len(faces), "every": 3})
        for right in (was, now)
    )
    assert measure_gain(before, after) == SeedComparison.of(was, now, faces)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ([True, True, None], "holds here"),
        ([True, None, False], "holds partly"),
        ([False, None], "does not hold here"),
    ],
)
def test_a_verdict_follows_from_its_parts(parts, word):
    assert decide(parts) == word


def test_rows_say_unit_interval_and_what_they_decide():
    gain = SeedComparison((0.01, 0.03, -0.001), 0.002, 1000)
    rows = [Row.of("a", gain, holds=False), Row("b", 4, unit="of 5 layers", form="d", p=1e-120)]
    assert to_markdown(tabulate(rows)).splitlines()[2:] == [
        "| a | +1.30 points | [+0.91, +1.69] | 8e-11 (seeds differ in sign) | no |",
        "| b | 4 of 5 layers |  | < 1e-99 |  |",
    ]


def test_a_change_on_real_networks_tells_three_measures_and_kl_decides():
    """Two seeds of four images: KL falls everywhere, cross-entropy rises, one more is right."""

    def column(right, kl, entropy):
        losses = {"kl": pack_values(torch.tensor(kl)), "cross_entropy": pack_values(entropy)}
        return pd.Series([{"correct": packed(torch.tensor(right)), **losses}] * 2)

    entropy = torch.tensor([0.5, 1.0, 1.5, 2.0])
    was = column([True, False, False, False], [1.0, 0.75, 0.5, 0.25], entropy)
    now = column([True, True, False, False], [0.75, 0.5, 0.25, 0.0], entropy + 0.125)
    change = real_cells.Change.of(was, now, images=4)
    assert change.kl.better and change.cross_entropy.worse and not change.top1.significant
    kl, top1, entropy = change.rows("a, over b", holds=change.kl.better)
    assert [row.name for row in (kl, top1, entropy)] == [
        "a, over b, KL",
        "a, over b",
        "a, over b, cross-entropy",
    ]
    assert [row.gain for row in (kl, top1, entropy)] == pytest.approx([-0.25, 25, 0.125])
    assert [row.holds for row in (kl, top1, entropy)] == [True, None, None]
    assert all(row.holds is None for row in change.rows("a, over b"))


def make_up(claim, chance):
    """Results of a claim: in each cell the easiest images are right, a share of chance(cell)."""
    faces = typefaces()
    order = torch.rand(len(faces), generator=torch.Generator().manual_seed(0))
    rows = [
        {
            **cell,
            "correct": packed(order < chance(cell)),
            "test_images": len(faces),
            "evaluations": 181 * cell.get("options", {}).get("passes", 10) / 10,
            "seconds": 1.0,
        }
        for cell in CLAIMS[claim].cells(False)
        if cell.get("role") != "choice"
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("gaining", "word"), [((3, 4, 8), WORDS[0]), ((3,), WORDS[1]), ((), WORDS[2])]
)
def test_the_headline_holds_in_as_many_settings_as_the_search_gains_in(gaining, word):
    found = CLAIMS["C5"].verdict(
        make_up(
            "C5", lambda c: 0.8 + 0.05 * ("EvolQ" in c["method"] and c["weight_bits"] in gaining)
        )
    )
    assert found.word == word and len(found.decisive) == 6
    assert sum(row.holds for row in found.decisive) == 2 * len(gaining)


@pytest.mark.parametrize(
    ("better", "word"),
    [(None, WORDS[0]), ({"passes": 20}, WORDS[1]), ({"population": 5}, WORDS[2])],
)
def test_the_paper_s_options_are_beaten_in_part_by_what_costs_more(better, word):
    found = CLAIMS["C7"].verdict(make_up("C7", lambda c: 0.8 + 0.05 * (c["options"] == better)))
    assert found.word == word and len(found.decisive) == 19
    assert [row.holds for row in found.decisive].count(False) == (better is not None)


@pytest.mark.parametrize(("ahead", "word"), [(4, WORDS[0]), (3, WORDS[1]), (2, WORDS[2])])
def test_our_search_must_be_ahead_in_three_settings_of_four(ahead, word):
    settings = [("vit", 3), ("vit", 4), ("cnn", 3), ("cnn", 4)][:ahead]

    def chance(cell):
        won = (cell["network"], cell["weight_bits"]) in settings
        return 0.8 + 0.05 * (won and cell["variant"] == c8_beyond.CHOSEN)

    results = make_up("C8", chance)
    better = results["variant"].eq(c8_beyond.CHOSEN)
    results["kl"] = [pack_values(torch.full((20,), 0.1 if good else 0.2)) for good in better]
    found = CLAIMS["C8"].verdict(results)
    top1 = [row.holds for row in found.decisive if row.unit == "points"]
    assert found.word == word and top1.count(True) == ahead and len(top1) == 4
    assert all(row.holds for row in found.decisive if row.unit == "nats")


def test_nothing_is_decided_by_a_part_of_the_cells(quick):
    told = {row["claim"]: row for row in json.loads((quick / "claims.json").read_text())}
    assert all(told[claim]["verdict"] == UNDECIDED for claim in ("C1", "C2", "C3", "C4", "C7"))


def test_selection_is_told_from_what_is_real():
    generator, faces = torch.Generator().manual_seed(0), torch.arange(60).repeat_interleave(20)
    noise = torch.rand(41, 1200, generator=generator) < 0.8
    noise[-1] = noise[noise.sum(1).argsort()[20]]  # the last is neither lucky nor unlucky
    found = Selection.of([noise], faces)
    assert found.here > 3 and abs(found.there) < 1.5  # most of the lead is luck
    assert found.lost > 1.96 * found.error > 0
    better = noise.clone()
    better[7] |= torch.rand(1200, generator=generator) < 0.5  # one snapshot is truly better
    found = Selection.of([better], faces)
    assert found.here == pytest.approx(found.there, abs=0.3) and found.there > 5
    same = Selection.of([noise[:1].expand(5, -1)], faces)
    assert same.here == same.there == same.error == 0


def test_the_committed_report_is_made_from_the_committed_results(tmp_path):
    """`make results` would change nothing: page, verdicts and alt texts agree with the files."""
    committed = DATA / "results"
    shutil.copytree(committed, tmp_path / "results")
    told = report.write_report(tmp_path / "results")
    files = {KNOWN[row["claim"]].reads or row["claim"] for row in told}
    assert files | {"PAPER"} == {path.stem for path in committed.glob("*.jsonl")}
    for name in ("README.md", "claims.json"):
        assert (tmp_path / "results" / name).read_text() == (committed / name).read_text(), (
            f"data/results/{name} is not made from the files beside it; run make results"
        )


def test_sentences_and_alt_texts_are_short():
    for row in committed_claims():
        assert len(row["sentence"].split()) <= 30, row["sentence"]
        assert 10 <= len(row["alt"].split()) <= 40, row["alt"]


def test_the_example_in_the_page_opens_a_file(monkeypatch):
    code = re.search(r"```python\n(.*?)```", (DATA / "results" / "README.md").read_text(), re.S)
    monkeypatch.chdir(DATA.parent)
    names = {}
    exec(code[1], names)
    results = report.load_results("C5")
    assert len(names["cells"]) == len(results) and names["table"].shape == (6, 6)
    mine = where(results, network="vit", weight_bits=3, method="EvolQ from MinMax")["top1"]
    assert names["table"].loc[("vit", 3), "EvolQ from MinMax"] == pytest.approx(mine.mean())


def test_an_unknown_experiment_lists_the_known(capsys):
    assert main(["reproduce", "C99"]) == 2
    said = capsys.readouterr().err
    assert "'C99'" in said and "C1" in said and "all" in said


# Real networks


def test_real_networks_without_their_folders_are_refused_in_a_sentence(tmp_path, capsys):
    missing = ["--weights", str(tmp_path / "no"), "--photographs", str(tmp_path)]
    assert main(["reproduce", "real", "--out", str(tmp_path / "out"), *missing]) == 2
    said = capsys.readouterr().err
    assert "no/vit_tiny_patch16_224.safetensors" in said and "--weights FOLDER" in said
    assert not (tmp_path / "out").exists()


def damage_photograph(folder):
    path = folder / "validation" / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:60])


def damage_network(folder):
    path = folder / "deit_tiny_patch16_224.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FLAWS = {
    "a damaged test photograph": (damage_photograph, r"validation/b/3\.png"),
    "a damaged network": (damage_network, r"deit_tiny_patch16_224\.safetensors"),
    "a class map that does not fit": (
        lambda folder: (folder / "wnids.txt").write_text("a\nb\n"),
        r"wnids\.txt",
    ),
    "no class map": (lambda folder: (folder / "wnids.txt").unlink(), r"wnids\.txt"),
    "too few to calibrate": (
        lambda folder: shutil.rmtree(folder / "calibration" / "c"),
        r"256|1,?000",
    ),
    "no photographs to test": (lambda folder: shutil.rmtree(folder / "validation"), "validation"),
}


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("claim", ["REAL", "R1"])
def test_folders_of_real_networks_are_checked_before_any_cell(
    photographs, monkeypatch, capsys, flaw, claim
):
    """A cell takes a quarter of an hour, and reads the test photographs at its end."""
    monkeypatch.setattr(real_cells, "start_from", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(real, "Run", lambda *_, **__: pytest.fail("computed"))
    if flaw == "too few to calibrate":
        monkeypatch.setattr(real_cells, "CALIBRATION", 1000)
    else:
        monkeypatch.setattr(real_cells, "wanted_by", lambda cells: 4)
    damage, said = FLAWS[flaw]
    damage(photographs)
    folders = ["--weights", str(photographs), "--photographs", str(photographs)]
    assert main(["reproduce", claim, "--out", str(photographs / "out"), *folders]) == 2
    assert re.search(said, sentence(capsys.readouterr().err))
    assert not (photographs / "out").exists()


def test_every_cell_of_real_networks_is_another_run():
    configs = {
        (cell["network"], *map(str, real.configs_of(cell))) for cell in real.CLAIM.cells(False)
    }
    assert len(configs) == len(real.CLAIM.cells(False)) == 21
    assert not real.CLAIM.cells(True)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder as `--photographs` takes it, and a checkpoint of a small network beside it."""
    for n in range(6):
        for part in ("calibration", "validation"):
            path = tmp_path / part / "abc"[n // 2] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    (tmp_path / "wnids.txt").write_text("a\nb\nc\n")

    def create(name, **options):
        torch.manual_seed(0)
        channels = (8, 8, 8, 8)
        # else the branches of blocks begin as zeros, and their scales change nothing
        return timm.models.resnet.resnet10t(num_classes=3, channels=channels, zero_init_last=False)

    monkeypatch.setattr(timm, "create_model", create)
    for name in real_cells.NETWORKS:
        save_file(create(name).state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(real_cells, "CALIBRATION", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def use(module, folder, **options):
    """A claim of real networks on small ones."""
    return real_cells.compute_at(module.CLAIM, real_cells.Place(folder, folder), **options)


def test_a_run_of_real_networks_is_resumed(photographs, monkeypatch):
    cell = real.CLAIM.cells(False)[1]
    seen = []
    whole = use(real, photographs, watch=seen.append).run(cell)
    assert len(seen) == whole["evaluations"] > 6 and whole["images"] == 6
    os.rename("runs", "finished")

    def stop(event):
        if event == seen[4] or event.cycle == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use(real, photographs, watch=stop).run(cell)
    rest = []
    resumed = use(real, photographs, watch=rest.append).run(cell)
    assert 0 < len(rest) < len(seen)
    timed = ("search_seconds", "peak_memory_mib")
    assert {k: v for k, v in resumed.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }


def test_searches_from_good_and_poor_starts_of_real_networks(photographs):
    """Two small cells from end to end: rounding, all searches, one reading of the test images."""
    claim = use(real_starts, photographs)
    cells = {(c["network"], c["start"], c["seed"]): c for c in claim.cells(False)}
    assert len(claim.cells(False)) == 2 * 2 * (5 + 5 + 1 + 1) and not claim.cells(True)
    rows = []
    for start in ("paper", "recommended"):
        cell = {**cells["deit_tiny_patch16_224", start, 0], "images": 4}
        result = claim.run(cell)
        assert result["images"] == 6 and set(result["EvolQ"]) >= {"fitness", "kl", "correct"}
        for name in c12_starts.SEARCHES:
            assert result[name]["fitness"] <= result[name]["fitness_before"]
        rows.append(row_of({"cell": cell, "result": result, "seconds": 1.0}))
    results = pd.DataFrame(rows)
    verdict = claim.verdict(results)
    assert "6-image check" in verdict.sentence and len(verdict.decisive) == 1
    (table,) = claim.tables(results).values()
    assert len(table) == 2 * (1 + len(c12_starts.SEARCHES))
    assert claim.figure(results).get_label()


@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_integers_of_a_real_network_are_chosen_once(photographs, monkeypatch, caplog, rounding):
    """Whoever begins there again, begins with the same network; other options are another one."""
    cell = {**real_settings.cells(False)[0], "images": 4}
    source = real_cells.source_of(cell, real_cells.Place(photographs, photographs), 4)
    config = replace(PRESETS["recommended"], rounding=rounding, weight_bits=3)
    images = source.load().images
    first = real_cells.start_from(source, config)
    chosen = integers_of(first.qmodel)
    assert chosen
    with monkeypatch.context() as patch:
        patch.setattr(real_cells, "round_setting", lambda *_: pytest.fail("chosen again"))
        again = real_cells.start_from(source, config)
    assert torch.equal(again.qmodel(images), first.qmodel(images))
    assert all(torch.equal(chosen[name], t) for name, t in integers_of(again.qmodel).items())
    assert len(list(real_cells.KEPT.iterdir())) == 1
    (kept,) = real_cells.KEPT.iterdir()
    kept.write_bytes(kept.read_bytes()[:-40])
    after = real_cells.start_from(source, config)
    assert "chosen again" in caplog.text and torch.equal(after.qmodel(images), first.qmodel(images))
    for other in (replace(config, weight_bits=4), replace(config, edge_bits=4)):
        real_cells.start_from(source, other)
    real_cells.start_from(replace(source, seed=1, calibration_images=3), config)
    assert len(list(real_cells.KEPT.iterdir())) == 4


def test_schemes_of_real_networks_without_a_search(photographs):
    """Two small cells; verdict and figure as if all had been measured, better at more bits."""
    claim = use(real_settings, photographs)
    cells = claim.cells(False)
    assert len(cells) == 2 * (3 * 7 - 1) and not claim.cells(True)
    assert cells == sorted(cells, key=claim.stage)
    first = [cell for cell in cells if not claim.stage(cell)]
    assert {cell["scheme"] for cell in first} == {*real_settings.SCHEMES} - {"recommended, learned"}
    made = {}
    for scheme in (real_settings.PAPER, real_settings.BEST):
        cell = next(c for c in cells if (c["weight_bits"], c["scheme"]) == (3, scheme))
        made[scheme] = claim.run({**cell, "images": 4})
        assert made[scheme]["images"] == 6
        assert not unpack_values(made[scheme]["float"]["kl"]).any()
    assert made[real_settings.PAPER]["quantized"] != made[real_settings.BEST]["quantized"]
    rows = []
    for cell in first:
        order = list(real_settings.SCHEMES).index(cell["scheme"])
        wrong = {8: 2, 4: 20, 3: 60}[cell["weight_bits"]] // (1 + order)
        found = {
            name: {
                "correct": packed(torch.arange(300) >= n),
                "kl": pack_values(torch.full((300,), n / 100) + torch.rand(300) / 1000),
                "cross_entropy": pack_values(torch.full((300,), 1 + n / 100)),
            }
            for name, n in (("float", 0), ("quantized", wrong))
        }
        rows.append(row_of({"cell": cell, "result": {"images": 300, **found}, "seconds": 1.0}))
    results = pd.DataFrame(rows)
    verdict = claim.verdict(results)
    assert verdict.word == WORDS[0] and len(verdict.decisive) == 4
    assert (
        "costs ViT-Tiny 0.7 and DeiT-Tiny 0.7" in verdict.sentence
        and "recover 0.7 (not significant)" in verdict.sentence
    )
    assert len(verdict.sentence.split()) <= 30
    (table,) = claim.tables(results).values()
    assert len(table) == len(first)
    assert 10 <= len(claim.figure(results).get_label().split()) <= 40


def test_options_of_a_search_of_real_networks(photographs):
    """A small cell from end to end; its verdict, table and figure."""
    claim = use(real_options, photographs)
    cells = claim.cells(False)
    assert len(cells) == 3 * 2 * 2 and not claim.cells(True)
    result = claim.run({**cells[0], "images": 4})
    for name in real_options.VARIANTS:
        assert result[name]["fitness"] <= result[name]["fitness_before"]
        assert result[name]["evaluations"] == result[real_options.PAPER]["evaluations"]
    assert result["median_scale"] > 0
    results = pd.DataFrame(
        [row_of({"cell": cell, "result": result, "seconds": 1.0}) for cell in cells[:4]]
    )
    verdict = claim.verdict(results)
    assert "of 20 comparisons" in verdict.sentence and "one seed" in verdict.sentence
    assert len(verdict.sentence.split()) <= 30 and len(verdict.decisive) == 20
    (table,) = claim.tables(results).values()
    assert len(table) == 4 * (1 + len(real_options.VARIANTS))
    assert 10 <= len(claim.figure(results).get_label().split()) <= 40


def test_gradients_of_real_networks(photographs):
    """A small cell of each role; then the choice and the verdict, from results made up."""
    claim = use(real_gradients, photographs)
    cells = claim.cells(False)
    assert len(cells) == 2 + 20 and not claim.cells(True)
    assert cells == sorted(cells, key=claim.stage)
    race = next(cell for cell in cells if cell["role"] == "race")
    result = claim.run({**race, "images": 4})
    assert result["images"] == 6
    for name in ("EvolQ", "SGD", "Adam"):
        assert result[name]["fitness"] <= result[name]["fitness_before"]
    choice = claim.run({**cells[0], "images": 4})
    assert len(choice) == 2 * len(real_gradients.SIZES)
    rows = []
    for cell in cells:
        if cell["role"] == "choice":
            found = {name: float("0.1" not in name) for name in choice}
            rows.append(row_of({"cell": cell, "result": found, "seconds": 1.0}))
            continue
        found = {}
        for name, kl in (("start", 0.9), ("EvolQ", 0.6), ("SGD", 0.5), ("Adam", 0.7)):
            found[name] = {
                "correct": packed(torch.arange(300) >= 300 * kl),
                "kl": pack_values(torch.full((300,), kl) + torch.rand(300) / 1000),
                "cross_entropy": pack_values(torch.full((300,), 1 + kl)),
            }
        rows.append(row_of({"cell": cell, "result": {"images": 300, **found}, "seconds": 1.0}))
    results = pd.DataFrame(rows)
    assert real_gradients.choose_steps(results) == {"SGD": 0.1, "Adam": 0.1}
    verdict = claim.verdict(results)
    assert verdict.word == WORDS[1] and len(verdict.decisive) == 4 * 2
    assert "below SGD or Adam in KL in 4 of 8 comparisons, above in 4" in verdict.sentence
    assert len(verdict.sentence.split()) <= 30
    table, steps = claim.tables(results).values()
    assert len(table) == 4 * 4 and len(steps) == len(real_gradients.SIZES)
    assert 10 <= len(claim.figure(results).get_label().split()) <= 40


def test_gradients_are_compared_with_the_start_that_their_own_cell_measured():
    """Another processor rounds otherwise, so that the start without a search is another network."""
    quick = {cell["search"]: cell for cell in c12_starts.cells(True) if cell["start"] == "paper"}
    rows = []
    for name in (c12_starts.NONE, "SGD"):
        step = {"step": 3e-3} if name == "SGD" else {}
        cell = {**quick[c12_starts.EVOLQ], "search": name, "passes": 2, **step}
        rows.append(row_of({"cell": cell, "result": c12_starts.run(cell), "seconds": 1.0}))
    none, sgd = rows
    assert sgd["fitness"] < sgd["fitness_before"]
    assert sgd[c12_starts.START]["kl"] == none["kl"]
    none["kl"] = pack_values(unpack_values(none["kl"]) + 1)  # as if on another machine
    (found,) = c12_starts.group(pd.DataFrame(rows)).values()
    change = c12_starts.measure_changes(found)["paper"]["SGD"]
    assert change.now == pytest.approx(float(unpack_values(sgd["kl"]).mean()))
    assert 0 < change.was < 1 and change.change != 0


def test_steps_of_gradients_are_those_that_c3_chooses():
    results = ResultFile(report.RESULTS, "C3").read(c3_rivals.cells(False))
    best = c3_rivals.choose_steps(results)
    for rule, step in c12_starts.GRADIENTS.values():
        assert {step} == set(best[rule]["step"])


def test_steps_on_real_networks_are_those_that_were_chosen():
    claim = KNOWN["R3"]
    results = ResultFile(report.RESULTS, "R3").read(claim.cells(False))
    assert real_gradients.choose_steps(results) == real_gradients.CHOSEN


def test_losses_of_a_search_of_real_networks(photographs):
    """A small cell from end to end: its fresh photographs, then verdict, table and figure."""
    claim = use(real_losses, photographs)
    cells = claim.cells(False)
    assert len(cells) == 3 * 2 and not claim.cells(True)
    cell = {**cells[0], "images": 4, "fresh": 2}
    place = real_cells.Place(photographs, photographs)
    fresh, _ = real_losses.load_fresh(cell, place)
    used = real_cells.source_of(cell, place, 4).load().images
    assert len(fresh) == 2 and not any(torch.equal(x, y) for x in fresh for y in used)
    result = claim.run(cell)
    for name in real_losses.LOSSES:
        assert result[name]["fitness"] <= result[name]["fitness_before"]
        assert result[name]["fresh_before"] > 0
    rows = []
    for cell in cells:  # other seeds overfit a little more, infoNCE least
        made = copy.deepcopy(result)
        for i, name in enumerate(real_losses.LOSSES):
            made[name] |= {"fitness_before": 1.0, "fitness": 0.5, "fresh_before": 1.0}
            made[name]["fresh"] = 0.6 + 0.01 * i * (1 + cell["seed"] / 10)
        rows.append(row_of({"cell": cell, "result": made, "seconds": 1.0}))
    results = pd.DataFrame(rows)
    gaps = real_losses.gaps_of(results[:1])
    assert gaps[real_losses.OURS] == [pytest.approx(0.2)] and gaps["mse"][0] > 0.2
    verdict = claim.verdict(results)
    assert "3 seeds" in verdict.sentence and "overfits less in 8" in verdict.sentence
    assert len(verdict.sentence.split()) <= 30
    for row in rows:  # which loss overfits least is another one each time
        for i, name in enumerate(real_losses.LOSSES):
            rank = (3 * i + row["seed"] ** 2) % len(real_losses.LOSSES)
            row[name] = {**row[name], "fresh": 0.6 + 0.01 * rank + 0.001 * i * row["seed"]}
    undecided = claim.verdict(pd.DataFrame(rows)).sentence
    assert "overfitting is undecided" in undecided and len(undecided.split()) <= 30
    alone = claim.verdict(results[:2])  # one seed says nothing of overfitting
    assert "one seed" in alone.sentence and len(alone.decisive) == 8
    (table,) = claim.tables(results).values()
    assert len(table) == 2 * (1 + len(real_losses.LOSSES))
    assert 10 <= len(claim.figure(results).get_label().split()) <= 40


def test_races_on_a_real_network(photographs):
    """A small cell from end to end; its verdict, table and figure."""
    claim = use(real_racing, photographs)
    cells = claim.cells(False)
    assert len(cells) == 5 * 2 and not claim.cells(True)
    result = claim.run({**cells[1], "images": 6, "batch": 2})
    paper, race, equal = (result[name] for name in real_racing.SEARCHES)
    assert race["evaluations"] == paper["evaluations"] == paper["cost"]
    assert race["cost"] <= paper["cost"] + 1 and equal["cost"] >= paper["cost"]
    assert {level["level"] for level in paper["levels"]} >= {0.05}
    results = pd.DataFrame(
        [row_of({"cell": cell, "result": result, "seconds": 1.0}) for cell in cells[:4]]
    )
    check_what_is_told(claim, results, "of DeiT-Tiny (2 seeds, one pass)", decisive=2)
    (table,) = claim.tables(results).values()
    assert len(table) == 2 * 4 and list(table["candidates"][:2]) == ["", str(paper["evaluations"])]


def test_bits_of_a_real_network(photographs):
    """A small cell from end to end; its verdict, table and figure."""
    claim = use(real_bits, photographs)
    cells = claim.cells(False)
    assert len(cells) == 5 * 4 * 2 and not claim.cells(True)
    assert [cell["mean_bits"] for cell in cells[:4]] == [2.5, 2.5, 3.0, 3.0]
    small = {"images": 4, "evaluations": 6, "widths": "2,3,8"}
    result = claim.run({**cells[0], **small})
    for method in real_bits.METHODS:
        assert result[method]["mean"] <= 2.5 and {*result[method]["bits"].values()} <= {2, 3, 8}
    assert result["evolution"]["evaluations"] == result["random walks"]["evaluations"] == 7
    assert result["even bits"]["kl"] != result["float"]["kl"]
    results = pd.DataFrame(
        [row_of({"cell": cell, "result": result, "seconds": 1.0}) for cell in cells[:4]]
    )
    check_what_is_told(claim, results, "end below even bits in", decisive=12)
    worse = copy.deepcopy(result)  # than every rival
    for method in (real_bits.EVEN, *real_bits.METHODS):
        worse[method]["kl"] = pack_values(torch.rand(6) + 9 * (method == real_bits.EVOLUTION))
    rows = [row_of({"cell": cell, "result": worse, "seconds": 1.0}) for cell in cells[:4]]
    assert "above a rival in 4." in claim.verdict(pd.DataFrame(rows)).sentence  # of 4 settings
    (table,) = claim.tables(results).values()
    assert len(table) == 4 * 4


def test_the_whole_search_of_a_real_network(photographs):
    """A small cell from end to end: both claims told from it, and every snapshot tested."""
    claim, picks = use(real_whole, photographs), KNOWN["R6"]
    cells = claim.cells(False)
    assert len(cells) == 2 * 2 * 3 and not claim.cells(True) and picks.reads == "R5"
    assert [claim.stage(cell) for cell in cells] == list(range(12))
    result = claim.run({**cells[3], "images": 4, "passes": 9})
    evolved, rival = result["EvolQ"], result["random"]
    assert evolved["evaluations"] == rival["evaluations"] == 9 * 4 * 3 + 1
    assert len(result["visits"]) == 9 * 4 and result["device"] == "cpu"
    assert 1 < len(result["snapshots"]) <= 1 + evolved["accepted"]
    assert result["snapshots"][-1] == evolved["correct"]
    assert min(visit["fitness"] for visit in result["visits"]) == evolved["fitness"]
    results = pd.DataFrame(
        [row_of({"cell": cell, "result": result, "seconds": 1.0}) for cell in cells[:6]]
    )
    check_what_is_told(claim, results, "of DeiT-Tiny (3 seeds), ten passes", decisive=2)
    check_what_is_told(picks, results, "of DeiT-Tiny (3 seeds), snapshots", decisive=2)
    check_what_is_told(claim, results[:4], "(W4A8: 3 seeds, W3A8: one), ten", decisive=2)
    (table,) = claim.tables(results).values()
    assert len(table) == 2 * 3


def test_snapshots_that_are_lucky_on_one_half_are_not_better_on_the_other():
    """Made up: 30 snapshots whose differences are pure luck."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(30, 400, generator=generator) < 0.7
    result = {
        "MinMax": {"correct": packed(right[0])},
        "snapshots": [packed(row) for row in right],
        "visits": [{"fitness": 1 - i / 100, "snapshot": i} for i in range(30)],
        "images": 400,
    }
    cells = real_whole.cells(False)[:3]
    rows = [row_of({"cell": cell, "result": result, "seconds": 1.0}) for cell in cells]
    found = real_whole.verdict_on_picks(pd.DataFrame(rows))
    luck, here, there = found.rows[:3]
    mean = 100 * float(right.float().mean() - right[-1].float().mean())
    assert luck.holds and luck.gain == pytest.approx(here.gain - there.gain)
    assert here.gain > mean + 4 and there.gain < mean + 2


def check_what_is_told(claim, results, said, decisive):
    """A verdict in few words, and a figure that says what it shows."""
    verdict = claim.verdict(results)
    assert said in verdict.sentence and len(verdict.sentence.split()) <= 30
    assert len(verdict.decisive) == decisive
    assert 10 <= len(claim.figure(results).get_label().split()) <= 40


def test_lines_through_blocks_of_real_networks(photographs, monkeypatch):
    """Each landscape of one layer, small; verdicts and figure from them as from all layers."""
    monkeypatch.setattr(real_landscape, "BLOCK", "layer2.0")
    monkeypatch.setattr(real_landscape, "CALIBRATION", 4)
    monkeypatch.setattr(c9_origin, "REACH", 0.3)  # so small a network hardly notices 1 %
    claim = use(real_landscape, photographs)
    cells = claim.cells(False)
    assert len(cells) == 3 * 2 * 2 * 4 * 2 * 2 and not claim.cells(True)
    rows = []
    for cell in cells:
        if (cell["layer"], cell["images"], cell["seed"]) != ("attn.qkv", 500, 0):
            continue
        small = {**cell, "layer": "conv2", "images": 4, "lines": 2, "points": 5}
        result = claim.run(small)
        lines, again = (torch.tensor(result[key]) for key in real_landscape.COMPUTED)
        assert lines.shape == again.shape == (2, 5) and result["device"] == "cpu"
        assert result["noise_floor"] == pytest.approx(noise_of_lines(lines, again)[0], abs=1e-6)
        for seed, layer in enumerate(real_landscape.LAYERS):  # as if all had been measured
            lines, again = torch.rand(2, 4, 21, generator=torch.Generator().manual_seed(seed))
            made = {**result, "lines_values": lines.tolist(), "again": again.tolist()}
            rows.append(row_of({"cell": {**small, "layer": layer}, "result": made, "seconds": 1}))
    results = pd.DataFrame(rows)
    assert len(results) == 2 * 2 * 2 * 4
    found = claim.verdict(results)
    assert "(one seed, 4 photographs, W3A8)" in found.sentence and len(found.decisive) == 4
    claim_on_layers = KNOWN["R2"]
    layers = claim_on_layers.verdict(results)
    assert "of 8 layers" in layers.sentence and len(layers.decisive) == 1
    beyond, jagged = (row.gain for row in layers.rows[:2])
    assert 0 <= beyond <= jagged == 8
    (table,) = claim_on_layers.tables(results).values()
    assert len(table) == 8
    more = [results.assign(images=images, seed=seed) for images, seed in ((4, 1), (9, 0))]
    most = claim_on_layers.verdict(pd.concat([results, *more]))  # more images, and fewer seeds
    assert "(2 seeds, 4 photographs, W3A8)" in most.sentence
    assert 10 <= len(claim_on_layers.figure(results).get_label().split()) <= 40
    for verdict in (found, layers):
        assert len(verdict.sentence.split()) <= 30
    # Lines of pure chance: the lowest point of one computation is any point of the other.
    share, (low, high) = real_landscape.kept_of(results)
    assert low < share < high and abs(share) < 0.4
    results["again"] = results["lines_values"]
    assert real_landscape.kept_of(results) == (1, (1, 1))
    (table,) = claim.tables(results).values()
    assert len(table) == 2 * 2 * 2 * 4
    assert 10 <= len(claim.figure(results).get_label().split()) <= 40


@pytest.fixture
def first_seed():
    """R12's first seed, made up: KL by start and search, the same in every setting."""
    losses = {
        ("paper", "none"): 0.9,
        ("paper", "EvolQ"): 0.6,
        ("paper", "EvolQ by KL"): 0.5,
        ("recommended, learned", "none"): 0.1,
        ("recommended, learned", "EvolQ by KL"): 0.05,
    }
    rows = []
    for cell in real_starts.CLAIM.cells(False):
        if cell["seed"]:
            continue
        result = {"images": 300}
        for name in ("none", *c12_starts.SEARCHES):
            kl = losses.get((cell["start"], name), 0.8)
            generator = torch.Generator().manual_seed(0)
            values = kl * (0.9 + 0.2 * torch.rand(300, generator=generator))
            right = torch.arange(300) < 300 * (1 - kl)
            result[name] = {"correct": packed(right), "kl": pack_values(values)}
            result[name]["cross_entropy"] = pack_values(values + 0.1)
        rows.append(row_of({"cell": cell, "result": result, "seconds": 1.0}))
    return pd.DataFrame(rows)


def test_another_claim_is_told_from_the_same_cells(first_seed):
    claim = KNOWN["R8"]
    found = claim.verdict(first_seed)
    assert found.word == WORDS[0] and "one seed" in found.sentence
    assert "in 4 of 4 settings (top-1 and KL), its own start in 4 (KL)" in found.sentence
    assert claim.reads == "R12" and len(found.sentence.split()) <= 30
    assert 10 <= len(claim.figure(first_seed).get_label().split()) <= 40


def test_a_claim_names_the_cells_that_it_is_told_from():
    """R8 and R2 are told from a part of other claims' cells."""
    found = report.list_parameters(KNOWN["R8"].cells(False))
    assert found["start"] == [real_starts.POOR, real_starts.BEST] and found["seed"] == [0]
    found = report.list_parameters(KNOWN["R2"].cells(False))
    assert found["integers"] == ["free"] and found["activations"] == ["8"]


def test_stages_of_a_module_are_those_of_its_claim():
    for module in {sys.modules[claim.run.__module__] for claim in KNOWN.values()}:
        assert module.CLAIM.stage is getattr(module, "stage_of", module.CLAIM.stage)


def test_the_choice_of_c8_is_among_the_searches_of_real_networks():
    """R8 finds it in the cells of R12, where it has other names."""
    chosen = c8_beyond.VARIANTS[c8_beyond.CHOSEN]
    start = c12_starts.STARTS[real_starts.BEST]
    assert replace(c8_beyond.STARTS[chosen.start], weight_bits=3) == replace(start, weight_bits=3)
    assert (
        chosen.search == c8_beyond.BLOCKS and chosen.options == c12_starts.SEARCHES["EvolQ by KL"]
    )


def test_what_is_there_of_a_long_claim_is_shown_stage_by_stage(tmp_path):
    """R12 is told from the first seed of two starts on; half a stage changes nothing."""
    cells = real_starts.CLAIM.cells(False)
    first = [cell for cell in cells if real_starts.stage_of(cell) == 0]
    assert cells[: len(first)] == first and {cell["start"] for cell in first} == {
        real_starts.POOR,
        real_starts.GOOD,
    }
    file = ResultFile(tmp_path, "R12")
    for number, cell in enumerate(cells[: len(first) + 1], 1):
        file.append({**content(cell), "claim": "R12"})
        if number < len(first):
            with pytest.raises(ValueError, match=f"{number} of 48 cells"):
                report.load_results("R12", tmp_path)
    assert len(report.load_results("R12", tmp_path)) == len(first)
    shown, finished = report.find_complete(KNOWN["R12"], tmp_path)
    assert shown == first and finished == len(first) + 1
    found = report.list_parameters(shown)
    assert found["seed"] == [0] and found["start"] == [real_starts.POOR, real_starts.GOOD]
    assert "calibration images `256`; passes `1`" in report.tell_parameters(found)


def test_what_a_section_says_of_its_cells():
    told = {"claim": "R0", "question": "?", "cells": 4, "finished": 6, "planned": 40, "alt": ""}
    more = {"devices": {"cpu": 4}, "figure": "R0.png", "parameters": {"step": list(range(9))}}
    verdict = Verdict(WORDS[0], "It does.")
    text = report.write_section({**told, **more}, "One seed.", verdict, {})
    assert "It does.\n\nOne seed.\n\nCells: step 9 kinds." in text
    assert "So far from 4 of 40 cells. Finished, and shown when their stage is complete: 2." in text
    assert "Finished" not in report.write_section({**told, **more, "finished": 4}, "", verdict, {})


def committed_claims():
    return json.loads((DATA / "results" / "claims.json").read_text())


def test_five_seeds_say_where_one_pass_gains_as_the_note_of_real_does():
    rows = {
        (row["claim"], each["name"]): each for row in committed_claims() for each in row["rows"]
    }
    for claim, label in (("R12", "EvolQ on paper"), ("R10", "the paper's search, over MinMax")):
        four, three = (rows[claim, f"DeiT-Tiny W{bits}A8: {label}"] for bits in (4, 3))
        assert four["p"] > 0.05 > three["p"] and three["gain"] > 0
        kl = rows[claim, f"DeiT-Tiny W4A8: {label}, KL"]
        assert kl["p"] > 0.05


def test_five_seeds_do_not_agree_on_infonce_or_kl_as_the_note_of_r4_says():
    told = {row["claim"]: row["rows"] for row in committed_claims()}
    label = "EvolQ, over EvolQ by KL, on paper, cross-entropy"
    found = [row for row in told["R12"] if row["name"].endswith(label)]
    assert len(found) == 4
    for row in found:
        assert row["p"] > 0.05 or "seeds differ in sign" in row["note"]
