"""The decoder, compared with a float64 transcription of the paper, with mlx-lm, and with itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm.models import mlx_cpu
from fastvlm.models._mlx import mx
from fastvlm.models.config import Qwen2Config
from fastvlm.models.kv_cache import CACHE_STEP, KVCache
from fastvlm.models.qwen2 import Qwen2

pytestmark = pytest.mark.usefixtures("float32_decoder")

CONFIG = Qwen2Config(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=101,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)
UNTIED = Qwen2Config(**{**vars(CONFIG), "tie_word_embeddings": False})

Weights = dict[str, np.ndarray]
CloseTo = Callable[[mx.array, np.ndarray], None]


def decoder(config: Qwen2Config = CONFIG, seed: int = 0) -> Qwen2:
    """Returns a decoder with random weights of trained-like scale, with biases and gains."""
    model, rng = Qwen2(config), np.random.default_rng(seed)
    drawn = []
    for name, array in tree_flatten(model.parameters()):
        noise = rng.normal(size=array.shape)
        if array.ndim == 2:
            noise *= 1.0 if "embed" in name else 1.5 / array.shape[1] ** 0.5
        elif "norm" in name:
            noise = 1 + 0.2 * noise
        drawn.append((name, mx.array(noise.astype(np.float32))))
    model.load_weights(drawn)
    return model


def embeddings(length: int, config: Qwen2Config = CONFIG, batch: int = 1) -> mx.array:
    rng = np.random.default_rng(length)
    return mx.array(rng.normal(size=(batch, length, config.hidden_size)).astype(np.float32))


@pytest.fixture
def close(tolerance: Callable[[str], float]) -> CloseTo:
    def check(found: mx.array, expected: np.ndarray | mx.array) -> None:
        found, expected = np.array(found, np.float64), np.array(expected, np.float64)
        assert found.shape == expected.shape
        assert np.isfinite(found).all() and np.isfinite(expected).all()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance("decoder_logits_float32"))

    return check


def transcription(weights: Weights, config: Qwen2Config, x: np.ndarray) -> np.ndarray:
    """Returns the logits (L, V) for embeddings (L, D), formula by formula in float64, one head at a time."""
    L, width = len(x), config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * gain

    def rotate(head: np.ndarray) -> np.ndarray:
        frequencies = config.rope_theta ** (-np.arange(0, width, 2) / width)
        turn = np.exp(1j * np.arange(L)[:, None] * frequencies)
        turned = (head[:, : width // 2] + 1j * head[:, width // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=1)

    for i in range(config.num_hidden_layers):
        w = {name.removeprefix(f"model.layers.{i}."): value for name, value in weights.items()}
        y = norm(x, w["input_layernorm.weight"])
        q, k, v = (y @ w[f"self_attn.{n}_proj.weight"].T + w[f"self_attn.{n}_proj.bias"] for n in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            mine, shared = (slice(n * width, (n + 1) * width) for n in (head, head // group))
            scores = rotate(q[:, mine]) @ rotate(k[:, shared]).T / np.sqrt(width)
            scores[np.triu_indices(L, 1)] = -np.inf
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    head = weights["model.embed_tokens.weight"] if config.tie_word_embeddings else weights["lm_head.weight"]
    return norm(x, weights["model.norm.weight"]) @ head.T


def numbers(model: Qwen2) -> Weights:
    return {name: np.array(array, np.float64) for name, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("length", [1, 2, 9, 130], ids="L{}".format)
def test_logits_follow_the_formulas(config: Qwen2Config, length: int, close: CloseTo) -> None:
    model, x = decoder(config), embeddings(length)
    expected = transcription(numbers(model), config, np.array(x[0], np.float64))
    close(model(x, all_positions=True)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_equal_mlx_lms(config: Qwen2Config, close: CloseTo) -> None:
    theirs_module = pytest.importorskip("mlx_lm.models.qwen2", reason="mlx-lm is not installed")
    fields = {name: getattr(config, name) for name in vars(config)}
    theirs = theirs_module.Model(theirs_module.ModelArgs(model_type="qwen2", **fields))
    ours = decoder(config)
    theirs.load_weights(tree_flatten(ours.parameters()), strict=True)  # the names are the same, too
    ids = mx.array([[5, 17, 100, 3, 3, 64, 0]])
    close(ours(ours.embed(ids), all_positions=True), theirs(ids))


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_parameters_have_hugging_faces_names(config: Qwen2Config) -> None:
    names = {name for name, _ in tree_flatten(Qwen2(config).parameters())}
    assert ("lm_head.weight" in names) is not config.tie_word_embeddings
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.q_proj.bias"} <= names
    assert not any("o_proj.bias" in name or ("mlp" in name and "bias" in name) for name in names)


def test_last_position_alone_gives_the_same_logits(close: CloseTo) -> None:
    model, x = decoder(), embeddings(11)
    close(model(x), model(x, all_positions=True)[:, -1:])


@pytest.mark.parametrize("capacity", [0, 3, 512])
@pytest.mark.parametrize("pieces", [[7, 4], [1] * 11, [10, 1], [1, 9, 1]], ids=str)
def test_prefill_in_pieces_equals_prefill_at_once(pieces: list[int], capacity: int, close: CloseTo) -> None:
    model, x = decoder(), embeddings(11)
    cache, start, found = model.make_cache(capacity), 0, []
    for length in pieces:
        found.append(model(x[:, start : start + length], cache, all_positions=True))
        start += length
    close(mx.concatenate(found, axis=1), model(x, all_positions=True))
    assert {layer.offset for layer in cache} == {11}


def test_cache_grows_when_it_is_full(close: CloseTo) -> None:
    model, length = decoder(), CACHE_STEP + 5
    x, cache = embeddings(length), model.make_cache()
    model(x[:, : CACHE_STEP - 1], cache)
    assert cache[0].capacity == CACHE_STEP
    for position in range(CACHE_STEP - 1, length):
        last = model(x[:, position : position + 1], cache)
    assert cache[0].capacity == 2 * CACHE_STEP
    close(last, model(x))


def test_answer_continues_from_the_rest_of_a_trimmed_cache(close: CloseTo) -> None:
    model, x = decoder(), embeddings(20)
    cache = model.make_cache()
    model(x[:, :9], cache)
    model(embeddings(5), cache)
    for layer in cache:
        layer.trim(5)
    close(model(x[:, 9:], cache), model(x))


@pytest.mark.parametrize("count", [-1, 4])
def test_trim_is_refused_when_there_are_fewer_positions(count: int) -> None:
    cache = KVCache()
    cache.update(mx.zeros((1, 2, 3, 8)), mx.zeros((1, 2, 3, 8)))
    with pytest.raises(ValueError, match=f"remove {count} of 3"):
        cache.trim(count)


def test_cache_tells_its_size() -> None:
    cache = KVCache(capacity=10)
    assert cache.nbytes == 0
    cache.update(mx.zeros((1, 2, 3, 8)), mx.zeros((1, 2, 3, 8)))
    assert cache.nbytes == 2 * 2 * 10 * 8 * 4


def test_earlier_logits_stay_when_later_tokens_change(close: CloseTo) -> None:
    model, x = decoder(), embeddings(100)
    other = mx.concatenate([x[:, :90], -x[:, 90:]], axis=1)
    before, after = model(x, all_positions=True), model(other, all_positions=True)
    close(before[:, :90], after[:, :90])
    assert mx.abs(before[:, 90:] - after[:, 90:]).max().item() > 0.1


@pytest.mark.parametrize("prefix", [0, 30])
def test_attention_of_the_cpu_in_any_blocks_equals_mlxs_own(
    prefix: int, close: CloseTo, monkeypatch: pytest.MonkeyPatch, computing_on: Callable
) -> None:
    model, x = decoder(), embeddings(100)

    def logits(block: int | None) -> mx.array:
        monkeypatch.setattr(mlx_cpu, "QUERY_BLOCK", block)
        computing_on("gpu" if block is None else "cpu")
        cache = model.make_cache()
        if prefix:
            model(x[:, :prefix], cache)
        return model(x[:, prefix:], cache, all_positions=True)

    expected = logits(None)
    for block in (7, 64, 1000):
        close(logits(block), expected)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(("batch", "length"), [(1, 8), (8, 1), (2, 32)])
def test_products_of_few_rows_with_sides_swapped_give_the_same(
    config: Qwen2Config, batch: int, length: int, close: CloseTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, swapped = decoder(config), embeddings(length, batch=batch), []
    original = mlx_cpu.swapped_product

    def noted(x: mx.array, weight: mx.array) -> mx.array:
        swapped.append(weight.shape)
        return original(x, weight)

    monkeypatch.setattr(mlx_cpu, "swapped_product", noted)
    monkeypatch.setattr(mlx_cpu, "swapping_pays", lambda: True)
    found = model(x, all_positions=True)
    assert len(swapped) == 7 * config.num_hidden_layers + 1  # all of the matrices
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(mlx_cpu, "swapping_pays", lambda: False)
        close(found, model(x, all_positions=True))
    swapped.clear()
    model(embeddings(7))
    model(embeddings(65))
    model.set_dtype(mx.float16)
    model(x.astype(mx.float16))
    assert swapped == []


def test_cpu_attention_takes_half_precision_and_sharp_scores() -> None:
    draw = np.random.default_rng(0)
    queries, keys, values = (mx.array(draw.normal(size=(1, heads, 70, 16)) * 12) for heads in (4, 2, 2))
    half = queries.astype(mx.float16)
    expected = mx.fast.scaled_dot_product_attention(
        half.astype(mx.float32), keys, values, scale=0.25, mask="causal"
    )  # scores of hundreds
    found = mlx_cpu.causal_attention(half, keys, values, 0.25)
    assert found.dtype == mx.float16
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=0.02)  # what float16 rounds off 40


@pytest.mark.parametrize("offsets", [(0,), (300,), (5, 0, 17)])
@pytest.mark.parametrize("count", [1, 9])
def test_rotary_positions_of_the_cpu_are_mlxs(offsets: tuple[int, ...], count: int) -> None:
    x = mx.array(np.random.default_rng(0).normal(size=(3, 4, count, 16)).astype(np.float32))
    expected = mx.fast.rope(
        x, 16, traditional=False, base=1e6, scale=1.0, offset=mx.array(offsets) if len(offsets) > 1 else offsets[0]
    )
    found = mlx_cpu.rotated(x, offsets, 1e6)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)  # float32 angles of hundreds
    assert mlx_cpu.rotated(x.astype(mx.float16), offsets, 1e6).dtype == mx.float16


def test_rows_of_a_batch_do_not_mix(close: CloseTo) -> None:
    model, x = decoder(), embeddings(70, batch=3)
    together = model(x, all_positions=True)
    for row in range(3):
        close(together[row : row + 1], model(x[row : row + 1], all_positions=True))
