"""Small ML Programs made with coremltools once per session, and a fixture that damages them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastvlm.models.mlprogram import model_class
from fastvlm.models.versions import import_coremltools


@pytest.fixture(scope="session")
def ct() -> ModuleType:
    return import_coremltools()


Builder = Callable[..., Any]


@pytest.fixture(scope="session")
def save_program(ct: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns `save_program(build, {"x": (1, 4)}, target="iOS17", half=False, ...)`, which returns a package's path.

    `build(mb, **inputs)` returns the outputs. Without `half` nothing is optimized or rounded.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    def save(
        build: Builder,
        inputs: dict[str, tuple[int, ...]],
        target: str = "iOS17",
        half: bool = False,
        compress: Callable[[Any], Any] | None = None,
        dtype: str = "fp32",
    ) -> Path:
        placeholders = {name: mb.TensorSpec(shape, types.string_to_builtin(dtype)) for name, shape in inputs.items()}
        program = Program()
        with Function(placeholders, getattr(ct.target, target)) as main:
            outputs = build(mb, **main.inputs)
            main.set_outputs(outputs if isinstance(outputs, list) else [outputs])
        program.add_function("main", main)
        model = ct.convert(
            program,
            minimum_deployment_target=getattr(ct.target, target),
            compute_units=ct.ComputeUnit.CPU_ONLY,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.DEFAULT if half else ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        path = tmp_path_factory.mktemp("packages") / "model.mlpackage"
        (compress(model) if compress else model).save(str(path))
        return path

    return save


@pytest.fixture(scope="session")
def small_package(save_program: Callable[..., Path]) -> Path:
    """A package of two convolutions and a GELU in float16, all weights in the blob file. Input `x` (1, 8, 6, 6)."""
    rng = np.random.default_rng(0)

    def build(mb: Any, x: Any) -> Any:
        h = mb.conv(x=x, weight=rng.normal(size=(16, 8, 3, 3)), bias=rng.normal(size=16), pad_type="same", name="first")
        h = mb.gelu(x=h, mode="EXACT", name="act")
        return mb.conv(x=h, weight=rng.normal(size=(16, 16, 1, 1)), bias=rng.normal(size=16), name="second")

    return save_program(build, {"x": (1, 8, 6, 6)}, half=True)


@pytest.fixture
def edit(tmp_path: Path) -> Callable[[Path, Callable[[Any], None]], Path]:
    """Returns `edit(package, change)`, which returns a copy whose protobuf was changed by `change(model)`."""

    def apply(package: Path, change: Callable[[Any], None]) -> Path:
        copy = tmp_path / "edited.mlpackage"
        shutil.copytree(package, copy)
        path = copy / "Data" / "com.apple.CoreML" / "model.mlmodel"
        model = model_class()()
        model.ParseFromString(path.read_bytes())
        change(model)
        path.write_bytes(model.SerializeToString())
        return copy

    return apply


@pytest.fixture(scope="session")
def block_of() -> Callable[[Any], Any]:
    """The block of operations in a parsed model."""

    def find(model: Any) -> Any:
        main = model.mlProgram.functions["main"]
        return main.block_specializations[main.opset]

    return find
