"""The Qwen2 decoder in MLX. Its input is embeddings, among which are the features of images.

Architecture: Qwen2 technical report (arXiv 2407.10671) and Hugging Face `modeling_qwen2.py`, with the same names.
Pre-norm blocks, grouped-query attention with biases on q, k and v, rotary positions over half-split heads, SwiGLU.
"""

from __future__ import annotations

from ._mlx import mx, nn
from .config import Qwen2Config
from .kv_cache import KVCache, QuantizedKVCache, check_kv_bits
from .mlx_layers import Embedding, Linear, Mask, RoPE, attention_mask, scaled_dot_product_attention, swiglu


class Attention(nn.Module):
    """The causal grouped-query attention."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        dim, head_dim = config.hidden_size, config.head_dim
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5

        self.q_proj = Linear(dim, config.num_attention_heads * head_dim, bias=True)
        self.k_proj = Linear(dim, config.num_key_value_heads * head_dim, bias=True)
        self.v_proj = Linear(dim, config.num_key_value_heads * head_dim, bias=True)
        self.o_proj = Linear(config.num_attention_heads * head_dim, dim, bias=False)
        self.rope = RoPE(head_dim, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: Mask, cache: KVCache) -> mx.array:
        """Returns (B, L, D) for x (B, L, D) at the positions after those in `cache`, and adds them to `cache`."""
        B, L, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        queries = queries.reshape(B, L, self.num_attention_heads, -1).transpose(0, 2, 1, 3)  # (B, H, L, head_dim)
        keys = keys.reshape(B, L, self.num_key_value_heads, -1).transpose(0, 2, 1, 3)  # (B, KV, L, head_dim)
        values = values.reshape(B, L, self.num_key_value_heads, -1).transpose(0, 2, 1, 3)

        queries, keys = self.rope(queries, cache), self.rope(keys, cache)
        keys, values = cache.update(keys, values)
        output = scaled_dot_product_attention(queries, keys, values, cache, scale=self.scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))  # (B, L, D)


class MLP(nn.Module):
    """The SwiGLU network: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=False)
        self.up_proj = Linear(dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: KVCache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nn.Module):
    """The embeddings, blocks and final norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, inputs_embeds: mx.array, cache: list[KVCache], last_only: bool) -> mx.array:
        x = inputs_embeds
        mask = attention_mask(x, cache[0], self.num_attention_heads)  # the same for all layers
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, mask, layer_cache)
        return self.norm(x[:, -1:] if last_only and x.shape[1] > 1 else x)


class Qwen2(nn.Module):
    """The decoder with its head, which is its own or the tied embeddings."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, inputs_embeds: mx.array, cache: list[KVCache] | None = None, all_positions: bool = False
    ) -> mx.array:
        """Returns logits (B, 1, V) at the last position, or (B, L, V) at all, where V is the rows of the head.

        `inputs_embeds` (B, L, D) are at the positions after those in `cache`, and are added to it.
        """
        hidden = self.model(inputs_embeds, cache or self.make_cache(), last_only=not all_positions)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def extend(self, inputs_embeds: mx.array, cache: list[KVCache]) -> None:
        """Adds (B, L, D) to `cache` without computing logits."""
        self.model(inputs_embeds, cache, last_only=True)

    def embed(self, ids: mx.array) -> mx.array:
        """Returns the embeddings (B, L, D) of ids (B, L)."""
        return self.model.embed_tokens(ids)

    def make_cache(self, capacity: int = 0, kv_bits: int | None = None) -> list[KVCache]:
        """Returns an empty cache per layer with space for `capacity` positions, in 8 bits if `kv_bits` is 8.

        Raises:
            UsageError: `kv_bits` has another value, or the heads do not divide into groups.
        """
        check_kv_bits(kv_bits)
        if kv_bits is None:
            return [KVCache(capacity) for _ in self.model.layers]
        return [QuantizedKVCache(self.config.head_dim, capacity) for _ in self.model.layers]
