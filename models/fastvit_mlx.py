"""The FastViT vision encoder in MLX, in reparameterized form, channels last.

Tensor names are mlx-vlm's (under `vision_tower.vision_model.`), so that clients with the encoder in MLX load the same
file. They differ from Apple's in the stem's `blocks`. `fastvit.py` is the torch form, which also trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ._mlx import mx, nn, on_cpu
from .checkpoint import check_tensors
from .errors import WeightsError
from .fastvit_config import BATCH_NORM_EPS, HEAD_DIM, LAYER_NORM_EPS, FastViTConfig
from .tensor_names import UNUSED_ENCODER_TENSORS, apple_encoder_shapes


def gelu(x: mx.array) -> mx.array:
    """Returns the exact GELU. `nn.gelu` would run the system's C++ compiler at first use off a Mac."""
    return 0.5 * x * (1.0 + mx.erf(x * 0.5**0.5))


class Conv(nn.Module):
    """A convolution with 'same' padding and a `weight` (out, K, K, in / groups)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = mx.zeros((out_channels, kernel_size, kernel_size, in_channels // groups))
        if bias:
            self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return convolve(x, self.weight, self.stride, self.groups) + self.bias


def convolve(x: mx.array, weight: mx.array, stride: int, groups: int) -> mx.array:
    """Returns the convolution (B, H / stride, W / stride, out) of x (B, H, W, C), without a bias."""
    out_channels, kernel_size, _, in_per_group = weight.shape
    if kernel_size == 1 and stride == 1 and groups == 1:
        return x @ weight.reshape(out_channels, in_per_group).T
    if on_cpu() and groups == out_channels and in_per_group == 1 and groups == x.shape[-1]:
        return depthwise(x, weight, stride)
    if not on_cpu() and in_per_group == 1 and out_channels == 2 * groups and groups == x.shape[-1]:
        return doubled_depthwise(x, weight, stride)
    return mx.conv2d(x, weight, stride=stride, padding=kernel_size // 2, groups=groups)


def depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Computes a depthwise convolution as a sum over its taps, since MLX lacks a fast kernel for it on a CPU."""
    _, H, W, _ = x.shape
    kernel_size = weight.shape[1]
    pad = kernel_size // 2
    x = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    total = mx.array(0.0, dtype=x.dtype)
    for i in range(kernel_size):
        for j in range(kernel_size):
            total = total + x[:, i : i + H : stride, j : j + W : stride] * weight[:, i, j, 0]
    return total


def doubled_depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Computes a depthwise convolution with two outputs per channel as two with one, which have a fast Metal kernel."""
    out_channels, kernel_size, _, _ = weight.shape
    halves = [
        mx.conv2d(x, weight[half::2], stride=stride, padding=kernel_size // 2, groups=out_channels // 2)
        for half in range(2)
    ]
    y = mx.stack(halves, axis=-1)  # (B, H, W, C, 2)
    return y.reshape(*y.shape[:3], out_channels)


class BatchNorm(nn.Module):
    """The tensors of a batch norm in inference."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))


class ConvNorm(nn.Module):
    """A 7x7 depthwise convolution without bias and a batch norm, which `fold` makes one convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 7, groups=channels, bias=False)
        self.bn = BatchNorm(channels)

    def fold(self) -> None:
        """Computes the folded convolution in float32, and stores it in the dtype of the weights."""
        norm, weight = self.bn, self.conv.weight
        gain = norm.weight.astype(mx.float32) * mx.rsqrt(norm.running_var.astype(mx.float32) + BATCH_NORM_EPS)  # (C,)
        bias = norm.bias.astype(mx.float32) - norm.running_mean.astype(mx.float32) * gain
        self._weight = (weight.astype(mx.float32) * gain[:, None, None, None]).astype(weight.dtype)
        self._bias = bias.astype(weight.dtype)
        mx.eval(self._weight, self._bias)

    def __call__(self, x: mx.array) -> mx.array:
        return convolve(x, self._weight, 1, self.conv.groups) + self._bias


class ConvFFN(nn.Module):
    """A feed-forward network: a depthwise convolution, then two pointwise ones."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv = ConvNorm(channels)
        self.fc1 = Conv(channels, hidden_channels, 1)
        self.fc2 = Conv(hidden_channels, channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(self.conv(x))))


class DepthwiseConv(nn.Module):
    """A depthwise convolution: the token mixer of a RepMixer block, or the position encoding before a stage."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.reparam_conv = Conv(channels, channels, kernel_size, groups=channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.reparam_conv(x)


class RepMixerBlock(nn.Module):
    """A block that mixes tokens with a convolution."""

    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.token_mixer = DepthwiseConv(channels, 3)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)
        self.layer_scale = mx.ones((1, 1, channels))

    def __call__(self, x: mx.array) -> mx.array:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class ChannelLayerNorm(nn.Module):
    """A layer norm over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS)


