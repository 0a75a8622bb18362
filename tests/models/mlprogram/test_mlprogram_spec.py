"""The protobuf classes load without coremltools, and get along with it in either order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OURS = "from fastvlm.models.mlprogram.spec import model_class; M = model_class()"
THEIRS = "import coremltools as ct; R = ct.proto.Model_pb2.Model"
SAME = """
from coremltools.converters.mil import Builder as mb
spec = M(specificationVersion=8)
spec.description.input.add(name="images")
assert M is R, "two classes for one message"
assert R.FromString(spec.SerializeToString()).description.input[0].name == "images"
assert ct.proto.MIL_pb2.Program is type(spec.mlProgram)
"""


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("order", [(OURS, THEIRS), (THEIRS, OURS)], ids=["before coremltools", "after coremltools"])
def test_model_class_is_coremltools_own_in_either_order(order: tuple[str, str]) -> None:
    python("\n".join([*order, SAME]))


def test_reading_imports_neither_coremltools_nor_torch() -> None:
    code = f"{OURS}\nimport sys, fastvlm.models.mlprogram as m\nm.read_package\n"
    loaded = python(code + "print([n for n in ('coremltools', 'torch', 'mlx') if n in sys.modules])")
    assert loaded.strip() == "[]"


def test_executor_is_an_attribute_of_the_package() -> None:
    code = "import fastvlm.models.mlprogram as m, sys; m.Executor; print('torch' in sys.modules)"
    assert python(code).strip() == "True"


def test_missing_coremltools_is_a_known_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm.models.errors import MachineError
    from fastvlm.models.mlprogram import spec

    monkeypatch.setattr(spec.importlib.machinery.PathFinder, "find_spec", lambda *_: None)
    monkeypatch.setattr(spec, "_ALIAS", "an_alias_of_this_test")
    with pytest.raises(MachineError, match="pip install coremltools"):
        spec.model_class()
