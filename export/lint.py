"""Rules for programs on the Neural Engine, checked on the saved package alone.

The rules are about shapes, ranks, types and operations. They come from coremltools, Apple's guidance and published
measurements. They show that a program is *eligible*. Only a compute plan on a Mac shows where it runs. Apple's own list
is `neural_engine_rules.md` in apple/coreai-models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ..models.mlprogram import (
    Constants,
    Operation,
    Program,
    TensorType,
    constexpr_census,
    stored_bytes,
)
from .engine_reports import report_of

Severity = Literal["error", "warning"]

ENGINE_OPERATIONS = frozenset(
    "add avg_pool cast clip concat conv dequantize gelu layer_norm linear matmul max_pool mul pow quantize reduce_mean "
    "relu reshape rsqrt sigmoid silu softmax split sqrt squeeze sub tanh transpose expand_dims".split()
)
"""The kinds that the engine is known to run. The encoder has 14 of them, and two more with int8 inputs."""

MAX_RANK = 5
"""The highest rank of a tensor on the engine."""

MAX_EXTENT = 16384
"""The most positions along a side of a tensor on the engine."""

MAX_CHANNELS = 65536
"""The most channels of a tensor on the engine."""

MAX_KERNEL = 13
"""The widest kernel of a convolution, and the widest average pooling, on the engine."""

MAX_FLOAT16 = 65504.0
MIN_NORMAL_FLOAT16 = 2.0**-14

SUBNORMAL_SHARE = 0.05
"""The share of subnormal numbers in a constant that is accepted."""

ROW_BYTES = 64
"""The bytes to which the engine pads a last axis."""

CHANNEL_MULTIPLE = 16
"""The multiple to which the engine pads channels."""

CACHE_BYTES = 2 * 2**20
"""The size of the engine's cache."""

STRIDE_FACTORS = (2, 3)
"""The prime factors of the strides that convolutions on the engine have without a detour."""

POOL_STRIDES = (1, 2, 4)
"""The strides of poolings that the engine has without a detour."""

PALETTE_STRIDE = 2
"""The largest stride of a convolution whose weight is a palette, and the largest that may differ along the sides."""

MAX_DILATION = 3
"""The largest dilation that is not a product of smaller ones."""

COARSE_PALETTE = 16
"""The number of values in a palette of 4 bits."""

APPLE_RULES = (
    "https://github.com/apple/coreai-models/blob/main/skills/skills/model-authoring/references/neural_engine_rules.md"
)
"""Apple's rules for the engine."""

MAX_WEIGHT_BYTES = 250 * 10**6
"""The size of a package above which it loads slowly."""

COMPRESSED_WEIGHTS_KEY = "fastvlm.compressed_weights"
"""The key of the package's metadata with the number of weights that the exporter compressed."""


