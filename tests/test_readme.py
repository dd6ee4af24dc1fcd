"""What the README prints is what the files hold, and what it points to is there."""

import json
import re
from pathlib import Path

import pytest

from evolq_lite.data import DATA
from evolq_lite.evaluate import Accuracy
from evolq_lite.experiments import real, report

ROOT = DATA.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md", "benchmarks/README.md"]


def test_the_demo_s_figures_are_those_of_its_summary():
    summary = json.loads((DATA / "results" / "demo-summary.json").read_text())
    for name, key in (("float", "float"), ("before", "before"), ("evolved", "after")):
        correct = round(summary[f"{key}_top1"] * summary["images"])
        row = f"| {'W3A8 ' * (name != 'float')}{name} | {Accuracy(correct, summary['images'])} |"
        assert row in README
    low, high = (100 * x for x in summary["gain_interval"])
    assert f"{100 * summary['gain']:+.2f} points [{low:+.2f}, {high:+.2f}]" in README
    assert f"p = {summary['p_value']:.2g}" in README
    assert f"{round(summary['search_seconds'])} s of search" in README
    assert f"the {summary['evaluations']} evaluations" in README


def test_verdicts_are_those_of_the_results():
    """Where the README names a claim's verdict, it is the one in claims.json."""
    verdicts = {
        row["claim"]: row["verdict"]
        for row in json.loads((DATA / "results" / "claims.json").read_text())
    }
    told = re.findall(r"^\| (C\d) [^|]*\| \*\*([a-z ]+)\*\* \|", README, re.MULTILINE)
    assert told and all(verdicts[claim] == verdict for claim, verdict in told)
    assert [claim for claim, _ in told] == [claim for claim in verdicts if claim.startswith("C")]


def test_the_figures_of_real_networks_are_those_of_the_results():
    results = report.known(real.CLAIM, DATA / "results", False)
    assert len(results) == len(real.CLAIM.cells(False))
    for setting, found in real.grouped(results).items():
        for method, r in found.items():
            whole, before, after = (
                Accuracy(round(r[f"{name}_top1"] * r["images"]), r["images"])
                for name in ("float", "before", "after")
            )
            row = f"| {setting} | {method} | {before} | {after} | {real.gain_of(r)} |"
            assert row in README and str(whole) in README, row


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)$", Path(file).read_text(), re.MULTILINE)
                assert anchor in [
                    re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
                ]


def test_every_picture_is_described():
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README):
        assert len(alt) > 20, target


def test_every_promise_names_a_test_that_is_there():
    """The table in data/README.md; a name may be cut short by `...` or `*`."""
    table = (DATA / "README.md").read_text(encoding="utf-8").partition("| whatever happens |")[2]
    told = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+?)(?:_?\.\.\.|\*)?`", table)
    files = set(re.findall(r"`(test_\w+\.py)(?:::|`)", table))
    assert len(told) > 12 and all((ROOT / "tests" / file).is_file() for file in files)
    written = "\n".join((ROOT / "tests" / file).read_text() for file in files)
    for _, name in told:
        assert f"def {name}" in written, name
