"""The caches of keys and values: forked, quantized, joined into batches and separated again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models._mlx import mx
from fastvlm.models.config import Qwen2Config
from fastvlm.models.errors import UsageError
from fastvlm.models.kv_cache import KVCache, QuantizedKVCache, extracted, selected, stacked
from fastvlm.models.qwen2 import Qwen2

HEADS, WIDTH = 2, 64
KINDS = pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(WIDTH)], ids=["float32", "8 bits"])


def drawn(rows: int, length: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(rows, HEADS, length, WIDTH)).astype(np.float32))


def content(cache: KVCache) -> list[np.ndarray]:
    """Returns the keys (HEADS, its length, WIDTH) of each row, without the padding."""
    keys, _ = cache._read([buffer[..., : cache.offset, :] for buffer in cache.buffers])
    keys = cache.dequantized(keys) if isinstance(cache, QuantizedKVCache) else keys
    counts = cache.padding.counts if cache.padding else (0,) * cache.rows
    return [np.array(row)[:, count:] for row, count in zip(keys, counts, strict=True)]


def filled(make: Callable[[], KVCache], length: int, seed: int) -> KVCache:
    cache = make()
    cache.update(drawn(1, length, seed), drawn(1, length, seed + 100))
    return cache


@KINDS
def test_fork_and_original_do_not_see_each_other(make: Callable[[], KVCache]) -> None:
    cache = filled(make, 5, seed=1)
    before = content(cache)[0]
    fork = cache.fork(7)
    fork.update(drawn(1, 2, 2), drawn(1, 2, 3))
    cache.update(drawn(1, 1, 4), drawn(1, 1, 5))
    assert (fork.offset, cache.offset, fork.capacity) == (7, 6, 7)
    np.testing.assert_array_equal(content(fork)[0][:, :5], before)
    np.testing.assert_array_equal(content(cache)[0][:, :5], before)
    assert np.abs(content(fork)[0][:, 5] - content(cache)[0][:, 5]).max() > 0.1


@KINDS
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
@settings(max_examples=15, deadline=None)
def test_rows_come_out_of_a_batch_as_they_went_in(
    make: Callable[[], KVCache], lengths: list[int], data: st.DataObject
) -> None:
    singles = [filled(make, length, seed) for seed, length in enumerate(lengths)]
    expected = [content(single)[0] for single in singles]
    batch = stacked(singles, room=3)
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    chosen = selected(batch, rows)
    chosen.update(drawn(len(rows), 1), drawn(len(rows), 1))
    again = stacked([chosen, filled(make, 12, seed=50)], room=1)
    for row, found in zip(rows, content(again), strict=False):
        np.testing.assert_array_equal(found[:, :-1], expected[row])
    assert content(again)[-1].shape[1] == 12
    assert min(chosen.padding.counts) == 0, "positions that are padding in every row are dropped"


@KINDS
def test_cache_of_one_row_holds_its_first_positions_alone(make: Callable[[], KVCache]) -> None:
    singles = [filled(make, length, seed) for seed, length in enumerate((3, 6, 4))]
    batch = stacked(singles, room=5)
    batch.update(drawn(3, 1, 7), drawn(3, 1, 8))
    whole = content(batch)[2]
    for length in (5, 2):
        found = extracted(batch, 2, length)
        assert (found.offset, found.rows, found.padding) == (length, 1, None)
        assert {buffer.shape[2] for buffer in found.buffers} == {length}
        np.testing.assert_array_equal(content(found)[0], whole[:, :length])
        found.update(drawn(1, 1, 9), drawn(1, 1, 9))
    np.testing.assert_array_equal(content(batch)[2], whole)


@KINDS
def test_fork_and_compact_copy_may_be_shorter(make: Callable[[], KVCache]) -> None:
    cache = filled(make, 6, seed=1)
    cache.reserve(300)
    cache.update(drawn(1, 1, 2), drawn(1, 1, 3))
    for short in (cache.fork(length=4), cache.compact(4)):
        assert {buffer.shape[2] for buffer in short.buffers} == {4}
        np.testing.assert_array_equal(content(short)[0], content(cache)[0][:, :4])
        short.update(drawn(1, 1, 4), drawn(1, 1, 5))
        assert short.offset == 5
    assert cache.offset == 7
    assert cache.compact(4).nbytes < cache.nbytes / 10


def small_decoder() -> Qwen2:
    mx.random.seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=300, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=400, tie_word_embeddings=True,
    )  # fmt: skip
    decoder = Qwen2(config)
    mx.eval(decoder.parameters())
    return decoder


def test_batch_of_mixed_lengths_has_the_logits_of_each(tolerance: Callable[[str], float]) -> None:
    decoder, lengths = small_decoder(), (3, 40, 11)
    prompts = [mx.random.normal((1, length, 128)) for length in lengths]
    caches = [decoder.make_cache() for _ in lengths]
    for prompt, cache in zip(prompts, caches, strict=True):
        decoder.extend(prompt, cache)
    batch = [stacked(layer, 2) for layer in zip(*caches, strict=True)]
    for token in (7, 200):
        tokens = mx.array([[token], [token + 1], [token + 2]])
        together = decoder(decoder.embed(tokens), batch)
        alone = [decoder(decoder.embed(tokens[n : n + 1]), cache) for n, cache in enumerate(caches)]
        difference = np.abs(np.array(together) - np.array(mx.concatenate(alone))).max()
        assert np.isfinite(np.array(together)).all()
        assert difference < tolerance("decoder_logits_float32")


def test_eight_bits_keep_the_logits(tolerance: Callable[[str], float]) -> None:
    decoder = small_decoder()
    x = mx.random.normal((1, 90, 128))
    exact = np.array(decoder(x, decoder.make_cache(), all_positions=True))
    cache = decoder.make_cache(100, kv_bits=8)
    pieces = [decoder(x[:, start : start + 30], cache, all_positions=True) for start in (0, 30, 60)]
    found = np.array(mx.concatenate(pieces, axis=1))
    assert np.isfinite(found).all()
    assert 0 < np.abs(found - exact).max() / np.abs(exact).max() < tolerance("kv_8_bits")
    assert cache[0].nbytes == 2 * 100 * (64 + 2 * 4)  # a scale and a bias per group: 0.28 of float32


@pytest.mark.parametrize("bits", [0, 4, 16, "8"])
def test_usage_error_when_bits_are_not_8(bits: object) -> None:
    with pytest.raises(UsageError, match="kv_bits must be 8"):
        small_decoder().make_cache(0, bits)  # type: ignore[arg-type]


def test_usage_error_when_heads_do_not_divide_into_groups() -> None:
    assert QuantizedKVCache(96).group_size == 32
    with pytest.raises(UsageError, match="multiple of 32 channels \\(got 48\\)"):
        QuantizedKVCache(48)
