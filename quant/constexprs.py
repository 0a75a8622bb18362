"""The pass that stores weights in fewer bits while coremltools converts a program.

coremltools' own compressors read a finished package, choose the rounding and write the package again. Here the traced
network has the rounded weights already. A last pass replaces each by the operation that computes the same numbers from
the stored form. So no rounding is chosen twice, and a package is in memory once.
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
"""The suffixes that coremltools adds to the name of a convolution's module."""


def with_stored_weights(pipeline: Any, stored: Mapping[str, StoredWeight]) -> Any:
    """Adds a last pass to `pipeline`, a coremltools `PassPipeline`, that stores the convolutions' weights as given.

    The keys of `stored` are the convolutions' names in the traced network. The pass raises PackageError unless it
    finds every convolution, with the numbers of its stored form.
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
    """Replaces weights of a coremltools program. Raises PackageError if one of `stored` is missing or differs."""
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
        raise PackageError(
            f"the program must have {len(stored)} compressed weights, got {done}. Export with the pinned coremltools."
        )


def conv_name(weight_name: str) -> str:
    """Returns the name of a convolution's module from its weight's name in a program."""
    for suffix in WEIGHT_SUFFIXES:
        weight_name = weight_name.removesuffix(suffix)
    return weight_name


def check_numbers(name: str, found: np.ndarray | None, stored: StoredWeight) -> None:
    """Raises PackageError unless the program's weight equals the stored one."""
    if found is None or not np.array_equal(found, stored.dense().astype(np.float16)):
        raise PackageError(
            f"{name}: the weight in the program differs from the one stored as {stored.scheme}. "
            "Export with the pinned coremltools."
        )


def replace_weight(function: Any, conv: Any, name: str, stored: StoredWeight) -> None:
    """Replaces the weight of one convolution by its stored form."""
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
    """Builds the operation that computes the weight: an iOS 18 one in a program for iOS 18, else an iOS 16 one."""
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
    """Returns the arguments of `constexpr_lut_to_dense`."""
    if not ios18:
        indices = pack_bits(stored.indices, stored.bits)
        return {"indices": indices, "lut": stored.lut, "shape": np.array(stored.indices.shape, np.uint32)}
    groups = stored.lut.size >> stored.bits
    lut = stored.lut.reshape(groups, *[1] * (stored.indices.ndim - 1), -1, 1)
    return {"indices": stored.indices.astype(_subbyte_type(f"uint{stored.bits}")), "lut": lut}


def blockwise_parts(stored: LinearWeight) -> dict[str, Any]:
    """Returns the arguments of `constexpr_blockwise_shift_scale`."""
    return {"data": stored.data.astype(_subbyte_type(stored.scheme)), "scale": stored.scale}


def affine_parts(stored: LinearWeight) -> dict[str, Any]:
    """Returns the arguments of `constexpr_affine_dequantize`."""
    scale = stored.scale.reshape(-1)
    return {
        "quantized_data": stored.data,
        "zero_point": np.zeros(scale.size, np.int8),
        "scale": scale,
        "axis": np.int32(0),
    }


def _subbyte_type(name: str) -> Any:
    """Returns coremltools' numpy type of that name. Small integers are bytes with a mark."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))
