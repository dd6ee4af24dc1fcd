"""What is loaded before a command does its work: torch, and nothing that --help does not need."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import evolq_lite
from evolq_lite import cli

ROOT = Path(__file__).resolve().parents[1]
# Together these take twice as long to load as torch; torch._dynamo comes with torchvision.
HEAVY = [
    "torch._dynamo",
    "torchvision",
    "timm",
    "scipy",
    "pandas",
    "matplotlib",
    "distributed",
    "dask",
    "ipywidgets",
]
LOADED = f"import sys; print('loaded', [name for name in {HEAVY} if name in sys.modules])"


def python(code: str) -> str:
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["evolq_lite", "evolq_lite.cli", "evolq_lite.__main__"])
def test_the_command_line_starts_light(module):
    assert python(f"import {module}; {LOADED}") == "loaded []"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["serve"],
        ["demo", "--cycles", "many"],
        ["demo", "--weight-bits", "99"],
        ["demo", "--resume", "--replace"],
        ["run", "--model", "vit"],
    ],
)
def test_help_and_wrong_options_stay_light(words):
    """A wrong option too is an answer that needs no network."""
    call = f"import evolq_lite.cli\ntry: evolq_lite.cli.main({words})\nexcept SystemExit: pass\n"
    assert python(f"{call}{LOADED}").splitlines()[-1] == "loaded []"


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"evolq_lite {evolq_lite.__version__}\n"


def static_names() -> dict[str, str]:
    """The public names as editors and mypy see them, with the modules that they come from."""
    tree = ast.parse((ROOT / "evolq_lite" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {a.name: f.module.removeprefix("evolq_lite.") for f in block.body for a in f.names}


def test_public_names_are_what_editors_are_told():
    assert static_names() == evolq_lite._HOMES
    for name, home in evolq_lite._HOMES.items():
        assert getattr(evolq_lite, name) is getattr(import_module(f"evolq_lite.{home}"), name)
    assert set(evolq_lite._HOMES) <= set(dir(evolq_lite))


def test_functions_named_like_their_modules_stay_functions():
    """In whatever order people import."""
    first = "import evolq_lite.evolve, evolq_lite.sensitivity, evolq_lite as eq; "
    last = "import evolq_lite as eq; eq.evolve; import evolq_lite.evolve, evolq_lite.sensitivity; "
    for code in (first, last, "import evolq_lite as eq; "):
        assert python(f"{code}print(callable(eq.evolve) and callable(eq.sensitivity))") == "True"


def test_modules_are_found_by_name_and_nothing_else_is():
    assert python("import evolq_lite as eq; print(eq.data.CHARACTERS[:3])") == "ABC"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        evolq_lite.quantise  # noqa: B018
