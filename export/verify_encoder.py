"""The exported encoder compared with the checkpoint's: outputs, stage by stage, and weight by weight.

A package runs in the executor, an encoder in MLX runs in MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models._mlx import mx
from ..models.checkpoint import check_tensors
from ..models.errors import VerificationError
from ..models.fastvit_mlx import FastViTMLX
from ..models.folder_layout import saved_encoder
from ..models.mlprogram.constexpr import Constants
from ..models.mlprogram.executor import Executor
from ..models.mlprogram.package import read_package
from ..models.mlprogram.program import Operation, Program, inputs_for, scheme
from ..models.tensor_names import UNUSED_ENCODER_TENSORS
from ..quant.encoder import convolutions
from ..quant.metrics import Agreement, WeightAudit, compare
from .encoder_reference import EncoderReference
from .mlx_encoder import DTYPES, reparameterized_tensors
from .rewrite import STREAM_LIMIT

if TYPE_CHECKING:
    from torch import nn

    from ..models.fastvit import FastViT

IN_BETWEEN = ("quantize", "dequantize", "cast")
"""The operations that may come between a convolution and the one that reads its result."""


@dataclass(frozen=True)
class EncoderVerification:
    """The agreement of an exported encoder with the checkpoint's."""

    output: Agreement
    stages: dict[str, float]
    """The SNR in dB of the stem and of each stage on the way."""
    weights: WeightAudit
    ranges: dict[str, float]
    """The largest magnitude of every result inside over the images, by name: in float16 for a package."""

    @property
    def large(self) -> dict[str, float]:
        """Results past a quarter of float16's range, the largest first. Unusual images could make them overflow."""
        found = {name: value for name, value in self.ranges.items() if value > STREAM_LIMIT}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user, one line each."""
        if not self.large:
            return ()
        name, largest = next(iter(self.large.items()))
        return (
            f"{len(self.large)} results inside the package pass a quarter of float16's range, which ends at 65,504: "
            f"{name} reaches {largest:,.0f}",
        )


@dataclass(frozen=True)
class MLXVerification(EncoderVerification):
    """The same for an encoder in MLX, whose `ranges` are of float32 results and need no warning."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user: none."""
        return ()


def verify_encoder(
    package: Path,
    images: Sequence[np.ndarray],
    reference: EncoderReference,
    expected: Sequence[np.ndarray],
    network: nn.Module,
    stream_scales: Sequence[float],
) -> EncoderVerification:
    """Runs the saved package in float16 on `images` and compares its output with `expected`, one for each.

    Args:
        network: what the package was made from: the checkpoint's encoder, rewritten, with its weights uncompressed.
        stream_scales: the power of two by which each stage's residual stream was scaled.

    Raises:
        VerificationError: the package overflows float16, or has other convolutions than `network`.
    """
    program = read_package(package)
    audit = audit_program(program, network)
    names = stage_results(program, reference.last_convolutions)
    (output,) = program.outputs
    executor = Executor(program, precision="float16", record_ranges=True, outputs=[output.name, *names.values()])
    outputs, stages = [], {}
    for image, scales in zip(images, [stream_scales] + [()] * len(images), strict=False):
        results = executor.run(inputs_for(program, image))
        if executor.first_overflow:
            raise VerificationError(
                f"{package.name}: float16 overflows (first at {executor.first_overflow}). The Neural Engine would "
                "return NaN or infinite features."
            )
        outputs.append(results[output.name].astype(np.float32))
        if scales:
            stages = _stage_snr(reference, {stage: results[name] for stage, name in names.items()}, scales)
    agreement = compare(np.concatenate(expected), np.concatenate(outputs), output.name)
    float16 = {name: value for name, value in executor.ranges.items() if program.types[name].dtype == "fp16"}
    return EncoderVerification(agreement, stages, audit, float16)


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
    return audit


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


def verify_mlx_encoder(
    folder: Path, images: Sequence[np.ndarray], reference: EncoderReference, encoder: FastViT, quant: str
) -> MLXVerification:
    """Runs the saved encoder in MLX, in float32, and compares it with the checkpoint's `encoder`.

    Raises:
        WeightsError: the saved tensors are not a whole encoder, or not finite.
        VerificationError: they have other shapes than the checkpoint's.
    """
    saved = saved_encoder(folder)
    audit = audit_tensors(saved, encoder.reparameterize(), quant)
    network = FastViTMLX.from_tensors(saved, mx.float32)
    outputs: list[np.ndarray] = []
    stages: dict[str, float] = {}
    ranges: dict[str, float] = {}
    for image in images:
        found = {name: np.array(result) for name, result in network.results(mx.array(image))}
        outputs.append(found.pop("image_features"))
        stages = stages or {
            stage: compare(reference.stages[stage], result.transpose(0, 3, 1, 2), stage).snr_db  # (1, C, H, W)
            for stage, result in found.items()
        }
        for name, result in found.items():
            ranges[name] = max(ranges.get(name, 0.0), float(np.abs(result).max()))
    agreement = compare(np.concatenate(reference.features), np.concatenate(outputs), "image_features")
    return MLXVerification(agreement, stages, audit, ranges)


def audit_tensors(saved: dict[str, mx.array], encoder: FastViT, quant: str) -> WeightAudit:
    """Compares every saved tensor with the reparameterized `encoder`. Raises WeightsError over names or shapes."""
    expected, audit = dict(reparameterized_tensors(encoder)), WeightAudit()
    kept = {name: tensor for name, tensor in saved.items() if not name.startswith(UNUSED_ENCODER_TENSORS)}
    check_tensors(
        {name: values.shape for name, values in expected.items()},
        {name: tensor.shape for name, tensor in kept.items()},
        "MLX vision encoder",
    )
    for name, values in expected.items():
        rounded = np.array(mx.array(values).astype(DTYPES[quant]).astype(mx.float32))
        audit.add(f"encoder {name}", rounded, np.array(kept[name].astype(mx.float32)), bits=16)
    return audit
