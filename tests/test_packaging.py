"""pyproject.toml and environment.yml (ranges) and requirements.lock (exact versions) agree.

Every rule is a function from the text of the files to a list of problems, so that the tests can
also hand it damaged text and see the problem reported.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml  # needed by timm
from packaging.requirements import Requirement  # needed by pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from pathspec import GitIgnoreSpec  # needed by mypy

import evolq_lite

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ENVIRONMENT = (ROOT / "environment.yml").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")

CONDA_NAMES = {
    "playwright-python": "playwright",
    "pytorch": "torch",
}  # conda-forge's name -> Python's name
CONDA_ONLY = {"python", "pip"}
APART = {"cluster", "instructor"}  # extras that are in neither of the other files
LOCK_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!]+)")  # no local part: no "+"


def project_ranges(pyproject: str) -> dict[str, SpecifierSet]:
    """Return every dependency with its range; of the extras, all but those that stand apart."""
    project = tomllib.loads(pyproject)["project"]
    lines = list(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        lines += [] if name in APART else extra
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r.specifier for r in requirements}


def environment_ranges(environment: str) -> dict[str, str]:
    """Return the packages that conda installs, under Python's names, with their ranges."""
    ranges = {}
    for line in yaml.safe_load(environment)["dependencies"]:
        if isinstance(line, str):  # not the pip section
            name, specifier = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", line).groups()
            ranges[CONDA_NAMES.get(name, canonicalize_name(name))] = specifier
    return ranges


def lock_versions(lock: str) -> dict[str, str]:
    """Return the pinned versions, leaving out lines that `lock_problems` reports."""
    matches = [LOCK_LINE.fullmatch(line) for line in requirement_lines(lock)]
    return {canonicalize_name(m[1]): m[2] for m in matches if m}


def requirement_lines(lock: str) -> list[str]:
    return [line for line in lock.splitlines() if line and not line.startswith("#")]


def environment_problems(pyproject: str, environment: str) -> list[str]:
    project, conda = project_ranges(pyproject), environment_ranges(environment)
    problems = [f"{name} is not in environment.yml" for name in sorted(project.keys() - conda)]
    extra = conda.keys() - project - CONDA_ONLY
    problems += [f"{name} is in environment.yml only" for name in sorted(extra)]
    problems += [
        f"{name}: {project[name]} in pyproject.toml, {conda[name]} in environment.yml"
        for name in sorted(project.keys() & conda)
        if project[name] != SpecifierSet(conda[name])
    ]
    python = conda.get("python", "").lstrip("=")
    required = SpecifierSet(tomllib.loads(pyproject)["project"]["requires-python"])
    if not python or not required.contains(python):
        problems.append(f"python {python or 'missing'} in environment.yml, {required} required")
    if yaml.safe_load(environment)["channels"] != ["conda-forge"]:
        problems.append("environment.yml uses another channel than conda-forge")
    return problems


