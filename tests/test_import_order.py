"""timm needs torchvision, whose extension loads beside a torch of the same build only."""

import subprocess
import sys

import pytest
import torch

from evolq_lite import _torchvision
from evolq_lite._torchvision import torchvision_advice


def python(code: str) -> "subprocess.CompletedProcess[str]":
    run = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    return subprocess.run(run, capture_output=True, text=True, check=False)


USE = "import timm; timm.create_model('test_vit'); print('used')"


@pytest.mark.parametrize(
    "first",
    [
        "import evolq_lite;",
        # In a notebook, people import timm, read the error, and go on in the same process.
        "\ntry:\n    import timm\nexcept RuntimeError as error:\n    assert 'nms' in str(error)\n"
        "import evolq_lite\n",
    ],
)
def test_the_advice_works(first):
    """evolq_lite first, then timm: whatever torchvision is installed."""
    done = python(first + USE)
    assert done.stdout == "used\n", done.stderr


def test_the_advice_is_given_where_it_is_needed(monkeypatch):
    """It names both versions, and says what to do."""
    monkeypatch.setattr(_torchvision, "_library", None)
    assert torchvision_advice() == ""
    monkeypatch.setattr(_torchvision, "_library", object())
    said = torchvision_advice()
    for word in (torch.__version__, "torchvision", "import evolq_lite before", "reinstall"):
        assert word in said


def test_it_is_given_exactly_where_timm_alone_fails():
    """What `check` says of this machine is true of it."""
    alone = python("import timm; print('imported')")
    assert (alone.stdout == "imported\n") == (torchvision_advice() == "")


def test_check_says_it(monkeypatch, capsys):
    from evolq_lite.cli import check

    monkeypatch.setattr(_torchvision, "_library", object())
    check()
    assert "import evolq_lite before timm" in capsys.readouterr().out
