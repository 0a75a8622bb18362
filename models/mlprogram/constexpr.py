"""Constants as the program stores them -> dense numpy arrays: `const` and the `constexpr_*` kinds.

Formulas are Apple's, from the MIL operation reference (iOS16 and iOS18 forms). Each result has the data type that the
program declares; arithmetic in between is float32, rounded once, which is what a compiler that decompresses ahead does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import PackageError
from .bits import unpack_bits
from .program import NUMPY_TYPES, Argument, Operation, Program, Value

_MAX_DEPTH = 4  # sparse, palette and scale on top of each other is the deepest that Core ML knows


class Constants:
    """The constants of a program by name, decoded when asked for; nothing is kept."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __contains__(self, name: str) -> bool:
        operation = self._program.producers.get(name)
        return operation is not None and operation.is_constant

    def array(self, argument: Argument, depth: int = 0) -> np.ndarray:
        """Return a constant, possibly a read-only view of the file; `depth` counts the constants that wait for it.

        Raises:
            PackageError: the argument is not a constant, or its parts contradict each other.
        """
        if isinstance(argument, Value):
            return argument.array()
        operation = self._program.producers.get(argument)
        if operation is None or not operation.is_constant:
            raise PackageError(
                f"{argument}: expected a constant, found a value computed at run time; export the model again"
            )
        return self.decode(operation, depth)

    def decode(self, operation: Operation, depth: int = 0) -> np.ndarray:
        """Return the result of a `const` or `constexpr_*` operation.

        Raises:
            PackageError: an unknown kind, a missing parameter, or parts that contradict each other.
        """
        decoder = _DECODERS.get(operation.kind)
        if decoder is None:
            known = ", ".join(_DECODERS)
            raise PackageError(f"{operation.name}: {operation.kind} cannot be decoded; known are {known}")
        if depth > _MAX_DEPTH:
            raise PackageError(
                f"{operation.name}: expected at most {_MAX_DEPTH} constants in a chain; export the model again"
            )
        try:
            array = decoder(_Parts(self, operation, depth))
        except (ValueError, IndexError, TypeError, OverflowError) as error:
            raise PackageError(f"{operation.name} ({operation.kind}): {error}; export the model again") from error
        declared = operation.outputs[0]
        if array.shape != declared.shape:
            raise PackageError(f"{operation.name}: expected {declared}, found {array.shape}; export the model again")
        if declared.dtype == "string":
            return array
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow stays visible as inf
            return array.astype(NUMPY_TYPES[declared.dtype], copy=False)


class _Parts:
    """Parameters of one constant operation, wherever its version keeps them."""

    def __init__(self, constants: Constants, operation: Operation, depth: int) -> None:
        self._constants = constants
        self._operation = operation
        self._depth = depth

    def __contains__(self, name: str) -> bool:
        return name in self._operation.attributes or name in self._operation.inputs

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._operation.attributes:
            return self._operation.attributes[name].array()
        arguments = self._operation.inputs.get(name, ())
        if len(arguments) != 1:
            raise ValueError(f"expected one value for {name}, found {len(arguments)}")
        return self._constants.array(arguments[0], self._depth + 1)

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(int(value) for value in self[name].reshape(-1))


def _const(parts: _Parts) -> np.ndarray:
    return parts["val"]


def _cast(parts: _Parts) -> np.ndarray:
    return parts["source_val"]  # to the declared type: always float16 -> float32


def _affine_dequantize(parts: _Parts) -> np.ndarray:
    """`scale * (quantized_data - zero_point)`, both scalars or vectors along `axis`."""
    data = parts["quantized_data"].astype(np.float32)
    (axis,) = parts.integers("axis")
    data -= _along(parts["zero_point"].astype(np.float32), axis, data)
    data *= _along(parts["scale"].astype(np.float32), axis, data)
    return data


def _along(vector: np.ndarray, axis: int, data: np.ndarray) -> np.ndarray:
    if vector.ndim == 0:
        return vector
    if vector.ndim != 1 or not -data.ndim <= axis < data.ndim or vector.size != data.shape[axis]:
        raise ValueError(f"expected a scalar or a vector along axis {axis} of {data.shape}, found shape {vector.shape}")
    shape = [1] * data.ndim
    shape[axis] = vector.size
    return vector.reshape(shape)