def lock_problems(pyproject: str, lock: str) -> list[str]:
    lines = requirement_lines(lock)
    problems = [f"not name==version: {line}" for line in lines if not LOCK_LINE.fullmatch(line)]
    spelled = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in lines]
    names = [canonicalize_name(name) for name in spelled]
    problems += [f"{name} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
    if spelled != sorted(spelled, key=str.lower):  # the order of pip freeze
        problems.append("not in alphabetical order")
    versions = lock_versions(lock)
    for name, specifier in project_ranges(pyproject).items():
        if name not in versions:
            problems.append(f"{name} is not in the lock")
        elif not specifier.contains(versions[name], prereleases=True):
            problems.append(f"{name} {versions[name]} is outside {specifier}")
    return problems


def closure_problems(pyproject: str, lock: str) -> list[str]:
    """Follow the installed packages' own requirements; each must be locked, in a good version.

    What is needed on some platforms only (CUDA on Linux, appnope on macOS) may be missing: the
    lock is made on one platform, and pip adds the rest.
    """
    versions, problems, seen = lock_versions(lock), [], set()
    todo = [(name, "") for name in project_ranges(pyproject)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in installed_requirements(name):
            marker = requirement.marker
            if marker and not marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in versions:
                if not re.search("platform|os_name|implementation", str(marker)):
                    problems.append(f"{needed} is not in the lock, but {name} needs it")
                continue
            if not requirement.specifier.contains(versions[needed], prereleases=True):
                problems.append(f"{needed} {versions[needed]}, but {name} needs {requirement}")
            todo += [(needed, wanted) for wanted in ("", *requirement.extras)]
    return problems


def installed_requirements(name: str) -> Iterable[Requirement]:
    try:
        return [Requirement(line) for line in distribution(name).requires or []]
    except PackageNotFoundError:  # such as an extra that is not installed
        return []


def installed_problems(lock: str) -> list[str]:
    problems = []
    for name, locked in lock_versions(lock).items():
        try:
            installed = distribution(name).version
        except PackageNotFoundError:
            continue  # needed on another platform or Python only
        if Version(installed).public != Version(locked).public:
            problems.append(f"{name} {installed} is installed, {locked} is locked")
    return problems


def test_environment_has_the_ranges_of_pyproject() -> None:
    assert environment_problems(PYPROJECT, ENVIRONMENT) == []


def test_lock_is_exact_and_inside_the_ranges() -> None:
    assert lock_problems(PYPROJECT, LOCK) == []


def test_lock_is_complete() -> None:
    assert closure_problems(PYPROJECT, LOCK) == []


def test_installed_packages_have_the_locked_versions() -> None:
    assert installed_problems(LOCK) == []


def test_no_source_file_is_ignored_by_git_or_ruff() -> None:
    """`runs/` in .gitignore also means evolq_lite/runs, and ruff leaves out what git ignores."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "evolq_lite").rglob("*.py")}
    ignored = GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text().splitlines())
    assert sources and not set(ignored.match_files(sources))
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "evolq_lite"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sources == {Path(line).relative_to(ROOT).as_posix() for line in shown.splitlines()}


def test_one_version_everywhere() -> None:
    version = tomllib.loads(PYPROJECT)["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert evolq_lite.__version__ == version
    assert citation["version"] == version
    assert f"\n## [{version}]" in changelog


def test_what_every_run_needs_is_no_extra() -> None:
    """`--workers` runs on Dask, so a plain install must bring it."""
    project = tomllib.loads(PYPROJECT)["project"]
    plain = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert "distributed" in plain
    for name, extra in project["optional-dependencies"].items():
        repeated = {canonicalize_name(Requirement(line).name) for line in extra} & plain
        assert not repeated, f"the extra {name} repeats {repeated}"


def changed(text: str, pattern: str, replacement: str) -> str:
    """Replace the one match of `pattern`, so that a test of damage cannot miss its target."""
    result, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    assert count == 1, f"{pattern} matches {count} times"
    return result


@pytest.mark.parametrize(
    ("pattern", "replacement", "problem"),
    [
        (r"^  - timm.*\n", "", "timm is not in"),
        (r"timm>=1.0.26,<1.1$", "timm>=1.0.26", "timm: "),
        (r"pytorch>=2.9,", "pytorch>=2.8,", "torch: "),
        (r"^  - pip$", "  - pip\n  - sympy", "sympy is in environment.yml only"),
        (r"python=3.11", "python=3.10", "python 3.10"),
        (r"^  - conda-forge$", "  - pytorch\n  - conda-forge", "another channel"),
    ],
)
def test_a_wrong_environment_is_reported(pattern: str, replacement: str, problem: str) -> None:
    problems = environment_problems(PYPROJECT, changed(ENVIRONMENT, pattern, replacement))
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    ("pattern", "replacement", "problem"),
    [
        (r"^timm==.*\n", "", "timm is not in the lock"),
        (r"^timm==.*$", "timm==0.9.0", "timm 0.9.0 is outside"),
        (r"^(tqdm)==", r"\1>=", "not name==version: tqdm>="),
        (r"^(six==).*$", r"\g<1>1.*", "not name==version: six==1.*"),
        (r"^(torch==.*)$", r"\1+cpu", "not name==version: torch=="),
        (r"^(six==.*)$", r"\1\n\1", "six is there twice"),
        (r"^(six==.*\n)((?:.*\n)*)", r"\2\1", "not in alphabetical order"),
    ],
)
def test_a_wrong_lock_is_reported(pattern: str, replacement: str, problem: str) -> None:
    problems = lock_problems(PYPROJECT, changed(LOCK, pattern, replacement))
    assert any(problem in line for line in problems)


def test_a_missing_transitive_package_is_reported() -> None:
    problems = closure_problems(PYPROJECT, changed(LOCK, r"^PyYAML==.*\n", ""))
    assert any("pyyaml is not in the lock" in line for line in problems)


def test_another_installed_version_is_reported() -> None:
    problems = installed_problems(changed(LOCK, r"^packaging==.*$", "packaging==1.0"))
    assert len(problems) == 1
    assert problems[0].startswith("packaging ")
