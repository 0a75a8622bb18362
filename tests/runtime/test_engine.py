"""From a request to its tokens: stages, reuse, limits and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.errors import PromptError, WeightsError
from fastvlm.models.images import open_image, preprocess, to_pixel_values
from fastvlm.runtime import engine as engine_module
from fastvlm.runtime import request as request_module
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.prompt_cache import CachedPrompt
from fastvlm.runtime.request import prepare
from fastvlm.runtime.timings import TTFT_STAGES

from .conftest import EventLog, StandingClock

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
OTHER = 255 - PICTURE
VARIED = {"temperature": 1.0, "seed": 3, "max_tokens": 8}
"""Options under which random weights do not repeat one token."""

Write = Callable[..., Path]
Open = Callable[[Path], FastVLM]


@pytest.fixture
def first_logits(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Logits of the first token of an answer."""
    seen: list[np.ndarray] = []
    original = engine_module.prefill
    monkeypatch.setattr(engine_module, "prefill", lambda *args: [seen.append(np.array(x := original(*args))), x][1])

    def run(image: object, prompt: str, **options: object) -> np.ndarray:
        vlm.engine.clear_caches()
        vlm.generate(image, prompt, max_tokens=1, **options)
        return seen[-1]

    return run


def eos_after(vlm: FastVLM, count: int) -> int:
    """An id that the varied answer has first at `count`."""
    ids = vlm.generate(PICTURE, "Hi", **VARIED).token_ids
    assert ids.index(ids[count]) == count
    return ids[count]


@pytest.mark.parametrize(
    ("image", "prompt", "options"),
    [
        (OTHER, "Describe it.", {}),
        (None, "Describe it.", {}),
        ([PICTURE, PICTURE], "Describe it.", {}),
        (PICTURE, "Describe <image> it.", {}),
        (PICTURE, "What is it?", {}),
        (PICTURE, "Describe it.", {"system": "Be brief."}),
        (PICTURE, "Describe it.", {"fit": "crop"}),
    ],
)
def test_logits_differ_when_the_request_does(
    first_logits: Callable[..., np.ndarray], image: object, prompt: str, options: dict
) -> None:
    usual = first_logits(PICTURE, "Describe it.")
    np.testing.assert_array_equal(first_logits(PICTURE, "Describe it."), usual)
    assert np.abs(first_logits(image, prompt, **options) - usual).max() > 0.01


@pytest.mark.parametrize("options", [{}, VARIED, {"repetition_penalty": 1.5}], ids=["greedy", "seeded", "penalty"])
@pytest.mark.parametrize(
    ("device", "expected"),
    # The projector, then the logits, whose check is read. A CPU also times the sampling.
    [("gpu", ["wait", "wait", "read"]), ("cpu", ["wait", "wait", "read", "wait"])],
)
def test_prefill_waits_twice_on_a_gpu(
    vlm: FastVLM,
    monkeypatch: pytest.MonkeyPatch,
    computing_on: Callable,
    device: str,
    expected: list[str],
    options: dict,
) -> None:
    """The read comes after a wait for the same array, so it does not wait itself."""
    computing_on(device)
    vlm.generate(PICTURE, "Hi", max_tokens=1)  # caches the masks of these lengths
    vlm.engine.clear_caches()
    vlm.engine.warm_up()  # caches the prefix of the template
    events = EventLog(monkeypatch)
    prefilled = vlm.engine.prefill(prepare(PICTURE, "Hi", **options), CachedPrompt())
    assert prefilled.cached_images == 0
    assert events.names == expected


def test_order_of_images_matters(first_logits: Callable[..., np.ndarray]) -> None:
    there, back = (first_logits(list(pair), "Compare.") for pair in [(PICTURE, OTHER), (OTHER, PICTURE)])
    assert np.abs(there - back).max() > 0.01


def test_prompt_tokens_count_every_image(vlm: FastVLM) -> None:
    alone, one, two = (vlm.generate([PICTURE] * n, "Hi", max_tokens=1).prompt_tokens for n in range(3))
    per_image = vlm.config.tokens_per_image
    assert per_image == 16
    assert one - alone == per_image + 1  # and a line break
    assert two - one == per_image + 1


