"""Prefill, decoding, and the ways in which an answer ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models._mlx import mx
from fastvlm.models.errors import UsageError
from fastvlm.models.qwen2 import Qwen2
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.runtime import generate
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import (
    DecodeResult,
    GenerationOptions,
    StopStrings,
    Stream,
    decode,
    decode_one_token,
    options_from,
    prefill,
    read_answer,
)
from fastvlm.runtime.sampling import Sampler, SamplingOptions, id_on_host
from fastvlm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("float32_decoder")

EOS = 1022

words = st.text("ab", min_size=1, max_size=4)
letters = st.text("ab", min_size=1, max_size=2)


def read(
    tokenizer: Tokenizer, ids: list[int], eos: tuple[int, ...] = (EOS,), stop: tuple[str, ...] = ()
) -> tuple[list[str], DecodeResult]:
    """The pieces of an answer, with a clock that goes a tenth of a second per look."""
    ticks = iter(range(1000))
    answer = read_answer(iter(ids), tokenizer, eos, stop, clock=lambda: next(ticks) / 10)
    pieces = []
    try:
        while True:
            pieces.append(next(answer))
    except StopIteration as end:
        return pieces, end.value


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte, so that pieces are small."""
    return [tokenizer.encode(character)[0] for character in text]


def embeddings(vlm: FastVLM, length: int) -> mx.array:
    ids = np.random.default_rng(length).integers(0, 1000, (1, length))
    return vlm.engine.language.language_model.embed(mx.array(ids))


