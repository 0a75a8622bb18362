"""The layers and operations that differ between a CPU and a GPU, under the names that architectures use.

On a CPU, products with few rows swap their sides, and attention and rotary positions consist of cheap operations
(`mlx_cpu`). On a GPU, MLX's fused kernels and joined matrices reduce the launches: one product for q, k and v, one for
gate and up, one kernel for SwiGLU.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from . import mlx_cpu
from ._mlx import mx, nn, on_cpu
from .kv_cache import KV_BITS, KVCache, Packed, QuantizedKVCache

Layer = TypeVar("Layer", bound=nn.Module)

Mask = mx.array | Literal["causal"]
"""An array (B, 1 or H, 1, N), True where a key counts, or `causal`, aligned to the last key."""


class Linear(nn.Linear):
    """An `nn.Linear` with another product for few rows on a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _swaps(x, self.weight):
            return super().__call__(x)
        y = mlx_cpu.swapped_product(x, self.weight)
        return y + self.bias if "bias" in self else y


class Embedding(nn.Embedding):
    """An `nn.Embedding` whose product as a head is that of `Linear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Returns the logits (..., rows) of hidden states (..., D)."""
        return mlx_cpu.swapped_product(x, self.weight) if _swaps(x, self.weight) else super().as_linear(x)


class RoPE(nn.Module):
    """The rotary positions over half-split heads."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        """Rotates (B, heads, L, head_dim) by the positions that follow those in `cache`."""
        if on_cpu():
            return mlx_cpu.rotated(x, cache.offsets, self.base)
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.base, scale=1.0, offset=cache.positions)


def attention_mask(x: mx.array, cache: KVCache, heads: int) -> Mask:
    """Returns the mask of x (B, L, D), whose positions follow those in `cache`. L is 1 if the cache has padding."""
    if cache.padding is None:
        return "causal"
    assert x.shape[1] == 1
    # Metal's kernel copies a mask of another shape than (B, H, L, N) in every layer. One copy per step suffices.
    broadcast = on_cpu() or isinstance(cache, QuantizedKVCache)
    return cache.padding.seen(cache.offset + 1, heads=1 if broadcast else heads)


def scaled_dot_product_attention(
    queries: mx.array, keys: Any, values: Any, cache: KVCache, scale: float, mask: Mask
) -> mx.array:
    """Returns attention (B, H, L, head_dim) of L queries. `keys` and `values` come from `cache.update`."""
    L = queries.shape[2]
    if isinstance(cache, QuantizedKVCache):
        if L == 1 and not on_cpu():
            return quantized_attention(queries, keys, values, cache, scale, mask)
        keys, values = cache.dequantized(keys), cache.dequantized(values)  # expanded once, since L queries read them
    if isinstance(mask, mx.array):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    if on_cpu():
        return mlx_cpu.causal_attention(queries, keys, values, scale)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask if L > 1 else None)


def quantized_attention(
    queries: mx.array, keys: Packed, values: Packed, cache: QuantizedKVCache, scale: float, mask: Mask
) -> mx.array:
    """Returns the attention of one query per row (B, H, 1, head_dim), with products of 8-bit keys and values.

    The heads of a group are the rows of one product, which reads each key once.
    """
    B, H, _, head_dim = queries.shape
    product = functools.partial(mx.quantized_matmul, group_size=cache.group_size, bits=KV_BITS)
    queries = (queries * scale).reshape(B, keys[0].shape[1], -1, head_dim)  # (B, kv_heads, H / kv_heads, head_dim)
    scores = product(queries, *keys, transpose=True)  # (B, kv_heads, H / kv_heads, N)
    if isinstance(mask, mx.array):
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    output = product(weights, *values, transpose=False)  # (B, kv_heads, H / kv_heads, head_dim)
    return output.reshape(B, H, 1, head_dim)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Returns silu(gate) * x. `nn.silu` would run the system's C++ compiler at first use off a Mac (0.5 s)."""
    if not on_cpu():
        return _fused_swiglu(gate, x)
    return (mlx_cpu.silu(gate) if gate.dtype == mx.float32 else gate * mx.sigmoid(gate)) * x


