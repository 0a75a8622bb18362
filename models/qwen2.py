"""The Qwen2 decoder in MLX, fed with embeddings so that an image's features can stand among the text's.

Architecture: Qwen2 technical report (arXiv 2407.10671) and Hugging Face `modeling_qwen2.py`, whose names are kept:
pre-norm blocks, grouped-query attention with biases on q, k and v, rotary positions over half-split heads, SwiGLU.
"""

from __future__ import annotations

from typing import NamedTuple

from . import mlx_cpu
from ._mlx import mx, nn, on_cpu
from .config import Qwen2Config
from .kv_cache import KVCache, Padding, QuantizedKVCache, check_kv_bits


class Linear(nn.Linear):
    """`nn.Linear`, but for few rows on a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _swaps(x, self.weight):
            return super().__call__(x)
        y = mlx_cpu.swapped_product(x, self.weight)
        return y + self.bias if "bias" in self else y


class Embedding(nn.Embedding):
    """`nn.Embedding`, whose product as a head is that of `Linear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        return mlx_cpu.swapped_product(x, self.weight) if _swaps(x, self.weight) else super().as_linear(x)


def _swaps(x: mx.array, weight: mx.array) -> bool:
    few = x.size // x.shape[-1] in mlx_cpu.FEW_ROWS
    return few and on_cpu() and x.dtype == weight.dtype == mx.float32


class Attention(nn.Module):
    """Causal grouped-query attention; `head_dim` is hidden_size / num_attention_heads."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.rope_theta = config.rope_theta
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=True)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=True)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def mixed(self, x: mx.array, cache: KVCache) -> mx.array:
        """(B, L, D) at the positions that follow those in the cache -> what `o_proj` reads, (B, L, D)."""
        B, L, D = x.shape
        queries = self._rotated(self._heads(self.q_proj(x), self.num_attention_heads), cache)
        keys = self._rotated(self._heads(self.k_proj(x), self.num_key_value_heads), cache)
        values = self._heads(self.v_proj(x), self.num_key_value_heads)
        keys, values = cache.update(keys, values)
        out = self._attend(queries, keys, values, cache.padding)
        return out.transpose(0, 2, 1, 3).reshape(B, L, D)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, padding: Padding | None = None) -> mx.array:
        """Causal attention of L queries, the last of which stands at the last of the keys; L is 1 with `padding`."""
        L, length = queries.shape[2], keys.shape[2]
        assert padding is None or L == 1
        row_mask = None if padding is None else padding.seen(length)
        if padding is None and on_cpu():
            return mlx_cpu.causal_attention(queries, keys, values, self.scale)
        mask = "causal" if L > 1 else row_mask  # causal: aligned to the last key
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)

    def _heads(self, x: mx.array, count: int) -> mx.array:
        B, L, _ = x.shape
        return x.reshape(B, L, count, self.head_dim).transpose(0, 2, 1, 3)  # (B, heads, L, head_dim)

    def _rotated(self, x: mx.array, cache: KVCache) -> mx.array:
        """(B, heads, L, head_dim) turned by the positions that follow those in `cache`."""
        if on_cpu():
            return mlx_cpu.rotated(x, cache.offsets, self.rope_theta)
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=cache.positions
        )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def gated(self, x: mx.array) -> mx.array:
        """What `down_proj` reads, (B, L, intermediate_size): the largest values of the whole decoder."""
        return silu(self.gate_proj(x)) * self.up_proj(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x). Not nn.silu, which off a Mac runs the system's C++ compiler at first use (0.5 s)."""
    if on_cpu() and x.dtype == mx.float32:
        return mlx_cpu.silu(x)
    return x * mx.sigmoid(x)


class BlockInputs(NamedTuple):
    """What a block's matrices read, (B, L, width) each."""

    qkv: mx.array
    o_proj: mx.array
    gate_up: mx.array
    down_proj: mx.array


class Block(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        return self.observed(x, cache)[0]

    def observed(self, x: mx.array, cache: KVCache) -> tuple[mx.array, BlockInputs]:
        """The result, and what was read on the way."""
        qkv = self.input_layernorm(x)
        mixed = self.self_attn.mixed(qkv, cache)
        x = x + self.self_attn.o_proj(mixed)
        gate_up = self.post_attention_layernorm(x)
        gated = self.mlp.gated(gate_up)
        return x + self.mlp.down_proj(gated), BlockInputs(qkv, mixed, gate_up, gated)


class Qwen2Model(nn.Module):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, inputs_embeds: mx.array, cache: list[KVCache], last_only: bool) -> mx.array:
        x = inputs_embeds
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, layer_cache)
        return self.norm(x[:, -1:] if last_only else x)


class Qwen2(nn.Module):
    """The decoder with its head: its own, or the embeddings again when they are tied."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, inputs_embeds: mx.array, cache: list[KVCache] | None = None, all_positions: bool = False
    ) -> mx.array:
        """Logits (B, 1, rows of the head) at the last position, or (B, L, rows) at all of them.

        `inputs_embeds` (B, L, D) stand at the positions that follow those in `cache`, which takes up theirs.
        """
        hidden = self.model(inputs_embeds, cache or self.make_cache(), last_only=not all_positions)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def extend(self, inputs_embeds: mx.array, cache: list[KVCache]) -> None:
        """Takes (B, L, D) into `cache` without asking for logits."""
        self.model(inputs_embeds, cache, last_only=True)

    def embed(self, ids: mx.array) -> mx.array:
        """(B, L) ids -> (B, L, D)."""
        return self.model.embed_tokens(ids)

    def make_cache(self, capacity: int = 0, kv_bits: int | None = None) -> list[KVCache]:
        """An empty cache per layer, with room for `capacity` positions at once; in 8 bits where `kv_bits` is 8.

        Raises:
            UsageError: another number of bits, or heads that hold no whole groups.
        """
        check_kv_bits(kv_bits)
        if kv_bits is None:
            return [KVCache(capacity) for _ in self.model.layers]
        return [QuantizedKVCache(self.config.head_dim, capacity) for _ in self.model.layers]
