"""The forms for a CPU and for a GPU compute the same, and so do joined and separate layers."""

from __future__ import annotations

import copy
import io
import re
import shutil
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from fastvlm.models._mlx import mx, nn
from fastvlm.models.config import Qwen2Config
from fastvlm.models.kv_cache import Padding, QuantizedKVCache, stacked
from fastvlm.models.mlx_layers import (
    JoinedAttention,
    JoinedMLP,
    attention_mask,
    join_projections,
    joined,
    quantized_attention,
    scaled_dot_product_attention,
    swiglu,
)
from fastvlm.models.qwen2 import Attention, Qwen2

CONFIG = Qwen2Config(
    hidden_size=256, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=400, tie_word_embeddings=True,
)  # fmt: skip


def decoder(bits: int | None = 8, dtype: mx.Dtype = mx.float16) -> Qwen2:
    """Returns a decoder with random weights, affine-quantized in groups of 64 if `bits` are given."""
    mx.random.seed(0)
    model = Qwen2(CONFIG)
    for name, array in nn.utils.tree_flatten(model.parameters()):
        if "norm" not in name:  # of trained-like scale, else every answer is one id
            scale = 1.0 if array.ndim == 1 or "embed" in name else 1.5 * array.shape[1] ** -0.5
            model.load_weights([(name, scale * mx.random.normal(array.shape))], strict=False)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    return model


def answer(model: Qwen2, rows: int = 1, kv_bits: int | None = None, count: int = 12) -> list[list[int]]:
    """Returns the likeliest id after each of `count` drawn ids, for a batch of `rows` prompts of different lengths."""
    caches = []
    for row in range(rows):
        cache = model.make_cache(0, kv_bits)
        model.extend(model.embed(mx.array([list(range(1, 20 + 3 * row))])), cache)
        caches.append(cache)
    cache = caches[0] if rows == 1 else [stacked(layers, count) for layers in zip(*caches, strict=True)]
    drawn = np.random.default_rng(rows).integers(0, CONFIG.vocab_size, (count, rows, 1))
    ids = [mx.argmax(model(model.embed(mx.array(tokens)), cache)[:, -1], axis=-1).tolist() for tokens in drawn]
    assert len({one for step in ids for one in step}) > 6, "answers of one id would show nothing"
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_ids_are_identical_when_projections_are_joined(bits: int | None, rows: int, computing_on: Callable) -> None:
    computing_on("gpu")
    model = decoder(bits, mx.float32)
    separate = answer(model, rows)
    join_projections(model)
    assert all(isinstance(block.self_attn, JoinedAttention) for block in model.model.layers)
    assert all(isinstance(block.mlp, JoinedMLP) for block in model.model.layers)
    assert answer(model, rows) == separate


def test_joined_products_are_exact(computing_on: Callable) -> None:
    computing_on("gpu")
    model, x = decoder(), mx.random.normal((2, 5, CONFIG.hidden_size)).astype(mx.float16)
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    together = joined(layers)(x)
    assert mx.array_equal(together, mx.concatenate([layer(x) for layer in layers], axis=-1)).item()
    assert layers[0].weight.shape[0] == CONFIG.hidden_size, "the layers themselves are left as they were"


@pytest.mark.slow
def test_layers_of_different_bits_stay_apart(computing_on: Callable) -> None:
    computing_on("gpu")
    model = decoder(None)
    wide = ("self_attn.v_proj", "mlp.up_proj")
    nn.quantize(model, class_predicate=lambda path, layer: hasattr(layer, "to_quantized") and {
        "group_size": 64, "bits": 8 if path.startswith("model.layers.1") and path.endswith(wide) else 4,
    })  # fmt: skip
    expected = answer(model)
    join_projections(model)
    assert [isinstance(block.self_attn, JoinedAttention) for block in model.model.layers] == [True, False, True]
    assert [isinstance(block.mlp, JoinedMLP) for block in model.model.layers] == [True, False, True]
    assert answer(model) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_ids_are_those_of_the_cpu_form_when_joined(kv_bits: int | None, rows: int, computing_on: Callable) -> None:
    computing_on("cpu")
    model = decoder(8, mx.float32)
    expected = answer(model, rows, kv_bits)
    computing_on("gpu")
    join_projections(model)
    assert answer(model, rows, kv_bits) == expected


