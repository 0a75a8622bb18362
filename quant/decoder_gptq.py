"""The decoder quantized block by block, each on what the prompts, quantized up to there, feed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..models._mlx import mx, nn
from ..models.kv_cache import KVCache
from ..models.language import EMBEDDING, HEAD
from ..models.layerwise import LayerwiseDecoder, Prompt, embedded, layer_prefix, named_parameters, recorded_inputs
from ..models.mlx_cpu import dequantize
from ..models.quantization import Affine
from ..models.qwen2 import Block
from .affine_groups import Packed, fitted
from .decoder_scheme import DecoderScheme
from .gptq import Feedback, Hessian, gptq

READERS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""The layer whose inputs are recorded for each matrix of a block: q, k and v read the same, and so do gate and up."""

Tensors = Iterator[tuple[str, mx.array]]


def gptq_tensors(
    decoder: LayerwiseDecoder, names: Sequence[str], scheme: DecoderScheme, prompts: Sequence[Prompt]
) -> Tensors:
    """(name, array) of every tensor to save, in the order of `names`, which is that of the computation.

    The embedding table is looked up, not multiplied with: its groups are only fitted. So is a tied head with it.
    """
    projector = decoder.projector()
    yield from _plain("multi_modal_projector", projector, names)
    name = f"{EMBEDDING}.weight"
    table = decoder.read(name)
    if scheme.applies_to(name, table.shape):
        found = fitted(np.array(table, copy=False), scheme.affine(EMBEDDING))
        yield from _three(EMBEDDING, found)
        table = dequantized(found, scheme.affine(EMBEDDING))
    else:
        yield name, table.astype(mx.float16)
    streams = [embedded(prompt, projector, table) for prompt in prompts]
    del projector, table
    for index, block in enumerate(decoder.blocks()):
        yield from _block_tensors(block, layer_prefix(index), names, scheme, streams)
        streams = [block(x, KVCache()) for x in streams]
        mx.eval(streams)
    norm = decoder.norm()
    yield from _plain("language_model.model.norm", norm, names)
    if not decoder.config.decoder.tie_word_embeddings:
        yield from _head_tensors(decoder.read(f"{HEAD}.weight"), [norm(x) for x in streams], scheme)


def _block_tensors(
    block: Block, prefix: str, names: Sequence[str], scheme: DecoderScheme, streams: Sequence[mx.array]
) -> Tensors:
    """The block's tensors; its matrices are then the quantized ones, as what follows will meet them."""
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
        reader, affine = READERS[own.removesuffix(".weight")], scheme.affine(layer)
        if reader not in factors:
            factors[reader] = hessians.pop(reader).feedback()
        found = gptq(np.array(weight, copy=False), factors[reader], affine)
        block.load_weights([(own, dequantized(found, affine))], strict=False)
        yield from _three(layer, found)


def _hessians(block: Block, scheme: DecoderScheme, streams: Sequence[mx.array]) -> dict[str, Hessian]:
    """The products of the input's columns over all streams, by the layer that reads it."""
    hessians: dict[str, Hessian] = {}
    for x in streams:
        with recorded_inputs(block, sorted(set(READERS.values()))) as inputs:
            block(x, KVCache())
        for reader, values in inputs.items():
            columns = values.shape[-1]
            if columns % scheme.group_size == 0:
                hessian = hessians.setdefault(reader, Hessian(columns, scheme.group_size))
                hessian.add(np.array(values, copy=False).reshape(-1, columns))
    return hessians


def _head_tensors(head: mx.array, inputs: Sequence[mx.array], scheme: DecoderScheme) -> Tensors:
    name, columns = f"{HEAD}.weight", head.shape[1]
    if not scheme.applies_to(name, head.shape):
        yield name, head.astype(mx.float16)
        return
    hessian = Hessian(columns, scheme.group_size)
    for x in inputs:
        hessian.add(np.array(x).reshape(-1, columns))
    yield from _three(HEAD, gptq(np.array(head, copy=False), hessian.feedback(), scheme.affine(HEAD)))


def _plain(prefix: str, module: nn.Module, names: Sequence[str]) -> Tensors:
    parameters = {f"{prefix}.{name}": array for name, array in named_parameters(module).items()}
    yield from ((name, parameters[name].astype(mx.float16)) for name in names if name in parameters)


def _three(layer: str, found: Packed) -> Tensors:
    for part, array in zip(("weight", "scales", "biases"), found, strict=True):
        yield f"{layer}.{part}", mx.array(array)


def dequantized(found: Packed, affine: Affine) -> mx.array:
    """As the saved decoder will see it, float32."""
    scales, biases = (mx.array(part).astype(mx.float32) for part in (found.scales, found.biases))
    return dequantize(mx.array(found.weight), scales, biases, affine)