@dataclass(frozen=True)
class Finding:
    """The places of a program that break one rule."""

    severity: Severity
    rule: str
    count: int
    example: str
    """The first place, with its shape or value."""
    reason: str
    advice: str
    source: str = ""
    """The address of the rule's origin. Empty for rules from coremltools and from many measurements."""

    def as_dict(self) -> dict[str, str | int]:
        """Returns the finding as it is printed with `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """A rule: the places that break it, why it matters, and what to do."""

    severity: Severity
    name: str
    places: Callable[[Program], Iterator[str]]
    reason: str
    advice: str
    source: str = ""


def lint(program: Program) -> list[Finding]:
    """Returns the broken rules of a program, errors first."""
    findings = []
    for rule in RULES:
        places = list(rule.places(program))
        if places:
            found = Finding(rule.severity, rule.name, len(places), places[0], rule.reason, rule.advice, rule.source)
            findings.append(found)
    return findings


def flexible_shapes(program: Program) -> Iterator[str]:
    """Yields the tensors whose shape is not fixed."""
    yield from (f"{tensor.name} {tensor}" for tensor in program.types.values() if not tensor.is_fixed)


def batches(program: Program) -> Iterator[str]:
    """Yields the inputs with more than one image."""
    yield from (f"{tensor.name} {tensor}" for tensor in program.inputs if tensor.rank > 2 and tensor.shape[0] > 1)


def float32_operations(program: Program) -> Iterator[str]:
    """Yields the operations that compute in float32, other than casts at the input and the output."""
    outputs = {tensor.name for tensor in program.outputs}
    inputs = {tensor.name for tensor in program.inputs}
    for operation in computed(program):
        boundary = operation.kind == "cast" and (
            operation.outputs[0].name in outputs or inputs & set(operation.references)
        )
        if not boundary and any(output.dtype == "fp32" for output in operation.outputs):
            yield f"{operation.name} ({operation.kind})"


def high_ranks(program: Program) -> Iterator[str]:
    """Yields the tensors of a rank above `MAX_RANK`."""
    yield from (f"{tensor.name} {tensor}" for tensor in results(program) if tensor.rank > MAX_RANK)


def large_extents(program: Program) -> Iterator[str]:
    """Yields the tensors with a longer side or more channels than the engine takes."""
    for tensor in results(program):
        if tensor.rank == 4 and (max(tensor.shape[2:]) > MAX_EXTENT or tensor.shape[1] > MAX_CHANNELS):
            yield f"{tensor.name} {tensor}"


def wide_kernels(program: Program) -> Iterator[str]:
    """Yields the convolutions with a kernel wider than `MAX_KERNEL`."""
    for operation in computed(program):
        weight = operation.inputs.get("weight", ())
        if operation.kind == "conv" and weight:
            shape = program.types[weight[0]].shape if isinstance(weight[0], str) else weight[0].type.shape
            if shape[-1] > MAX_KERNEL:
                yield f"{operation.name} (kernel {'x'.join(map(str, shape[2:]))})"


def foreign_operations(program: Program) -> Iterator[str]:
    """Yields the operations that the engine is not known to run."""
    for operation in computed(program):
        if operation.kind not in ENGINE_OPERATIONS:
            yield f"{operation.name} ({operation.kind})"


def block_scales(program: Program) -> Iterator[str]:
    """Yields the weights with a scale per block."""
    for operation in program.operations:
        scale = operation.values.get("scale")
        blockwise = operation.kind == "constexpr_blockwise_shift_scale"
        if blockwise and scale is not None and sum(size > 1 for size in scale.type.shape) > 1:
            yield f"{operation.name} (scales {list(scale.type.shape)})"


def missing_compression(program: Program) -> Iterator[str]:
    """Yields the number of compressed weights if it is less than the exporter compressed."""
    expected = program.metadata.get(COMPRESSED_WEIGHTS_KEY, "")
    found = sum(constexpr_census(program).values())
    if expected.isdigit() and found < int(expected):
        yield f"{found} of {expected} weights"


def broken_constants(program: Program) -> Iterator[str]:
    """Yields the constants that are NaN, infinite, or past float16."""
    for operation, values in float_constants(program):
        if not np.isfinite(values).all():
            yield f"{operation.name} (not finite)"
        elif values.dtype != np.float16 and values.size and float(np.abs(values).max()) > MAX_FLOAT16:
            yield f"{operation.name} (largest magnitude {float(np.abs(values).max()):g})"


def unfused_norms(program: Program) -> Iterator[str]:
    """Yields the operations that a fused norm would not leave."""
    yield from (f"{op.name} ({op.kind})" for op in computed(program) if op.kind in ("rsqrt", "sqrt", "pow"))


def costly_kinds(program: Program) -> Iterator[str]:
    """Yields the operations that change the memory layout."""
    yield from (f"{op.name} ({op.kind})" for op in computed(program) if op.kind in ("linear", "squeeze"))


def turned_weights(program: Program) -> Iterator[str]:
    """Yields the products that transpose a softmax."""
    constants = Constants(program)
    softmaxes = {output.name for op in computed(program) if op.kind == "softmax" for output in op.outputs}
    for operation in (op for op in computed(program) if op.kind == "matmul"):
        left, right, turn = (operation.inputs.get(name, ())[:1] for name in ("x", "y", "transpose_y"))
        turns = turn and constants.array(turn[0]).any() and softmaxes.intersection(right)
        if turns and all(isinstance(name, str) and name not in constants for name in left):
            yield f"{operation.name} (transpose_y of a softmax)"


def many_transposes(program: Program) -> Iterator[str]:
    """Yields every transpose but the first."""
    transposes = [op.name for op in computed(program) if op.kind == "transpose"]
    yield from transposes[1:]


def rank_5(program: Program) -> Iterator[str]:
    """Yields the tensors of rank 5."""
    yield from (f"{tensor.name} {tensor}" for tensor in results(program) if tensor.rank == MAX_RANK)


def large_pools(program: Program) -> Iterator[str]:
    """Yields the average poolings with a window wider than `MAX_KERNEL`."""
    for operation in computed(program):
        sizes = operation.inputs.get("kernel_sizes", ())
        if operation.kind == "avg_pool" and sizes:
            window = Constants(program).array(sizes[0])
            if window.max() > MAX_KERNEL:
                yield f"{operation.name} (window {window.tolist()})"


def short_rows(program: Program) -> Iterator[str]:
    """Yields the tensors with a last axis shorter than `ROW_BYTES`."""
    for tensor in results(program):
        if (
            tensor.rank == 4
            and tensor.elements > 0  # an untrusted package may declare none
            and tensor.nbytes // tensor.elements * tensor.shape[-1] < ROW_BYTES
        ):
            yield f"{tensor.name} {tensor}"


def border_rows(program: Program) -> Iterator[str]:
    """Yields the inputs and outputs whose last axis is not a multiple of `ROW_BYTES`."""
    arrays = (tensor for tensor in (*program.inputs, *program.outputs) if tensor.name not in program.image_inputs)
    for tensor in arrays:
        if tensor.is_fixed and tensor.rank and tensor.elements > 0:
            row_bytes = tensor.nbytes // tensor.elements * tensor.shape[-1]
            yield from [f"{tensor.name} {tensor}"] if row_bytes % ROW_BYTES else []


def odd_strides(program: Program) -> Iterator[str]:
    """Yields the convolutions and poolings whose strides are slow on the engine."""
    for operation in computed(program):
        strides = numbers(program, operation, "strides")
        unequal = min(strides, default=0) > PALETTE_STRIDE and len(set(strides)) > 1
        slow = {
            "conv": unequal or any(has_other_factors(stride) for stride in strides),
            "avg_pool": any(stride not in POOL_STRIDES for stride in strides),
            "max_pool": any(stride not in POOL_STRIDES for stride in strides),
        }
        if slow.get(operation.kind):
            yield f"{operation.name} (strides {list(strides)})"


def palette_strides(program: Program) -> Iterator[str]:
    """Yields the convolutions with a palette and a stride above `PALETTE_STRIDE`."""
    palettes = {op.outputs[0].name for op in program.operations if op.kind == "constexpr_lut_to_dense" and op.outputs}
    for operation in computed(program):
        strides = numbers(program, operation, "strides")
        palette = operation.kind == "conv" and palettes.intersection(operation.inputs.get("weight", ()))
        if palette and max(strides, default=0) > PALETTE_STRIDE:
            yield f"{operation.name} (strides {list(strides)})"


def large_dilations(program: Program) -> Iterator[str]:
    """Yields the convolutions with a dilation above `MAX_DILATION`."""
    for operation in computed(program):
        dilations = numbers(program, operation, "dilations")
        if operation.kind == "conv" and max(dilations, default=0) > MAX_DILATION:
            yield f"{operation.name} (dilations {list(dilations)})"


def large_softmaxes(program: Program) -> Iterator[str]:
    """Yields the softmaxes over positions whose operand does not fit into the engine's cache, the largest first."""
    found = []
    for operation in (op for op in computed(program) if op.kind == "softmax"):
        (axis, *_) = (*numbers(program, operation, "axis"), -1)
        found += [scores for scores in operation.outputs if scores.is_fixed and scores.rank == 4 and axis % 4 != 1]
    for scores in sorted(found, key=lambda tensor: -tensor.nbytes):
        if scores.nbytes > CACHE_BYTES:
            yield f"{scores.name} {scores}, {scores.nbytes / 2**20:.1f} MiB"


