"""What an ML Program says: its types, values and operations, free of torch and of protobuf.

Every object is frozen. Values in `weights/weight.bin` are views of a memory map: nothing is read before it is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from .bits import unpack_bits

FLEXIBLE = -1
"""The size of a dimension that the program leaves open."""

BITS = {"bool": 8, "fp16": 16, "fp32": 32, "fp64": 64, "int64": 64, "uint64": 64}
BITS |= {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32)}
BITS |= {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
"""Bits of one element as stored, by MIL data type (strings are not here)."""

NUMPY_TYPES = {"bool": "bool", "fp16": "float16", "fp32": "float32", "fp64": "float64", "string": "str"}
NUMPY_TYPES |= {name: name for name in BITS if name.lstrip("u").startswith("int") and BITS[name] >= 8}
NUMPY_TYPES |= {
    "int4": "int8",
    "uint1": "uint8",
    "uint2": "uint8",
    "uint3": "uint8",
    "uint4": "uint8",
    "uint6": "uint8",
}
"""numpy's type of a decoded value, by MIL data type; types below one byte are unpacked to one byte each."""


@dataclass(frozen=True)
class TensorType:
    """A named tensor: MIL data type ("fp16", "int32", "uint4", "string") and shape (`FLEXIBLE` where open)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_fixed(self) -> bool:
        return FLEXIBLE not in self.shape

    @property
    def elements(self) -> int:
        """Number of elements; only meaningful where the shape is fixed."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: elements below one byte are packed."""
        return (self.elements * BITS.get(self.dtype, 0) + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}{[size if size != FLEXIBLE else '?' for size in self.shape]}"


@dataclass(frozen=True, eq=False)
class Value:
    """A constant. `offset` is where its entry starts in the blob file, None for an immediate value."""

    type: TensorType
    stored: np.ndarray
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return self.type.nbytes

    def array(self) -> np.ndarray:
        """Return the value as numpy: read-only and possibly a view of the file; packed types are unpacked to bytes."""
        dtype, shape = self.type.dtype, self.type.shape
        if dtype == "string" or self.stored.dtype != np.uint8:
            return self.stored.reshape(shape)
        bits = BITS[dtype]
        if bits < 8:
            return unpack_bits(self.stored, bits, self.type.elements, signed=dtype == "int4").reshape(shape)
        return self.stored.view(NUMPY_TYPES[dtype]).reshape(shape)


Argument = str | Value
"""What an operation is given: the name of an earlier result, or a value written in place."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation. Constants of the iOS16 `constexpr_*` kinds are in `attributes`, those of iOS18 in `inputs`."""

    kind: str
    name: str
    inputs: dict[str, tuple[Argument, ...]]
    attributes: dict[str, Value]
    outputs: tuple[TensorType, ...]

    @property
    def is_constant(self) -> bool:
        """Whether the result is known before any input is: `const` and the `constexpr_*` kinds."""
        return self.kind == "const" or self.kind.startswith("constexpr_")

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the earlier results that it reads, in order, with repetitions."""
        return tuple(a for arguments in self.inputs.values() for a in arguments if isinstance(a, str))

    @property
    def values(self) -> dict[str, Value]:
        """The values written in place, by parameter, attributes first."""
        literal = {k: a for k, arguments in self.inputs.items() for a in arguments if isinstance(a, Value)}
        return {**self.attributes, **literal}


@dataclass(frozen=True, eq=False)
class Program:
    """The `main` function of a saved ML Program, in execution order.

    `image_inputs` maps the inputs declared as images to their colour layout ("RGB"); their values are 0..255, NCHW.
    `metadata` holds the author's texts and coremltools' versions.
    """

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    operations: tuple[Operation, ...]
    spec_version: int
    opset: str
    metadata: dict[str, str]
    path: Path
    image_inputs: dict[str, str]

    @cached_property
    def producers(self) -> dict[str, Operation]:
        """The operation behind each result, by the result's name."""
        return {output.name: operation for operation in self.operations for output in operation.outputs}

    @cached_property
    def types(self) -> dict[str, TensorType]:
        """The type of every input and result, by name."""
        results = {output.name: output for operation in self.operations for output in operation.outputs}
        return {**{tensor.name: tensor for tensor in self.inputs}, **results}


def census(program: Program) -> Counter[str]:
    """Count operations by kind, without `const` and the `constexpr_*` kinds."""
    return Counter(operation.kind for operation in program.operations if not operation.is_constant)


def constexpr_census(program: Program) -> Counter[str]:
    """Count the `constexpr_*` operations by kind: one per compressed weight and stage of its compression."""
    return Counter(operation.kind for operation in program.operations if operation.kind.startswith("constexpr_"))


def max_rank(program: Program) -> int:
    """Return the highest rank of the inputs and of any tensor computed at run time (constants not counted)."""
    computed = [
        output.rank for operation in program.operations if not operation.is_constant for output in operation.outputs
    ]
    return max([tensor.rank for tensor in program.inputs] + computed, default=0)


def scheme(operation: Operation) -> str:
    """Return how a constant is stored: "fp16", "int8 affine", "4-bit palette", "int4 blockwise", "fp16 sparse"."""
    values, kind = operation.values, operation.kind.removeprefix("constexpr_")
    if kind == "const":
        return operation.outputs[0].dtype
    if kind == "lut_to_dense":
        lut = values.get("lut")
        entries = 0 if lut is None else lut.type.shape[0] if lut.type.rank == 1 else lut.type.shape[-2]
        return f"{max(entries - 1, 0).bit_length()}-bit palette" if entries else "palette"
    names = {
        "affine_dequantize": ("quantized_data", "affine"),
        "blockwise_shift_scale": ("data", "blockwise"),
        "sparse_to_dense": ("nonzero_data", "sparse"),
        "cast": ("source_val", "cast"),
    }
    data, suffix = names.get(kind, ("", kind))
    return f"{values[data].type.dtype} {suffix}" if data in values else suffix


def stored_bytes(program: Program) -> Counter[str]:
    """Sum the bytes of all constants in the blob files by `scheme`; a blob that two operations share counts once."""
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for operation in program.operations:
        for value in operation.values.values() if operation.is_constant else ():
            if value.offset is not None and value.offset not in seen:
                seen.add(value.offset)
                total[scheme(operation)] += value.nbytes
    return total