def test_encoder_sees_each_image_as_it_is_fitted(vlm: FastVLM) -> None:
    vlm.generate([PICTURE, OTHER], "Hi", max_tokens=1)
    vlm.generate(PICTURE, "Hi", max_tokens=1, fit="crop")
    expected = [
        to_pixel_values(preprocess(open_image(image), vlm.config.image_size, fit))
        for image, fit in [(PICTURE, "pad"), (OTHER, "pad"), (PICTURE, "crop")]
    ]
    np.testing.assert_array_equal(np.stack(vlm.engine.encoder.calls), np.stack(expected))


def test_fit_defaults_to_what_the_config_says(write_folder: Write, open_vlm: Open) -> None:
    vlm = open_vlm(write_folder(image_aspect_ratio="crop"))
    vlm.generate(PICTURE, "Hi", max_tokens=1)
    vlm.engine.clear_caches()
    vlm.generate(PICTURE, "Hi", max_tokens=1, fit="crop")
    np.testing.assert_array_equal(*vlm.engine.encoder.calls)


def test_answer_equals_the_decoder_run_by_hand(vlm: FastVLM) -> None:
    """The same parts combined by hand: prompt ids, features in their place, the likeliest token each time."""
    found = vlm.generate(PICTURE, "Hi", max_tokens=5)
    ids = list(vlm.engine.prompts.encode(request_module._messages("Hi", None, 1)).ids)
    place = ids.index(1023)
    pixel_values = to_pixel_values(preprocess(open_image(PICTURE), 256, "pad"))
    features = vlm.engine.language.multi_modal_projector(mx.array(vlm.engine.encoder.encode(pixel_values)))
    decoder, answer = vlm.engine.language.language_model, []
    for _ in range(5):
        before, after = mx.array([ids[:place]]), mx.array([ids[place + 1 :] + answer])
        x = mx.concatenate([decoder.embed(before), features, decoder.embed(after)], axis=1)
        answer.append(mx.argmax(decoder(x)[0, -1]).item())
    assert list(found.token_ids) == answer


def test_answer_ends_at_an_eos_of_the_config(write_folder: Write, open_vlm: Open) -> None:
    eos = eos_after(open_vlm(write_folder()), 3)
    vlm = open_vlm(write_folder(eos_token_id=[1020, eos]))
    found, past = vlm.generate(PICTURE, "Hi", **VARIED), vlm.generate(PICTURE, "Hi", ignore_eos=True, **VARIED)
    assert (found.finish_reason, len(found.token_ids)) == ("stop", 3)
    assert (past.finish_reason, len(past.token_ids)) == ("length", 8)
    assert past.token_ids[3] == eos
    assert found.token_ids == past.token_ids[:3]
    assert found.timings.generated_tokens == 3


def test_tokenizers_eos_ends_an_answer_too(write_folder: Write, open_vlm: Open) -> None:
    vlm = open_vlm(write_folder(eos_token_id=1020))
    assert vlm.engine.eos_token_ids == (1020, 1022)


def test_end_of_the_templates_turn_ends_an_answer_too(write_folder: Write, open_vlm: Open) -> None:
    folder = write_folder(eos_token_id=1020)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    content = json.dumps({**settings, "eos_token": "<|endoftext|>"}).encode()
    (folder / "tokenizer_config.json").write_bytes(content)
    (folder / "fastvlm.json").unlink()
    vlm = open_vlm(folder)
    tokens = vlm.engine.tokenizer.control_tokens
    assert vlm.engine.eos_token_ids == (tokens["<|endoftext|>"], tokens["<|im_end|>"])


def test_context_bounds_prompt_and_answer_together(write_folder: Write, open_vlm: Open) -> None:
    vlm = open_vlm(write_folder(tokenizer_model_max_length=60))
    found = vlm.generate(PICTURE, "Hi", max_tokens=1000, ignore_eos=True)
    assert found.finish_reason == "context"
    assert found.prompt_tokens + len(found.token_ids) == 60
    room = 60 - found.prompt_tokens
    assert vlm.generate(PICTURE, "Hi", max_tokens=room, ignore_eos=True).finish_reason == "length"
    calls = len(vlm.engine.encoder.calls)
    with pytest.raises(PromptError, match=r"takes \d+ tokens \(16 per image\), but the context has 60"):
        vlm.generate([PICTURE] * 3, "Hi")
    assert len(vlm.engine.encoder.calls) == calls, "the encoder must not run in vain"
    vlm.generate(None, "a" * (60 - vlm.generate(None, "", max_tokens=1).prompt_tokens - 1), max_tokens=9)
    with pytest.raises(PromptError, match="takes 60 tokens"):
        vlm.generate(None, "q" * (60 - vlm.generate(None, "", max_tokens=1).prompt_tokens))


