"""The encoder rewritten for the Neural Engine: channels first throughout, batch 1, fixed size, all constants folded.

Compared with the upstream graph (460 operations, 25 transposes, rank 5) the traced program has 352 operations, one
transpose and rank 4 at most. The folds are exact: they are computed in float64. The projector is here too, for packages
that include it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.checkpoint import Checkpoint, iter_float_tensors
from ..models.errors import WeightsError
from ..models.fastvit import (
    AttentionBlock,
    Downsampling,
    FastViT,
    MobileOneBlock,
    PositionConv,
    ReparamLargeKernelConv,
    RepMixerBlock,
    bias_of,
    conv_from,
)
from ..models.fastvit_config import HEAD_DIM, LAYER_NORM_EPS

STREAM_LIMIT = 65504 / 4
"""The most that a residual stream reaches on calibration images: a quarter of float16's largest number, because other
images reach more."""

NOISE_LIMIT = 65504 / 1.5
"""The most that a residual stream reaches on standard-normal noise. It is more than the limit for images, because a
smaller scale than images need would round the smallest channels to subnormal numbers."""

MOST_DRIFT = 2.0**-10
"""The largest relative change of a channel's scale for exact weights: a step of float16. More would move its range."""

MEAN_BITS = 4
"""The significant bits of the means that are subtracted from attention's values: 15/16 of a mean or more."""

GELU_BOUND = 8.0
"""The magnitude from which GELU equals ReLU in float16: it differs by less than 1e-14."""

MIN_TILED_BYTES = 16 * 2**20
"""The least bytes of attention scores in float16 that are computed in parts. At 1024 px stage 3 of FastViTHD has 50 MB,
and stage 4 6 MB, which more operations would not make faster."""

PROJECTOR_LAYERS = ("0", "2")
"""The places of the linear layers in Apple's `mm_projector`. A GELU is between them."""


Scale = float | Tensor
"""The factor of a residual stream, or of each of its channels (C,), float64."""