@pytest.mark.parametrize("chunk", [1, 5, 6, 11, 12, 13])
def test_prefill_in_chunks_equals_prefill_at_once(
    vlm: FastVLM, chunk: int, tolerance: Callable[[str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, x = vlm.engine.language.language_model, embeddings(vlm, 12)
    whole = np.array(decoder(x)[:, -1])
    monkeypatch.setattr(generate, "PREFILL_CHUNK", chunk)
    cache = decoder.make_cache()
    lengths: list[int] = []
    monkeypatch.setattr(type(decoder.model), "__call__", watched(type(decoder.model).__call__, lengths))
    found = np.array(prefill(decoder, x, cache))
    assert lengths == [chunk] * ((12 - 1) // chunk) + [12 - (12 - 1) // chunk * chunk]
    assert cache[0].offset == 12
    np.testing.assert_allclose(found, whole, rtol=0, atol=tolerance("decoder_logits_float32"))


@pytest.mark.slow
def test_long_prompts_take_the_memory_of_short_ones() -> None:
    """The peak is that of 1,024 tokens, but for the cache and the prompt itself. MLX counts it, so it is exact."""
    decoder = Qwen2(RandomCheckpoint("tiny").config.decoder)
    mx.eval(decoder.parameters())
    short, long = (working_bytes(decoder, length) for length in (1024, 8192))
    assert long < 1.3 * short


def working_bytes(decoder: Qwen2, length: int) -> int:
    """Returns the peak of a prefill without weights, prompt and cache."""
    x = 0.05 * mx.random.normal((1, length, decoder.config.hidden_size), key=mx.random.key(0))
    cache = decoder.make_cache(length)
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(prefill(decoder, x, cache))
    return mx.get_peak_memory() - before - sum(layer.nbytes for layer in cache)


def watched(call: Callable, lengths: list[int]) -> Callable:
    def watch(self: object, inputs_embeds: mx.array, *rest: object, **named: object) -> mx.array:
        lengths.append(inputs_embeds.shape[1])
        return call(self, inputs_embeds, *rest, **named)

    return watch


def test_one_token_at_a_time_equals_all_at_once(vlm: FastVLM, tolerance: Callable[[str], float]) -> None:
    decoder, ids = vlm.engine.language.language_model, mx.array([5, 900, 33, 7])
    whole = np.array(decoder(decoder.embed(ids[None]), all_positions=True)[0])
    cache = decoder.make_cache()
    found = [np.array(decode_one_token(decoder, ids[n : n + 1], cache)[0]) for n in range(4)]
    np.testing.assert_allclose(np.stack(found), whole, rtol=0, atol=tolerance("decoder_logits_float32"))


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(temperature=1.0, repetition_penalty=1.3, seed=4)]
)
@pytest.mark.parametrize("lookahead", [0, 1, 3, 50])
def test_ids_are_the_same_however_far_decoding_looks_ahead(
    vlm: FastVLM, options: SamplingOptions, lookahead: int
) -> None:
    decoder = vlm.engine.language.language_model

    def run(count: int, lookahead: int) -> tuple[list[int], int]:
        cache, sampler = decoder.make_cache(), Sampler(options, (1, 2))
        first = sampler(prefill(decoder, embeddings(vlm, 6), cache)[0])
        rest = list(decode(decoder, first, cache, sampler, count, lookahead))
        return [id_on_host(first), *rest], cache[0].offset

    ids, offset = run(9, lookahead)
    assert ids == run(9, 0)[0]
    assert len(ids) == 10
    assert offset == 6 + 9  # no step is begun that nobody asked for


def test_decoding_begins_no_step_when_none_is_asked_for(vlm: FastVLM) -> None:
    assert list(decode(vlm.engine.language.language_model, mx.array([1]), [], Sampler(SamplingOptions()), 0)) == []


def test_ids_follow_from_the_logits_of_all_before_them(vlm: FastVLM) -> None:
    decoder, x, options = (
        vlm.engine.language.language_model,
        embeddings(vlm, 6),
        SamplingOptions(temperature=1.0, seed=4),
    )
    cache, sampler = decoder.make_cache(), Sampler(options)
    first = sampler(prefill(decoder, x, cache)[0])
    ids = [id_on_host(first), *decode(decoder, first, cache, sampler, 5)]
    assert len(set(ids)) > 3
    again = Sampler(options)
    for n in range(6):
        whole = mx.concatenate([x, decoder.embed(mx.array([ids[:n]], mx.int32))], axis=1) if n else x
        assert ids[n] == id_on_host(again(decoder(whole)[0, -1]))


def test_answer_ends_at_eos_and_leaves_it_out(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "abc")
    pieces, ending = read(tokenizer, [*ids, EOS, *ids])
    assert pieces == ["a", "b", "c"]
    assert (ending.text, ending.token_ids, ending.finish_reason) == ("abc", tuple(ids), "stop")


@pytest.mark.parametrize("eos", [5, 700, EOS])
def test_answer_ends_at_any_of_several_eos_ids(tokenizer: Tokenizer, eos: int) -> None:
    assert read(tokenizer, [*encode(tokenizer, "a"), eos, 9], eos=(700, EOS, 5))[1].stop_reason == eos


def test_answer_goes_on_past_eos_when_none_is_named(tokenizer: Tokenizer) -> None:
    _, ending = read(tokenizer, [*encode(tokenizer, "a"), EOS, *encode(tokenizer, "b")], eos=())
    assert (ending.text, ending.finish_reason) == ("ab", "length")
    assert ending.token_ids[1] == EOS


def test_answer_is_empty_when_eos_comes_first(tokenizer: Tokenizer) -> None:
    pieces, ending = read(tokenizer, [EOS])
    assert pieces == []
    assert ending == DecodeResult("", (), "stop", None, EOS)


def test_answer_ends_with_length_when_ids_run_out(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, encode(tokenizer, "abc"))[1].finish_reason == "length"


def test_rate_counts_the_tokens_after_the_first(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "abcde")
    assert read(tokenizer, ids)[1].decode_tps == pytest.approx(10.0)  # 4 tokens in 0.4 s
    assert read(tokenizer, [*ids, EOS])[1].decode_tps == pytest.approx(10.0)
    assert read(tokenizer, ids[:1])[1].decode_tps is None


def test_stop_text_ends_the_answer_and_is_left_out(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "yes. END more")
    pieces, ending = read(tokenizer, ids, stop=("END", "never"))
    assert "".join(pieces) == ending.text == "yes. "
    assert (ending.finish_reason, ending.stop_reason) == ("stop", "END")
    assert ending.token_ids == tuple(ids[: len("yes. END")])


def test_stop_text_is_found_when_one_token_holds_more(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" assistant user")
    assert len(ids) == 2
    assert read(tokenizer, ids, stop=("ist",))[1] == DecodeResult(" ass", (ids[0],), "stop", None, "ist")


@pytest.mark.parametrize("last", [[], [EOS]])
def test_beginning_of_a_stop_text_comes_out_when_the_answer_ends(tokenizer: Tokenizer, last: list[int]) -> None:
    pieces, ending = read(tokenizer, [*encode(tokenizer, "so EN"), *last], stop=("END",))
    assert "".join(pieces) == ending.text == "so EN"
    assert pieces[-1] == "EN"


def test_half_a_character_is_dropped_when_the_answer_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok😀")[:-1]
    pieces, ending = read(tokenizer, ids)
    assert "".join(pieces) == ending.text == "ok"
    assert ending.token_ids == tuple(ids)


@given(st.lists(letters), st.lists(words, min_size=1, max_size=3))
def test_stop_texts_are_cut_as_in_the_whole_text(pieces: list[str], stop: list[str]) -> None:
    texts, out, seen = StopStrings(stop), "", ""
    for piece in pieces:
        out += texts.push(piece)
        seen += piece
        places = [place for place in (seen.find(text) for text in stop) if place >= 0]
        assert (texts.found is not None) is bool(places)
        if places:
            assert out == seen[: min(places)]
            return
    assert out + texts.flush() == seen


@given(st.lists(words, min_size=1), st.lists(words, max_size=3))
def test_no_more_text_is_held_back_than_a_stop_text_could_need(pieces: list[str], stop: list[str]) -> None:
    texts, out, seen = StopStrings(stop), "", ""
    for piece in pieces:
        out += texts.push(piece)
        seen += piece
        if texts.found:
            return
        held = seen[len(out) :]
        assert not held or any(text.startswith(held) for text in stop)


def pieces_of(texts: list[str], value: object) -> Iterator[str]:
    yield from texts
    return value


def test_stream_gives_pieces_and_then_the_generation() -> None:
    stream = Stream(pieces_of(["a", "b"], "whole"))
    with pytest.raises(UsageError, match="Read the stream to its end"):
        _ = stream.generation
    assert next(stream) == "a"
    with pytest.raises(UsageError):
        _ = stream.generation
    assert list(stream) == ["b"]
    assert stream.generation == "whole"
    assert list(stream) == []
    assert stream.generation == "whole"


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, "3", None, True])
def test_usage_error_when_max_tokens_is_out_of_range(max_tokens: object) -> None:
    with pytest.raises(UsageError, match=r"^max_tokens must be"):
        GenerationOptions(max_tokens=max_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["", ("a", ""), 3, (3,), None])
def test_usage_error_when_stop_is_no_text(stop: object) -> None:
    with pytest.raises(UsageError, match=r"^stop must be strings"):
        options_from(stop, 1, False, SamplingOptions())


@pytest.mark.parametrize(("stop", "texts"), [("END", ("END",)), ([], ()), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_may_be_one_text_or_several(stop: object, texts: tuple[str, ...]) -> None:
    assert options_from(stop, 1, False, SamplingOptions()).stop == texts


def test_stream_is_closed_when_its_context_ends() -> None:
    pieces = pieces_of(["a", "b"], "whole")
    with Stream(pieces) as stream:
        assert next(stream) == "a"
    assert list(stream) == []
    with pytest.raises(UsageError):
        _ = stream.generation
