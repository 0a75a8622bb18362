"""Fewer bits for the encoder's weights inside a Core ML program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..models.errors import PackageError, UsageError

if TYPE_CHECKING:
    from coremltools.models import MLModel
    from torch import Tensor, nn

ENCODER_SCHEMES = ("fp16", "int8")

MIN_ELEMENTS = 2048
"""Weights of this many numbers or fewer stay float16: together they are a ten-thousandth of the bytes."""

INT8_MAX = 127

MIN_WEIGHT_SNR_DB = 30.0
"""Weights that int8 keeps less well than this stay float16; trained ones reach 40 to 45 dB."""

COMPRESSED_OPERATIONS = {"int8": "constexpr_affine_dequantize"}


def check_scheme(scheme: str) -> None:
    """Raises UsageError unless `scheme` is one of `ENCODER_SCHEMES`."""
    if scheme not in ENCODER_SCHEMES:
        raise UsageError(f"--quant should be one of {', '.join(ENCODER_SCHEMES)}; found {scheme!r:.40}")


def is_compressed(weight: np.ndarray) -> bool:
    """Whether a convolution's weight (out, in / groups, K, K) is stored in int8.

    Depthwise weights stay float16: they are 1 % of FastViTHD's bytes and would cause 5 dB of its noise, because each
    output rests on few numbers whose errors cannot average out. So do weights that int8 would spoil: with small layer
    scales folded into them, their scales, which are float16 themselves, underflow.
    """
    if weight.ndim != 4 or weight.shape[1] == 1 or weight.size <= MIN_ELEMENTS:
        return False
    weight = weight.astype(np.float32)
    noise = float(((rounded_to_int8(weight) - weight) ** 2).sum())
    return noise * 10 ** (MIN_WEIGHT_SNR_DB / 10) < float((weight**2).sum())


def rounded_to_int8(weight: np.ndarray) -> np.ndarray:
    """`weight` as linear symmetric int8 stores it, with one float16 scale per output channel; float32."""
    largest = np.abs(weight).max((1, 2, 3), keepdims=True)
    scale = (2 * largest.astype(np.float16) / np.float16(2 * INT8_MAX)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.nan_to_num(weight / scale, posinf=INT8_MAX, neginf=-INT8_MAX)
    return np.round(steps).clip(-INT8_MAX, INT8_MAX) * scale


def compressed_convs(network: nn.Module) -> Iterator[nn.Conv2d]:
    """The convolutions whose weights `compress_weights` stores in fewer bits."""
    from torch import nn

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and is_compressed(module.weight.numpy().astype(np.float16)):
            yield module


def correct_biases(network: nn.Module, images: Sequence[np.ndarray]) -> None:
    """Moves each compressed convolution's bias by what rounding its weights to int8 shifts its mean output.

    Inputs behind a GELU have means far from zero, so rounding errors add up to a constant per channel: most of int8's
    noise (arXiv 1906.04721, section 4.2). The means are taken over `images`, each (1, 3, S, S), in place.
    """
    import torch

    from ..models.fastvit_blocks import bias_of

    means: dict[nn.Conv2d, list[Tensor]] = {conv: [] for conv in compressed_convs(network)}
    hooks = [
        conv.register_forward_hook(lambda module, inputs, _: means[module].append(inputs[0].mean((0, 2, 3))))
        for conv in means
    ]
    try:
        with torch.inference_mode():
            for image in images:
                network(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    for conv, found in means.items():
        weight = conv.weight.numpy()
        error = torch.from_numpy(weight - rounded_to_int8(weight))  # (out, in, K, K)
        bias_of(conv).data += error.sum((2, 3)) @ torch.stack(found).mean(0)


def compress_weights(model: MLModel, scheme: str, expected: int) -> MLModel:
    """`model` with its larger weights in `scheme`; int8 is linear, symmetric, with one scale per output channel.

    Raises:
        PackageError: not exactly `expected` weights were compressed. coremltools passes over what it does not
            understand without a word.
    """
    import coremltools.optimize.coreml as cto

    kind = cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype=scheme, granularity="per_channel", weight_threshold=MIN_ELEMENTS
    )
    config = cto.OptimizationConfig(global_config=kind)
    for name, weight in cto.get_weights_metadata(model, weight_threshold=MIN_ELEMENTS).items():
        if not is_compressed(weight.val):
            config.set_op_name(name, None)
    compressed = cto.linear_quantize_weights(model, config)
    found = count_operations(compressed, COMPRESSED_OPERATIONS[scheme])
    if found != expected:
        raise PackageError(f"{scheme} should compress {expected} of the encoder's weights; coremltools did {found}")
    return compressed


def count_operations(model: MLModel, kind: str) -> int:
    """How many operations of `kind` the program has."""
    return sum(
        operation.type == kind
        for function in model.get_spec().mlProgram.functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
    )
