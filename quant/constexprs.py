"""Weights that were stored in fewer bits, put into a program while coremltools converts it.

coremltools' own compressors read a finished package, choose the rounding themselves and write it again. Here the
network that is traced holds the rounded weights already; a last pass over the program swaps each for the operation that
makes the same numbers from the stored ones. Nothing is decided twice, and a package in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..models.errors import PackageError
from ..models.mlprogram.program import pack_bits
from .schemes import LinearWeight, PaletteWeight, StoredWeight

PASS_NAME = "fastvlm::store_weights"
WEIGHT_SUFFIXES = ("_to_fp16", ".weight")
"""What coremltools makes of the name of a convolution's module."""


def with_stored_weights(pipeline: Any, stored: Mapping[str, StoredWeight]) -> Any:
    """`pipeline` (a coremltools `PassPipeline`) with a last pass that stores the convolutions' weights as given.

    `stored` goes by the convolutions' names in the network that was traced.
    The pass raises PackageError unless it finds each of them, with the numbers that its stored form stands for.
    """
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    if PASS_NAME not in PASS_REGISTRY:
        _register()
    pipeline.append_pass(PASS_NAME)
    pipeline.set_options(PASS_NAME, {"stored": stored})
    return pipeline


def _register() -> None:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace=PASS_NAME.split("::")[0], name=PASS_NAME.split("::")[1])
    class StoreWeights(AbstractGraphPass):
        stored: Mapping[str, StoredWeight] = {}

        def apply(self, prog: Any) -> None:
            store_weights(prog, self.stored)


def store_weights(prog: Any, stored: Mapping[str, StoredWeight]) -> None:
    """Swaps weights of a coremltools program. Raises PackageError when one of `stored` is not there, or is another."""
    done = 0
    for function in prog.functions.values():
        with function:
            for conv in [op for op in function.operations if op.op_type == "conv"]:
                name = conv_name(conv.weight.name)
                if name in stored:
                    check_numbers(name, conv.weight.val, stored[name])
                    replace_weight(function, conv, f"{name}_{done}_{stored[name].scheme}", stored[name])
                    done += 1
    if done != len(stored):
        raise PackageError(f"{len(stored)} of the encoder's weights should be compressed; the program has {done}")


def conv_name(weight_name: str) -> str:
    for suffix in WEIGHT_SUFFIXES:
        weight_name = weight_name.removesuffix(suffix)
    return weight_name


def check_numbers(name: str, found: np.ndarray | None, stored: StoredWeight) -> None:
    if found is None or not np.array_equal(found, stored.dense().astype(np.float16)):
        raise PackageError(
            f"{name}: the program holds another weight than the one that was stored as {stored.scheme}; "
            "export again with the pinned coremltools"
        )


def replace_weight(function: Any, conv: Any, name: str, stored: StoredWeight) -> None:
    old = conv.weight
    function.replace_uses_of_var_after_op(
        anchor_op=old.op,
        end_op=conv,
        old_var=old,
        new_var=constexpr(stored, name, before=conv),
        no_check_var_types=True,
    )
    if not old.child_ops:
        function.remove_ops([old.op])


def constexpr(stored: StoredWeight, name: str, before: Any) -> Any:
    """The operation that makes the weight: iOS 16's kinds, or iOS 18's in a program for that."""
    from coremltools.converters.mil._deployment_compatibility import AvailableTarget
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with

    ios18 = is_current_opset_version_compatible_with(AvailableTarget.iOS18)
    if isinstance(stored, PaletteWeight):
        kind, parts = "constexpr_lut_to_dense", palette_parts(stored, ios18)
    elif ios18:
        kind, parts = "constexpr_blockwise_shift_scale", blockwise_parts(stored)
    else:
        kind, parts = "constexpr_affine_dequantize", affine_parts(stored)
    return getattr(Builder, kind)(**parts, name=name, before_op=before)


def palette_parts(stored: PaletteWeight, ios18: bool) -> dict[str, Any]:
    if not ios18:
        indices = pack_bits(stored.indices, stored.bits)
        return {"indices": indices, "lut": stored.lut, "shape": np.array(stored.indices.shape, np.uint32)}
    lut = stored.lut.reshape(*[1] * stored.indices.ndim, -1, 1)
    return {"indices": stored.indices.astype(_subbyte_type(f"uint{stored.bits}")), "lut": lut}


def blockwise_parts(stored: LinearWeight) -> dict[str, Any]:
    return {"data": stored.data.astype(_subbyte_type(stored.scheme)), "scale": stored.scale}


def affine_parts(stored: LinearWeight) -> dict[str, Any]:
    scale = stored.scale.reshape(-1)
    return {
        "quantized_data": stored.data,
        "zero_point": np.zeros(scale.size, np.int8),
        "scale": scale,
        "axis": np.int32(0),
    }


def _subbyte_type(name: str) -> Any:
    """coremltools' numpy type of that name; small integers are bytes with a mark."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))
