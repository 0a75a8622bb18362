"""One operation, run by the executor and inferred by coremltools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastvlm.models.mlprogram import FLEXIBLE, Operation, Program, TensorType, Value
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.ops import KINDS

Evaluate = Callable[..., tuple[list[np.ndarray], list[np.ndarray | None]]]


@pytest.fixture(scope="session")
def evaluate(ct: ModuleType) -> Evaluate:
    """Returns `evaluate(kind, target="iOS17", late=False, infer=True, **parameters)`: the (executed, inferred) results.

    `late` passes every numeric parameter at run time instead of as a constant. Without `infer` coremltools only infers
    types. A result that it does not infer is None.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, types

    def type_of(name: str, var: Any) -> TensorType:
        dtype = types.builtin_to_string(var.dtype)
        shape = tuple(size if isinstance(size, int | np.integer) else FLEXIBLE for size in var.shape)
        return TensorType(name, {"str": "string"}.get(dtype, dtype), shape)

    def run(kind: str, target: str = "iOS17", late: bool = False, infer: bool = True, **parameters: Any) -> Any:
        operands = KINDS[kind].operands
        open_names = [name for name in operands if not infer and name in parameters]
        several = [(name, parameters[name]) for name in open_names]
        parts = [(name, part) for name, given in several for part in (given if isinstance(given, list) else [given])]
        open_names = [name for name in open_names if all(np.ndim(part) for key, part in parts if key == name)]
        tensors = {name: parameters.pop(name) for name in open_names}
        arrays = {
            f"{name}_{i}": np.asarray(array)
            for name, given in tensors.items()
            for i, array in enumerate(given if isinstance(given, list) else [given])
        }
        specs = {
            name: mb.TensorSpec(array.shape, types.numpy_type_to_builtin_type(array.dtype))
            for name, array in arrays.items()
        }
        with Function(specs, getattr(ct.target, target)) as function:
            for name, given in tensors.items():
                many = isinstance(given, list)
                parameters[name] = (
                    [function.inputs[f"{name}_{i}"] for i in range(len(given))]
                    if many
                    else function.inputs[f"{name}_0"]
                )
            made = getattr(mb, kind)(**parameters)
        results = list(made) if isinstance(made, tuple | list) else [made]
        feed, inputs, declared = {}, {}, []
        for name, given in results[0].op.inputs.items():
            arguments: list[str | Value] = []
            for i, var in enumerate(given if isinstance(given, tuple | list) else [given]):
                if var is None:
                    continue
                key, type = f"{name}_{i}", type_of(f"{name}_{i}", var)
                array = arrays[key] if key in arrays else np.asarray(var.val)
                if name in operands or (late and type.dtype != "string"):
                    declared.append(type)
                    feed[key] = array
                    arguments.append(key)
                else:
                    arguments.append(Value(type, array))
            if arguments:
                inputs[name] = tuple(arguments)
        outputs = tuple(type_of(f"out_{i}", var) for i, var in enumerate(results))
        operation = Operation(kind, "made", inputs, {}, outputs)
        program = Program(tuple(declared), outputs, (operation,), 8, "CoreML7", {}, Path("made"), {})
        return list(Executor(program).run(feed).values()), [var.val for var in results]

    return run


@pytest.fixture(scope="session")
def agree(evaluate: Evaluate, tolerance: Callable[[str], float]) -> Callable[..., None]:
    """Returns `agree(kind, expected=None, **parameters)`: the executor, with constant and with computed parameters,
    gives `expected`, or what coremltools infers."""

    def compare(kind: str, expected: Any = None, target: str = "iOS17", **parameters: Any) -> None:
        for late in (False, True):
            found, inferred = evaluate(kind, target, late, expected is None, **parameters)
            wanted = inferred if expected is None else expected if isinstance(expected, list) else [expected]
            for result, reference in zip(found, wanted, strict=True):
                assert reference is not None, f"coremltools does not infer {kind}"
                reference = np.asarray(reference)
                assert result.shape == reference.shape
                scale = max(1.0, float(np.abs(reference[np.isfinite(reference)]).max(initial=0)))
                np.testing.assert_allclose(
                    result.astype(np.float64),
                    reference.astype(np.float64),
                    rtol=0,
                    atol=tolerance("op_float32") * scale,
                    err_msg=f"{kind}, late={late}",
                )

    return compare
