"""FastViT, the vision encoder of FastVLM, in torch: training form and reparameterized form.

The architecture is FastViTHD's (FastVLM, arXiv 2412.13303): a convolutional stem, stages of RepMixer blocks, stages of
attention blocks, a wide output convolution. Everything is NCHW float32. `fastvit_blocks.py` has the parts that fold.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import APPLE_ENCODER_PREFIX, Checkpoint, check_tensors, iter_float_tensors, shapes, tensors_under
from .errors import WeightsError
from .fastvit_blocks import (
    ConvNorm,
    MobileOneBlock,
    PositionConv,
    ReparamLargeKernelConv,
    RepMixer,
    layer_scale,
)
from .fastvit_config import HEAD_DIM, LAYER_NORM_EPS, FastViTConfig

IGNORED_TENSORS = ("head.", "num_batches_tracked")
"""Parts of Apple's towers that do not shape the features: the CLIP head and batch norms' step counters."""


class Downsampling(nn.Module):
    """Halves the resolution and changes the width."""

    def __init__(self, in_channels: int, out_channels: int, config: FastViTConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(in_channels, out_channels, reparameterized=config.reparameterized),
            MobileOneBlock(
                out_channels,
                out_channels,
                1,
                reparameterized=config.reparameterized,
                conv_branches=config.conv_branches,
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvFFN(nn.Module):
    """Feed-forward network of 1x1 convolutions behind a 7x7 depthwise one."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, 7, groups=channels)
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    def __init__(self, channels: int, mlp_ratio: int, config: FastViTConfig) -> None:
        super().__init__()
        self.token_mixer = RepMixer(channels, config)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)
        self.layer_scale = layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.mix_tokens(x))

    def mix_tokens(self, x: Tensor) -> Tensor:
        return self.token_mixer(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.convffn(x)


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred * (centred.square().mean(1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = channels // HEAD_DIM
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.qkv(tokens).reshape(B, H * W, 3, self.num_heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, heads, HW, 32) each
        weights = (query * HEAD_DIM**-0.5 @ key.transpose(-1, -2)).softmax(-1)  # (B, heads, HW, HW)
        tokens = (weights @ value).transpose(1, 2).reshape(B, H * W, C)
        return self.proj(tokens).transpose(1, 2).reshape(B, C, H, W)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.token_mixer = Attention(channels)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)
        self.layer_scale_1 = layer_scale(channels)
        self.layer_scale_2 = layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.mix_tokens(x))

    def mix_tokens(self, x: Tensor) -> Tensor:
        return x + self.layer_scale_1 * self.token_mixer(self.norm(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale_2 * self.convffn(x)


class FastViT(nn.Module):
    """The encoder: `images` (B, 3, S, S) in 0..1 -> `image_features` (B, (S / 64)^2, C)."""

    def __init__(self, config: FastViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = stem(config)
        self.network = nn.ModuleList(network_parts(config))
        self.conv_exp = MobileOneBlock(
            config.embed_dims[-1],
            config.out_channels,
            3,
            reparameterized=config.reparameterized,
            groups=config.embed_dims[-1],
            conv_branches=config.conv_branches,
            se_channels=config.se_channels,
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for part in self.network:
            x = part(x)
        return self.features(x)

    def features(self, x: Tensor) -> Tensor:
        """The output convolution's part: the last stage (B, C, H, W) -> `image_features` (B, HW, 2C)."""
        return self.conv_exp(x).flatten(2).transpose(1, 2)  # (B, N, C)

    def reparameterize(self) -> FastViT:
        """Folds every block's branches in place; a second call changes nothing. Returns itself."""
        for module in list(self.modules()):
            if module is not self and hasattr(module, "reparameterize"):
                module.reparameterize()  # type: ignore[operator]
        return self

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> FastViT:
        """The encoder of an Apple-layout checkpoint, in the form that it is stored in, float32, ready for inference.

        Raises:
            WeightsError: tensors are missing, unexpected (both listed), of a wrong shape or not finite.
        """
        tensors = {
            name: info
            for name, info in tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX).items()
            if not name.startswith(IGNORED_TENSORS) and not name.endswith(IGNORED_TENSORS)
        }
        with torch.device("meta"):
            encoder = cls(FastViTConfig.from_shapes(shapes(tensors)))
        expected = {name: tuple(t.shape) for name, t in encoder.state_dict().items() if not name.endswith("tracked")}
        check_tensors(expected, shapes(tensors), "vision encoder")
        if encoder.config.out_channels != checkpoint.config.mm_hidden_size:
            raise WeightsError(
                f"config.json says mm_hidden_size={checkpoint.config.mm_hidden_size}, but the encoder gives "
                f"{encoder.config.out_channels} channels"
            )
        encoder.load_state_dict(_float32_state(checkpoint, expected), strict=False, assign=True)
        return encoder.requires_grad_(False).eval()


def _float32_state(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    state = {}
    prefixed = [APPLE_ENCODER_PREFIX + name for name in names]
    for name, values in iter_float_tensors(checkpoint, prefixed, "pt"):
        tensor = torch.as_tensor(values).float()
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} holds NaN or infinite values: the checkpoint is damaged")
        state[name.removeprefix(APPLE_ENCODER_PREFIX)] = tensor
    return state


def stem(config: FastViTConfig) -> nn.Sequential:
    """Three MobileOne blocks that reduce the resolution 4x."""
    width = config.embed_dims[0]
    block = partial(
        MobileOneBlock,
        out_channels=width,
        reparameterized=config.reparameterized,
        scale_branch=config.stem_scale_branch,
        conv_branches=config.conv_branches,
    )
    return nn.Sequential(
        block(3, kernel_size=3, stride=2),
        block(width, kernel_size=3, stride=2, groups=width),
        block(width, kernel_size=1),
    )


def network_parts(config: FastViTConfig) -> list[nn.Module]:
    """Stages, each behind its downsampling and position convolution, in Apple's numbering."""
    parts: list[nn.Module] = []
    for i, (depth, width, ratio) in enumerate(zip(config.depths, config.embed_dims, config.mlp_ratios, strict=True)):
        if i:
            parts.append(Downsampling(config.embed_dims[i - 1], width, config))
        kernel_size = config.pos_emb_kernels[i]
        if kernel_size is not None:
            parts.append(PositionConv(width, kernel_size, reparameterized=config.reparameterized))
        attention = config.token_mixers[i] == "attention"
        parts.append(
            nn.Sequential(
                *(
                    AttentionBlock(width, ratio) if attention else RepMixerBlock(width, ratio, config)
                    for _ in range(depth)
                )
            )
        )
    return parts
