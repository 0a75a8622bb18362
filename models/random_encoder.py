"""The tensors of a random vision encoder with the ranges of the published ones.

Trained encoders differ from Gaussian weights in ways that decide whether float16 and few bits suffice. Reproduced are

- the largest activation: `fastvlm-coreai` (scripts/probe_activations.py, 2026) reports the maxima after `network.9` of
  the three published encoders on standard-normal pixels, and 121.0 as the largest weight of `conv_exp`;
- heavy tails: the 1x1 convolutions of PP-OCRv4's detector and recognizer, two trained networks of reparameterized
  convolutions, have an excess kurtosis of 2.6 and 8.0 (medians over layers) and weights of up to 22 standard deviations
  of their row. `z + z^3 / 10` of a standard-normal z has 3.6;
- unequal channels: the logarithms of the rows' deviations spread by 0.37 and 0.57 there, and by 0.68 and 0.89 in
  depthwise convolutions, because batch norms are folded into them (see also arXiv 1906.04721, figure 2);
- a few channels whose activations are a thousand times the median (arXiv 2402.17762).

The writers of a residual stream scale each of its channels, and its readers undo that, as batch norms do in training.
A block changes its stream as much as in the trained `tiny`. The gains of the last stage were fitted once, and are
constants, so that reading a tensor needs no other one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .fastvit_config import FastViTConfig
from .safetensors_files import Shape

Draws = Callable[[str], np.random.Generator]
"""A function from a key to a generator that depends on the checkpoint, its seed, and that key only."""

LARGEST_CONV_EXP_WEIGHT = 121.0
"""The largest weight of `conv_exp.reparam_conv`, the same in all published encoders."""

ROW_SPREAD, DEPTHWISE_SPREAD, CHANNEL_SPREAD = 0.45, 0.7, 0.7
"""The standard deviations of the logarithms of rows' and channels' scales."""

MASSIVE_CHANNELS, MASSIVE_SCALE = 5, 60.0
"""The number of the last stage's channels with massive activations, and their scale. The median channel has 1."""

DEAD_SHARE, DEAD_SCALE = 0.01, 0.004
"""The share of the last stage's channels that hardly vary, and their scale, which no gain multiplies."""

STEM_GAIN = 8.0
"""The gain of the first convolution. Photographs are smooth and vary little, and batch norm scales them to 1."""

HE_GAIN = 1.5
"""The gain of a convolution behind a GELU, which keeps the variance of its inputs to about 0.4."""

BLOCK_SHARE = 0.15
"""The mean layer scale, relative to the channel's scale: 0.10 to 0.30 in the trained `tiny`."""

MIXER_NOISE = 0.15
"""The size of a depthwise convolution next to the skip connection that is folded into it."""


@dataclass(frozen=True)
class EncoderRanges:
    """The ranges of one published encoder."""

    largest: float
    """The largest magnitude after the last position convolution, on standard-normal pixels at 1024 px."""
    gain: float
    """The factor of the last stage's residual stream that reaches it. Fitted."""


PUBLISHED_RANGES = {
    "0.5b": EncoderRanges(252_866, 292.7674),
    "1.5b": EncoderRanges(55_630, 43.1888),
    "7b": EncoderRanges(12_740, 10.121),
    "small-0.5b": EncoderRanges(252_866, 232.1882),
    "small-1.5b": EncoderRanges(55_630, 433.7413),
    "small-7b": EncoderRanges(12_740, 56.2832),
}
"""The ranges by size. The small encoders reach the same maxima at 256 px."""


