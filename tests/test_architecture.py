"""The rooms of the package: no import circle, no way into the wings from below, no print."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "evolq_lite"
WINGS = ("runs", "experiments", "panels", "cli")
FRONT = ("__init__", "__main__")  # the public interface and the way in


def name_of(path: Path) -> str:
    """A file as `convert` or `runs.folder`; a package is its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evolq_lite"):
            base = node.module.removeprefix("evolq_lite").lstrip(".")
            inner = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {m for m in inner if m in MODULES} or {base or "__init__"}
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("evolq_lite").lstrip(".") or "__init__"
                for a in node.names
                if a.name.partition(".")[0] == "evolq_lite"
            }
    return found - {name}


def test_imports_go_in_no_circle():
    graph = {name: imports_of(name) for name in MODULES if name not in FRONT}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def wing_of(name: str) -> str:
    """The wing in which a module stands, "" for the flat lecture modules."""
    first = name.partition(".")[0]
    return first if first in WINGS else ""


def test_wings_are_not_imported_from_below():
    """runs, then experiments and panels, then the command line: each may use those before it."""
    allowed = {"": {""}, "runs": {"", "runs"}}
    allowed["experiments"] = allowed["panels"] = {"", "runs", "experiments", "panels"}
    allowed["cli"] = {*allowed["panels"], "cli"}
    for name in MODULES:
        if name in FRONT:
            continue
        reached = {wing_of(module) for module in imports_of(name)}
        assert reached <= allowed[wing_of(name)], f"{name} imports from {reached}"


def test_the_package_itself_imports_no_wing_but_scales():
    reached = {module for module in imports_of("__init__") if wing_of(module)}
    assert reached <= {"runs.scales"}


@pytest.mark.parametrize("name", ["objective", "search", "descent", "landscape", "evolve"])
def test_test_data_stays_outside_the_search(name):
    assert not imports_of(name) & {"data", "evaluate"}


def test_searches_know_no_models():
    assert "torch.nn" not in MODULES["search"].read_text()


@pytest.mark.parametrize("name", [n for n in MODULES if n not in FRONT and wing_of(n) != "cli"])
def test_the_library_prints_nothing(name):
    if name == "panels.__main__":
        return  # a command
    tree = ast.parse(MODULES[name].read_text())
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")]
    assert "print" not in calls


def test_a_module_names_the_lesson_that_it_is_read_with():
    """docs/modules.md has it from there; the lesson names the module, too."""
    lessons = sorted((PACKAGE.parent / "notebooks" / "src").glob("0[1-9]_*.py"))
    assert len(lessons) == 9
    for lesson in lessons:
        line = re.search(r"\*\*Read alongside:\*\* .*", lesson.read_text())
        for file in re.findall(r"(\w+)\.py", line[0]):
            lecture = ast.get_docstring(ast.parse(MODULES[file].read_text()))
            named = re.search(r"lesson (\d)", lecture)
            assert named and named[1] == lesson.name[1], (lesson.name, file)
