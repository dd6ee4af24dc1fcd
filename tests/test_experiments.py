"""Experiments: cells are kept, never trusted blindly, the report follows from files alone."""

import json
import shutil

import pytest
import torch

from evolq_lite.cli import main, parser
from evolq_lite.data import DATA
from evolq_lite.evaluate import packed, unpacked
from evolq_lite.experiments import CLAIMS, KNOWN, real, report
from evolq_lite.experiments.c6_selection import Selection
from evolq_lite.experiments.cells import UNDECIDED, VERDICTS, paired, path_of, read


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """All claims, quickly, by the command itself."""
    folder = tmp_path_factory.mktemp("results")
    assert main(["reproduce", "--quick", "--out", str(folder)]) == 0
    return folder


def test_quick_writes_a_file_a_cell_and_the_report(quick):
    for name, claim in CLAIMS.items():
        for cell in claim.cells(True):
            content = json.loads(path_of(quick, name, cell).read_text())
            assert content["cell"] == cell and content["seconds"] > 0
            assert content["environment"]["versions"]["torch"]
        assert (quick / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((quick / "claims.json").read_text())
    assert [row["claim"] for row in rows] == list(CLAIMS)
    page = (quick / "README.md").read_text()
    for row in rows:
        assert row["verdict"] in (*VERDICTS, UNDECIDED) and row["sentence"] in page
        assert f"![{row['alt']}]({row['figure']})" in page


def test_cells_that_are_there_are_skipped(quick, monkeypatch):
    monkeypatch.setattr(report, "computed", lambda *_: pytest.fail("computed again"))
    before = (quick / "claims.json").read_bytes()
    assert main(["reproduce", "c1", "C3", "--quick", "--out", str(quick)]) == 0
    assert (quick / "claims.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "\x00", "cut", "other", "old", "bad"])
def test_damaged_or_foreign_results_are_named_and_not_trusted(quick, tmp_path, caplog, damage):
    claim = CLAIMS["C1"]
    cell = claim.cells(True)[0]
    content = json.loads(path_of(quick, "C1", cell).read_text())
    path = path_of(tmp_path, "C1", cell)
    path.parent.mkdir()
    text = json.dumps(content)
    changed = {
        "cut": text[:-40],
        "other": json.dumps(content | {"cell": cell | {"seed": 7}}),
        "old": json.dumps(content | {"version": 0}),
        "bad": json.dumps(content | {"result": 3}),
    }.get(damage, damage)
    path.write_text(changed)
    assert read(path, "C1", cell) is None
    assert path.name in caplog.text and "anew" in caplog.text
    path.write_text(text)
    assert read(path, "C1", cell)["top1"] == content["result"]["top1"]


def test_results_pair_image_by_image():
    torch.manual_seed(0)
    n = 7001  # no whole bytes; enough for a normal test to be near the exact one
    was, now = torch.rand(n) > 0.41, torch.rand(n) > 0.4
    assert torch.equal(unpacked(packed(was), n), was)
    results = [[{"correct": packed(x), "images": n}] for x in (was, now)]
    gain = paired(*results)
    assert gain.gained == int((~was & now).sum()) and gain.images == n
    # The same seed three times is no more than once.
    many = paired(*[3 * rows for rows in results])
    assert many.gain == pytest.approx(gain.gain) and many.images == n
    assert many.interval == pytest.approx(gain.interval, abs=1e-3)
    assert 0.01 < gain.p_value < 0.99
    assert many.p_value == pytest.approx(gain.p_value, abs=0.03)


def test_nothing_is_decided_by_a_part_of_the_cells(quick):
    rows = {r["claim"]: r for r in json.loads((quick / "claims.json").read_text())}
    assert all(rows[claim]["verdict"] == UNDECIDED for claim in ("C1", "C2", "C3", "C7"))


def test_selection_is_told_from_what_is_real():
    generator, faces = torch.Generator().manual_seed(0), torch.arange(60).repeat_interleave(20)
    noise = torch.rand(41, 1200, generator=generator) < 0.8
    noise[-1] = noise[noise.sum(1).argsort()[20]]  # the last is neither lucky nor unlucky
    found = Selection.of([noise], faces)
    assert found.here > 3 and abs(found.there) < 1.5  # most of the lead is luck
    assert found.lost > 1.96 * found.error > 0
    real = noise.clone()
    real[7] |= torch.rand(1200, generator=generator) < 0.5  # one snapshot is truly better
    found = Selection.of([real], faces)
    assert found.here == pytest.approx(found.there, abs=0.3) and found.there > 5
    same = Selection.of([noise[:1].expand(5, -1)], faces)
    assert same.here == same.there == same.error == 0


def test_cells_have_files_of_their_own():
    for name, claim in CLAIMS.items():
        for mode in (False, True):
            cells = claim.cells(mode)
            assert len({path_of(report.Path("x"), name, cell) for cell in cells}) == len(cells)


def test_an_unknown_experiment_lists_the_known(capsys):
    assert main(["reproduce", "C9"]) == 2
    said = capsys.readouterr().err
    assert "'C9'" in said and "C1" in said and "all" in said


@pytest.mark.slow
def test_workers_compute_the_same_cells(quick, tmp_path):
    out = tmp_path / "results"
    assert main(["reproduce", "C1", "C5", "--quick", "--workers", "2", "--out", str(out)]) == 0
    for name in ("C1", "C5"):
        for cell in CLAIMS[name].cells(True):
            one, two = (json.loads(path_of(f, name, cell).read_text()) for f in (quick, out))
            assert one["result"].keys() == two["result"].keys() and one["cell"] == two["cell"]
            # Float kernels round differently with as many threads as there are cores, and with one.
            gap = abs(two["result"]["top1"] - one["result"]["top1"])
            assert gap <= 5 / one["result"]["images"]


def test_real_networks_are_runs_that_the_command_line_accepts(tmp_path):
    outs = set()
    for cell in real.CLAIM.cells(False):
        arguments = parser().parse_args(real.options(cell, tmp_path, tmp_path, tmp_path / "out"))
        assert arguments.model == cell["network"] and arguments.act_bits == 8
        assert (arguments.weight_bits, arguments.passes) == (cell["weight_bits"], cell["passes"])
        names = "model", "weight_bits", "algorithm", "mutation", "weight_observer"
        names = *names, "bias_correction", "passes"
        outs.add(tuple(getattr(arguments, name) for name in names))
    assert len(outs) == len(real.CLAIM.cells(False)) == 21
    assert not real.CLAIM.cells(True)


def test_real_networks_without_their_folders_are_refused_in_a_sentence(tmp_path, capsys):
    missing = ["--weights", str(tmp_path / "no"), "--photographs", str(tmp_path)]
    assert main(["reproduce", "real", "--out", str(tmp_path / "out"), *missing]) == 2
    said = capsys.readouterr().err
    assert "no/vit_tiny_patch16_224.safetensors" in said and "--weights FOLDER" in said
    assert not (tmp_path / "out").exists()


def test_a_stopped_reproduction_loses_the_cell_in_work_only(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second cell: the first is there, and the same command goes on from there."""
    claim, done = CLAIMS["C1"], []

    def run(cell):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(cell)
        return claim.run(cell)

    fake = report.Claim(**{**vars(claim), "run": run})
    with monkeypatch.context() as patch:
        patch.setitem(KNOWN, "C1", fake)
        assert main(["reproduce", "C1", "--quick", "--out", str(tmp_path)]) == 130
    assert "goes on" in capsys.readouterr().err
    files = list((tmp_path / "C1").iterdir())
    assert [path_of(tmp_path, "C1", done[0])] == files


def test_the_committed_report_is_made_from_the_committed_results(tmp_path):
    """`make results` would change nothing: README, verdicts and alt texts agree with the JSON."""
    committed = DATA / "results"
    shutil.copytree(committed, tmp_path / "results")
    rows = report.write_report(tmp_path / "results")
    assert {row["claim"] for row in rows} == {p.name for p in committed.iterdir() if p.is_dir()}
    for name in ("README.md", "claims.json"):
        assert (tmp_path / "results" / name).read_text() == (committed / name).read_text(), (
            f"data/results/{name} is not made from the JSON beside it; run make results"
        )
