"""The choice of bits for each of the decoder's matrices, by the effect of its rounding on the logits."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from ..models._mlx import mx
from ..models.checkpoint import Checkpoint
from ..models.kv_cache import KVCache
from ..models.language import EMBEDDING, HEAD
from ..models.layerwise import LayerwiseDecoder, Prompt, checkpoint_reader, embedded, layer_prefix, named_parameters
from ..models.qwen2 import Block
from ..models.safetensors_files import Shape
from ..models.tensor_names import language_shapes, saved_name
from .decoder_scheme import MIXED_BITS, DecoderScheme
from .metrics import kl_divergence
from .prompts import thinned

PROMPTS = 2
IMAGE_TOKENS = 16
TEXT_TOKENS = 48
POSITIONS = 16
"""The prompts of a measurement, the tokens of each, and the last positions, whose logits count.

The time of a measurement is proportional to them.
"""

STREAMS_AT_ONCE = 32
"""The variants of a prompt that run through a block together, which bounds memory."""


def mixed_bits(
    checkpoint: Checkpoint, scheme: DecoderScheme, prompts: Sequence[Prompt], on_stage: Callable[[str], None]
) -> dict[str, int]:
    """Returns the bits by saved layer name, with the scheme's average.

    Every matrix is rounded to the fewest bits alone. Its cost is the divergence (KL) of the logits from the original.
    All variants run at once, layer by layer, in the memory of a layer. Noise is assumed to fall with the square of the
    step.
    """
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    shapes = {saved_name(name): shape for name, shape in language_shapes(checkpoint.config, rows).items()}
    sizes = {
        name.removesuffix(".weight"): prod(shape) for name, shape in shapes.items() if scheme.applies_to(name, shape)
    }
    costs = dict.fromkeys(sizes, 0.0)
    for index, prompt in enumerate(shortened(prompts)):
        on_stage(f"measure the decoder's sensitivity ({index + 1} of {PROMPTS})")
        for layer, cost in sensitivities(checkpoint, scheme, prompt, shapes).items():
            costs[layer] += cost
    return chosen_bits(costs, sizes, scheme)


def shortened(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the first prompts with fewer tokens of image and text."""
    return [
        replace(prompt, image_features=thinned(prompt.image_features, IMAGE_TOKENS), after=prompt.after[:TEXT_TOKENS])
        for prompt in prompts[:PROMPTS]
    ]


def chosen_bits(costs: Mapping[str, float], sizes: Mapping[str, int], scheme: DecoderScheme) -> dict[str, int]:
    """Returns the bits by layer. From the fewest bits, it takes the step with the largest saving per byte that fits."""
    bits = dict.fromkeys(sizes, MIXED_BITS[0])
    left = (scheme.bits_per_weight - 32 / scheme.group_size - MIXED_BITS[0]) * sum(sizes.values())
    steps = [_step(layer, 0, costs[layer], sizes[layer]) for layer in sizes]
    heapq.heapify(steps)
    while steps:
        _, layer, rung = heapq.heappop(steps)
        price = sizes[layer] * (MIXED_BITS[rung + 1] - MIXED_BITS[rung])
        if price > left:
            continue
        left -= price
        bits[layer] = MIXED_BITS[rung + 1]
        if rung + 2 < len(MIXED_BITS):
            heapq.heappush(steps, _step(layer, rung + 1, costs[layer], sizes[layer]))
    return bits


def _step(layer: str, rung: int, cost: float, size: int) -> tuple[float, str, int]:
    """Returns the step to the next number of bits as (priority, layer, rung). The least priority is best."""
    fewer, more = MIXED_BITS[rung], MIXED_BITS[rung + 1]
    saved = cost * (noise_share(fewer) - noise_share(more))
    return -saved / (size * (more - fewer)), layer, rung


def noise_share(bits: int) -> float:
    """Returns the power of the rounding noise as a share of that at the fewest bits."""
    return ((2 ** MIXED_BITS[0] - 1) / (2**bits - 1)) ** 2


def sensitivities(
    checkpoint: Checkpoint, scheme: DecoderScheme, prompt: Prompt, shapes: Mapping[str, Shape]
) -> dict[str, float]:
    """Returns the KL divergence of the logits by the only layer that is rounded to the fewest bits."""
    decoder = LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config)
    tied = checkpoint.config.decoder.tie_word_embeddings
    projector, table = decoder.projector(), decoder.table()
    streams = embedded(prompt, projector, table)  # (streams, L, D): the original first
    followed: list[str] = []
    if scheme.applies_to(f"{EMBEDDING}.weight", table.shape):
        streams = mx.concatenate([streams, embedded(prompt, projector, _rounded(table, scheme))])
        followed.append(EMBEDDING)
    del table
    for index, block in enumerate(decoder.blocks()):
        results = [_through(block, streams)]
        for own, weight in named_parameters(block).items():
            name = f"{layer_prefix(index)}.{own}"
            if not scheme.applies_to(name, shapes[name]):
                continue
            block.load_weights([(own, _rounded(weight, scheme))], strict=False)
            results.append(block(streams[:1], "causal", KVCache()))
            mx.eval(results[-1])
            block.load_weights([(own, weight)], strict=False)
            followed.append(name.removesuffix(".weight"))
        streams = mx.concatenate(results)
    hidden = decoder.norm()(streams[:, -POSITIONS:])  # (streams, positions, D)
    head = decoder.head()
    original = np.array(hidden[0] @ head.T)
    found = {
        layer: kl_divergence(original, np.array(x @ head.T))
        for layer, x in zip(followed, hidden[1:], strict=True)
        if not (tied and layer == EMBEDDING)
    }
    if not scheme.applies_to(f"{HEAD if not tied else EMBEDDING}.weight", head.shape):
        return found
    last, x = (EMBEDDING, hidden[1]) if tied else (HEAD, hidden[0])
    return {**found, last: kl_divergence(original, np.array(x @ _rounded(head, scheme).T))}


def _through(block: Block, streams: mx.array) -> mx.array:
    parts = []
    for start in range(0, len(streams), STREAMS_AT_ONCE):
        parts.append(block(streams[start : start + STREAMS_AT_ONCE], "causal", KVCache()))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _rounded(weight: mx.array, scheme: DecoderScheme) -> mx.array:
    bits, group_size = MIXED_BITS[0], scheme.group_size
    parts = mx.quantize(weight.astype(mx.float16), group_size=group_size, bits=bits)
    return mx.dequantize(*parts, group_size=group_size, bits=bits).astype(mx.float32)