def int8_products(program: Program) -> Iterator[str]:
    """Yields the products of tensors that come from `dequantize` and go into `quantize`."""
    dequantized = {out.name for op in computed(program) if op.kind == "dequantize" for out in op.outputs}
    quantized = {name for op in computed(program) if op.kind == "quantize" for name in op.references}
    for operation in computed(program):
        if operation.kind == "mul" and dequantized.intersection(operation.references):
            yield from (f"{operation.name} {out}" for out in operation.outputs if out.name in quantized)


def palettes_of_ios18(program: Program) -> Iterator[str]:
    """Yields the palettes in iOS 18's operation."""
    for operation in program.operations:
        if operation.kind == "constexpr_lut_to_dense" and "shape" not in {*operation.inputs, *operation.attributes}:
            yield f"{operation.name} {operation.outputs[0]}"


def coarse_palettes(program: Program) -> Iterator[str]:
    """Yields the weights with one palette of at most `COARSE_PALETTE` values, in the operation before iOS 18."""
    for operation in program.operations:
        lut = operation.values.get("lut") if operation.kind == "constexpr_lut_to_dense" else None
        if lut is not None and "shape" in operation.values and 0 < lut.type.elements <= COARSE_PALETTE:
            yield f"{operation.name} {operation.outputs[0]}"


