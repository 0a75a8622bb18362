"""The language side run layer by layer, each layer's weights read when its turn comes and freed after it.

It needs the memory of one layer and the embedding table, where `load_language` needs that of the whole model: exports
of any size can be compared with their checkpoint on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ._mlx import mx, nn
from .apple_layout import language_shapes, saved_name
from .checkpoint import Checkpoint
from .config import FastVLMConfig
from .language import EMBEDDING, HEAD, Projector, dequantized
from .qwen2 import Block, KVCache

ReadTensor = Callable[[str], mx.array]
"""A tensor's saved name -> its values, float32, not quantized."""


def checkpoint_reader(checkpoint: Checkpoint) -> ReadTensor:
    """Reads from a source checkpoint."""
    apple_names = {saved_name(name): name for name in language_shapes(checkpoint.config)}
    return lambda name: mx.array(checkpoint.read(apple_names[name], "mlx")).astype(mx.float32)


def saved_reader(weights: dict[str, mx.array], config: FastVLMConfig) -> ReadTensor:
    """Reads from an exported folder's weights, taking each out of `weights`, so that it is freed after its use."""
    return lambda name: dequantized(weights, name, config.quantization)


@dataclass(frozen=True)
class Probe:
    """What a decoder computes for an image between texts."""

    logits: mx.array
    """(positions, vocabulary), float32."""
    largest: float
    """The largest magnitude on the way: in the residual stream, or in front of a down projection."""
    largest_layer: int


def run_layerwise(
    read: ReadTensor, config: FastVLMConfig, before: Sequence[int], image_features: mx.array, after: Sequence[int]
) -> Probe:
    """Logits at the ids `after` an image (1, N, C) that stands behind `before`, in float32."""
    decoder = config.decoder
    image = _loaded(Projector(config), "multi_modal_projector.", read)(image_features)  # (1, N, D)
    table = read(f"{EMBEDDING}.weight")
    x = mx.concatenate([table[mx.array([before])], image, table[mx.array([after])]], axis=1)  # (1, L, D)
    mx.eval(x)
    if not decoder.tie_word_embeddings:
        del table
    magnitudes: list[float] = []
    for index in range(decoder.num_hidden_layers):
        block = _loaded(Block(decoder), f"language_model.model.layers.{index}.", read)
        x = x + block.self_attn(block.input_layernorm(x), KVCache())
        gated = block.mlp.gated(block.post_attention_layernorm(x))
        x = x + block.mlp.down_proj(gated)
        magnitudes.append(float(np.array(mx.maximum(mx.abs(gated).max(), mx.abs(x).max()))))
    norm = _loaded(nn.RMSNorm(decoder.hidden_size, decoder.rms_norm_eps), "language_model.model.norm.", read)
    head = table if decoder.tie_word_embeddings else read(f"{HEAD}.weight")
    logits = norm(x[0, -len(after) :]) @ head.T
    largest = int(np.argmax(magnitudes))
    return Probe(logits, magnitudes[largest], largest)


def _loaded(module: nn.Module, prefix: str, read: ReadTensor) -> nn.Module:
    """`module` with its weights, whose saved names begin with `prefix`."""
    from mlx.utils import tree_flatten

    names = dict(tree_flatten(module.parameters()))
    return module.load_weights([(name, read(prefix + name)) for name in names])
