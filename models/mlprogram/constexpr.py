"""Decodes stored constants into dense numpy arrays: `const` and the `constexpr_*` kinds.

The formulas are Apple's, from the MIL operation reference (iOS16 and iOS18 forms). Each result has the data type that
the program declares. Arithmetic in between is float32 and is rounded once, like in a compiler that decompresses ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import PackageError
from .program import NUMPY_TYPES, Argument, Operation, Program, Shape, Value, unpack_bits

MAX_DEPTH = 4
"""The longest chain of constants. Core ML's deepest is sparse, palette and scale on top of each other."""


class Constants:
    """The constants of a program by name. They are decoded on request and not cached."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __contains__(self, name: str) -> bool:
        operation = self._program.producers.get(name)
        return operation is not None and operation.is_constant

    def array(self, argument: Argument, depth: int = 0) -> np.ndarray:
        """Returns a constant, possibly a read-only view of the file. `depth` is its depth in a chain of constants.

        Raises:
            PackageError: the argument is not a constant, or its parts contradict each other.
        """
        if isinstance(argument, Value):
            return argument.array()
        operation = self._program.producers.get(argument)
        if operation is None or not operation.is_constant:
            raise PackageError(f"{argument}: must be a constant, got a value computed at run time")
        index = next(i for i, output in enumerate(operation.outputs) if output.name == argument)
        return self.decode(operation, depth, index)

    def decode(self, operation: Operation, depth: int = 0, index: int = 0) -> np.ndarray:
        """Returns the result number `index` of a `const` or `constexpr_*` operation. The sparse kinds have two.

        Raises:
            PackageError: the kind is unknown, a parameter is missing, or parameters contradict each other.
        """
        decoder = _DECODERS.get(operation.kind)
        if decoder is None:
            raise PackageError(f"{operation.name}: kind must be one of {', '.join(_DECODERS)}, got {operation.kind}")
        if depth > MAX_DEPTH:
            raise PackageError(f"{operation.name}: must have at most {MAX_DEPTH} constants in a chain, got more")
        try:
            found = decoder(_Parts(self, operation, depth))
        except (ValueError, IndexError, TypeError, OverflowError) as error:
            raise PackageError(f"{operation.name} ({operation.kind}): {error}") from error
        array = found[index] if isinstance(found, tuple) else found
        declared = operation.outputs[index]
        if array.shape != declared.shape:
            raise PackageError(f"{operation.name}: must be {declared}, got shape {array.shape}")
        if declared.dtype == "string":
            return array
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow stays visible as inf
            return array.astype(NUMPY_TYPES[declared.dtype], copy=False)


class _Parts:
    """The parameters of one constant operation, from its attributes (iOS16) or its inputs (iOS18)."""

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
            raise ValueError(f"{name} must be one value, got {len(arguments)}")
        return self._constants.array(arguments[0], self._depth + 1)

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(int(value) for value in self[name].reshape(-1))


def _const(parts: _Parts) -> np.ndarray:
    return parts["val"]


def _cast(parts: _Parts) -> np.ndarray:
    return parts["source_val"]  # to the declared type: always float16 -> float32


def _affine_dequantize(parts: _Parts) -> np.ndarray:
    """Returns `scale * (quantized_data - zero_point)`, both scalars or vectors along `axis`."""
    data = parts["quantized_data"].astype(np.float32)
    (axis,) = parts.integers("axis")
    data -= _along(parts["zero_point"].astype(np.float32), axis, data)
    data *= _along(parts["scale"].astype(np.float32), axis, data)
    return data


def _along(vector: np.ndarray, axis: int, data: np.ndarray) -> np.ndarray:
    if vector.ndim == 0:
        return vector
    if vector.ndim != 1 or not -data.ndim <= axis < data.ndim or vector.size != data.shape[axis]:
        raise ValueError(f"must be a scalar or a vector along axis {axis} of {data.shape}, got shape {vector.shape}")
    shape = [1] * data.ndim
    shape[axis] = vector.size
    return vector.reshape(shape)


def _blockwise_shift_scale(parts: _Parts) -> np.ndarray:
    """Returns `scale * (data - offset)`. Each scale covers a block of `data.shape / scale.shape` elements."""
    return _scaled_blocks(parts, parts["data"])


def _scaled_blocks(parts: _Parts, data: np.ndarray) -> np.ndarray:
    scale = parts["scale"].astype(np.float32)
    blocks = _blocks(data.shape, scale.shape)  # (blocks 0, size 0, blocks 1, size 1, ...)
    values = data.astype(np.float32).reshape(blocks)
    if "offset" in parts:
        values -= parts["offset"].astype(np.float32).reshape(_one_per_block(scale.shape))
    values *= scale.reshape(_one_per_block(scale.shape))
    return values.reshape(data.shape)


def _blocks(shape: Shape, counts: Shape) -> Shape:
    if len(shape) != len(counts) or any(count < 1 or size % count for size, count in zip(shape, counts, strict=True)):
        raise ValueError(f"block counts must divide {shape}, got {counts}")
    return tuple(part for size, count in zip(shape, counts, strict=True) for part in (count, size // count))


def _one_per_block(counts: Shape) -> Shape:
    return tuple(part for count in counts for part in (count, 1))


def _lut_to_dense(parts: _Parts) -> np.ndarray:
    """Returns `lut[index]` of each element. iOS16 packs indices into bytes with a `shape`, iOS18 has uintN indices."""
    lut = parts["lut"]
    if "shape" in parts:
        return _packed_lut(parts["indices"], lut, parts.integers("shape"))
    return _looked_up(parts, parts["indices"])


def _looked_up(parts: _Parts, indices: np.ndarray) -> np.ndarray:
    lut = parts["lut"]
    if lut.ndim != indices.ndim + 2:
        raise ValueError(f"lut must have rank {indices.ndim + 2}, got {lut.ndim}")
    axis = parts.integers("vector_axis")[0] if "vector_axis" in parts else indices.ndim - 1
    return _grouped_lut(indices, lut, axis)


def _packed_lut(packed: np.ndarray, lut: np.ndarray, shape: Shape) -> np.ndarray:
    bits = int(lut.size).bit_length() - 1
    count = int(np.prod(shape, dtype=object))
    if lut.size != 1 << bits or bits not in (1, 2, 3, 4, 6, 8) or packed.size != (count * bits + 7) // 8:
        raise ValueError(f"must be indices for {shape} into 2^n values, got {packed.size} bytes and {lut.size} values")
    return lut[unpack_bits(packed, bits, count)].reshape(shape)


def _grouped_lut(indices: np.ndarray, lut: np.ndarray, axis: int) -> np.ndarray:
    """Looks up `lut` (groups..., entries, vector): one table per block of indices, each entry a vector along `axis`."""
    entries, vector = lut.shape[-2:]
    if not -indices.ndim <= axis < indices.ndim or (indices.size and indices.max() >= entries):
        raise ValueError(f"indices must be below {entries} and axis one of {indices.shape}, got axis {axis}")
    groups = lut.shape[:-2]
    blocks = _blocks(indices.shape, groups)
    table = np.arange(int(np.prod(groups))).reshape(_one_per_block(groups)) * entries
    rows = (table + indices.reshape(blocks)).reshape(indices.shape)
    dense = lut.reshape(-1, vector)[rows]  # (indices..., vector)
    axis %= indices.ndim
    shape = [size * vector if i == axis else size for i, size in enumerate(indices.shape)]
    return np.moveaxis(dense, -1, axis + 1).reshape(shape)


def _sparse_to_dense(parts: _Parts) -> np.ndarray:
    """Returns `nonzero_data` where the mask is set and 0 elsewhere. iOS16 packs the mask into bytes with a `shape`."""
    mask, nonzero = parts["mask"], parts["nonzero_data"]
    if "shape" in parts:
        shape = parts.integers("shape")
        count = int(np.prod(shape, dtype=object))
        if mask.size != (count + 7) // 8:
            raise ValueError(f"the mask for {shape} must have {(count + 7) // 8} bytes, got {mask.size}")
        mask = unpack_bits(mask, 1, count).reshape(shape)
    return _spread(nonzero, mask)


def _spread(nonzero: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns `nonzero` in the places where `mask` is set, and 0 elsewhere."""
    chosen = mask != 0
    if nonzero.shape != (np.count_nonzero(chosen),):
        raise ValueError(f"must have {np.count_nonzero(chosen)} values for the mask, got shape {nonzero.shape}")
    dense = np.zeros(mask.shape, dtype=nonzero.dtype)
    dense[chosen] = nonzero
    return dense


Sparse = tuple[np.ndarray, np.ndarray]
"""(mask, the values where it is set)."""


def _sparse_blockwise_shift_scale(parts: _Parts) -> Sparse:
    """Returns the values of `blockwise_shift_scale` where the mask is set."""
    mask = parts["data_mask"]
    return mask, _scaled_blocks(parts, _spread(parts["nonzero_data"], mask))[mask != 0]


def _lut_to_sparse(parts: _Parts) -> Sparse:
    """Returns the values of `lut_to_dense` where the mask is set. With vectors the mask grows along their axis."""
    mask = parts["indices_mask"]
    dense = _looked_up(parts, _spread(parts["indices_nonzero_data"], mask))
    axis = parts.integers("vector_axis")[0] if "vector_axis" in parts else mask.ndim - 1
    grown = np.repeat(mask, parts["lut"].shape[-1], axis)
    return grown, dense[grown != 0]


_DECODERS: dict[str, Callable[[_Parts], np.ndarray | Sparse]] = {
    "const": _const,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