class RandomEncoder:
    """The random tensors of a reparameterized encoder, by Apple's names without the prefix."""

    def __init__(self, config: FastViTConfig, ranges: EncoderRanges, draws: Draws) -> None:
        self.ranges, self.draws = ranges, draws
        self.widths = config.embed_dims
        self.stages = part_stages(config)

    def tensor(self, name: str, shape: Shape) -> np.ndarray:
        """Returns the tensor `name` as float32."""
        noise = self.draws(name).standard_normal(shape, dtype=np.float32)
        if name.endswith("conv.conv.weight"):
            return depthwise(noise) * column(self._row_scales(name, shape[0]))
        if "convffn.conv.bn." in name:
            return self._norm(name, noise)
        if "layer_scale" in name:
            scales = self._written(name)[:, None, None]  # (C, 1, 1)
            return BLOCK_SHARE * np.exp(0.3 * noise) * scales
        if name.endswith("norm.weight"):
            return 1 + 0.1 * noise
        if name.endswith("bias"):
            return 0.1 * noise * self._written(name)
        if name.startswith("conv_exp.reparam_conv"):
            weight = depthwise(noise) / column(np.repeat(self.channels(len(self.widths) - 1), 2))
            return weight.clip(-LARGEST_CONV_EXP_WEIGHT, LARGEST_CONV_EXP_WEIGHT)
        if "lkb_reparam" in name:
            stage = self.stages[int(name.split(".")[1])] - 1
            return depthwise(noise) / column(np.repeat(self.channels(stage), shape[0] // self.widths[stage]))
        if re.search(r"(token_mixer|network\.\d+)\.reparam_conv\.weight$", name):
            weight = MIXER_NOISE * depthwise(noise)
            weight[:, :, shape[2] // 2, shape[3] // 2] += 1
            return weight
        if len(shape) == 4 and shape[1] == 1:
            return HE_GAIN * depthwise(noise)
        return self._dense(name, shape, noise)

    def channels(self, stage: int) -> np.ndarray:
        """Returns the scale of each channel of a stage's residual stream, float32 (C,)."""
        draw, width = self.draws(f"channels of stage {stage}"), self.widths[stage]
        scales = np.exp(CHANNEL_SPREAD * draw.standard_normal(width, dtype=np.float32))
        if stage < len(self.widths) - 1:
            return scales
        scales *= np.float32(self.ranges.gain)
        order = draw.permutation(width)
        scales[order[:MASSIVE_CHANNELS]] = MASSIVE_SCALE * self.ranges.gain
        scales[order[MASSIVE_CHANNELS:][: round(DEAD_SHARE * width)]] = DEAD_SCALE
        return scales

    def _written(self, name: str) -> np.ndarray:
        """Returns the scales of the stream's channels that the parameter `name` writes, or 1 if it writes none."""
        if name.startswith("patch_embed.2"):
            return self.channels(0)
        if re.search(r"layer_scale|proj\.1\.|(token_mixer|network\.\d+)\.reparam_conv", name):
            return self.channels(self.stages[int(name.split(".")[1])])
        return np.ones(1, np.float32)

    def _row_scales(self, name: str, rows: int) -> np.ndarray:
        """Returns the scale of each row of a block's depthwise convolution, whose batch norm undoes it."""
        draw = self.draws(name.split(".conv.")[0] + " rows")
        return np.exp(DEPTHWISE_SPREAD * draw.standard_normal(rows, dtype=np.float32))

    def _norm(self, name: str, noise: np.ndarray) -> np.ndarray:
        """Returns a parameter of a block's batch norm, for the scales of its stream and of its convolution's rows."""
        if name.endswith("bn.weight"):
            return 1 + 0.1 * noise
        if name.endswith("bn.bias"):
            return 0.1 * noise
        scales = self.channels(self.stages[int(name.split(".")[1])]) * self._row_scales(name, len(noise))
        return scales**2 * np.exp(0.3 * noise) if name.endswith("running_var") else 0.1 * noise * scales

    def _dense(self, name: str, shape: Shape, noise: np.ndarray) -> np.ndarray:
        """Returns a dense weight with heavy tails, whose rows have unequal sizes and a mean of zero."""
        weight = noise.reshape(shape[0], -1)
        weight *= 1 + weight * weight / 10
        weight -= weight.mean(1, keepdims=True)
        gain = STEM_GAIN if name.startswith("patch_embed.0") else HE_GAIN if "reparam" in name else 1.0
        rows = gain / 1.32 / math.sqrt(weight.shape[1])  # 1.32 is the standard deviation of z + z^3 / 10
        spread = np.exp(ROW_SPREAD * self.draws(name + " rows").standard_normal(shape[0], dtype=np.float32))
        weight *= (np.float32(rows) * spread * self._written(name))[:, None]
        return weight.reshape(shape)


def depthwise(noise: np.ndarray) -> np.ndarray:
    """Returns standard-normal `noise` (C, 1, K, K) as filters that keep the variance of white inputs."""
    return noise * np.float32(1 / math.sqrt(math.prod(noise.shape[1:])))


def column(scales: np.ndarray) -> np.ndarray:
    """Returns `scales` (C,) as (C, 1, 1, 1)."""
    return scales[:, None, None, None]


def part_stages(config: FastViTConfig) -> dict[int, int]:
    """Returns the stage whose residual stream each part of `network` writes, by the part's number."""
    stages: dict[int, int] = {}
    for stage, kernel in enumerate(config.pos_emb_kernels):
        for _ in range((stage > 0) + (kernel is not None) + 1):  # downsampling, position convolution, blocks
            stages[len(stages)] = stage
    return stages
