"""The decoder and projector weights of an exported folder: float16, or affine in groups.

Groups are rounded to the nearest levels (`rtn`), or calibrated (`gptq`). Calibration quantizes the decoder block by
block, each block on the prompts' activations after the quantized blocks before it. The bits of a mixed decoder are
chosen by the effect of each matrix's rounding on the logits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from ..models._mlx import mx, nn
from ..models.checkpoint import Checkpoint, check_tensors, iter_float_tensors, shapes
from ..models.errors import WeightsError
from ..models.kv_cache import KVCache
from ..models.language import EMBEDDING, HEAD
from ..models.layerwise import (
    LayerwiseDecoder,
    Prompt,
    checkpoint_reader,
    embedded,
    layer_prefix,
    named_parameters,
    recorded_inputs,
)
from ..models.mlx_cpu import dequantize
from ..models.quantization import Affine
from ..models.qwen2 import Block
from ..models.safetensors_files import Shape
from ..models.tensor_names import APPLE_ENCODER_PREFIX, language_shapes, saved_name
from .affine_groups import Packed, fitted
from .decoder_scheme import MIXED_BITS, DecoderScheme
from .gptq import DAMPING, TABLE_DAMPING, Feedback, Hessian, gptq
from .metrics import kl_divergence
from .prompts import thinned

PARTS = ("weight", "scales", "biases")
"""The names of the tensors of a quantized layer, in the order of MLX's functions."""

RECORDED_INPUTS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""The layer whose inputs are recorded for each matrix of a block. q, k and v share theirs, and so do gate and up."""

Tensors = Iterator[tuple[str, mx.array]]
"""The names and arrays of tensors to save."""

PROMPTS = 2
IMAGE_TOKENS = 16
TEXT_TOKENS = 48
POSITIONS = 16
"""The prompts of a measurement, the tokens of each, and the last positions, whose logits count.

The time of a measurement is proportional to them.
"""

STREAMS_AT_ONCE = 32
"""The variants of a prompt that run through a block together, which bounds memory."""


def check_language_tensors(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Compares the decoder's and projector's tensors with the config, and returns their names and shapes.

    Raises:
        WeightsError: tensors are missing, unexpected or of a wrong shape.
    """
    table = checkpoint.tensors.get("model.embed_tokens.weight")
    expected = language_shapes(checkpoint.config, embedding_rows=table.shape[0] if table else None)
    found = {
        name: shape for name, shape in shapes(checkpoint.tensors).items() if not name.startswith(APPLE_ENCODER_PREFIX)
    }
    if checkpoint.config.decoder.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # a redundant copy
    check_tensors(expected, found, "decoder")
    return expected


def saved_tensors(checkpoint: Checkpoint, scheme: DecoderScheme, prompts: Sequence[Prompt] = ()) -> Tensors:
    """Yields (name, array) of every tensor of `model.safetensors`, one at a time in the order of the computation.

    A quantized matrix becomes three tensors: `.weight` (uint32, packed), `.scales` and `.biases` (float16, one per
    group). `prompts` are the calibration prompts of a scheme that `needs_calibration`.

    Raises:
        WeightsError: a tensor is not finite, or does not fit into float16.
    """
    apple_names = {saved_name(name): name for name in check_language_tensors(checkpoint)}

    def read(saved: str) -> mx.array:
        return _read(checkpoint, apple_names[saved])

    if scheme.is_quantized and scheme.quantizer == "gptq":
        yield from _gptq_tensors(LayerwiseDecoder(read, checkpoint.config), list(apple_names), scheme, prompts)
        return
    for saved in apple_names:
        weight, layer = read(saved).astype(mx.float16), saved.removesuffix(".weight")
        if not scheme.applies_to(saved, weight.shape):
            yield saved, weight
            continue
        affine = scheme.affine(layer)
        # On the CPU, also where there is a GPU: the two need not round alike, and equal checkpoints give equal bytes.
        packed = mx.quantize(weight, group_size=affine.group_size, bits=affine.bits, stream=mx.cpu)
        yield from _quantized_tensors(layer, packed)


def _read(checkpoint: Checkpoint, name: str) -> mx.array:
    """Reads a tensor in float32. Raises WeightsError if float16 cannot represent it."""
    ((_, values),) = iter_float_tensors(checkpoint, [name], "mlx")
    weight = mx.array(values)
    if not mx.isfinite(weight.astype(mx.float16)).all().item():
        raise WeightsError(
            f"{name} holds NaN, infinite values or numbers beyond float16's 65,504. Check the checkpoint."
        )
    return weight.astype(mx.float32)