class EngineFFN(nn.Module):
    """A 7x7 depthwise convolution with its batch norm folded, fc1, GELU, and fc2 with the layer scale folded."""

    def __init__(self, block: RepMixerBlock | AttentionBlock, layer_scale: Tensor, stream_scale: Scale) -> None:
        super().__init__()
        weight, bias = block.convffn.conv.folded()
        self.conv = conv_from(weight / column(stream_scale), bias, stride=1, groups=len(bias))
        self.fc1 = block.convffn.fc1
        scale = layer_scale.double() * column(stream_scale)[:, 0]  # (C, 1, 1)
        self.fc2 = scaled_outputs(block.convffn.fc2.weight, bias_of(block.convffn.fc2), scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class ScaledGELU(nn.Module):
    """The GELU of an input that is `scale` times the original, with `scale` times the original output.

    GELU is not homogeneous. Near zero it is computed at the original scale, and beyond `GELU_BOUND` it is ReLU, so no
    result is larger than the input.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        bound = GELU_BOUND * self.scale
        near = x.clamp(-bound, bound)
        return F.relu(x - near) + F.gelu(near * (1 / self.scale)) * self.scale


class EngineRepMixerBlock(nn.Module):
    """A RepMixer block whose input stream is scaled by `scale_in` and whose output stream is scaled by `scale`."""

    def __init__(self, block: RepMixerBlock, scale_in: Scale, scale: Scale) -> None:
        super().__init__()
        self.token_mixer = rescaled(block.token_mixer.reparam_conv, scale_in, scale)
        self.convffn = EngineFFN(block, block.layer_scale, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.convffn(x)


class EngineAttentionBlock(nn.Module):
    """An attention block over `grid` x `grid` positions, with each head's channels in front of its positions.

    `value_mean` (C,) is subtracted from the values, and what `proj` makes of it is part of its bias. That is exact,
    because a softmax sums to 1. Sums over many positions are then of small values of both signs, of which an
    accumulator in float16 loses less.
    """

    def __init__(
        self, block: AttentionBlock, grid: int, scale: float, tiles: int = 1, value_mean: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.eps = LAYER_NORM_EPS * scale**2  # only the epsilon of layer norm depends on the stream's scale
        self.channels = block.norm.weight.numel()
        self.num_heads = self.channels // HEAD_DIM
        self.gain: Tensor | None = None
        """The factors (C, 1, 1) of what the layer norm returns, for int8 inputs. `evening` sets them."""
        self.tiles = tiles if 2 * self.num_heads * grid**4 >= MIN_TILED_BYTES else 1
        mean = torch.zeros(self.channels) if value_mean is None else value_mean
        self.qkv = folded_qkv(block, mean)
        proj = block.token_mixer.proj
        bias = bias_of(proj).double() + proj.weight.double() @ mean.double()
        self.proj = scaled_outputs(proj.weight[:, :, None, None], bias, block.layer_scale_1 * scale)
        self.convffn = EngineFFN(block, block.layer_scale_2, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attend(self.normalize(x)))
        return x + self.convffn(x)

    def normalize(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # squares of more than 256 would overflow
            return self.normalize(x.float()).half()
        # coremltools fuses this form into one layer_norm. With `pow` or `sqrt` it would stay eight operations.
        centred = x - x.mean(1, keepdim=True)
        normal = centred * ((centred * centred).mean(1, keepdim=True) + self.eps).rsqrt()
        return normal if self.gain is None else normal * self.gain

    def attend(self, x: Tensor) -> Tensor:
        positions = self.grid * self.grid
        qkv = self.qkv(x).reshape(1, 3 * self.num_heads, HEAD_DIM, positions)
        query, key, value = qkv.split(self.num_heads, 1)  # (1, heads, 32, HW) each
        # Keys come before queries, as in ml-ane-transformers. A second matmul that transposes its weights makes
        # MPSGraph abort, which runs the package on a GPU (lint rule "turned weights").
        mixed = [
            value @ (key.transpose(-1, -2) @ part).softmax(-2)  # (1, heads, 32, queries) by (1, heads, keys, queries)
            for part in (query.chunk(self.tiles, -1) if self.tiles > 1 else [query])
        ]
        together = torch.cat(mixed, -1) if self.tiles > 1 else mixed[0]  # (1, heads, 32, HW)
        return together.reshape(1, self.channels, self.grid, self.grid)


class EngineHead(nn.Module):
    """The last convolution, `conv_exp`: (1, C, H, W) -> (1, 2C, H, W)."""

    def __init__(self, conv_exp: MobileOneBlock, scale_in: float) -> None:
        super().__init__()
        self.conv = rescaled(conv_exp.reparam_conv, scale_in, 1.0)
        self.se = conv_exp.se

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.se(self.conv(x)))


class TokensLast(nn.Module):
    """The only transpose: (1, C, H, W) -> (1, HW, C)."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.positions = grid * grid

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, x.shape[1], self.positions).transpose(1, 2)  # (1, N, C)


