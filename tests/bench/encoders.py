"""Small encoders with seeded random weights: the architectures that people convert to Core ML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]
"""A network in evaluation mode, and inputs for it."""

SIZE = 32


class First(nn.Module):
    """A transformers model that returns its first result as a tensor."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        result = self.model(x, return_dict=False, **self.options)
        return result[0] if isinstance(result, tuple) else result


def vision(
    name: str, /, attention: str | None = None, model: str | None = None, size: int = SIZE, **config: Any
) -> Made:
    """Makes `<name>Model` of transformers from a small config."""
    import transformers

    made = getattr(transformers, f"{name}Config")(**config)
    if attention:
        made._attn_implementation = attention
    network = getattr(transformers, model or f"{name}Model")(made)
    return First(randomized(network)).eval(), (torch.rand(1, 3, size, size),)


def text(name: str, /, attention: str = "eager", model: str | None = None, **config: Any) -> Made:
    """Makes a text encoder of transformers from a small config."""
    import transformers

    made = getattr(transformers, f"{name}Config")(vocab_size=99, **config)
    made._attn_implementation = attention
    network = getattr(transformers, model or f"{name}Model")(made)
    return First(randomized(network)).eval(), (torch.randint(3, 99, (1, 12), dtype=torch.int32),)


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZED = {**VIT, "image_size": SIZE, "patch_size": 8}
BERT = {**VIT, "max_position_embeddings": 64}


def randomized(network: nn.Module) -> nn.Module:
    """Returns a network with random weights of the usual size and random batch statistics.

    Initial weights of transformers are so small that the result hardly depends on the input.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def plain(network: nn.Module, *shape: int) -> Made:
    """Returns a network and an image, or another input of `shape`, for it."""
    return randomized(network).eval(), (torch.rand(*(shape or (1, 3, SIZE, SIZE))),)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, **options: Any) -> nn.Sequential:
    padding = options.pop("padding", kernel // 2 * options.get("dilation", 1))
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False, **options),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Excite(nn.Module):
    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), gate
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x)


def resnet() -> Made:
    block = Residual(nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)))
    down = Residual(nn.Sequential(conv(8, 16, 3, 2), nn.ReLU(), conv(16, 16)), conv(8, 16, 1, 2))
    stem = nn.Sequential(conv(3, 8, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return plain(nn.Sequential(stem, block, nn.ReLU(), down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))


def mobilenet_v3() -> Made:
    def block(expand: int, act: nn.Module) -> nn.Module:
        wide = conv(expand, expand, 5, 1, expand)
        return nn.Sequential(conv(8, expand, 1), act, wide, Excite(expand, nn.Hardsigmoid()), act, conv(expand, 8, 1))

    stem = nn.Sequential(conv(3, 8, 3, 2), nn.Hardswish())
    return plain(nn.Sequential(stem, Residual(block(16, nn.ReLU())), Residual(block(24, nn.Hardswish()))))


def mobilenet_v2() -> Made:
    body = nn.Sequential(conv(8, 32, 1), nn.ReLU6(), conv(32, 32, 3, 1, 32), nn.ReLU6(), conv(32, 8, 1))
    return plain(nn.Sequential(conv(3, 8, 3, 2), nn.ReLU6(), Residual(body), nn.AdaptiveAvgPool2d(1)))


def efficientnet() -> Made:
    body = nn.Sequential(conv(8, 32, 1), nn.SiLU(), conv(32, 32, 3, 1, 32), nn.SiLU(), Excite(32, nn.Sigmoid()))
    return plain(nn.Sequential(conv(3, 8, 3, 2), nn.SiLU(), body, conv(32, 8, 1)))


def vgg() -> Made:
    layers = [conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 16), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)]
    return plain(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)))


class Densenet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 4 * i), nn.ReLU(), conv(3 + 4 * i, 4)) for i in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = conv(3, 8, 3, 2), nn.Sequential(conv(4, 4, 3, 1, 4), conv(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept, moved = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(moved)], 1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = conv(3, 8), conv(8, 16)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.down(x))
        low = F.relu(self.bottom(F.max_pool2d(high, 2)))
        return self.out(torch.cat([high, self.up(low)], 1))


class Pyramid(nn.Module):
    """A feature pyramid with nearest and bilinear upsampling, and a dilated head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.head = conv(3, 8, 3, 2), conv(8, 8, 3, 2), conv(8, 4, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        high = F.leaky_relu(self.stem(x), 0.1)
        low = F.elu(self.deep(high))
        joined = high + F.interpolate(low, scale_factor=2.0, mode="nearest")
        whole = F.interpolate(self.head(joined), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return F.interpolate(whole, scale_factor=2.0, mode="bilinear", align_corners=True)


def super_resolution() -> Made:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)]
    return plain(nn.Sequential(nn.ReflectionPad2d(2), *layers, nn.Hardtanh(0.0, 1.0)))