def odd_channels(program: Program) -> Iterator[str]:
    """Yields the convolutions with a number of channels that is padded."""
    for operation in computed(program):
        channels = operation.outputs[0].shape[1:2] if operation.kind == "conv" and operation.outputs else ()
        if any(count % CHANNEL_MULTIPLE for count in channels):
            yield f"{operation.name} {operation.outputs[0]}"


def large_operands(program: Program) -> Iterator[str]:
    """Yields the tensors that do not fit into the engine's cache, the largest first."""
    tensors = sorted(results(program), key=lambda tensor: -tensor.nbytes)
    yield from (
        f"{tensor.name} {tensor}, {tensor.nbytes / 2**20:.1f} MiB" for tensor in tensors if tensor.nbytes > CACHE_BYTES
    )


def heavy_weights(program: Program) -> Iterator[str]:
    """Yields the size of the weights if it is above `MAX_WEIGHT_BYTES`."""
    total = sum(stored_bytes(program).values())
    if total > MAX_WEIGHT_BYTES:
        yield f"{total / 1e6:.0f} MB"


def subnormal_constants(program: Program) -> Iterator[str]:
    """Yields the constants with many numbers too small for full precision in float16."""
    for operation, values in float_constants(program):
        if values.dtype != np.float16 or not values.ndim:  # an epsilon is meant to be small
            continue
        count = int(np.count_nonzero((np.abs(values) < MIN_NORMAL_FLOAT16) & (values != 0)))
        if count > SUBNORMAL_SHARE * values.size:
            yield f"{operation.name} ({count} of {values.size} numbers)"


def numbers(program: Program, operation: Operation, name: str) -> tuple[int, ...]:
    """Returns the constant integers of an argument. Empty if it is missing, or computed for each image."""
    constants = Constants(program)
    given = operation.inputs.get(name, ())
    if len(given) != 1 or (isinstance(given[0], str) and given[0] not in constants):
        return ()
    return tuple(int(value) for value in constants.array(given[0]).reshape(-1))


def has_other_factors(number: int) -> bool:
    """Returns True if a number has a prime factor besides `STRIDE_FACTORS`."""
    for factor in STRIDE_FACTORS:
        while number > 1 and number % factor == 0:
            number //= factor
    return number > 1


def computed(program: Program) -> Iterator[Operation]:
    """Yields the operations that run for each image."""
    return (operation for operation in program.operations if not operation.is_constant)


def results(program: Program) -> Iterator[TensorType]:
    """Yields the tensors of fixed shape that are computed for each image."""
    return (output for operation in computed(program) for output in operation.outputs if output.is_fixed)


def float_constants(program: Program) -> Iterator[tuple[Operation, np.ndarray]]:
    """Yields each floating-point constant and its values: dense weights, scales and tables of compressed weights."""
    for operation in program.operations:
        if operation.is_constant:
            for value in operation.values.values():
                if value.type.dtype in ("fp16", "fp32"):
                    yield operation, value.array()