def rewrite(
    encoder: FastViT,
    image_size: int,
    scales: Sequence[float] | None = None,
    *,
    pixel_scale: float = 1.0,
    projector: nn.Module | None = None,
    attention_tiles: int = 1,
    value_means: Sequence[Tensor] | None = None,
) -> nn.Sequential:
    """Returns a network equal to `encoder`: `images` (1, 3, S, S) float32 in 0..1 -> `image_features` (1, N, C).

    `encoder` is reparameterized in place first. Convolutions that need no fold are shared with it, not copied.

    Args:
        scales: the factor of each stage's residual stream. Powers of two are exact, and keep a stream inside
            float16's range that would exceed it.
        pixel_scale: 255 for images in 0..255.
        projector: (1, C, H, W) -> (1, D, H, W). It follows the encoder, before the transpose: the output is (1, N, D).
        attention_tiles: the number of parts that the queries are computed in where scores take `MIN_TILED_BYTES`.
        value_means: what to subtract from the values of each attention block, as `EngineAttentionBlock` explains.
    """
    encoder.reparameterize()
    means = iter(value_means or ())
    stage_scales = iter(scales or [1.0] * len(encoder.config.depths))
    first, *others = (folded(block) for block in encoder.patch_embed)
    scale = next(stage_scales)
    parts: list[nn.Module] = [conv_gelu(rescaled(first, pixel_scale, 1.0)), *map(conv_gelu, others)]
    grid = image_size // 4  # the stem's strides
    scale_in = 1.0
    for part in encoder.network:
        if isinstance(part, Downsampling):
            grid //= 2
            parts.append(conv_gelu(rescaled(folded(part.proj[0]), scale_in, 1.0)))
            scale = scale_in = next(stage_scales)
            parts.append(conv_gelu(folded(part.proj[1]), scale))
        elif isinstance(part, PositionConv):
            parts.append(rescaled(part.reparam_conv, scale_in, scale))
            scale_in = scale
        elif isinstance(part, nn.Sequential):
            mixer_scales = exact_scales(part, scale_in, scale)
            for block in part:
                if isinstance(block, RepMixerBlock):
                    parts.append(EngineRepMixerBlock(block, *next(mixer_scales)))
                    scale_in = scale
                elif isinstance(block, AttentionBlock):  # the position convolution has rescaled the stream
                    parts.append(EngineAttentionBlock(block, grid, scale_in, attention_tiles, next(means, None)))
    parts += [EngineHead(encoder.conv_exp, scale_in), *([projector] if projector else []), TokensLast(grid)]
    return nn.Sequential(*parts).requires_grad_(False).eval()


def exact_scales(part: nn.Sequential, scale_in: float, scale: float) -> Iterator[tuple[Scale, Scale]]:
    """Yields the scales of the stream before and behind each token mixer of a stage. The last one restores `scale`."""
    weights = [block.token_mixer.reparam_conv.weight for block in part if isinstance(block, RepMixerBlock)]
    before: Scale = scale_in
    for place, weight in enumerate(weights, 1):
        after = scale if place == len(weights) else exact_scale(weight, before, scale)
        yield before, after
        before = after


def exact_scale(weight: Tensor, scale_in: Scale, scale: float) -> Tensor:
    """Returns a scale (C,) of a token mixer's output, close to `scale`, in which float16 has its largest weights.

    Skip connections are folded into token mixers, so an error of the largest weight is one of the whole stream, and
    the errors of all blocks add up. With these scales it is exact in all blocks but a stage's last, without a
    further operation.
    """
    taps = weight.double().flatten(1)  # (C, K * K)
    largest = taps.gather(1, taps.abs().argmax(1, keepdim=True)) / column(scale_in)[:, :, 0, 0]  # (C, 1)
    wanted = (largest * scale).to(torch.float16).double()
    found = (wanted / largest).flatten()
    return torch.where((found / scale - 1).abs() < MOST_DRIFT, found, scale)  # not where float16 has too few digits


def branch_convolutions(network: nn.Module) -> list[str]:
    """Returns the names of the dense convolutions inside residual branches: fc1 and fc2, qkv and proj, in order.

    The layer scale damps their errors, and they do 96 % of the arithmetic of FastViTHD's convolutions. The others
    (stem, downsampling, squeeze and excitation) are on the image's only path: int8 inputs there would cost 12 dB on the
    small reference encoders.
    """
    blocks = {name for name, module in network.named_modules()
              if isinstance(module, EngineRepMixerBlock | EngineAttentionBlock)}  # fmt: skip
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and name.split(".")[0] in blocks
    ]


def follow_gelu(names: Iterable[str]) -> list[str]:
    """Returns the names of `branch_convolutions` that read the results of a GELU."""
    return [name for name in names if name.endswith(".fc2")]