def _gptq_tensors(
    decoder: LayerwiseDecoder, names: Sequence[str], scheme: DecoderScheme, prompts: Sequence[Prompt]
) -> Tensors:
    """Yields every tensor to save with calibrated matrices, in the order of the computation.

    A tied embedding table comes last, since its products as a head are calibrated. The groups of a table without
    products are only fitted.
    """
    tied = decoder.config.decoder.tie_word_embeddings
    projector = decoder.projector()
    yield from _plain("multi_modal_projector", projector, names)
    table = decoder.read(f"{EMBEDDING}.weight")
    if not tied:
        table = yield from _table_tensors(table, scheme)
    streams = [embedded(prompt, projector, table) for prompt in prompts]
    del projector, table
    for index, block in enumerate(decoder.blocks()):
        yield from _block_tensors(block, layer_prefix(index), names, scheme, streams)
        streams = [block(x, "causal", KVCache()) for x in streams]
        mx.eval(streams)
    norm = decoder.norm()
    yield from _plain("language_model.model.norm", norm, names)
    yield from _head_tensors(EMBEDDING if tied else HEAD, decoder, [norm(x) for x in streams], scheme)


def _table_tensors(table: mx.array, scheme: DecoderScheme) -> Generator[tuple[str, mx.array], None, mx.array]:
    """Yields the tensors of an embedding table whose rows are only looked up, and returns the saved table."""
    name = f"{EMBEDDING}.weight"
    if not scheme.applies_to(name, table.shape):
        yield name, table.astype(mx.float16)
        return table
    found = fitted(np.array(table, copy=False), scheme.affine(EMBEDDING))
    yield from _quantized_tensors(EMBEDDING, map(mx.array, found))
    return dequantized(found, scheme.affine(EMBEDDING))


def _block_tensors(
    block: Block, prefix: str, names: Sequence[str], scheme: DecoderScheme, streams: Sequence[mx.array]
) -> Tensors:
    """Yields the block's tensors, and replaces its matrices by the quantized ones for the next blocks' inputs."""
    parameters = named_parameters(block)
    factors: dict[str, Feedback] = {}
    hessians = _hessians(block, scheme, streams)
    for name in names:
        own = name.removeprefix(f"{prefix}.")
        if own == name:
            continue
        layer, weight = name.removesuffix(".weight"), parameters[own]
        if not scheme.applies_to(name, weight.shape):
            yield name, weight.astype(mx.float16)
            continue
        reader, affine = RECORDED_INPUTS[own.removesuffix(".weight")], scheme.affine(layer)
        if reader not in factors:
            factors[reader] = hessians.pop(reader).feedback()
        found = gptq(np.array(weight, copy=False), factors[reader], affine)
        block.load_weights([(own, dequantized(found, affine))], strict=False)
        yield from _quantized_tensors(layer, map(mx.array, found))


def _hessians(block: Block, scheme: DecoderScheme, streams: Sequence[mx.array]) -> dict[str, Hessian]:
    """Returns the Hessians of all streams by the layer whose inputs were recorded."""
    hessians: dict[str, Hessian] = {}
    for x in streams:
        with recorded_inputs(block, sorted(set(RECORDED_INPUTS.values()))) as inputs:
            block(x, "causal", KVCache())
        for reader, values in inputs.items():
            columns = values.shape[-1]
            if columns % scheme.group_size == 0:
                hessian = hessians.setdefault(reader, Hessian(columns, scheme.group_size))
                hessian.add(np.array(values, copy=False).reshape(-1, columns))
    return hessians


def _head_tensors(layer: str, decoder: LayerwiseDecoder, inputs: Sequence[mx.array], scheme: DecoderScheme) -> Tensors:
    """Yields the tensors of the head `layer`, which is its own or the tied embedding table."""
    name = f"{layer}.weight"
    head = decoder.read(name)
    if not scheme.applies_to(name, head.shape):
        yield name, head.astype(mx.float16)
        return
    columns = head.shape[1]
    hessian = Hessian(columns, scheme.group_size)
    for x in inputs:
        hessian.add(np.array(x).reshape(-1, columns))
    feedback = hessian.feedback(TABLE_DAMPING if layer == EMBEDDING else DAMPING)
    found = gptq(np.array(head, copy=False), feedback, scheme.affine(layer))
    yield from _quantized_tensors(layer, map(mx.array, found))


def _plain(prefix: str, module: nn.Module, names: Sequence[str]) -> Tensors:
    parameters = {f"{prefix}.{name}": array for name, array in named_parameters(module).items()}
    yield from ((name, parameters[name].astype(mx.float16)) for name in names if name in parameters)


def _quantized_tensors(layer: str, arrays: Iterable[mx.array]) -> Tensors:
    yield from zip((f"{layer}.{part}" for part in PARTS), arrays, strict=True)


def dequantized(found: Packed, affine: Affine) -> mx.array:
    """Returns the matrix (rows, columns) of packed codes in float32, as the saved decoder computes with it."""
    scales, biases = (mx.array(part).astype(mx.float32) for part in (found.scales, found.biases))
    return dequantize(mx.array(found.weight), scales, biases, affine)


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
