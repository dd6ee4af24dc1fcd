"""The rooms of the package: imports point downwards, it stays small, and it prints nothing."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "evolq_lite"
ORDER = [
    "_torchvision",
    "numerics",
    "fitness",
    "observers",
    "config",
    "layers",
    "chain",
    "convert",
    "genome",
    "objective",
    "search",
    "data",
    "evaluate",
    "evolve",
    "record",
    "figures",
    "cli",
]
BUDGET = 2500  # physical lines, panels not counted


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evolq_lite"):
            inner = node.module.partition(".")[2]
            found |= {inner} if inner else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place():
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert names == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_downwards(name):
    above = imports_of(PACKAGE / f"{name}.py") - set(ORDER[: ORDER.index(name)])
    assert not above, f"{name} imports {above}, which come after it"


@pytest.mark.parametrize("name", ["objective", "search", "evolve"])
def test_test_data_and_models_stay_outside_the_search(name):
    assert not imports_of(PACKAGE / f"{name}.py") & {"data", "evaluate"}
    if name == "search":
        assert "torch.nn" not in (PACKAGE / "search.py").read_text()


def test_size_budget():
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py"))
    assert lines <= BUDGET


@pytest.mark.parametrize("name", [name for name in ORDER if name != "cli"])
def test_the_library_prints_nothing(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")]
    assert "print" not in calls


@pytest.mark.parametrize("name", ORDER)
def test_public_names_have_docstrings(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        kinds = (ast.FunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and not node.name.startswith("_") and node.name != "note":
            inner = isinstance(node, ast.FunctionDef) and node.name in (
                "record",
                "root",
                "on_evaluation",
            )
            assert inner or ast.get_docstring(node), f"{name}.{node.name}"
