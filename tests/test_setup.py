"""The Makefile's choice of a Python, the workflow on hosted machines, and the issue forms."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MAKE = shutil.which("make")
SHIM_WITHOUT_PYTHON = "#!/bin/sh\nexit 127\n"
"""The output of pyenv's `python3.13` if another version is selected."""


def python_of(version: tuple[int, int]) -> str:
    """Returns a command that runs this Python and claims another version."""
    claim = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    return f'#!/bin/sh\nexec "{sys.executable}" -c "{claim}" "$2"\n'


def chosen(folder: Path, commands: dict[str, str], *arguments: str) -> str:
    """Returns the Makefile's PYTHON on a machine with only these commands."""
    folder.mkdir()
    for name, content in commands.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    shown = folder / "shown.mk"
    shown.write_text("shown: ; @echo '$(PYTHON)';\n")
    command = [str(MAKE), "-f", str(ROOT / "Makefile"), "-f", str(shown), "shown", *arguments]
    done = subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"python3": (3, 12), "python3.13": (3, 13)}, "python3"),
        ({"python3": (3, 9), "python3.11": (3, 11), "python3.12": (3, 12)}, "python3.12"),
        ({"python3": (3, 14), "python3.13": None, "python3.11": (3, 11)}, "python3.11"),
        ({"python3.13": (3, 13), "python3.11": (3, 11)}, "python3.13"),
        ({"python3": (3, 9)}, "python3"),
    ],
    ids=["python3 fits", "too old", "too new, and a shim", "no python3", "none fits"],
)
def test_make_takes_the_first_python_that_fits(
    tmp_path: Path, versions: dict[str, tuple[int, int] | None], expected: str
) -> None:
    commands = {name: python_of(version) if version else SHIM_WITHOUT_PYTHON for name, version in versions.items()}
    assert chosen(tmp_path / "bin", commands) == expected


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_make_takes_the_python_that_is_given(tmp_path: Path) -> None:
    assert chosen(tmp_path / "bin", {"python3": python_of((3, 12))}, "PYTHON=other") == "other"


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]


def test_every_python_is_tested_on_a_mac(job: dict[str, Any]) -> None:
    matrix = job["strategy"]["matrix"]
    assert any(name.startswith("macos") for name in matrix["os"])
    assert matrix["python"] == ["3.11", "3.12", "3.13"] and "include" not in matrix and "exclude" not in matrix


def test_hosted_macs_stay_off_the_engine(job: dict[str, Any]) -> None:
    (step,) = [step for step in job["steps"] if "FASTVLM_COMPUTE_UNITS=CPU_ONLY" in step.get("run", "")]
    assert step["if"] == "runner.os == 'macOS'" and "$GITHUB_ENV" in step["run"]
    first_use = next(index for index, one in enumerate(job["steps"]) if "make" in one.get("run", ""))
    assert job["steps"].index(step) < first_use


def test_workflow_runs_what_a_change_has_to_pass(job: dict[str, Any]) -> None:
    asked = re.findall(r"^make (\w+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    steps = [step for step in job["steps"] if "name" in step]
    run = " ".join(step["run"] for step in steps)
    assert asked == re.findall(r"make PYTHON=python3 (\w+)", run) and asked
    assert all(0 < step["timeout-minutes"] < job["timeout-minutes"] for step in steps)
    assert (ROOT / re.search(r"tests/mac/\w+\.py", run)[0]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_form_is_one_that_github_shows(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in fields]
    assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in fields)
    assert {part["type"] for part in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_mac_form_asks_for_the_report() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/mac.yml").read_text())
    required = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert {"command", "mac-check", "doctor"} <= required


@pytest.mark.slow
def test_clone_may_have_any_name(tmp_path: Path) -> None:
    tests = ("conftest.py", "prose.py", "test_prose.py")
    for name in ("__init__.py", "_version.py", "pyproject.toml", *(f"tests/{test}" for test in tests)):
        (tmp_path / "has-hyphen" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "has-hyphen" / name)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "good_prose", "tests/test_prose.py"]
    done = subprocess.run(command, cwd=tmp_path / "has-hyphen", capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
