"""What other programs read: workflow, pre-commit, dev container, issue forms, Makefile."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # needed by timm

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
KINDS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}


def read_yaml(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_runs_the_two_commands_where_people_are() -> None:
    workflow = read_yaml(".github/workflows/test.yml")
    assert {"push", "pull_request"} <= workflow[True].keys()  # YAML 1.1 reads "on" as true
    job = workflow["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"] and oldest == f">={matrix['python'][0]}"
    commands = [step["run"].strip() for step in job["steps"] if "run" in step]
    assert commands[-2:] == ["make demo", "make test"]
    assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"}


def test_the_site_is_built_and_published() -> None:
    workflow = read_yaml(".github/workflows/site.yml")
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert "make site" in [step.get("run") for step in build["steps"]]
    upload = build["steps"][-1]
    assert upload["with"]["path"] == "build/site/html" and "pages" in upload["uses"]
    assert publish["needs"] == "build" and publish["permissions"]["pages"] == "write"
    assert workflow["permissions"] == {"contents": "read"}


def test_pre_commit_has_the_locked_ruff() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    locked = re.search(r"^ruff==(.*)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked and repository["rev"] == f"v{locked[1]}"
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format"}


def test_the_dev_container_uses_the_environment_that_make_creates() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["postCreateCommand"] == "make check"
    python = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert python.endswith("/.venv/bin/python")
    lowest = read_yaml("environment.yml")["dependencies"][0].partition("=")[2]
    assert container["image"].endswith(f":{lowest}")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_what_github_accepts(path: Path) -> None:
    form = read_yaml(path)
    if path.stem == "config":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert (
        form["name"]
        and form["description"]
        and form.keys() <= {*("name", "description", "title", "labels", "assignees", "body")}
    )
    assert any(part["type"] != "markdown" for part in form["body"])
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        attributes = part["attributes"]
        assert part["type"] in KINDS
        assert attributes.get("value" if part["type"] == "markdown" else "label")
        if part["type"] == "dropdown":
            options = attributes["options"]
            assert len(options) == len(set(options)) and all(isinstance(o, str) for o in options)


def test_there_is_a_form_for_each_kind_of_trouble() -> None:
    assert {"wrong-result", "lesson-unclear", "grading"} <= {path.stem for path in FORMS}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["2000", "1"]),
        ({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "8"}, ["7", "8"]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, []),
    ],
    ids=["nothing", "both", "policy"],
)
def test_make_bounds_spinning_unless_you_have_set_it(
    own: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    names = "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"
    environment = {key: value for key, value in os.environ.items() if key not in names} | own
    probe = tmp_path / "probe.mk"
    probe.write_text(
        f"include {ROOT / 'Makefile'}\nprobe:\n\t@echo $$GOMP_SPINCOUNT $$KMP_BLOCKTIME\n"
    )
    result = subprocess.run(
        ["make", "--no-print-directory", "-f", str(probe), "probe"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == expected
