"""The work of an answer: operations and bytes, counted from a package or from an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...models.config import FastVLMConfig, Qwen2Config
from ...models.errors import ModelFolderError
from ...models.fastvit_config import HEAD_DIM, FastViTConfig
from ...models.mlprogram import census, read_package, stored_bytes
from ...models.mlprogram.cost import flops, moved_elements
from ..folder import open_folder

TEXT_TOKENS = 30
"""The text tokens of a prompt: the training prompt around a short question."""

ACTIVATION_BYTES = 2
"""The bytes of an activation. The engine computes in float16."""

ENCODER_BITS = {"fp16": 16.0, "int8": 8.1, "pal8": 8.1, "pal6": 6.2, "int4": 4.7, "pal4": 4.2, "w8a8": 8.1}
"""The bits per weight of an exported FastViTHD by scheme. They include scales and float16 depthwise weights."""

INT8_ACTIVATIONS = "w8a8"
"""The scheme with int8 activations."""


@dataclass(frozen=True)
class EncoderCost:
    """The work of encoding one image."""

    flops: int
    """The operations, where a multiplication and an addition count as two."""
    moved_elements: int
    """The values that convolutions and matrix products read and write, as if none stayed on the chip."""
    weight_bytes: float
    int8_activations: bool = False

    @property
    def moved_bytes(self) -> float:
        """The bytes of weights and activations."""
        return self.weight_bytes + ACTIVATION_BYTES * self.moved_elements


@dataclass(frozen=True)
class Work:
    """The work of encoding one image and prefilling one prompt."""

    label: str
    image_size: int
    prompt_tokens: int
    encoder: EncoderCost
    prefill_flops: int
    decoder_bytes: float
    """The bytes of weights that a forward pass of the decoder reads."""


def folder_work(path: str | Path, prompt_tokens: int | None = None) -> Work:
    """Counts the work of an exported folder from its package's operations and its decoder's files.

    Raises:
        ModelFolderError, PackageError, ConfigError: the folder cannot be read.
    """
    folder = open_folder(path)
    config = folder.config
    if not folder.package.is_dir():
        raise ModelFolderError(
            f"{folder.path} has no Core ML package to estimate. Export it with encoder='coreml'.", "encoder"
        )
    program = read_package(folder.package)
    cost = EncoderCost(
        flops=sum(flops(program, operation) for operation in program.operations),
        moved_elements=sum(moved_elements(program, operation) for operation in program.operations),
        weight_bytes=sum(stored_bytes(program).values()),
        int8_activations=census(program)["quantize"] > 0,
    )
    stored = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    decoder_bytes = stored * _read_share(config.decoder)
    return _work(folder.path.resolve().name, config, cost, decoder_bytes, prompt_tokens)


def architecture_work(
    label: str,
    config: FastVLMConfig,
    encoder: FastViTConfig,
    *,
    image_size: int | None = None,
    prompt_tokens: int | None = None,
    encoder_bits: float = ENCODER_BITS["int8"],
    int8_activations: bool = False,
    decoder_bits: float = 8.5,
) -> Work:
    """Counts the work of a model that is not exported. Bits are per weight with scales (16: float16)."""
    config = replace(config, image_size=image_size or config.image_size)
    cost = replace(encoder_cost(encoder, config.image_size, encoder_bits), int8_activations=int8_activations)
    decoder_bytes = decoder_weights(config.decoder) * decoder_bits / 8
    return _work(label, config, cost, decoder_bytes, prompt_tokens)


def _work(
    label: str, config: FastVLMConfig, cost: EncoderCost, decoder_bytes: float, prompt_tokens: int | None
) -> Work:
    length = prompt_tokens or config.tokens_per_image + TEXT_TOKENS
    computed = prefill_flops(config.decoder, length) + projector_flops(config)
    return Work(label, config.image_size, length, cost, computed, decoder_bytes)


def encoder_cost(config: FastViTConfig, image_size: int, bits: float) -> EncoderCost:
    """Returns the sums over FastViT's convolutions and matrix products at any image size."""
    layers = list(encoder_layers(config, image_size))
    return EncoderCost(
        flops=sum(layer.flops for layer in layers),
        moved_elements=sum(layer.moved for layer in layers),
        weight_bytes=sum(layer.weights for layer in layers) * bits / 8,
    )


