"""The calls of Core ML: by the extension module alone, or else by coremltools' own classes."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models import versions
from fastvlm.models.errors import MachineError, PackageError
from fastvlm.models.versions import import_coremltools
from fastvlm.runtime import coreml
from fastvlm.runtime.coreml import COMPUTE_UNITS, CoreMLTools

EXTENSION = '''
import os, tempfile

class _MLModelProxy:
    """The constructor, predict and compileModel of libcoremlpython.so as coremltools 9.0 calls them."""

    made = []

    def __init__(self, path, compute_units, function, hints, asset):
        if TOO_NEW:
            raise TypeError("__init__(): incompatible constructor arguments")
        self.made.append([path, compute_units, function, hints, asset])

    def predict(self, data, state):
        if "images" not in data:
            raise RuntimeError('{\\n    NSLocalizedDescription = "Failed to run: error code: -14.";\\n}')
        assert state is None
        return {"image_features": data["images"] * 2}

    @staticmethod
    def compileModel(path):
        folder = os.path.join(tempfile.mkdtemp(), "x.mlmodelc")
        os.mkdir(folder)
        open(os.path.join(folder, "of"), "w").write(path)
        return folder
'''

OWN_CLASSES = """
import enum, sys, types

from . import libcoremlpython  # as coremltools does

class ComputeUnit(enum.Enum):
    CPU_ONLY = 1

class CompiledMLModel:
    def __init__(self, path, compute_units):
        self.made = [path, compute_units.name]

    def predict(self, data):
        return {"made": self.made}

models = types.SimpleNamespace(CompiledMLModel=CompiledMLModel)
"""

SCRIPT = """
import json, sys
from pathlib import Path
sys.platform = "darwin"
from fastvlm.runtime.coreml import CoreMLTools
tools = CoreMLTools("CPU_ONLY")
folder = Path(sys.argv[1])
tools.compile(folder / "a.mlpackage", folder / "a.mlmodelc")
predict = tools.open(folder / "a.mlmodelc")
extension = sys.modules.get("coremltools.libcoremlpython")
print(json.dumps({"coremltools": "coremltools" in sys.modules, "made": extension._MLModelProxy.made,
                  "found": predict({"images": 3}), "compiled": (folder / "a.mlmodelc" / "of").read_text()}))
"""


def run_with(tmp_path: Path, too_new: bool) -> dict[str, Any]:
    package = tmp_path / "site" / "coremltools"
    package.mkdir(parents=True)
    (package / "libcoremlpython.py").write_text(f"TOO_NEW = {too_new}\n{EXTENSION}")
    (package / "__init__.py").write_text(OWN_CLASSES if too_new else "raise AssertionError('imported whole')")
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{SCRIPT}", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_extension_module_predicts_without_coremltools(tmp_path: Path) -> None:
    found = run_with(tmp_path, too_new=False)
    assert found["made"] == [[str(tmp_path / "a.mlmodelc"), "CPU_ONLY", "", {}, None]]
    assert found["found"] == {"image_features": 6}
    assert found["compiled"] == str(tmp_path / "a.mlpackage")
    assert not found["coremltools"]


def test_own_classes_open_where_the_constructor_has_changed(tmp_path: Path) -> None:
    found = run_with(tmp_path, too_new=True)
    assert found["coremltools"]
    assert found["found"] == {"made": [str(tmp_path / "a.mlmodelc"), "CPU_ONLY"]}


class Model:
    """A class in place of coremltools' CompiledMLModel."""

    opened: tuple[str, object]

    def __init__(self, path: str, compute_units: object) -> None:
        type(self).opened = (path, compute_units)

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "images" not in inputs:
            raise RuntimeError('{\n    NSLocalizedDescription = "Failed to run: error code: -14.";\n}')
        return inputs


@pytest.mark.skipif(sys.platform == "darwin", reason="here the extension module exists")
@pytest.mark.parametrize("units", COMPUTE_UNITS)
def test_core_ml_tools_compile_and_open(units: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coremltools = import_coremltools()
    import coremltools.models.utils as utils

    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(utils, "compile_model", lambda source, destination: compiled.append((source, destination)))
    monkeypatch.setattr(coremltools.models, "CompiledMLModel", Model)
    tools = CoreMLTools(units)
    assert tools.version.startswith("macOS")
    tools.compile(tmp_path / "a.mlpackage", tmp_path / "a.mlmodelc")
    assert compiled == [(str(tmp_path / "a.mlpackage"), str(tmp_path / "a.mlmodelc"))]
    predict = tools.open(tmp_path / "a.mlmodelc")
    assert Model.opened == (str(tmp_path / "a.mlmodelc"), coremltools.ComputeUnit[units])
    pixels = np.zeros(3)
    assert predict({"images": pixels})["images"] is pixels
    with pytest.raises(PackageError, match=r"Core ML cannot run the package: Failed to run: error code: -14\.$"):
        predict({})


def test_newer_coremltools_predicts_and_does_not_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        versions.importlib.metadata, "version", lambda name: "10.0" if name == "coremltools" else real(name)
    )
    assert import_coremltools(conversion=False).__name__ == "coremltools"
    with pytest.raises(MachineError, match=r"coremltools 10\.0 .*pip install \"coremltools>=9\.0,<9\.1\""):
        import_coremltools()


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML works")
def test_machine_error_when_this_is_not_a_mac() -> None:
    with pytest.raises(MachineError, match="macOS only"):
        CoreMLTools("CPU_ONLY")
    assert coreml.extension_proxy() is None
