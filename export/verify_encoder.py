"""The exported encoder compared with the checkpoint's: outputs, stage by stage, and weight by weight.

The checkpoint's encoder runs in float32, the package in the executor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.errors import VerificationError
from ..models.fastvit import FastViT
from ..models.fastvit_config import FastViTConfig
from ..models.mlprogram.constexpr import Constants
from ..models.mlprogram.executor import Executor
from ..models.mlprogram.package import read_package
from ..models.mlprogram.program import Operation, Program, inputs_for, scheme
from ..quant.calibration import NOISE, ImageSet
from ..quant.encoder import convolutions
from ..quant.metrics import SHIFTED_ROW, Agreement, WeightAudit, compare
from .rewrite import STREAM_LIMIT, EngineAttentionBlock

FLOAT16_MAX = 65504.0

ALL, HEAD = "all", "head"
"""The names of the agreement over all images, and of the part behind the last stage."""

IN_BETWEEN = ("quantize", "dequantize", "cast")
"""The operations that may come between a convolution and the one that reads its result."""

CONVOLUTIONS = {"stem": 3, "downsampling": 2, "repmixer": 4, "attention": 5}
"""The number of convolutions in each part of the rewritten encoder. A stage's last one is the last to write its
residual stream."""

LEAST_BIAS_BITS = 6
"""The fewest bits of weights whose biases are compared."""


@dataclass(frozen=True)
class EncoderReference:
    """The results of the checkpoint's encoder, float32."""

    features: list[np.ndarray]
    """`image_features` (1, N, C) of each image."""
    stages: dict[str, np.ndarray]
    """The results (1, C, H, W) of the stem and of each stage for the first image."""
    last_convolutions: dict[str, int]
    """The place of each one's last convolution in the rewritten encoder."""


def encoder_reference(encoder: FastViT, images: Sequence[np.ndarray]) -> EncoderReference:
    """Runs the checkpoint's encoder on `images`, (1, 3, S, S) each."""
    features: list[np.ndarray] = []
    stages: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for image in images:
            x = encoder.patch_embed(torch.from_numpy(image))
            found = {"stem": x}
            for part in encoder.network:
                x = part(x)
                if isinstance(part, nn.Sequential):
                    found[f"stage {len(found) - 1}"] = x
            features.append(encoder.features(x).numpy())
            stages = stages or {name: tensor.numpy() for name, tensor in found.items()}
    return EncoderReference(features, stages, last_convolutions(encoder.config))


