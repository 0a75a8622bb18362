"""The contents of an ML Program: types, values and operations, without torch or protobuf.

Every object is frozen. Values in `weights/weight.bin` are views of a memory map, so nothing is read before it is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from ..errors import PackageError
from ..fastvit_config import Shape

FLEXIBLE = -1
"""The size of a dimension that the program leaves open."""

BITS = {"bool": 8, "fp16": 16, "fp32": 32, "fp64": 64, "int64": 64, "uint64": 64}
BITS |= {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32)}
BITS |= {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
"""The stored width of one element in bits, by MIL data type. Strings are not listed."""

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
"""numpy's type of a decoded value, by MIL data type. Types below one byte are unpacked to one byte per element."""

_WORD_BITS = 24  # a multiple of a byte and of every packed width (1, 2, 3, 4, 6)


@dataclass(frozen=True)
class TensorType:
    """A named tensor with its MIL data type ("fp16", "int32", "uint4", "string") and shape (`FLEXIBLE` where open)."""

    name: str
    dtype: str
    shape: Shape

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def is_fixed(self) -> bool:
        """True if no dimension is left open."""
        return FLEXIBLE not in self.shape

    @property
    def elements(self) -> int:
        """The number of elements, only meaningful for a fixed shape."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The stored size in bytes. Elements below one byte are packed."""
        return (self.elements * BITS.get(self.dtype, 0) + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}{[size if size != FLEXIBLE else '?' for size in self.shape]}"


@dataclass(frozen=True, eq=False)
class Value:
    """A constant. `offset` is the start of its entry in the blob file, or None for an immediate value."""

    type: TensorType
    stored: np.ndarray
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        """The stored size in bytes."""
        return self.type.nbytes

    def array(self) -> np.ndarray:
        """Returns the value as a read-only array, possibly a view of the file. Packed types are unpacked to bytes."""
        dtype, shape = self.type.dtype, self.type.shape
        if dtype == "string" or self.stored.dtype != np.uint8:
            return self.stored.reshape(shape)
        bits = BITS[dtype]
        if bits < 8:
            return unpack_bits(self.stored, bits, self.type.elements, signed=dtype == "int4").reshape(shape)
        return self.stored.view(NUMPY_TYPES[dtype]).reshape(shape)


Argument = str | Value
"""An argument of an operation: the name of an earlier result, or an immediate value."""


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
        """True for `const` and the `constexpr_*` kinds, whose result does not depend on any input."""
        return self.kind == "const" or self.kind.startswith("constexpr_")

    @property
    def references(self) -> tuple[str, ...]:
        """The names of the earlier results that it reads, in order, with repetitions."""
        return tuple(a for arguments in self.inputs.values() for a in arguments if isinstance(a, str))

    @property
    def values(self) -> dict[str, Value]:
        """The immediate values by parameter, attributes first."""
        literal = {k: a for k, arguments in self.inputs.items() for a in arguments if isinstance(a, Value)}
        return {**self.attributes, **literal}


@dataclass(frozen=True)
class Feature:
    """The description of an input or output for the model's user, where it says more than the program's type.

    Attributes:
        color: the color layout of an image ("RGB", "BGR", "GRAYSCALE", "GRAYSCALE_FLOAT16"), else an empty string.
        bounds: the smallest and largest size of each axis (no largest: `FLEXIBLE`), or empty. For an image the axes
            are height and width.
        shapes: the allowed shapes, if they are listed, or empty. For an image each is (height, width).
        default: the value of an optional input that is left out, else None.
        shape: the default shape, where several are allowed.
    """

    color: str = ""
    bounds: tuple[tuple[int, int], ...] = ()
    shapes: tuple[Shape, ...] = ()
    default: float | None = None
    shape: Shape = ()

    def allows(self, shape: Shape) -> bool:
        """Returns True if the description allows an array, or an image of (height, width), of `shape`."""
        if self.shapes:
            return shape in self.shapes
        if not self.bounds:
            return True
        return len(shape) == len(self.bounds) and all(
            low <= size and (high == FLEXIBLE or size <= high)
            for size, (low, high) in zip(shape, self.bounds, strict=True)
        )

    def sizes(self) -> str:
        """Returns the allowed sizes as text: "1 x 3 x 16 to 64", or "1 x 8 or 1 x 16"."""
        if self.shapes:
            return " or ".join(" x ".join(map(str, shape)) for shape in self.shapes)
        ends = [f"{low} or more" if high == FLEXIBLE else f"{low} to {high}" for low, high in self.bounds]
        return " x ".join(str(low) if low == high else end for end, (low, high) in zip(ends, self.bounds, strict=True))