def path_convolutions(network: nn.Module) -> list[str]:
    """Returns the names of the dense convolutions between stages: the stem's and downsampling's, in order.

    Every image passes them, without a skip connection, so their rounding errors reach the output undamped.
    """
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and name.endswith(".0") and name.count(".") == 1
    ]


def folded(block: nn.Module) -> nn.Conv2d:
    """Returns the convolution that a block's branches were folded into."""
    assert isinstance(block, MobileOneBlock | ReparamLargeKernelConv)
    return block.lkb_reparam if isinstance(block, ReparamLargeKernelConv) else block.reparam_conv


def conv_gelu(conv: nn.Conv2d, scale: float = 1.0) -> nn.Sequential:
    """Returns `conv` followed by a GELU, with `scale` times the original output."""
    return nn.Sequential(rescaled(conv, 1.0, scale), nn.GELU() if scale == 1 else ScaledGELU(scale))


def rescaled(conv: nn.Conv2d, scale_in: Scale, scale_out: Scale) -> nn.Conv2d:
    """Returns `conv` for an input that is `scale_in` times the original, with `scale_out` times the original output.

    Scales may differ by channel if `conv` computes each channel from itself.
    """
    if isinstance(scale_in, float) and isinstance(scale_out, float) and scale_in == scale_out == 1:
        return conv
    weight = conv.weight.double() * (column(scale_out) / column(scale_in))
    bias = bias_of(conv).double() * column(scale_out).flatten()
    return conv_from(weight, bias, conv.stride[0], conv.groups)


def column(scale: Scale) -> Tensor:
    """Returns `scale` as (C, 1, 1, 1) or (1, 1, 1, 1), float64."""
    return torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1, 1, 1)


def stream_maxima(encoder: FastViT, images: Iterable[Tensor]) -> list[float]:
    """Returns the largest magnitude of each stage's residual stream over `images`, each (1, 3, S, S).

    Raises:
        WeightsError: the encoder computes NaN or infinite values in float32.
    """
    maxima = [0.0] * len(encoder.config.depths)
    for image in images:
        stage, x = 0, encoder.patch_embed(image)
        for part in encoder.network:
            stage += isinstance(part, Downsampling)
            for write in stream_writers(part):
                x = write(x)
                maxima[stage] = float(np.maximum(maxima[stage], float(x.abs().max())))  # keeps a NaN, unlike max()
    if not np.isfinite(maxima).all():
        raise WeightsError(
            f"the encoder: NaN or infinite values in float32 (largest by stage: {maxima}). The weights are damaged."
        )
    return maxima