def reference_features(encoder: FastViT, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns `image_features` (1, N, C) of each image, float32."""
    with torch.inference_mode():
        return [encoder(torch.from_numpy(image)).numpy() for image in images]


def last_convolutions(config: FastViTConfig) -> dict[str, int]:
    """Returns the place of the last convolution of the stem and of each stage, in the order of the computation."""
    count = CONVOLUTIONS["stem"]
    places = {"stem": count - 1}
    for index, (depth, mixer, kernel) in enumerate(
        zip(config.depths, config.token_mixers, config.pos_emb_kernels, strict=True)
    ):
        count += CONVOLUTIONS["downsampling"] if index else 0
        count += depth * CONVOLUTIONS[mixer] + (kernel is not None)
        places[f"stage {index}"] = count - 1
    return places


@dataclass(frozen=True)
class EncoderVerification:
    """The agreement of an exported encoder with the checkpoint's."""

    output: Agreement
    """The agreement over all images. Noise does not count, as it is far from what an encoder was trained on."""
    stages: dict[str, float]
    """The SNR in dB of the stem and of each stage on the way."""
    weights: WeightAudit
    ranges: dict[str, float]
    """The largest magnitude of every result inside over the images, by name: in float16 for a package."""
    kinds: dict[str, Agreement] = field(default_factory=dict)
    """The agreement by the kind of images, with noise unless it overflows."""
    load: dict[str, dict[str, float]] = field(default_factory=dict)
    """The largest magnitude of each stage's results as a share of float16's largest number, by the kind of images. It
    is below 1 unless float16 overflows, and is empty for an encoder in MLX."""
    modes: dict[str, float | None] = field(default_factory=dict)
    """The SNR in dB of the first image's output by the executor's precision, `float16` and `float16-accumulate`, or
    None if it overflows. It is empty if only one was run."""

    @property
    def large(self) -> dict[str, float]:
        """Results past a quarter of float16's range, the largest first. Unusual images could make them overflow."""
        found = {name: value for name, value in self.ranges.items() if value > STREAM_LIMIT}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user, one line each."""
        notes = []
        if self.large:
            name, largest = next(iter(self.large.items()))
            notes.append(
                f"{len(self.large)} results inside the package pass a quarter of float16's range, which ends at "
                f"65,504: {name} reaches {largest:,.0f}"
            )
        overflowing = [stage for stage, share in self.load.get("noise", {}).items() if not share < 1]
        if overflowing:
            notes.append(f"standard-normal noise overflows float16 in {overflowing[0]}, but no image does")
        return tuple(notes)


def verify_encoder(
    package: Path,
    images: ImageSet,
    reference: EncoderReference,
    expected: Sequence[np.ndarray],
    network: nn.Module,
    stream_scales: Sequence[float],
    *,
    accumulate: bool = False,
) -> EncoderVerification:
    """Runs the saved package in float16 on `images` and compares its output with `expected`, one for each.

    Args:
        network: what the package was made from: the checkpoint's encoder, rewritten, with its weights uncompressed.
        stream_scales: the power of two by which each stage's residual stream was scaled.
        accumulate: True also runs the first image with products that are summed in float16.

    Raises:
        VerificationError: the package overflows float16 on an image, or has other convolutions than `network`.
    """
    program = read_package(package)
    audit = audit_program(program, network)
    names = stage_results(program, reference.last_convolutions)
    (output,) = program.outputs
    executor = Executor(program, precision="float16", record_ranges=True, outputs=[output.name, *names.values()])
    outputs: list[np.ndarray] = []
    stages: dict[str, float] = {}
    ranges: dict[str, float] = {}
    load: dict[str, dict[str, float]] = {}
    for image, kind in zip(images, images.kinds, strict=True):
        executor.ranges = {}
        results = executor.run(inputs_for(program, image))
        if executor.first_overflow and kind != NOISE:
            raise VerificationError(
                f"{package.name}: float16 overflows (first at {executor.first_overflow}). The Neural Engine would "
                "return NaN or infinite features."
            )
        outputs.append(results[output.name].astype(np.float32))
        if not stages:
            stages = _stage_snr(reference, {stage: results[name] for stage, name in names.items()}, stream_scales)
        float16 = {name: value for name, value in executor.ranges.items() if program.types[name].dtype == "fp16"}
        merge_largest(load.setdefault(kind, {}), stage_load(program, names, float16))
        if kind != NOISE:
            merge_largest(ranges, float16)
    kinds = agreements(images, expected, outputs, output.name)
    modes: dict[str, float | None] = {}
    if accumulate:
        summed = Executor(program, precision="float16-accumulate").run(inputs_for(program, images[0]))[output.name]
        for precision, one in (("float16", outputs[0]), ("float16-accumulate", summed.astype(np.float32))):
            finite = np.isfinite(one).all()
            modes[precision] = compare(expected[0], one, output.name).snr_db if finite else None
    return EncoderVerification(kinds.pop(ALL), stages, audit, ranges, kinds, load, modes)


def agreements(
    images: ImageSet, expected: Sequence[np.ndarray], outputs: Sequence[np.ndarray], what: str
) -> dict[str, Agreement]:
    """Returns the agreement over all images but noise, under `ALL`, and by kind. Noise that overflows has none."""
    rows: dict[str, list[int]] = {ALL: []}
    for index, kind in enumerate(images.kinds):
        if kind != NOISE:
            rows[ALL].append(index)
        if kind != NOISE or np.isfinite(outputs[index]).all():
            rows.setdefault(kind, []).append(index)
    return {
        kind: compare(np.concatenate([expected[i] for i in found]), np.concatenate([outputs[i] for i in found]), what)
        for kind, found in rows.items()
    }


def merge_largest(into: dict[str, float], found: Mapping[str, float]) -> None:
    """Raises the values of `into` to those of `found`. A NaN stays."""
    for name, value in found.items():
        into[name] = float(np.maximum(into.get(name, 0.0), value))


def stage_load(program: Program, last: Mapping[str, str], ranges: Mapping[str, float]) -> dict[str, float]:
    """Returns the largest of each stage's `ranges` as a share of float16's largest number. The head is last.

    `last` has the name of each stage's last result. An operation counts for the stage that it is computed in.
    """
    ends = iter(last.items())
    stage, end = next(ends)
    shares = dict.fromkeys([*last, HEAD], 0.0)
    for operation in program.operations:
        for result in operation.outputs:
            if result.name in ranges:
                merge_largest(shares, {stage: ranges[result.name] / FLOAT16_MAX})
            if result.name == end:
                stage, end = next(ends, (HEAD, ""))
    return shares


def _stage_snr(
    reference: EncoderReference, found: Mapping[str, np.ndarray], scales: Sequence[float]
) -> dict[str, float]:
    """Returns the SNR by stage, after its stream is divided by the power of two that it was scaled by."""
    by_stage = {"stem": 1.0, **{f"stage {index}": scale for index, scale in enumerate(scales)}}
    return {
        stage: compare(reference.stages[stage], result.astype(np.float32) / by_stage[stage], stage).snr_db
        for stage, result in found.items()
    }


def stage_results(program: Program, last: Mapping[str, int]) -> dict[str, str]:
    """Returns the names of the results of the stem (after its GELU) and of each stage (after its last addition).

    Raises:
        VerificationError: the program does not have the form of the rewritten encoder.
    """
    found = [operation for operation in program.operations if operation.kind == "conv"]
    if len(found) <= max(last.values()):
        raise VerificationError(
            f"the package: too few convolutions (got {len(found)}, at least {max(last.values()) + 1} are needed). "
            "Export the model again."
        )
    return {
        stage: _consumed_by(program, found[place], "gelu" if stage == "stem" else "add")
        for stage, place in last.items()
    }


def _consumed_by(program: Program, operation: Operation, kind: str) -> str:
    """Returns the result of the operation of `kind` that reads what `operation` computes."""
    name = operation.outputs[0].name
    for reader in program.operations:
        if name in reader.references:
            if reader.kind == kind:
                return reader.outputs[0].name
            if reader.kind in IN_BETWEEN:
                name = reader.outputs[0].name
    raise VerificationError(f"the package: {operation.name} is not followed by {kind}. Export the model again.")


def audit_program(program: Program, network: nn.Module) -> WeightAudit:
    """Compares every convolution's weight in the program, decoded, with that of the network, in the order of both.

    Raises:
        VerificationError: the numbers of convolutions differ.
    """
    saved = [operation for operation in program.operations if operation.kind == "conv"]
    original = convolutions(network)
    if len(saved) != len(original):
        raise VerificationError(
            f"the package: {len(saved)} convolutions, but the checkpoint's encoder has {len(original)}. Export the "
            "model again."
        )
    constants, audit = Constants(program), WeightAudit()
    for operation, (name, module) in zip(saved, original.items(), strict=True):
        (weight,) = operation.inputs["weight"]
        bits, fitted = stored_bits(program, weight)
        with np.errstate(over="ignore"):
            expected = module.weight.numpy().astype(np.float16)  # as it would be stored without compression
        audit.add(f"encoder {name}.weight", expected, constants.array(weight), bits, fitted=fitted)
    audit.failures += wrong_biases(program, constants, network)
    audit.failures += wrong_gains(program, constants, network)
    return audit


def wrong_biases(program: Program, constants: Constants, network: nn.Module) -> list[str]:
    """Returns a line for each bias that is missing or differs from the network's.

    An export corrects biases for the mean error of rounding, by less than 1 % of their power with 6 bits or more. Those
    of coarser weights change more, and so do those of attention, which contain the mean of the values. Neither is
    compared.
    """
    means = {f"{name}.{conv}" for name, module in network.named_modules() if isinstance(module, EngineAttentionBlock)
             for conv in ("qkv", "proj")}  # fmt: skip
    saved = [operation for operation in program.operations if operation.kind == "conv"]
    found = []
    for operation, (name, module) in zip(saved, convolutions(network).items(), strict=True):
        bits, _ = stored_bits(program, operation.inputs["weight"][0])
        if module.bias is None or name in means or bits < LEAST_BIAS_BITS:
            continue
        expected = module.bias.numpy().astype(np.float64)
        bias = constants.array(operation.inputs["bias"][0]) if operation.inputs.get("bias") else 0 * expected
        if np.square(bias - expected).sum() > SHIFTED_ROW * np.square(expected).sum() > 0:
            found.append(f"encoder {name}.bias is missing, or differs by more than rounding explains")
    return found


def wrong_gains(program: Program, constants: Constants, network: nn.Module) -> list[str]:
    """Returns a line for each layer norm whose gain differs from the network's, which is 1 unless channels are even."""
    norms = [operation for operation in program.operations if operation.kind == "layer_norm"]
    blocks = {name: module for name, module in network.named_modules() if isinstance(module, EngineAttentionBlock)}
    if len(norms) != len(blocks):
        return [f"the package must have {len(blocks)} layer norms, got {len(norms)}"]
    found = []
    for operation, (name, block) in zip(norms, blocks.items(), strict=True):
        expected = np.ones(1) if block.gain is None else block.gain.numpy().ravel()
        saved = constants.array(operation.inputs["gamma"][0]) if operation.inputs.get("gamma") else np.ones(1)
        if not np.array_equal(np.broadcast_to(expected, saved.shape), saved):
            found.append(f"encoder {name}.norm has another gain")
    return found


def stored_bits(program: Program, weight: Any) -> tuple[int, bool]:
    """Returns the bits per number of a weight, and whether its levels were fitted to it.

    Fitted are the levels of a palette, and of blocks with searched scales.
    """
    operation = program.producers.get(weight) if isinstance(weight, str) else None
    if operation is None or not operation.kind.startswith("constexpr_"):
        return 16, False
    words = scheme(operation).replace("-", " ").split()
    digits = "".join(filter(str.isdigit, words[0]))
    return int(digits or 16), not {"palette", "blockwise"}.isdisjoint(words)
