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
    "integer",
    "config",
    "layers",
    "chain",
    "convert",
    "genome",
    "objective",
    "search",
    "descent",
    "landscape",
    "data",
    "evaluate",
    "evolve",
    "parallel",
    "record",
    "figures",
    "runs",
    "cli",
]
# Lines of code, without docstrings, comments and blanks: what lessons read, and all the rest. (The
# architecture's 2,500 physical lines cannot hold a docstring on every public name as well.)
FURNITURE = {
    "__init__",
    "__main__",
    "_torchvision",
    "cli",
    "data",
    "evaluate",
    "figures",
    "record",
    "runs",
}
BUDGETS = {"lessons": 2000, "furniture": 1500}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evolq_lite"):
            inner = node.module.partition(".")[2]
            found |= {inner} if inner else {alias.name for alias in node.names}
    return found


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank, nor comment, nor docstring."""
    text = path.read_text()
    told = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line.strip() for line in text.splitlines()]
    return sum(
        bool(line) and not line.startswith("#") and number not in told
        for number, line in enumerate(lines, 1)
    )


def test_every_module_has_its_place():
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert names == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_downwards(name):
    allowed = {*ORDER[: ORDER.index(name)], *(["experiments"] if name == "cli" else [])}
    above = imports_of(PACKAGE / f"{name}.py") - allowed
    assert not above, f"{name} imports {above}, which come after it"


@pytest.mark.parametrize(
    "name", ["objective", "search", "descent", "landscape", "evolve", "parallel"]
)
def test_test_data_and_models_stay_outside_the_search(name):
    assert not imports_of(PACKAGE / f"{name}.py") & {"data", "evaluate"}
    if name == "search":
        assert "torch.nn" not in (PACKAGE / "search.py").read_text()


def test_size_budget():
    lines = {path.stem: code_lines(path) for path in PACKAGE.glob("*.py")}
    furniture = sum(lines.pop(name) for name in FURNITURE)
    assert sum(lines.values()) <= BUDGETS["lessons"] and furniture <= BUDGETS["furniture"]


@pytest.mark.parametrize("name", [name for name in ORDER if name != "cli"])
def test_the_library_prints_nothing(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")]
    assert "print" not in calls


@pytest.mark.parametrize("name", ORDER)
def test_public_names_have_docstrings(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    nodes = [*tree.body, *(n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body)]
    for node in nodes:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        assert not public or ast.get_docstring(node), f"{name}.{node.name}"
