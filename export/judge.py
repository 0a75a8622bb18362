"""Apple's Core AI interpreter as a second judge of an exported encoder, next to this project's own executor.

Both run the network that the folder's package has: the checkpoint's architecture, rewritten, with the package's stored
weights and biases. Each is compared with torch in float32, stage by stage. Core AI sums products of matrices in
float16, so the executor's mode that does the same must agree with it. The judge checks the rewrite, the stored weights
and the executor's arithmetic. It reads neither the bytes of the `.mlpackage` nor runs the Neural Engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from ..models.blas import disable_tf32
from ..models.config import MAX_IMAGE_SIZE, PATCH_SIZE
from ..models.errors import UsageError, VerificationError
from ..models.fastvit import FastViT, bias_of
from ..models.folder_layout import ASSET_NAME, PACKAGE_NAME
from ..models.mlprogram.constexpr import Constants
from ..models.mlprogram.cost import flops
from ..models.mlprogram.executor import Executor, Precision
from ..models.mlprogram.package import read_package
from ..models.mlprogram.program import Argument, Operation, Program, inputs_for, unpack_bits
from ..models.references import open_checkpoint
from ..quant.calibration import verification_images
from ..quant.encoder import convolutions
from ..quant.metrics import compare
from ..quant.schemes import W8A8, LinearWeight, PaletteWeight, StoredWeight
from .coreai import PRECISIONS, Staged, interpret, require_coreai, stage_names
from .options import OnStage, silent
from .recipe import PackageInterface, interface_for
from .verify import check_hashes, saved_recipe
from .verify_encoder import last_convolutions, stage_results
from .write_encoder import convert_encoder, rewritten

JUDGE_SIZE = 256
"""The side in pixels of the judged image. FastViTHD takes seconds at 256 px, and minutes at 1024 px."""

FLOAT32_FLOOR_DB = 100.0
"""The least SNR of a stage in float32. Sums in another order give 120 dB or more."""

ROUNDED_FLOOR_DB = 65.0
"""The least SNR of the executor's float32 results that are rounded to float16 once, as the package declares their
type. 73 dB is usual."""

FLOAT16_BOUND_DB = 3.0
"""The most by which SNRs in float16 may differ. With equal sums 0.5 dB is usual, from 256 to 1024 px."""

ACCUMULATE: Precision = "float16-accumulate"
"""The executor's mode that sums as Core AI does."""

FLOPS_PER_SECOND = {"float32": 6e9, "float16": 1.5e9}
"""The arithmetic per second of Apple's interpreter on two cores, for the estimate of a run's time."""

EXECUTOR_FLOPS_PER_SECOND = {"float32": 1e11, "float16": 3e10}
"""The same for the executor, without sums in float16."""

SUMS_PER_SECOND = 5e8
"""The products per second that the executor sums in float16."""

START_SECONDS = 20
"""The time in seconds for the start of the process and both conversions."""

Rows = Mapping[str, float]
"""The SNR in dB by stage, compared with torch in float32."""