class Attention(nn.Module):
    """The multi-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = channels // HEAD_DIM
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, HEAD_DIM).transpose(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]  # (B, heads, HW, 32) each
        mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=HEAD_DIM**-0.5)
        return self.proj(mixed.transpose(0, 2, 1, 3).reshape(B, H, W, C))


class AttentionBlock(nn.Module):
    """A block that mixes tokens with attention."""

    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.token_mixer = Attention(channels)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)
        self.layer_scale_1 = mx.ones((1, 1, channels))
        self.layer_scale_2 = mx.ones((1, 1, channels))

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class SqueezeExcite(nn.Module):
    """A gate on the channels, computed from their means."""

    def __init__(self, channels: int, reduced_channels: int) -> None:
        super().__init__()
        self.reduce = Conv(channels, reduced_channels, 1)
        self.expand = Conv(reduced_channels, channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        gate = x.mean((1, 2), keepdims=True)  # (B, 1, 1, C)
        return x * mx.sigmoid(self.expand(mx.maximum(self.reduce(gate), 0)))


class MobileOneBlock(nn.Module):
    """A convolution, an optional squeeze-and-excitation gate, and GELU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, se: int = 0
    ) -> None:
        super().__init__()
        self.reparam_conv = Conv(in_channels, out_channels, kernel_size, stride, groups)
        if se:
            self.se = SqueezeExcite(out_channels, se)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.reparam_conv(x)
        return gelu(self.se(x) if "se" in self else x)


class LargeKernelConv(nn.Module):
    """A 7x7 convolution with stride 2, and GELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lkb_reparam = Conv(in_channels, out_channels, 7, stride=2, groups=in_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(self.lkb_reparam(x))


class Downsampling(nn.Module):
    """A layer that halves the resolution and changes the width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = [LargeKernelConv(in_channels, out_channels), MobileOneBlock(out_channels, out_channels, 1)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj[1](self.proj[0](x))


class Stem(nn.Module):
    """The three convolutions that reduce the resolution 4x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = [
            MobileOneBlock(3, width, 3, stride=2),
            MobileOneBlock(width, width, 3, stride=2, groups=width),
            MobileOneBlock(width, width, 1),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return x


class FastViTMLX(nn.Module):
    """The encoder from `images` (B, 3, S, S) in 0..1 to `image_features` (B, (S / 64)^2, C)."""

    def __init__(self, config: FastViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Stem(config.embed_dims[0])
        self.network = network_parts(config)
        width = config.embed_dims[-1]
        self.conv_exp = MobileOneBlock(width, config.out_channels, 3, groups=width, se=config.se_channels)

    def __call__(self, images: mx.array) -> mx.array:
        *_, (_, image_features) = self.results(images)
        return image_features

    def results(self, images: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Yields each intermediate result by name, launched.

        These are `stem` (B, H, W, C), `stage 0`, ... and `image_features` (B, N, C) in float32.
        """
        images = images.astype(self.conv_exp.reparam_conv.weight.dtype)
        x, stage = self.patch_embed(images.transpose(0, 2, 3, 1)), 0  # (B, H, W, C) from here on
        yield "stem", evaluated(x)
        for part in self.network:
            for layer in part if isinstance(part, list) else [part]:
                x = evaluated(layer(x))
            if isinstance(part, list):
                yield f"stage {stage}", x
                stage += 1
        x = self.conv_exp(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(mx.float32)  # (B, N, C)
        yield "image_features", evaluated(x)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, mx.array], dtype: mx.Dtype | None = None) -> FastViTMLX:
        """Returns the encoder for tensors with mlx-vlm's names.

        It computes in `dtype`. None is bfloat16 on a GPU if the tensors are stored in it, as in other clients, and else
        float32. In float16, sums overflow on trained weights, and on a CPU 16-bit kernels are slow.

        Raises:
            WeightsError: tensors are missing, unexpected (both listed), of a wrong shape or not finite.
        """
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNUSED_ENCODER_TENSORS)}
        config = FastViTConfig.from_shapes(
            apple_encoder_shapes({name: tensor.shape for name, tensor in tensors.items()})
        )
        if not config.reparameterized:
            raise WeightsError("the MLX encoder must be in reparameterized form, got the training form")
        encoder = cls(config)
        parameters = dict(nn.utils.tree_flatten(encoder.parameters()))
        check_tensors(
            {name: tensor.shape for name, tensor in parameters.items()},
            {name: tensor.shape for name, tensor in tensors.items()},
            "MLX vision encoder",
        )
        if dtype is None:
            stored = {tensor.dtype for tensor in tensors.values()}
            dtype = mx.bfloat16 if stored == {mx.bfloat16} and not on_cpu() else mx.float32
        encoder.load_weights([(name, tensor.astype(dtype)) for name, tensor in tensors.items()])
        damaged = [name for name, tensor in tensors.items() if not mx.isfinite(tensor).all().item()]
        if damaged:
            raise WeightsError(f"{damaged[0]} has NaN or infinite values. Export the model again.")
        mx.eval(encoder.parameters())
        for module in encoder.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return encoder


def evaluated(x: mx.array) -> mx.array:
    """Computes `x` on a CPU, or launches it on a GPU, so that intermediate results are freed early. Returns `x`."""
    if on_cpu():
        mx.eval(x)
    else:
        mx.async_eval(x)
    return x


def network_parts(config: FastViTConfig) -> list[nn.Module | list[nn.Module]]:
    """Returns the stages, each after its downsampling and position convolution, in Apple's numbering."""
    parts: list[nn.Module | list[nn.Module]] = []
    for i, (depth, width, ratio) in enumerate(zip(config.depths, config.embed_dims, config.mlp_ratios, strict=True)):
        if i:
            parts.append(Downsampling(config.embed_dims[i - 1], width))
        kernel_size = config.pos_emb_kernels[i]
        if kernel_size is not None:
            parts.append(DepthwiseConv(width, kernel_size))
        block = AttentionBlock if config.token_mixers[i] == "attention" else RepMixerBlock
        parts.append([block(width, ratio) for _ in range(depth)])
    return parts
