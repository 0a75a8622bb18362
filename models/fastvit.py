"""FastViT, the vision encoder of FastVLM, in torch: training form and reparameterized form.

The architecture is FastViTHD's (FastVLM, arXiv 2412.13303): a convolutional stem, stages of RepMixer blocks, stages of
attention blocks, a wide output convolution. Everything is NCHW float32. Attribute names are Apple's, so that
`state_dict()` keys are the checkpoint's.

Blocks that train as a sum of branches own an idempotent `reparameterize()`, which folds branches and batch norms into
one convolution, in float64 (RepVGG, arXiv 2101.03697; MobileOne, arXiv 2206.04040; FastViT, arXiv 2303.14189).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Checkpoint, check_tensors, iter_float_tensors, shapes, tensors_under
from .errors import WeightsError
from .fastvit_config import BATCH_NORM_EPS, HEAD_DIM, LAYER_NORM_EPS, FastViTConfig
from .tensor_names import APPLE_ENCODER_PREFIX

IGNORED_TENSORS = ("head.", "num_batches_tracked")
"""The tensors of Apple's towers without effect on the features: the CLIP head and batch norms' step counters."""


def fold_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns (weight, bias) in float64 of a convolution with `weight` and no bias, followed by `norm`."""
    assert norm.running_var is not None and norm.running_mean is not None
    gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()  # (C,)
    return weight.double() * gain[:, None, None, None], norm.bias.double() - norm.running_mean.double() * gain