def _blockwise_shift_scale(parts: _Parts) -> np.ndarray:
    """`scale * (data - offset)`; each scale covers a block of `data.shape / scale.shape` elements."""
    data, scale = parts["data"], parts["scale"].astype(np.float32)
    blocks = _blocks(data.shape, scale.shape)  # (blocks 0, size 0, blocks 1, size 1, ...)
    values = data.astype(np.float32).reshape(blocks)
    if "offset" in parts:
        values -= parts["offset"].astype(np.float32).reshape(_one_per_block(scale.shape))
    values *= scale.reshape(_one_per_block(scale.shape))
    return values.reshape(data.shape)


def _blocks(shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != len(counts) or any(count < 1 or size % count for size, count in zip(shape, counts, strict=True)):
        raise ValueError(f"expected block counts that divide {shape}, found {counts}")
    return tuple(part for size, count in zip(shape, counts, strict=True) for part in (count, size // count))


def _one_per_block(counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part for count in counts for part in (count, 1))


def _lut_to_dense(parts: _Parts) -> np.ndarray:
    """`lut[index]` of each element: iOS16 packs the indices in bytes beside `shape`, iOS18 types them as uintN."""
    lut = parts["lut"]
    if "shape" in parts:
        return _packed_lut(parts["indices"], lut, parts.integers("shape"))
    indices = parts["indices"]
    if lut.ndim != indices.ndim + 2:
        raise ValueError(f"expected a table of rank {indices.ndim + 2}, found {lut.ndim}")
    axis = parts.integers("vector_axis")[0] if "vector_axis" in parts else indices.ndim - 1
    return _grouped_lut(indices, lut, axis)


def _packed_lut(packed: np.ndarray, lut: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    bits = int(lut.size).bit_length() - 1
    count = int(np.prod(shape, dtype=object))
    if lut.size != 1 << bits or bits not in (1, 2, 3, 4, 6, 8) or packed.size != (count * bits + 7) // 8:
        raise ValueError(
            f"expected indices for {shape} into 2^n values, found {packed.size} bytes and {lut.size} values"
        )
    return lut[unpack_bits(packed, bits, count)].reshape(shape)


def _grouped_lut(indices: np.ndarray, lut: np.ndarray, axis: int) -> np.ndarray:
    """Look up in `lut` (groups..., entries, vector): a table per block of indices, each entry a vector along `axis`."""
    entries, vector = lut.shape[-2:]
    if not -indices.ndim <= axis < indices.ndim or (indices.size and indices.max() >= entries):
        raise ValueError(f"expected indices below {entries} and an axis of {indices.shape}, found axis {axis}")
    groups = lut.shape[:-2]
    blocks = _blocks(indices.shape, groups)
    table = np.arange(int(np.prod(groups))).reshape(_one_per_block(groups)) * entries
    rows = (table + indices.reshape(blocks)).reshape(indices.shape)
    dense = lut.reshape(-1, vector)[rows]  # (indices..., vector)
    axis %= indices.ndim
    shape = [size * vector if i == axis else size for i, size in enumerate(indices.shape)]
    return np.moveaxis(dense, -1, axis + 1).reshape(shape)


def _sparse_to_dense(parts: _Parts) -> np.ndarray:
    """`nonzero_data` where the mask's bit is set, 0 elsewhere: iOS16 packs the mask in bytes beside `shape`."""
    mask, nonzero = parts["mask"], parts["nonzero_data"]
    if "shape" in parts:
        shape = parts.integers("shape")
        count = int(np.prod(shape, dtype=object))
        if mask.size != (count + 7) // 8:
            raise ValueError(f"expected a mask of {(count + 7) // 8} bytes for {shape}, found {mask.size}")
        mask = unpack_bits(mask, 1, count).reshape(shape)
    chosen = mask != 0
    if nonzero.shape != (np.count_nonzero(chosen),):
        raise ValueError(f"expected {np.count_nonzero(chosen)} values for the mask, found {nonzero.shape}")
    dense = np.zeros(mask.shape, dtype=nonzero.dtype)
    dense[chosen] = nonzero
    return dense


_DECODERS: dict[str, Callable[[_Parts], np.ndarray]] = {
    "const": _const,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