def style() -> Made:
    layers = [nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)]
    return plain(nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 3, 2, 1, output_padding=1), nn.Tanh()))


class Patches(nn.Module):
    """Patches of an image as tokens, before a body of tokens."""

    def __init__(self, body: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.patch, self.body = nn.Conv2d(3, width, 8, 8), body
        self.position = nn.Parameter(torch.randn(1, (SIZE // 8) ** 2, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.patch(x).flatten(2).transpose(1, 2) + self.position)


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, keys: int | None = None, rotary: bool = False) -> None:
        super().__init__()
        self.heads, self.keys, self.rotary = heads, keys or heads, rotary
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width * self.keys // heads)
        self.out = nn.Linear(width, width)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.keys, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        if self.keys != self.heads:
            k, v = (part.repeat_interleave(self.heads // self.keys, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def block(**options: Any) -> nn.Module:
    mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16))
    return nn.Sequential(Residual(nn.Sequential(nn.LayerNorm(16), Attention(**options))), Residual(mlp))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


class Windows(nn.Module):
    """Attention in shifted windows of a grid, as Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.roll(x.view(1, 4, 4, 16), (-1, -1), (1, 2))
        parts = grid.view(1, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(4, 4, 16)
        grid = self.attention(parts).view(1, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(1, 4, 4, 16)
        return torch.roll(grid, (1, 1), (1, 2)).reshape(1, 16, 16)


class Queries(nn.Module):
    """Learned queries over tokens, and the three most similar tokens of each."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.attention(self.queries, x, x)
        scores, places = (F.normalize(found, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)).topk(3, -1)
        nearest = torch.gather(x, 1, places[..., :1].expand(-1, -1, 16))
        return torch.cat([found, nearest, scores.mean(-1, keepdim=True).expand(-1, -1, 16)], -1)


class Recurrent(nn.Module):
    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 6, bidirectional=bidirectional, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lstm(self.embed(ids))[0].amax(1)


class TextConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 8), nn.Conv1d(8, 12, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).to(torch.float32)[:, None]
        features = F.relu(self.conv(self.embed(ids).transpose(1, 2)))
        return (features * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def ids(network: nn.Module) -> Made:
    return network.eval(), (torch.randint(0, 50, (1, 9), dtype=torch.int32),)


def whisper() -> Made:
    import transformers

    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=20,
    )  # fmt: skip
    config._attn_implementation = "eager"
    encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    return First(randomized(encoder)).eval(), (torch.rand(1, 8, 40),)


STAGES: dict[str, Sequence[int]] = {"depths": [1, 1, 1, 1]}
PYRAMID: dict[str, Sequence[int]] = {**STAGES, "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4]}
ENCODERS: dict[str, Callable[[], Made]] = {
    "vit": lambda: vision("ViT", "eager", **SIZED),
    "vit_sdpa": lambda: vision("ViT", "sdpa", **SIZED),
    "deit": lambda: vision("DeiT", "eager", **SIZED),
    "beit": lambda: vision("Beit", "eager", **SIZED, use_relative_position_bias=True),
    "clip_vision": lambda: vision("CLIPVision", "eager", **SIZED),
    "clip_vision_sdpa": lambda: vision("CLIPVision", "sdpa", **SIZED),
    "siglip_vision": lambda: vision("SiglipVision", "eager", **SIZED),
    "blip_vision": lambda: vision("BlipVision", "eager", **SIZED),
    "dinov2": lambda: vision("Dinov2", "eager", **{**SIZED, "mlp_ratio": 2}),
    "dinov2_registers": lambda: vision("Dinov2WithRegisters", "eager", **{**SIZED, "mlp_ratio": 2}),
    "dinov3_vit": lambda: vision("DINOv3ViT", "eager", **SIZED),
    "ijepa": lambda: vision("IJepa", "eager", **SIZED),
    "yolos": lambda: vision("Yolos", "eager", **{**SIZED, "image_size": [SIZE, SIZE], "num_detection_tokens": 4}),
    "sam_vision": lambda: vision(
        "SamVision", "eager", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_dim=64,
        output_channels=16,
        image_size=SIZE, patch_size=8, window_size=2, global_attn_indexes=[1],
    ),
    "convnext": lambda: vision("ConvNext", hidden_sizes=[8, 16, 24, 32], **STAGES),
    "convnextv2": lambda: vision("ConvNextV2", hidden_sizes=[8, 16, 24, 32], **STAGES),
    "dinov3_convnext": lambda: vision("DINOv3ConvNext", hidden_sizes=[8, 16, 24, 32], **STAGES),
    "swin": lambda: vision("Swin", embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, image_size=SIZE),
    "swinv2": lambda: vision("Swinv2", embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, image_size=SIZE),
    "resnet_hf": lambda: vision("ResNet", embedding_size=8, hidden_sizes=[8, 16, 24, 32], **STAGES),
    "regnet": lambda: vision("RegNet", embedding_size=8, hidden_sizes=[8, 16, 24, 32], groups_width=4, **STAGES),
    "bit": lambda: vision("Bit", embedding_size=8, hidden_sizes=[8, 16, 24, 32], num_groups=4, **STAGES),
    "mobilenet_v1": lambda: vision("MobileNetV1", depth_multiplier=0.125),
    "mobilenet_v2_hf": lambda: vision("MobileNetV2", depth_multiplier=0.1, min_depth=4),
    "mobilevit": lambda: vision(
        "MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[4, 8, 8, 16, 16, 24, 32], image_size=SIZE, size=64
    ),
    "mobilevitv2": lambda: vision("MobileViTV2", width_multiplier=0.125, image_size=64, size=64),
    "efficientnet_hf": lambda: vision("EfficientNet", width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128),
    "segformer": lambda: vision("Segformer", **PYRAMID),
    "poolformer": lambda: vision("PoolFormer", hidden_sizes=[8, 16, 16, 32], **STAGES),
    "pvt": lambda: vision("Pvt", image_size=SIZE, **PYRAMID),
    "pvt_v2": lambda: vision("PvtV2", image_size=SIZE, **PYRAMID),
    "focalnet": lambda: vision(
        "FocalNet", embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], image_size=SIZE
    ),
    "levit": lambda: vision(
        "Levit", image_size=64, size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "whisper_encoder": whisper,
    "clip_text": lambda: text("CLIPText", **BERT, eos_token_id=98),
    "siglip_text": lambda: text("SiglipText", **BERT, projection_size=32),
    "bert": lambda: text("Bert", **BERT),
    "distilbert": lambda: text("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "vgg": vgg,
    "densenet": lambda: plain(Densenet()),
    "shufflenet": lambda: plain(Shuffle()),
    "unet": lambda: plain(Unet()),
    "pyramid": lambda: plain(Pyramid()),
    "super_resolution": super_resolution,
    "style": style,
    "vit_block": lambda: plain(Patches(block())),
    "vit_rotary": lambda: plain(Patches(block(rotary=True))),
    "vit_grouped": lambda: plain(Patches(block(keys=2))),
    "vit_windows": lambda: plain(Patches(Windows())),
    "mixer": lambda: plain(Patches(Mixer())),
    "queries": lambda: plain(Patches(Queries())),
    "lstm": lambda: ids(Recurrent(False)),
    "lstm_both_ways": lambda: ids(Recurrent(True)),
    "text_conv": lambda: ids(TextConv()),
    "video": lambda: plain(
        nn.Sequential(nn.Conv3d(3, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2)), 1, 3, 8, 16, 16
    ),
    "audio": lambda: plain(
        nn.Sequential(nn.Conv1d(8, 16, 5, 2, 2), nn.BatchNorm1d(16), nn.GELU(), nn.AvgPool1d(2)), 1, 8, 40
    ),
}  # fmt: skip
"""The encoders by name. Each call makes the same weights if torch is seeded before."""