def identity_kernel(channels: int, groups: int, kernel_size: int) -> Tensor:
    """Returns the float64 weight (C, C / groups, K, K) of a convolution that returns its input."""
    weight = torch.zeros(channels, channels // groups, kernel_size, kernel_size, dtype=torch.float64)
    index = torch.arange(channels)
    weight[index, index % (channels // groups), kernel_size // 2, kernel_size // 2] = 1
    return weight


def padded_kernel(weight: Tensor, kernel_size: int) -> Tensor:
    """Returns `weight` centred in a kernel of `kernel_size`."""
    return F.pad(weight, [(kernel_size - weight.shape[-1]) // 2] * 4)


def conv_from(weight: Tensor, bias: Tensor, stride: int, groups: int) -> nn.Conv2d:
    """Returns a float32 convolution with 'same' padding from float64 parameters."""
    out_channels, in_per_group, kernel_size, _ = weight.shape
    conv = nn.Conv2d(
        in_per_group * groups, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, device="meta"
    )
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)
    return conv


def bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Returns the bias of a layer that was made with one."""
    assert layer.bias is not None
    return layer.bias


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns (weight, bias) in float64 of the one convolution that equals both."""
        return fold_norm(self.conv.weight, self.bn)


class SqueezeExcite(nn.Module):
    """Rescales each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, reduced_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced_channels, 1)
        self.expand = nn.Conv2d(reduced_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.expand(F.relu(self.reduce(gate))).sigmoid()


class MobileOneBlock(nn.Module):
    """A convolution that trains as a sum of branches: convolutions, a 1x1 scale, a normalized skip."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        reparameterized: bool,
        stride: int = 1,
        groups: int = 1,
        conv_branches: int = 1,
        scale_branch: bool = True,
        se_channels: int = 0,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.groups, self.kernel_size, self.activation = stride, groups, kernel_size, activation
        self.se = SqueezeExcite(out_channels, se_channels) if se_channels else nn.Identity()
        if reparameterized:
            self.reparam_conv = nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups
            )
            return
        self.rbr_conv = nn.ModuleList(
            ConvNorm(in_channels, out_channels, kernel_size, stride, groups) for _ in range(conv_branches)
        )
        if scale_branch and kernel_size > 1:
            self.rbr_scale = ConvNorm(in_channels, out_channels, 1, stride, groups)
        if in_channels == out_channels and stride == 1:
            self.rbr_skip = nn.BatchNorm2d(in_channels, eps=BATCH_NORM_EPS)

    def convolve(self, x: Tensor) -> Tensor:
        """Returns the sum of the branches, before squeeze-and-excitation and activation."""
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        branches = [branch(x) for branch in self.rbr_conv]
        branches += [getattr(self, name)(x) for name in ("rbr_scale", "rbr_skip") if hasattr(self, name)]
        return sum(branches[1:], branches[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.convolve(x))
        return F.gelu(x) if self.activation else x

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns (weight, bias) in float64 of the one convolution that equals the sum of the branches."""
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv.weight.double(), bias_of(self.reparam_conv).double()
        parts = [branch.folded() for branch in self.rbr_conv if isinstance(branch, ConvNorm)]
        if hasattr(self, "rbr_scale"):
            parts.append(self.rbr_scale.folded())
        if hasattr(self, "rbr_skip"):
            identity = identity_kernel(self.rbr_skip.num_features, self.groups, self.kernel_size)
            parts.append(fold_norm(identity, self.rbr_skip))
        weights, biases = zip(*parts, strict=True)
        padded = [padded_kernel(weight, self.kernel_size) for weight in weights]
        return torch.stack(padded).sum(0), torch.stack(biases).sum(0)

    def reparameterize(self) -> None:
        """Folds the branches into one convolution, in place."""
        if hasattr(self, "reparam_conv"):
            return
        self.reparam_conv = conv_from(*self.folded(), self.stride, self.groups)
        remove_modules(self, "rbr_conv", "rbr_scale", "rbr_skip")


class ReparamLargeKernelConv(nn.Module):
    """A strided depthwise convolution whose large kernel trains together with a small one."""

    def __init__(
        self, in_channels: int, out_channels: int, *, reparameterized: bool, kernel_size: int = 7, stride: int = 2
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.groups = kernel_size, stride, in_channels
        if reparameterized:
            self.lkb_reparam = nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=in_channels
            )
        else:
            self.lkb_origin = ConvNorm(in_channels, out_channels, kernel_size, stride, in_channels)
            self.small_conv = ConvNorm(in_channels, out_channels, 3, stride, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "lkb_reparam"):
            return F.gelu(self.lkb_reparam(x))
        return F.gelu(self.lkb_origin(x) + self.small_conv(x))

    def reparameterize(self) -> None:
        """Folds the branches into one convolution, in place."""
        if hasattr(self, "lkb_reparam"):
            return
        (large, large_bias), (small, small_bias) = self.lkb_origin.folded(), self.small_conv.folded()
        weight = large + padded_kernel(small, self.kernel_size)
        self.lkb_reparam = conv_from(weight, large_bias + small_bias, self.stride, self.groups)
        remove_modules(self, "lkb_origin", "small_conv")


class PositionConv(nn.Module):
    """Conditional position encoding: the input plus a depthwise convolution of it."""

    def __init__(self, channels: int, kernel_size: int, *, reparameterized: bool) -> None:
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size
        conv = nn.Conv2d(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels)
        if reparameterized:
            self.reparam_conv = conv
        else:
            self.pe = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.reparam_conv(x) if hasattr(self, "reparam_conv") else x + self.pe(x)

    def reparameterize(self) -> None:
        """Folds the branches into one convolution, in place."""
        if hasattr(self, "reparam_conv"):
            return
        weight = self.pe.weight.double() + identity_kernel(self.channels, self.channels, self.kernel_size)
        self.reparam_conv = conv_from(weight, bias_of(self.pe).double(), 1, self.channels)
        remove_modules(self, "pe")


class RepMixer(nn.Module):
    """Mixes tokens with a 3x3 depthwise convolution: `x + layer_scale * (mixer(x) - norm(x))`."""

    def __init__(self, channels: int, config: FastViTConfig, kernel_size: int = 3) -> None:
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size
        if config.reparameterized:
            self.reparam_conv = nn.Conv2d(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels)
            return
        self.norm = NormBranch(channels)
        self.mixer = MobileOneBlock(
            channels,
            channels,
            kernel_size,
            reparameterized=False,
            groups=channels,
            conv_branches=config.conv_branches,
            activation=False,
        )
        self.layer_scale = layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))

    def reparameterize(self) -> None:
        """Folds the branches into one convolution, in place."""
        if hasattr(self, "reparam_conv"):
            return
        weight, bias = self.mixer.folded()
        norm_weight, norm_bias = self.norm.folded(self.kernel_size)
        scale = self.layer_scale.double()[:, 0, 0]  # (C,)
        weight = (weight - norm_weight) * scale[:, None, None, None]
        weight = weight + identity_kernel(self.channels, self.channels, self.kernel_size)
        self.reparam_conv = conv_from(weight, (bias - norm_bias) * scale, 1, self.channels)
        remove_modules(self, "mixer", "norm", "layer_scale")


class NormBranch(nn.Module):
    """The batch norm that a RepMixer subtracts. Upstream it is a MobileOne block, hence the names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.rbr_skip(x)

    def folded(self, kernel_size: int) -> tuple[Tensor, Tensor]:
        """Returns (weight, bias) in float64 of the depthwise convolution that equals the batch norm."""
        channels = self.rbr_skip.num_features
        return fold_norm(identity_kernel(channels, channels, kernel_size), self.rbr_skip)


def layer_scale(channels: int) -> nn.Parameter:
    """Returns a factor (C, 1, 1) for each channel."""
    return nn.Parameter(torch.ones(channels, 1, 1))


def remove_modules(module: nn.Module, *names: str) -> None:
    """Deletes those of the attributes `names` that `module` has."""
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


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
    """A 7x7 depthwise convolution and a feed-forward network of 1x1 convolutions."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, 7, groups=channels)
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """A block of the convolutional stages: RepMixer, then ConvFFN."""

    def __init__(self, channels: int, mlp_ratio: int, config: FastViTConfig) -> None:
        super().__init__()
        self.token_mixer = RepMixer(channels, config)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)
        self.layer_scale = layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.mix_tokens(x))

    def mix_tokens(self, x: Tensor) -> Tensor:
        """Returns the output of the token mixer, skip connection included."""
        return self.token_mixer(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Returns the output of the feed-forward network, skip connection included."""
        return x + self.layer_scale * self.convffn(x)


class ChannelLayerNorm(nn.Module):
    """A layer norm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred * (centred.square().mean(1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    """A multi-head self-attention over the positions of a feature map."""

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
    """A block of the last stages: attention, then ConvFFN."""

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
        """Returns the output of the token mixer, skip connection included."""
        return x + self.layer_scale_1 * self.token_mixer(self.norm(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Returns the output of the feed-forward network, skip connection included."""
        return x + self.layer_scale_2 * self.convffn(x)


class FastViT(nn.Module):
    """The encoder. Maps `images` (B, 3, S, S) in 0..1 to `image_features` (B, (S / 64)^2, C)."""

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
        """Returns `image_features` (B, HW, 2C) from the output (B, C, H, W) of the last stage."""
        return self.conv_exp(x).flatten(2).transpose(1, 2)  # (B, N, C)

    def reparameterize(self) -> FastViT:
        """Folds every block's branches in place and returns itself. A second call changes nothing."""
        for module in list(self.modules()):
            if module is not self and hasattr(module, "reparameterize"):
                module.reparameterize()  # type: ignore[operator]
        return self

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> FastViT:
        """Returns the encoder of a checkpoint in its stored form, float32, ready for inference.

        Raises:
            WeightsError: tensors are missing, unexpected, of a wrong shape or not finite. The message lists them.
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
                f"config.json has mm_hidden_size={checkpoint.config.mm_hidden_size}, but the encoder has "
                f"{encoder.config.out_channels} output channels"
            )
        encoder.load_state_dict(_float32_state(checkpoint, expected), strict=False, assign=True)
        return encoder.requires_grad_(False).eval()


def _float32_state(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    state = {}
    prefixed = [APPLE_ENCODER_PREFIX + name for name in names]
    for name, values in iter_float_tensors(checkpoint, prefixed, "pt"):
        tensor = torch.as_tensor(values).float()
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} has NaN or infinite values: the checkpoint is damaged")
        state[name.removeprefix(APPLE_ENCODER_PREFIX)] = tensor
    return state


def stem(config: FastViTConfig) -> nn.Sequential:
    """Returns the three MobileOne blocks that reduce the resolution 4x."""
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
    """Returns downsamplings, position convolutions and stages in Apple's numbering."""
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