RULES = (
    Rule("error", "fixed shapes", flexible_shapes, "flexible shapes lose the engine", "convert at one image size",
         APPLE_RULES),
    Rule("error", "batch of one", batches, "the engine runs one image at a time", "export with batch 1"),
    Rule("error", "float16", float32_operations, "the engine computes in float16 only",
         "convert with float16 precision", APPLE_RULES),
    Rule("error", "rank", high_ranks, f"the engine takes rank {MAX_RANK} at most", "merge axes before the operation",
         APPLE_RULES),
    Rule("error", "extent", large_extents,
         f"the engine takes {MAX_EXTENT} along a side and {MAX_CHANNELS} channels at most", "use a smaller image size"),
    Rule("error", "kernel width", wide_kernels, f"the engine takes kernels of {MAX_KERNEL} at most",
         "split the convolution into smaller ones"),
    Rule("error", "operations", foreign_operations, "the engine is not known to run this operation",
         "rewrite it with convolutions, matmul and elementwise operations"),
    Rule("error", "block scales", block_scales, "per-block scales were wrong on the engine, without an error",
         "quantize per channel", report_of("int4", "ios18").source),
    Rule("error", "compression", missing_compression, "the package has fewer compressed weights than were written",
         "export again with the pinned coremltools"),
    Rule("error", "constants", broken_constants, "the engine would compute NaN or infinity from it",
         "check the checkpoint for damaged tensors, and mask with -40000", APPLE_RULES),
    Rule("warning", "int8 products", int8_products,
         "a product between quantize and dequantize was wrong by a factor of 2 to 8 in Core AI",
         "keep it in float16", report_of("w8a8", "ios17").source),
    Rule("warning", "4-bit palettes", coarse_palettes, "one palette of 16 values per weight was wrong on the engine",
         "use int8 or 8-bit palettes, or compare on your Mac", report_of("pal4", "ios17").source),
    Rule("warning", "iOS 18 palettes", palettes_of_ios18, "palettes for iOS 18 ended the process at load on macOS 26",
         "export for iOS 17", report_of("pal8", "ios18").source),
    Rule("warning", "palette strides", palette_strides,
         f"convolutions with palettes take strides of {PALETTE_STRIDE} at most", "store the weight as int8",
         APPLE_RULES),
    Rule("warning", "strides", odd_strides, "strides are products of 2 and 3 in convolutions, and 2 or 4 in poolings",
         "split the stride over several layers", APPLE_RULES),
    Rule("warning", "dilations", large_dilations, f"dilations past {MAX_DILATION} are slow",
         "use a chain of smaller ones", APPLE_RULES),
    Rule("warning", "unfused norm", unfused_norms, "a layer norm in parts is eight operations, and loses precision",
         "write it so that the converter fuses it", APPLE_RULES),
    Rule("warning", "costly kinds", costly_kinds, "linear and squeeze change the memory layout",
         "use 1x1 convolutions and keep four axes", APPLE_RULES),
    Rule("warning", "turned weights", turned_weights, "on a GPU it can abort the process: MLIR pass manager failed",
         "compute the scores as key^T query, with softmax over the keys, then value times the weights"),
    Rule("warning", "large softmax", large_softmaxes,
         "a softmax over positions cannot be split over them, which costs most for large scores",
         "use a smaller image size, or --attention-tiles", APPLE_RULES),
    Rule("warning", "transposes", many_transposes, "each transpose copies its operand",
         "keep channels first throughout", APPLE_RULES),
    Rule("warning", "rank 5", rank_5, "rank 5 is slower on the engine", "stay at rank 4"),
    Rule("warning", "large pools", large_pools, f"average pooling past {MAX_KERNEL} falls to the CPU",
         "use reduce_mean"),
    Rule("warning", "short rows", short_rows,
         f"a last axis under {ROW_BYTES} bytes is padded to that, and one of a single number to 32 times its bytes",
         "put the longest axis last, or use a larger image", APPLE_RULES),
    Rule("warning", "border rows", border_rows,
         f"the last axis of inputs and outputs is aligned to {ROW_BYTES} bytes, and others are copied",
         "use a multiple of 32 numbers", APPLE_RULES),
    Rule("warning", "odd channels", odd_channels, f"channels are padded to a multiple of {CHANNEL_MULTIPLE}",
         "choose widths that are multiples"),
    Rule("warning", "large operands", large_operands, f"operands past {CACHE_BYTES >> 20} MiB leave the engine's cache",
         "nothing is needed, and a smaller image size makes them smaller"),
    Rule("warning", "heavy weights", heavy_weights, f"packages past {MAX_WEIGHT_BYTES // 10**6} MB load slowly",
         "use int8"),
    Rule("warning", "subnormal constants", subnormal_constants, "numbers below 6e-5 lose precision in float16",
         "fold scales into larger weights"),
)  # fmt: skip