@pytest.mark.parametrize(("max_tokens", "room"), [(3, 3), (5000, 512)])
def test_cache_is_not_allocated_for_a_whole_answer(vlm: FastVLM, max_tokens: int, room: int) -> None:
    prefilled = vlm.engine.prefill(request_module.prepare(None, "Hi", max_tokens=max_tokens), CachedPrompt())
    assert prefilled.max_new_tokens == max_tokens
    assert {buffer.shape[2] for layer in prefilled.cache for buffer in layer.buffers} == {
        prefilled.prompt_tokens + room
    }


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7, "seed": 1}])
def test_timings_tell_every_stage(vlm: FastVLM, options: dict) -> None:
    found = vlm.generate(PICTURE, "Hi", max_tokens=4, ignore_eos=True, **options)
    timings = found.timings
    assert all(getattr(timings, stage) > 0 for stage in TTFT_STAGES)
    assert timings.ttft_ms == sum(getattr(timings, stage) for stage in TTFT_STAGES)
    assert (timings.load_ms, timings.compile_ms) == (1.0, 0.0)
    assert timings.image_open_ms > 0
    assert timings.decode_tps > 0
    assert (timings.prompt_tokens, timings.generated_tokens) == (found.prompt_tokens, 4)
    json.dumps(timings.as_dict())