def primitives(*outputs: mx.array) -> Counter[str]:
    """Counts the operations of the graph for `outputs` by name."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return Counter(re.findall(r'label ?="([^"]*)"', text.getvalue()))


@pytest.mark.slow
def test_joined_step_has_four_quantized_products_per_layer(computing_on: Callable) -> None:
    mlx_lm = pytest.importorskip("mlx_lm.models.qwen2", reason="mlx-lm is not installed")
    computing_on("gpu")
    ours, token = decoder(), mx.array([[3]])
    join_projections(ours)
    theirs = mlx_lm.Model(mlx_lm.ModelArgs(model_type="qwen2", **vars(CONFIG)))
    theirs.set_dtype(mx.float16)
    nn.quantize(theirs, 64, 8)
    mx.eval(theirs.parameters())
    mx.enable_compile()  # the graphs are only counted
    found = primitives(ours(ours.embed(token), ours.make_cache(8)))
    baseline = primitives(theirs(token))
    assert found["QuantizedMatmul"] == 4 * CONFIG.num_hidden_layers + 1
    assert baseline["QuantizedMatmul"] == 7 * CONFIG.num_hidden_layers + 1
    assert found.total() < baseline.total()
    fused = [name for name in found if name.startswith("Compiled")]
    assert [found[name] for name in fused] == [CONFIG.num_hidden_layers], "SwiGLU is one kernel"


def filled(lengths: list[int], dtype: mx.Dtype) -> QuantizedKVCache:
    """Returns a cache in 8 bits with one row per length, without the last position of each."""
    rows = []
    for length in lengths:
        cache = QuantizedKVCache(64)
        cache.update(*(mx.random.normal((1, 2, length, 64)).astype(dtype) for _ in "kv"))
        rows.append(cache)
    return rows[0] if len(rows) == 1 else stacked(rows, 1)


@pytest.mark.parametrize("lengths", [[1], [300], [7, 30, 1]], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_attention_in_8_bits_is_that_of_dequantized_keys(
    lengths: list[int], dtype: mx.Dtype, computing_on: Callable, tolerance: Callable[[str], float]
) -> None:
    mx.random.seed(1)
    cache = filled(lengths, dtype)
    queries, key, value = (mx.random.normal((len(lengths), heads, 1, 64)).astype(dtype) * 2 for heads in (4, 2, 2))
    mask = attention_mask(queries[:, 0], cache, 4)
    keys, values = cache.update(key, value)
    computing_on("cpu")
    expected = np.array(scaled_dot_product_attention(queries, keys, values, cache, 0.125, mask), np.float32)
    computing_on("gpu")
    found = scaled_dot_product_attention(queries, keys, values, cache, 0.125, mask)
    assert mx.array_equal(found, quantized_attention(queries, keys, values, cache, 0.125, mask)).item()
    assert found.dtype == dtype
    found = np.array(found, np.float32)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < tolerance(f"quantized_attention_{str(dtype).removeprefix('mlx.core.')}")


def test_prefill_in_8_bits_expands_keys_once(computing_on: Callable) -> None:
    computing_on("gpu")
    cache = QuantizedKVCache(64)
    keys, values = cache.update(*(mx.random.normal((1, 2, 9, 64)) for _ in "kv"))
    queries = mx.random.normal((1, 4, 9, 64))
    found = primitives(scaled_dot_product_attention(queries, keys, values, cache, 0.125, "causal"))
    assert found["QuantizedMatmul"] == 0


def test_mask_of_a_batch_is_whole_on_a_gpu_and_made_once(computing_on: Callable) -> None:
    padding = Padding([2, 0])
    small, whole = padding.seen(5), padding.seen(5, heads=4)
    assert whole.shape == (2, 4, 1, 5)
    assert whole is padding.seen(5, heads=4)
    assert mx.array_equal(whole, mx.broadcast_to(small, whole.shape)).item()
    assert padding.positions(7) is padding.positions(7)
    assert padding.positions(7).tolist() == [5, 7]
    assert padding.positions(8).tolist() == [6, 8]
    assert padding.positions(0).tolist() == [-2, 0]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_swiglu_is_right_from_end_to_end(device: str, computing_on: Callable) -> None:
    computing_on(device)
    x = np.concatenate([np.linspace(-30, 30, 2001), [-1e4, -200.0, -100.0, 0.0, 100.0, 1e4]]).astype(np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-np.maximum(x.astype(np.float64), -700)))
    found = swiglu(mx.array(x), mx.full(x.shape, 2.0))
    np.testing.assert_allclose(np.array(found), 2 * exact, rtol=2e-5, atol=1e-37)


@pytest.mark.skipif(not shutil.which("g++"), reason="mx.compile needs a C++ compiler on a CPU")
def test_compiled_swiglu_takes_any_shape(computing_on: Callable) -> None:
    computing_on("gpu")
    for shape in ((1, 1, 8), (1, 9, 8), (3, 1, 16)):
        gate, up = mx.random.normal(shape), mx.random.normal(shape)
        mx.disable_compile()
        expected = np.array(swiglu(gate, up))
        mx.enable_compile()
        np.testing.assert_allclose(np.array(swiglu(gate, up)), expected, rtol=1e-5, atol=1e-6)


def test_joined_layer_leaves_the_parts_as_they_were() -> None:
    attention = Attention(CONFIG)
    before = copy.deepcopy(dict(nn.utils.tree_flatten(attention.parameters())))
    whole = joined([attention.q_proj, attention.k_proj, attention.v_proj])
    assert whole.weight.shape == (256 + 2 * 128, 256)
    after = dict(nn.utils.tree_flatten(attention.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