@dataclass(frozen=True)
class Judgement:
    """The agreement of the executor and of Apple's interpreter with torch, by stage."""

    image_size: int
    saved_size: int
    """The image size of the folder's package. The saved package itself runs only if `image_size` equals it."""
    executor: Mapping[str, Rows]
    """By precision, `float32`, `float16` and `float16-accumulate`."""
    executor_floors_db: Rows
    """The least SNR of each of the executor's results in float32."""
    judge: Mapping[str, Rows]
    """The same from Apple's interpreter."""
    seconds: Mapping[str, float]
    """The time of its run by precision."""

    @property
    def failures(self) -> list[str]:
        """The first stage in which a side falls short or the sides disagree, by precision, as one line each."""
        sides = (
            ("the executor", self.executor, self.executor_floors_db),
            ("Core AI", self.judge, dict.fromkeys(self.executor_floors_db, FLOAT32_FLOOR_DB)),
        )
        found = []
        for side, rows, floors in sides:
            short = [stage for stage, snr_db in rows["float32"].items() if snr_db < floors[stage]]
            found += [
                f"{side} in float32 reaches {rows['float32'][stage]:.1f} dB at {stage}, the floor is "
                f"{floors[stage]:.0f} dB"
                for stage in short[:1]
            ]
        for stage, ours in self.executor[ACCUMULATE].items():
            theirs = self.judge["float16"][stage]
            if abs(ours - theirs) > FLOAT16_BOUND_DB:
                found.append(
                    f"the executor and Core AI disagree in float16, first at {stage} ({ours:.1f} and {theirs:.1f} dB, "
                    f"the bound is {FLOAT16_BOUND_DB:.0f} dB)"
                )
                break
        return found

    @property
    def passed(self) -> bool:
        """True if nothing falls short."""
        return not self.failures

    @property
    def scope(self) -> str:
        """The description of what was judged, and of what was not."""
        run = "the saved package" if self.image_size == self.saved_size else "a package of that size"
        return (
            f"judged at {self.image_size} px: the rewrite and the stored weights, against {run} in the executor. Not "
            "judged: the bytes of the .mlpackage in Core ML, and the Neural Engine"
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        sides = {"executor": self.executor, "coreai": self.judge}
        return {
            "image_size": self.image_size,
            "scope": self.scope,
            "seconds": {precision: round(seconds, 2) for precision, seconds in self.seconds.items()},
            "stages_snr_db": {
                side: {p: {stage: round(value, 1) for stage, value in rows.items()} for p, rows in found.items()}
                for side, found in sides.items()
            },
        }


def judge(
    folder: str | Path,
    against: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    judge_size: int | None = None,
    on_stage: OnStage = silent,
) -> Judgement:
    """Runs a folder's encoder in Apple's Core AI interpreter and in the executor, and compares both with torch.

    Args:
        folder: an exported model folder.
        against: the checkpoint that it was exported from. Its architecture is rewritten again.
        adapter: the folder of the LoRA adapter that was merged into it.
        base: the checkpoint that had what `against` lacks.
        allow_pickle: True also reads pickles, as `fastvlm.export` does.
        judge_size: the side of the image in pixels, or None for `JUDGE_SIZE`, or less if the folder's size is less.
        on_stage: a function that is called with a short description of each stage before it begins.

    Raises:
        MachineError: Apple's packages are missing.
        UsageError: the folder has no package that can be judged, or `judge_size` is invalid.
        CrashError: the interpreter's process ended early.
        VerificationError: the package has other convolutions than the checkpoint, or a result is not finite.
        FastVLMError: the folder or the checkpoint cannot be read.
    """
    require_coreai()
    disable_tf32()
    folder = Path(folder).expanduser()
    recipe = saved_recipe(folder)
    check_recipe(folder, recipe)
    size = min(JUDGE_SIZE, recipe["image_size"]) if judge_size is None else judge_size
    check_judge_size(size)
    check_hashes(folder)
    checkpoint = open_checkpoint(against, adapter, base=base, allow_pickle=allow_pickle)
    on_stage("rewrite the checkpoint's encoder")
    interface = interface_for([recipe["quant"]], saved=recipe)
    encoder = FastViT.from_checkpoint(checkpoint)
    network = rewritten(encoder, checkpoint, size, interface, recipe["stream_scales"])
    program = read_package(folder / PACKAGE_NAME)
    stored = take_numbers(network, program)
    pixel_values = verification_images(size)[0]
    image = pixel_values * np.float32(interface.pixel_scale)
    with torch.inference_mode():
        expected = [tensor.numpy() for tensor in Staged(network, torch.float32)(torch.from_numpy(image))]
    reference = dict(zip(stage_names(network), expected, strict=True))
    last = last_convolutions(encoder.config)
    del encoder
    with tempfile.TemporaryDirectory(prefix="fastvlm-judge-") as scratch:
        if size != recipe["image_size"]:
            program = package_of_size(network, stored, size, interface, Path(scratch), on_stage)
        executor, coreai = estimate(program)
        on_stage(f"run the executor (about {executor:.0f} s, and then Core AI about {coreai:.0f} s)")
        ours = {precision: run_executor(program, last, pixel_values, precision) for precision in get_args(Precision)}
    on_stage(f"run Core AI (about {coreai:.0f} s)")
    theirs = interpret(network, stored, image)
    return Judgement(
        image_size=size,
        saved_size=recipe["image_size"],
        executor={precision: snr_by_stage(reference, found) for precision, found in ours.items()},
        executor_floors_db=executor_floors(program, last),
        judge={precision: snr_by_stage(reference, theirs[precision].results) for precision in PRECISIONS},
        seconds={precision: theirs[precision].seconds for precision in PRECISIONS},
    )


def estimate(program: Program) -> tuple[float, float]:
    """Returns the seconds that the executor's runs and Core AI's runs take, about, on two cores."""
    work = sum(flops(program, operation) for operation in program.operations)
    sums = sum(flops(program, operation) for operation in program.operations if operation.kind == "matmul") / 2
    rates = EXECUTOR_FLOPS_PER_SECOND
    executor = work / rates["float32"] + 2 * work / rates["float16"] + sums / SUMS_PER_SECOND
    return executor, sum(work / FLOPS_PER_SECOND[precision] for precision in PRECISIONS) + START_SECONDS


def check_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError if the folder's encoder is not one that Core AI can judge."""
    if recipe.get("layout") == "mlx":
        raise UsageError(f"{folder}: the encoder is in MLX. Export with encoder='coreml' to judge it.", "encoder")
    if recipe.get("format") == "coreai":
        raise UsageError(
            f"{folder}: the folder has no Core ML package to judge. Leave judge out: {ASSET_NAME} is run without it.",
            "judge",
        )
    if recipe["quant"] == W8A8:
        raise UsageError(f"{folder}: w8a8 rounds inputs of convolutions, which Core AI cannot judge. Judge int8.")


def check_judge_size(size: int) -> None:
    """Raises UsageError unless `size` is a side that the encoder takes."""
    if size % PATCH_SIZE or not 2 * PATCH_SIZE <= size <= MAX_IMAGE_SIZE:
        raise UsageError(
            f"judge_size must be a multiple of {PATCH_SIZE} from {2 * PATCH_SIZE} to {MAX_IMAGE_SIZE} (got {size}).",
            "judge_size",
        )


def take_numbers(network: nn.Module, program: Program) -> dict[str, StoredWeight]:
    """Puts the package's weights and biases into a rewritten network, and returns its compressed weights by name.

    Raises:
        VerificationError: the package has other convolutions than the network.
    """
    saved = [operation for operation in program.operations if operation.kind == "conv"]
    original, constants, found = convolutions(network), Constants(program), {}
    if len(saved) != len(original):
        raise VerificationError(
            f"the package: {len(saved)} convolutions, but the checkpoint's encoder has {len(original)}. Export the "
            "model again."
        )
    for operation, (name, conv) in zip(saved, original.items(), strict=True):
        weight, bias = constants.array(operation.inputs["weight"][0]), constants.array(operation.inputs["bias"][0])
        if weight.shape != tuple(conv.weight.shape):
            raise VerificationError(
                f"{name}.weight: the package has another shape than the checkpoint (got {list(weight.shape)}, "
                f"expected {list(conv.weight.shape)}). Pass the checkpoint that it was exported from."
            )
        conv.weight.data = torch.from_numpy(weight.astype(np.float32))
        bias_of(conv).data = torch.from_numpy(bias.astype(np.float32))
        stored = stored_form(program, operation.inputs["weight"][0])
        if stored is not None:
            found[name] = stored
    return found


def stored_form(program: Program, weight: Argument) -> StoredWeight | None:
    """Returns a weight as the package stores it, or None if it is float16."""
    operation = program.producers.get(weight) if isinstance(weight, str) else None
    if operation is None or operation.kind == "const":
        return None
    if operation.kind == "constexpr_affine_dequantize":
        scale = part(program, operation, "scale").reshape(-1, 1, 1, 1)
        return LinearWeight("int8", part(program, operation, "quantized_data"), scale)
    if operation.kind == "constexpr_blockwise_shift_scale":
        (data,) = operation.inputs["data"]
        scheme = (program.types[data] if isinstance(data, str) else data.type).dtype
        return LinearWeight(scheme, part(program, operation, "data"), part(program, operation, "scale"))
    assert operation.kind == "constexpr_lut_to_dense"
    lut, indices = part(program, operation, "lut"), part(program, operation, "indices")
    groups = lut.shape[0] if lut.ndim > 1 else 1  # iOS 18's form is (groups, 1, 1, 1, values, 1)
    lut = lut.reshape(groups, -1) if groups > 1 else lut.reshape(-1)
    bits = (lut.shape[-1] - 1).bit_length()
    if "shape" in operation.attributes:  # iOS 16's form has packed bits
        (output,) = operation.outputs
        indices = unpack_bits(indices, bits, output.elements).reshape(output.shape)
    return PaletteWeight(f"pal{bits}", indices, lut)


def part(program: Program, operation: Operation, name: str) -> np.ndarray:
    """Returns a parameter of a compressed weight: an attribute (iOS 16), or a constant input (iOS 18)."""
    if name in operation.attributes:
        return operation.attributes[name].array()
    return Constants(program).array(operation.inputs[name][0])


def package_of_size(
    network: nn.Sequential,
    stored: Mapping[str, StoredWeight],
    size: int,
    interface: PackageInterface,
    scratch: Path,
    on_stage: OnStage,
) -> Program:
    """Converts the network to a package for images of another size than the folder's, and reads it."""
    package = scratch / PACKAGE_NAME
    convert_encoder(network, size, stored, package, metadata={}, on_stage=on_stage, interface=interface)
    return read_package(package)


def results_by_stage(program: Program, last: Mapping[str, int]) -> dict[str, str]:
    """Returns the names of the program's results by stage, with its output as `output`."""
    return {**stage_results(program, last), "output": program.outputs[0].name}


def executor_floors(program: Program, last: Mapping[str, int]) -> dict[str, float]:
    """Returns the least SNR in dB of each of the executor's results in float32."""
    names = results_by_stage(program, last)
    rounded = {stage: program.types[name].dtype == "fp16" for stage, name in names.items()}
    return {stage: ROUNDED_FLOOR_DB if rounded[stage] else FLOAT32_FLOOR_DB for stage in names}


def run_executor(
    program: Program, last: Mapping[str, int], pixel_values: np.ndarray, precision: Any
) -> dict[str, np.ndarray]:
    """Runs the executor once, and returns the results of the stages and the output, float32."""
    names = results_by_stage(program, last)
    results = Executor(program, precision=precision, outputs=list(names.values())).run(
        inputs_for(program, pixel_values)
    )
    return {stage: results[name].astype(np.float32) for stage, name in names.items()}


def snr_by_stage(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the SNR in dB of each stage."""
    return {stage: compare(values, found[stage], stage).snr_db for stage, values in reference.items()}