def test_only_the_first_answer_of_a_process_is_cold(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_answers", iter(range(9)))
    assert [vlm.generate(None, "Hi", max_tokens=1).timings.cold for _ in range(3)] == [True, False, False]


def test_stages_are_timed_where_the_work_is(vlm: FastVLM, standing_clock: StandingClock) -> None:
    for owner, name, seconds in [
        (request_module, "open_images", 2.0),
        (engine_module, "preprocess", 2.0),
        (vlm.engine.prompts, "encode", 0.5),
        (vlm.engine.encoder, "encode", 4.0),
        (vlm.engine, "_project", 8.0),
        (engine_module, "prefill", 16.0),
        (engine_module, "Sampler", 32.0),
    ]:
        standing_clock.slow(owner, name, seconds)
    timings = vlm.generate([PICTURE, OTHER], "Hi", max_tokens=1).timings
    assert timings.image_open_ms == 2000
    found = [getattr(timings, stage) for stage in TTFT_STAGES]
    assert found == [4500, 8000, 8000, 16000, 32000]


def test_every_stage_ends_with_its_results_computed(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX is lazy: what a stage leaves undone would be timed as the next one's."""
    events: list[str] = []

    class Clock(engine_module.LapClock):
        def lap_ms(self) -> float:
            events.append("lap")
            return super().lap_ms()

    original = mx.eval
    for module in (engine_module, request_module):
        monkeypatch.setattr(module, "LapClock", Clock)
    vlm.generate(PICTURE, "Hi", max_tokens=1)
    vlm.engine.clear_caches()
    vlm.engine.warm_up()  # reads the beginning of prompts, which is kept
    events.clear()
    monkeypatch.setattr(mx, "eval", lambda *args: events.append("eval") or original(*args))
    vlm.generate(PICTURE, "Hi", max_tokens=1)
    opened, preprocessed, encoded, kept = ["lap"], ["lap"], ["lap"], ["eval"]
    ends = [event for event, after in zip(events, [*events[1:], ""], strict=True) if not event == after == "eval"]
    assert ends == [*opened, *preprocessed, *encoded, *["eval", "lap"] * 3, *kept]  # projected, prefilled, sampled


def test_sampler_knows_the_prompt_and_the_options(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    original = engine_module.Sampler
    monkeypatch.setattr(engine_module, "Sampler", lambda *args: made.append(args) or original(*args))
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 9}
    vlm.generate(PICTURE, "Hi", max_tokens=1, **given)
    options, ids, allowed, logprobs = made[0]
    assert allowed is logprobs is None
    assert vars(options) == given
    assert ids == vlm.engine.prompts.encode(request_module._messages("Hi", None, 1)).ids


def test_text_alone_needs_no_encoder(vlm: FastVLM) -> None:
    found = vlm.generate(None, "Hi", max_tokens=2)
    assert vlm.engine.encoder.calls == []
    assert found.prompt_tokens == vlm.generate([], "Hi", max_tokens=2).prompt_tokens


@pytest.mark.parametrize(
    ("image", "prompt", "marks", "images"), [(None, "<image>", 1, 0), (PICTURE, "<image> <image>", 2, 1)]
)
def test_prompt_error_names_both_numbers(vlm: FastVLM, image: object, prompt: str, marks: int, images: int) -> None:
    with pytest.raises(PromptError, match=rf"<image>: {marks}, images: {images}\)"):
        vlm.generate(image, prompt)


def test_prompt_error_when_the_template_adds_an_image_mark(write_folder: Write, open_vlm: Open) -> None:
    path = write_folder(manifest=None)
    (path / "chat_template.jinja").write_text("<image>{{ messages[0].content }}")
    vlm = open_vlm(path)
    with pytest.raises(PromptError, match="2 image placeholders, but 1"):
        vlm.generate(PICTURE, "Hi")


def test_prompt_error_when_the_embeddings_end_before_a_token(write_folder: Write, open_vlm: Open) -> None:
    vlm = open_vlm(write_folder(vocab_size=900))
    with pytest.raises(PromptError, match="token 1022, but the model has 900 embeddings"):
        vlm.generate(PICTURE, "Hi")
    assert vlm.engine.encoder.calls == [], "the encoder must not run in vain"


def test_embeddings_may_end_before_the_image_token(write_folder: Write, open_vlm: Open) -> None:
    vlm = open_vlm(write_folder(vocab_size=1023))
    assert len(vlm.generate(PICTURE, "Hi", max_tokens=2, ignore_eos=True).token_ids) == 2


def test_prompt_error_when_nothing_is_left_of_a_prompt(write_folder: Write, open_vlm: Open) -> None:
    path = write_folder(manifest=None)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    vlm = open_vlm(path)
    with pytest.raises(PromptError, match="the prompt is empty"):
        vlm.generate(None, "")
    assert vlm.generate(None, "a", max_tokens=1).prompt_tokens == 1
    assert vlm.generate(PICTURE, "<image>", max_tokens=1).prompt_tokens == 16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_error_when_logits_are_not_finite(vlm: FastVLM, value: float) -> None:
    vlm.engine.language.language_model.model.norm.weight = mx.full((128,), value)
    with pytest.raises(WeightsError, match=r"not finite: .* overflow float32"):
        vlm.generate(PICTURE, "Hi")


def test_single_features_beyond_float16_give_finite_logits(vlm: FastVLM) -> None:
    encode = vlm.engine.encoder.encode

    def with_outliers(pixel_values: np.ndarray) -> np.ndarray:
        features = encode(pixel_values).copy()
        features[0, 3, 5], features[0, 7, 1] = 7e4, -7e4
        return features

    vlm.engine.encoder.encode = with_outliers  # type: ignore[method-assign]
    expected = vlm.engine.prefill(prepare(PICTURE, "Hi"), CachedPrompt()).first_token
    vlm.engine.feature_cache.clear()
    vlm.engine.language.multi_modal_projector.set_dtype(mx.float16)
    found = vlm.engine.prefill(prepare(PICTURE, "Hi"), CachedPrompt()).first_token
    assert found.item() == expected.item()


def test_projected_features_are_not_projected_again(vlm: FastVLM) -> None:
    plain = vlm.generate(PICTURE, "Hi", **VARIED)
    project, encode = vlm.engine.language.multi_modal_projector, vlm.engine.encoder.encode
    vlm.engine.encoder.encode = lambda values: np.array(project(mx.array(encode(values))))  # type: ignore[method-assign]
    vlm.engine.encoder.projected = True
    vlm.engine.clear_caches()
    again = vlm.generate(PICTURE, "Hi", **VARIED)
    assert again.token_ids == plain.token_ids
    assert len(set(plain.token_ids)) > 3
