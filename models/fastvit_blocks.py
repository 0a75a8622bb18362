"""The blocks of FastViT that train as a sum of branches and run as one convolution.

Each owns an idempotent `reparameterize()` that folds its branches and batch norms, in float64 (RepVGG, arXiv
2101.03697; MobileOne, arXiv 2206.04040; FastViT, arXiv 2303.14189). Attribute names are Apple's, so that
`state_dict()` keys are the checkpoint's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fastvit_config import BATCH_NORM_EPS, FastViTConfig


def fold_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float64 of the convolution that equals `norm` behind one with `weight` and no bias."""
    assert norm.running_var is not None and norm.running_mean is not None
    gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()  # (C,)
    return weight.double() * gain[:, None, None, None], norm.bias.double() - norm.running_mean.double() * gain


def identity_kernel(channels: int, groups: int, kernel_size: int) -> Tensor:
    """The float64 weight of a convolution that returns its input, (C, C / groups, K, K)."""
    weight = torch.zeros(channels, channels // groups, kernel_size, kernel_size, dtype=torch.float64)
    index = torch.arange(channels)
    weight[index, index % (channels // groups), kernel_size // 2, kernel_size // 2] = 1
    return weight


def padded_kernel(weight: Tensor, kernel_size: int) -> Tensor:
    """`weight` centred in a kernel of `kernel_size`."""
    return F.pad(weight, [(kernel_size - weight.shape[-1]) // 2] * 4)


def conv_from(weight: Tensor, bias: Tensor, stride: int, groups: int) -> nn.Conv2d:
    """A float32 convolution with 'same' padding from float64 parameters."""
    out_channels, in_per_group, kernel_size, _ = weight.shape
    conv = nn.Conv2d(
        in_per_group * groups, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, device="meta"
    )
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)
    return conv


def bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a layer that was made with one."""
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
        return fold_norm(self.conv.weight, self.bn)


class SqueezeExcite(nn.Module):
    """Rescales channels by what the whole image says of them."""

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
        """The sum of the branches, before squeeze-and-excitation and activation."""
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        branches = [branch(x) for branch in self.rbr_conv]
        branches += [getattr(self, name)(x) for name in ("rbr_scale", "rbr_skip") if hasattr(self, name)]
        return sum(branches[1:], branches[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.convolve(x))
        return F.gelu(x) if self.activation else x

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) in float64 of the one convolution that equals the sum of the branches."""
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
        if hasattr(self, "reparam_conv"):
            return
        self.reparam_conv = conv_from(*self.folded(), self.stride, self.groups)
        remove_modules(self, "rbr_conv", "rbr_scale", "rbr_skip")


class ReparamLargeKernelConv(nn.Module):
    """A strided depthwise convolution whose large kernel trains beside a small one."""

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
    """The batch norm that a RepMixer subtracts, named as the MobileOne block that it is upstream."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.rbr_skip(x)

    def folded(self, kernel_size: int) -> tuple[Tensor, Tensor]:
        """(weight, bias) in float64 of the depthwise convolution that equals the batch norm."""
        channels = self.rbr_skip.num_features
        return fold_norm(identity_kernel(channels, channels, kernel_size), self.rbr_skip)


def layer_scale(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(channels, 1, 1))


def remove_modules(module: nn.Module, *names: str) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
