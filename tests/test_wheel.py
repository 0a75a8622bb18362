"""The wheel has every module and file that the package reads, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from fastvlm.models.versions import TESTED_PYTHON

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "export", "models", "quant", "runtime")
FILES = ("__init__.py", "_version.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Returns the files in a wheel. It is built from a copy, since a build writes into its folder."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module(names: set[str]) -> None:
    modules = {
        f"fastvlm/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    }
    assert modules - names == set(), "list new packages in pyproject.toml"
    assert {"fastvlm/__init__.py", "fastvlm/_version.py"} <= names


def test_wheel_holds_what_the_package_reads(names: set[str]) -> None:
    read = [path for path in (ROOT / "models/tiny/checkpoint").iterdir() if path.suffix in (".json", ".safetensors")]
    read += (ROOT / "runtime/samples").glob("*.png")
    read += (ROOT / "quant/photographs").iterdir()
    read += (ROOT / "runtime/server/page").iterdir()
    assert {f"fastvlm/{path.relative_to(ROOT).as_posix()}" for path in read} - names == set()


def test_wheel_is_marked_as_typed(names: set[str]) -> None:
    assert "fastvlm/py.typed" in names


def test_wheel_holds_nothing_else(names: set[str]) -> None:
    own = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in own} == {"fastvlm"}
    page = {name for name in own if name.startswith("fastvlm/runtime/server/page/")}
    assert {Path(name).suffix for name in page} == {".html", ".css", ".js", ".svg"}
    kinds = {Path(name).suffix for name in own - page}
    assert kinds <= {".py", ".json", ".safetensors", ".png", ".jpg", ".md", ".typed"}
    assert not any("/tests/" in name or "/docs/" in name for name in names)


def test_pip_refuses_every_python_that_doctor_warns_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, beyond = (".".join(map(str, version)) for version in TESTED_PYTHON)
    assert project["requires-python"] == f">={first},<{beyond}"
    minors = range(TESTED_PYTHON[0][1], TESTED_PYTHON[1][1])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in minors} <= set(project["classifiers"])


def test_command_that_the_wheel_installs_is_there(names: set[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fastvlm": "fastvlm.cli.start:main"}
    assert "fastvlm/cli/start.py" in names