@dataclass(frozen=True, eq=False)
class Program:
    """One function of a saved ML Program, in execution order.

    `image_inputs` maps the inputs declared as images to their color layout ("RGB"). Their values are 0..255, NCHW.
    `metadata` has the author's texts and coremltools' versions. `states` keep their values between runs. `features`
    describes inputs and outputs by name. `functions` lists the names of all functions in the package.
    """

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    operations: tuple[Operation, ...]
    spec_version: int
    opset: str
    metadata: dict[str, str]
    path: Path
    image_inputs: dict[str, str]
    states: tuple[TensorType, ...] = ()
    features: dict[str, Feature] = field(default_factory=dict)
    functions: tuple[str, ...] = ("main",)

    @cached_property
    def producers(self) -> dict[str, Operation]:
        """The operation behind each result, by the result's name."""
        return {output.name: operation for operation in self.operations for output in operation.outputs}

    @cached_property
    def types(self) -> dict[str, TensorType]:
        """The type of every input, state and result, by name."""
        results = {output.name: output for operation in self.operations for output in operation.outputs}
        return {**{tensor.name: tensor for tensor in (*self.inputs, *self.states)}, **results}


def inputs_for(program: Program, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the executor's inputs for `pixel_values` (1, 3, S, S) float32 in 0..1, NCHW, RGB.

    An input that is declared as an image takes 0..255 instead. `pixel_values` are exact multiples of 1/255.

    Raises:
        PackageError: the package has no input or several, or takes images that are not RGB.
    """
    if len(program.inputs) != 1:
        raise PackageError(f"{program.path}: must have one input, got {len(program.inputs)}")
    name = program.inputs[0].name
    layout = program.image_inputs.get(name)
    if layout is None:
        return {name: pixel_values}
    if layout != "RGB":
        raise PackageError(f"{program.path}: {name} must take RGB images, got {layout}")
    return {name: np.rint(pixel_values * np.float32(255))}


def census(program: Program) -> Counter[str]:
    """Counts operations by kind, without `const` and the `constexpr_*` kinds."""
    return Counter(operation.kind for operation in program.operations if not operation.is_constant)


def constexpr_census(program: Program) -> Counter[str]:
    """Counts the `constexpr_*` operations by kind: one per compressed weight and stage of its compression."""
    return Counter(operation.kind for operation in program.operations if operation.kind.startswith("constexpr_"))


def max_rank(program: Program) -> int:
    """Returns the highest rank of the inputs and of any tensor computed at run time. Constants are not counted."""
    computed = [
        output.rank for operation in program.operations if not operation.is_constant for output in operation.outputs
    ]
    return max([tensor.rank for tensor in program.inputs] + computed, default=0)


def scheme(operation: Operation) -> str:
    """Returns how a constant is stored: "fp16", "int8 affine", "4-bit palette", "int4 blockwise", "fp16 sparse"."""
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
    """Sums the bytes of all constants in the blob files by `scheme`. A blob that two operations share counts once."""
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for operation in program.operations:
        for value in operation.values.values() if operation.is_constant else ():
            if value.offset is not None and value.offset not in seen:
                seen.add(value.offset)
                total[scheme(operation)] += value.nbytes
    return total


def unpack_bits(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """Returns `count` integers of `bits` bits each from uint8 `packed`, one per byte: int8 if `signed`, else uint8.

    Core ML packs them from the least significant bit on, across byte borders. `bits` is 1, 2, 3, 4, 6 or 8, and
    `packed` has at least `count * bits` bits.
    """
    if bits == 8:
        return packed[:count].view(np.int8 if signed else np.uint8)
    padded = np.zeros(-(-packed.size // 3) * 3, dtype=np.uint8)
    padded[: packed.size] = packed
    low, middle, high = padded.reshape(-1, 3).astype(np.uint32).T
    words = low | middle << np.uint32(8) | high << np.uint32(16)
    shifts = np.arange(0, _WORD_BITS, bits, dtype=np.uint32)
    values = (words[:, None] >> shifts).astype(np.uint8)  # (words, values per word)
    values &= np.uint8((1 << bits) - 1)
    flat = values.reshape(-1)[:count]
    if not signed:
        return flat
    sign = np.uint8(1 << (bits - 1))
    return ((flat ^ sign).view(np.int8) - sign.astype(np.int8)).astype(np.int8)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 `values` below 2^bits one after the other, as `unpack_bits` reads them, and fills the last byte."""
    flat = values.reshape(-1)
    if bits == 8:
        return flat
    per_word = _WORD_BITS // bits
    padded = np.zeros((-(-flat.size // per_word), per_word), dtype=np.uint32)
    padded.reshape(-1)[: flat.size] = flat
    words = np.zeros(len(padded), dtype=np.uint32)
    for i in range(per_word):
        words |= padded[:, i] << np.uint32(i * bits)
    packed = np.stack([words, words >> np.uint32(8), words >> np.uint32(16)], axis=1).astype(np.uint8)
    return packed.reshape(-1)[: -(-flat.size * bits // 8)]