@functools.partial(mx.compile, shapeless=True)
def _fused_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * x


class JoinedAttention(nn.Module):
    """The attention of a Qwen2 block with q, k and v as one product, and one rotation.

    Layers are read as items. As attributes they take MLX ten times as long, which adds up in the host's time per token.
    """

    def __init__(self, attention: nn.Module, qkv_proj: nn.Module) -> None:
        super().__init__()
        self.num_attention_heads = attention.num_attention_heads
        self.num_key_value_heads = attention.num_key_value_heads
        self.head_dim = attention.head_dim
        self.scale = attention.scale
        self.rope = attention.rope
        self.qkv_proj = qkv_proj
        self.o_proj = attention.o_proj

    def __call__(self, x: mx.array, mask: Mask, cache: KVCache) -> mx.array:
        """Takes the keys and values of x (B, L, D) into `cache` and returns (B, L, D)."""
        B, L, D = x.shape
        H, KV = self.num_attention_heads, self.num_key_value_heads
        heads = self["qkv_proj"](x)  # (B, L, (H + 2 KV) * head_dim)
        if L == 1:  # nothing to transpose
            heads = heads.reshape(B, -1, 1, self.head_dim)
        else:
            heads = heads.reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)  # (B, H + 2 KV, L, head_dim)
        # The values are rotated too, and not used. A slice without them would be copied for the kernel.
        queries, keys, _ = mx.split(self["rope"](heads, cache), [H, H + KV], axis=1)
        keys, values = cache.update(keys, heads[:, -KV:])
        output = scaled_dot_product_attention(queries, keys, values, cache, self.scale, mask)  # (B, H, L, head_dim)
        return self["o_proj"]((output if L == 1 else output.transpose(0, 2, 1, 3)).reshape(B, L, D))


class JoinedMLP(nn.Module):
    """The MLP of a Qwen2 block with gate and up as one product. Layers are read as items, as in `JoinedAttention`."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def __call__(self, x: mx.array) -> mx.array:
        """Returns down(silu(gate(x)) * up(x)) of x (B, L, D)."""
        gate, up = mx.split(self["gate_up_proj"](x), 2, axis=-1)  # (B, L, intermediate_size) each
        return self["down_proj"](swiglu(gate, up))


def join_projections(decoder: nn.Module) -> None:
    """Joins q, k, v into one product and gate, up into another in every block of a Qwen2.

    Outputs are independent, so the results stay the same. Layers that differ in bits or group size stay apart. Each
    block's weights are copied and freed in turn.
    """
    for block in decoder.model.layers:
        attention, mlp = block.self_attn, block.mlp
        if qkv_proj := joined([attention.q_proj, attention.k_proj, attention.v_proj]):
            block.self_attn = JoinedAttention(attention, qkv_proj)
        if gate_up_proj := joined([mlp.gate_proj, mlp.up_proj]):
            block.mlp = JoinedMLP(gate_up_proj, mlp.down_proj)


def joined(layers: Sequence[Layer]) -> Layer | None:
    """Returns one linear layer with the outputs of all `layers`, or None if they are stored differently."""
    forms = {
        (type(layer), *(getattr(layer, name, None) for name in ("bits", "group_size", "mode"))) for layer in layers
    }
    tensors = [{name: layer[name] for name in layer.parameters()} for layer in layers]
    dtypes = {tuple((name, tensor.dtype) for name, tensor in sorted(own.items())) for own in tensors}
    if len(forms) > 1 or len(dtypes) > 1:
        return None
    whole = copy.copy(layers[0])
    for name in tensors[0]:
        whole[name] = mx.concatenate([own[name] for own in tensors])  # along the outputs
    mx.eval(whole.parameters())
    return whole


def _swaps(x: mx.array, weight: mx.array) -> bool:
    few = x.size // x.shape[-1] in mlx_cpu.FEW_ROWS
    return few and on_cpu() and x.dtype == weight.dtype == mx.float32 and mlx_cpu.swapping_pays()