def stream_writers(part: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields the functions that write a stage's stream: downsampling, position convolution, the halves of blocks.

    Downsampling has two, since what its GELU reads can be larger than what it returns.
    """
    if isinstance(part, Downsampling):
        first, second = part.proj
        assert isinstance(second, MobileOneBlock)
        yield lambda x: second.convolve(first(x))
        yield F.gelu
    elif isinstance(part, PositionConv):
        yield part
    elif isinstance(part, nn.Sequential):
        for block in part:
            assert isinstance(block, RepMixerBlock | AttentionBlock)
            yield from (block.mix_tokens, block.feed_forward)


def stream_scales(maxima: Sequence[float], on_noise: Sequence[float] | None = None) -> list[float]:
    """Returns for each stage the power of two, at most 1, that keeps its stream under `STREAM_LIMIT`.

    `on_noise` are the maxima on noise, which the scales keep under `NOISE_LIMIT`.
    """
    pairs = zip(maxima, on_noise or [0.0] * len(maxima), strict=True)
    needed = [max(value / STREAM_LIMIT, noise / NOISE_LIMIT) for value, noise in pairs]
    return [min(1.0, 2.0 ** math.floor(-math.log2(value))) if value else 1.0 for value in needed]


@contextlib.contextmanager
def recorded_values(encoder: FastViT) -> Iterator[list[list[Tensor]]]:
    """Yields a list of the means (C,) of each attention block's values, one for each image that runs inside the block.

    The values are the last third of `qkv`, a product without a bias. So their mean is that of its input, multiplied.
    """
    blocks = [block for block in encoder.modules() if isinstance(block, AttentionBlock)]
    means: list[list[Tensor]] = [[] for _ in blocks]

    def record(block: AttentionBlock, found: list[Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, x: Tensor) -> None:
            weight = block.token_mixer.qkv.weight[-x.shape[1] :]  # (C, C)
            found.append(weight.double() @ x.double().mean((0, 2, 3)))

        return block.norm.register_forward_hook(hook)

    handles = [record(block, found) for block, found in zip(blocks, means, strict=True)]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def round_means(means: Tensor) -> Tensor:
    """Returns means rounded to `MEAN_BITS` significant bits.

    Any value may be subtracted from attention's values. Float32 sums depend on the number of threads, and biases with
    all their digits would rarely be the same in two exports.
    """
    mantissa, exponent = torch.frexp(means)
    return torch.ldexp((mantissa * 2**MEAN_BITS).round() / 2**MEAN_BITS, exponent)


def scaled_outputs(weight: Tensor, bias: Tensor, scale: Tensor) -> nn.Conv2d:
    """Returns the 1x1 convolution with its output channels multiplied by `scale` (C, 1, 1)."""
    scale = scale.double().flatten()
    return conv_from(weight.double() * scale[:, None, None, None], bias.double() * scale, stride=1, groups=1)


def folded_qkv(block: AttentionBlock, value_mean: Tensor) -> nn.Conv2d:
    """Returns qkv as a 1x1 convolution with layer norm's gain and bias and the query's 1/sqrt(32) folded into it.

    `value_mean` (C,) is subtracted from the values.
    """
    weight = block.token_mixer.qkv.weight.double()  # (3C, C)
    bias = weight @ block.norm.bias.double()
    bias[-len(value_mean) :] -= value_mean.double()
    weight = weight * block.norm.weight.double()
    queries = torch.ones(len(weight), 1, dtype=torch.float64)
    queries[: len(weight) // 3] = HEAD_DIM**-0.5
    return conv_from((weight * queries)[:, :, None, None], bias * queries[:, 0], stride=1, groups=1)


class ProjectorConvs(nn.Module):
    """The projector as 1x1 convolutions: linear, exact GELU, linear, (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.linear_0 = first
        self.linear_2 = second

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ProjectorConvs:
        """Returns the checkpoint's projector in float32. Shapes are checked with the decoder's.

        Raises:
            WeightsError: a tensor is not finite.
        """
        return cls(*(_linear(checkpoint, f"model.mm_projector.{place}") for place in PROJECTOR_LAYERS)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_0(x)))


def projected(checkpoint: Checkpoint, image_features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the checkpoint's projection of each `image_features` (1, N, C): (1, N, D), float32."""
    projector = ProjectorConvs.from_checkpoint(checkpoint)
    with torch.inference_mode():
        columns = [torch.from_numpy(features).mT[..., None] for features in image_features]  # (1, C, N, 1)
        return [projector(column)[..., 0].mT.numpy() for column in columns]  # (1, N, D)


def _linear(checkpoint: Checkpoint, layer: str) -> nn.Conv2d:
    parameters = []
    for name, values in iter_float_tensors(checkpoint, (f"{layer}.weight", f"{layer}.bias"), "pt"):
        parameters.append(torch.as_tensor(values).float())
        if not torch.isfinite(parameters[-1]).all():
            raise WeightsError(f"{name}: NaN or infinite values. The checkpoint is damaged.")
    weight, bias = parameters
    return conv_from(weight[:, :, None, None], bias, stride=1, groups=1)