@dataclass(frozen=True)
class Layer:
    """The operations, weights and moved values of one layer."""

    flops: int
    weights: int
    moved: int


def encoder_layers(config: FastViTConfig, image_size: int) -> Iterator[Layer]:
    """Yields the convolutions and matrix products of a reparameterized FastViT, in order."""
    widths, grid = config.embed_dims, image_size // 2
    yield convolution(3, widths[0], 3, grid, stride=2)
    grid //= 2
    yield convolution(widths[0], widths[0], 3, grid, stride=2, depthwise=True)
    yield convolution(widths[0], widths[0], 1, grid)
    for stage, width in enumerate(widths):
        if stage:
            grid //= 2
            yield convolution(widths[stage - 1], width, 7, grid, stride=2, depthwise=True)
            yield convolution(width, width, 1, grid)
        if kernel := config.pos_emb_kernels[stage]:
            yield convolution(width, width, kernel, grid, depthwise=True)
        for _ in range(config.depths[stage]):
            yield from block_layers(config, stage, grid)
    out = config.out_channels
    yield convolution(widths[-1], out, 3, grid, depthwise=True)
    yield convolution(out, config.se_channels, 1, 1)
    yield convolution(config.se_channels, out, 1, 1)


def block_layers(config: FastViTConfig, stage: int, grid: int) -> Iterator[Layer]:
    """Yields the layers of a block: the token mixer, then the feed-forward network."""
    width, hidden = config.embed_dims[stage], config.embed_dims[stage] * config.mlp_ratios[stage]
    if config.token_mixers[stage] == "repmixer":
        yield convolution(width, width, 3, grid, depthwise=True)
    else:
        positions, heads = grid * grid, width // HEAD_DIM
        scores = heads * positions * positions
        yield convolution(width, 3 * width, 1, grid)
        yield Layer(2 * scores * HEAD_DIM, 0, 2 * width * positions + scores)  # query^T key
        yield Layer(2 * scores * HEAD_DIM, 0, scores + 2 * width * positions)  # value scores
        yield convolution(width, width, 1, grid)
    yield convolution(width, width, 7, grid, depthwise=True)
    yield convolution(width, hidden, 1, grid)
    yield convolution(hidden, width, 1, grid)


def convolution(
    in_channels: int, out_channels: int, kernel: int, grid: int, *, stride: int = 1, depthwise: bool = False
) -> Layer:
    """Returns a convolution with an output of `grid` x `grid` positions."""
    weights = out_channels * (1 if depthwise else in_channels) * kernel * kernel
    read, written = in_channels * (grid * stride) ** 2, out_channels * grid * grid
    return Layer(2 * weights * grid * grid, weights, read + written)


def decoder_weights(config: Qwen2Config) -> int:
    """Returns the number of weights that a forward pass reads: the layers and the output matrix."""
    return body_weights(config) + config.hidden_size * config.vocab_size


def body_weights(config: Qwen2Config) -> int:
    """Returns the number of weights in the matrices of the decoder's layers."""
    kv_size = config.num_key_value_heads * config.head_dim
    attention = 2 * config.hidden_size * (config.hidden_size + kv_size)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def prefill_flops(config: Qwen2Config, length: int) -> int:
    """Returns the operations of a prefill of `length` positions, with causal attention and logits for the last one."""
    attention = 2 * length * length * config.hidden_size * config.num_hidden_layers
    return 2 * length * body_weights(config) + 2 * config.hidden_size * config.vocab_size + attention


def projector_flops(config: FastVLMConfig) -> int:
    """Returns the operations of projecting one image's features."""
    hidden = config.decoder.hidden_size
    return 2 * config.tokens_per_image * hidden * (config.mm_hidden_size + hidden)


def _read_share(config: Qwen2Config) -> float:
    """Returns the share of a decoder's stored weights that a forward pass reads, without an untied embedding table."""
    read = decoder_weights(config)
    return read / (read + (0 if config.tie_word_embeddings else config.hidden_size * config.vocab_size))
