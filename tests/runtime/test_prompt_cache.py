"""The fixed beginning of prompts is read once, at load; and several threads may ask."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastvlm
from fastvlm.models._mlx import mx
from fastvlm.models.errors import UsageError
from fastvlm.models.kv_cache import KVCache
from fastvlm.models.qwen2 import Qwen2, Qwen2Model
from fastvlm.runtime import engine as engine_module
from fastvlm.runtime import fastvlm as runtime
from fastvlm.runtime import prompt_cache
from fastvlm.runtime.encoders import VisionEncoder
from fastvlm.runtime.engine import reusable_prefix
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.prompt import Message
from fastvlm.runtime.prompt_cache import (
    MAX_CACHE_BYTES,
    MAX_PREFIX_TOKENS,
    MIN_CACHE_BYTES,
    CachedPrompt,
    FeatureCache,
    ImageItem,
    PrefixCache,
    check_cache_bytes,
    default_cache_bytes,
    segments,
    shared_count,
    text_prefix,
)
from fastvlm.runtime.timings import TTFT_STAGES

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
OTHER = 255 - PICTURE
VARIED = {"temperature": 1.0, "seed": 3, "max_tokens": 8}

Open = Callable[[Path], FastVLM]
Write = Callable[..., Path]


@pytest.fixture
def loaded(write_folder: Write, open_vlm: Open, monkeypatch: pytest.MonkeyPatch) -> FastVLM:
    """A model that came through `load`."""
    path = write_folder()
    encoder = open_vlm(path).engine.encoder
    monkeypatch.setattr(runtime, "open_encoder", lambda *args: encoder)
    return fastvlm.load(path)


def test_beginning_of_prompts_is_read_at_load(loaded: FastVLM, vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Qwen2Model.__call__
    monkeypatch.setattr(
        Qwen2Model,
        "__call__",
        lambda self, x, *rest, **named: read.append(x.shape[1]) or original(self, x, *rest, **named),
    )
    found = loaded.generate(PICTURE, "Hi", max_tokens=1)
    reused = found.timings.reused_tokens
    assert reused > 10
    assert read == [found.prompt_tokens - reused]
    assert vlm.generate(PICTURE, "Hi", max_tokens=1).timings.reused_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("image", [None, PICTURE, [PICTURE, OTHER]], ids=["none", "one", "two"])
@pytest.mark.parametrize("options", [VARIED, {"max_tokens": 6, "system": "Be brief."}], ids=["seeded", "system"])
def test_ids_do_not_depend_on_what_was_read_before(loaded: FastVLM, vlm: FastVLM, image: object, options: dict) -> None:
    expected = vlm.generate(image, "What is it?", **options).token_ids
    for _ in range(2):
        loaded.generate(OTHER, "Something else.", max_tokens=2, system="Be long.")
        assert loaded.generate(image, "What is it?", **options).token_ids == expected


def test_stages_add_up_with_and_without_a_known_beginning(loaded: FastVLM) -> None:
    for system in (None, "Be brief."):
        timings = loaded.generate(PICTURE, "Hi", max_tokens=2, system=system).timings
        assert timings.ttft_ms == sum(getattr(timings, stage) for stage in TTFT_STAGES)
        assert timings.as_dict()["reused_tokens"] == timings.reused_tokens


def test_load_time_holds_the_reading(write_folder: Write, open_vlm: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder()
    encoder = open_vlm(path).engine.encoder
    monkeypatch.setattr(runtime, "open_encoder", lambda *args: encoder)
    now = [0.0]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])
    original = engine_module.Engine.warm_up

    def slow(self: engine_module.Engine) -> None:
        now[0] += 7.0
        original(self)

    monkeypatch.setattr(engine_module.Engine, "warm_up", slow)
    assert fastvlm.load(path).load_ms == 7000


def test_template_that_refuses_a_plain_question_still_loads(
    write_folder: Write, open_vlm: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_folder(manifest=None)
    (path / "chat_template.jinja").write_text(
        "{% if messages|length < 2 %}{{ raise_exception('x') }}{% endif %}"
        "{{ messages[0].content }}{{ messages[1].content }}"
    )
    encoder = open_vlm(path).engine.encoder
    monkeypatch.setattr(runtime, "open_encoder", lambda *args: encoder)
    assert fastvlm.load(path).generate(None, "Hi", system="S", max_tokens=1).timings.reused_tokens == 0


def test_logits_are_computed_for_the_last_position_alone(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    original = engine_module.prefill
    monkeypatch.setattr(engine_module, "prefill", lambda *args: [x := original(*args), shapes.append(x.shape)][0])
    head = type(vlm.engine.language.language_model.model.embed_tokens)
    as_linear = head.as_linear
    monkeypatch.setattr(head, "as_linear", lambda self, x: shapes.append(x.shape) or as_linear(self, x))
    vlm.generate(PICTURE, "Describe it.", max_tokens=1)
    assert shapes == [(1, 1, 128), (1, 1024)]


class SlowEncoder:
    """Works in another process, so to speak: features come only after the text before the image has been read."""

    def __init__(self, encoder: VisionEncoder, reading: threading.Event) -> None:
        self._encoder, self._reading = encoder, reading
        self.name, self.projected, self.compile_ms = encoder.name, encoder.projected, 0.0
        self.image_size = encoder.image_size

    def room(self) -> int:
        return 3

    def submit(self, pixel_values: np.ndarray) -> SlowEncoder:
        self._pixel_values, self.done = pixel_values, False
        return self

    def result(self) -> np.ndarray:
        assert self._reading.is_set(), "the text before the image is not read meanwhile"
        return self._encoder.encode(self._pixel_values)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.submit(pixel_values).result()

    def wait_ready(self) -> None: ...
    def close(self) -> None: ...


def test_text_is_read_while_an_image_is_encoded(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vlm.generate(PICTURE, "Hi", system="S", **VARIED).token_ids
    reading, extend = threading.Event(), Qwen2.extend
    encoder = SlowEncoder(vlm.engine.encoder, reading)
    slow = FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0)
    monkeypatch.setattr(Qwen2, "extend", lambda *args: reading.set() or extend(*args))
    found = slow.generate(PICTURE, "Hi", system="S", **VARIED)
    assert found.token_ids == expected
    assert found.timings.ttft_ms == sum(getattr(found.timings, stage) for stage in TTFT_STAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [VARIED, {"max_tokens": 8, "repetition_penalty": 1.4, **VARIED}], ids=["plain", "penalty"]
)
def test_threads_get_the_ids_that_each_gets_alone(loaded: FastVLM, options: dict) -> None:
    images, prompts = [PICTURE, OTHER, None], ["One?", "What is it, then?", "Why?"]
    alone = [loaded.generate(image, prompt, **options).token_ids for image, prompt in zip(images, prompts, strict=True)]
    found: dict[int, list] = {n: [] for n in range(3)}

    def ask(n: int) -> None:
        for _ in range(3):
            found[n].append(loaded.generate(images[n], prompts[n], **options).token_ids)

    threads = [threading.Thread(target=ask, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert found == {n: [alone[n]] * 3 for n in found}


@pytest.mark.slow
def test_closed_stream_frees_what_it_held(vlm: FastVLM) -> None:
    def caches() -> int:
        gc.collect()
        return sum(type(thing) is KVCache for thing in gc.get_objects())

    vlm.generate(PICTURE, "Hi", max_tokens=2)
    before = caches()
    stream = vlm.stream(PICTURE, "Hi", max_tokens=20, ignore_eos=True)
    next(stream)
    assert caches() > before
    stream.close()
    assert caches() == before


def test_one_answer_may_be_read_by_several_threads_in_turn(loaded: FastVLM) -> None:
    options = {"repetition_penalty": 1.3, **VARIED}
    expected = loaded.generate(PICTURE, "Hi", **options)
    stream, pieces = loaded.stream(PICTURE, "Hi", **options), []

    def read_one() -> None:
        pieces.append(next(stream, None))

    while not pieces or pieces[-1] is not None:
        thread = threading.Thread(target=read_one)
        thread.start()
        thread.join(300)
        assert pieces, "reading failed"
    assert "".join(pieces[:-1]) == expected.text
    assert stream.generation.token_ids == expected.token_ids


def test_cells_are_found_again_and_split() -> None:
    one, other = ImageItem(PICTURE), ImageItem(OTHER)
    assert list(segments([1, 2, one, 3, one, other])) == [[1, 2], one, [3], one, other]
    assert list(segments([])) == []
    assert shared_count([1, 2, one, 3], [1, 2, ImageItem(PICTURE.copy()), 4]) == 3
    assert shared_count([1, one], [1, other]) == 1
    assert shared_count([], [1]) == 0
    assert text_prefix([5, 6, one, 7]) == [5, 6]
    assert text_prefix([5, 6]) == text_prefix([one, 5]) == []


def test_prefix_is_computed_alone_where_no_user_wrote_it() -> None:
    one, rest = ImageItem(PICTURE), [7, 8]
    asked = [Message("system", "S"), Message("user", "What?", 1), Message("user", "a <image>", 1)]
    assert reusable_prefix(asked, [1, 2, one, *rest]) == [1, 2]
    assert reusable_prefix([Message("user", "<image> What?", 1)], [1, 2, one, *rest]) == [1, 2]
    assert reusable_prefix([Message("user", "See <image> What?", 1)], [1, 2, one, *rest]) == []
    assert reusable_prefix([Message("user", "What?", 0), Message("user", "What?", 1)], [1, 2, one]) == []
    assert reusable_prefix([Message("user", "What?", 1)], [1] * (MAX_PREFIX_TOKENS + 1) + [one]) == []
    assert reusable_prefix([Message("system", "S")], [1, 2]) == []


def test_memory_leaves_out_what_the_cache_does_not_hold(vlm: FastVLM) -> None:
    decoder = vlm.engine.language.language_model
    cache = decoder.make_cache()
    decoder.extend(mx.zeros((1, 18, 128)), cache)
    picture = ImageItem(PICTURE)
    memory = CachedPrompt([picture, 1, 2, 3], cache)  # 3 was handed out, and nothing has followed it
    assert memory.take([picture, 1, 2, 3, 4], 16) == (3, cache)
    assert cache[0].offset == 18
    assert (memory.items, memory.cache) == ([], [])
    memory.put([picture, 1, 2, 3], cache)
    assert memory.take([picture, 1], 16)[0] == 1  # the last cell is read again, for its logits
    assert cache[0].offset == 16
    assert CachedPrompt().take([1, 2], 16) == (0, [])


def held(length: int, value: float = 1.0) -> list[KVCache]:
    """The cache of one layer with `length` positions of eight bytes."""
    cache = KVCache(length)
    cache.update(mx.full((1, 1, length, 1), value), mx.full((1, 1, length, 1), value))
    return [cache]


def test_longest_prefix_is_found_by_ids_and_images() -> None:
    cache, one, other = PrefixCache(10**6, tokens_per_image=4), plain(1), plain(2)
    cache.add([1, 2, one, 3], held(7))
    cache.add([1, 2, other, 3, 4], held(8))
    for items, reused, positions in [
        ([1, 2, plain(1), 3, 5], 4, 7),
        ([1, 2, plain(1), 5, 6], 3, 6),
        ([1, 2, plain(1)], 2, 2),  # never the last item
        ([1, 2, plain(3), 3], 2, 2),
        ([1, 2, plain(2), 3, 4, 5], 5, 8),
        ([2, one], 0, 0),
    ]:
        assert cache.count(items) == reused
        found, layers = cache.longest(items)
        assert (found, [layer.offset for layer in layers]) == (reused, [positions] * bool(reused))


def test_forks_do_not_change_a_cached_prefix() -> None:
    cache = PrefixCache(10**6, tokens_per_image=4)
    cache.add([1, 2, 3], held(3))
    for _ in range(2):
        reused, (layer,) = cache.longest([1, 2, 9, 9])
        keys, _ = layer.update(mx.zeros((1, 1, 2, 1)), mx.zeros((1, 1, 2, 1)))
        assert (reused, keys.flatten().tolist()) == (2, [1, 1, 0, 0])


@given(
    keys=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12),
    asked=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    limit=st.sampled_from([0, 40, 100, 10**6]),
)
def test_bytes_are_bounded_and_no_entry_is_a_prefix(keys: list[list[int]], asked: list[int], limit: int) -> None:
    cache = PrefixCache(limit, tokens_per_image=4)
    for key in keys:
        cache.add(key, held(len(key)))
        assert cache.nbytes <= limit
    entries = [entry.key for entry in cache._entries]
    assert not any(one != other and other[: len(one)] == one for one in entries for other in entries)
    assert len(set(entries)) == len(entries)
    best = max((min(shared_count(key, asked), len(asked) - 1) for key in entries), default=0)
    assert cache.count(asked) == best
    if limit == 10**6:
        assert best == max((min(shared_count(key, asked), len(asked) - 1) for key in keys), default=0)


def test_least_recently_used_prefix_goes_first_and_the_pinned_one_stays() -> None:
    cache = PrefixCache(60, tokens_per_image=4)
    cache.add([9, 9], held(2), pinned=True)
    for first in (1, 2, 3):
        cache.add([first, 0], held(2))
    cache.longest([1, 0, 5])
    cache.add([4, 0], held(2))
    assert [cache.count([first, 0, 5]) for first in (1, 2, 3, 4, 9)] == [2, 0, 2, 2, 1]
    cache.add([5] * 100, held(100))
    assert cache.count([1, 0, 5]) == 2, "an entry that cannot fit displaces nothing"
    cache.clear()
    assert (cache.nbytes, cache.count([1, 0, 5]), cache.count([9, 9, 9])) == (0, 0, 2)


@pytest.mark.parametrize("cache_bytes", [-1, 1.5, True, "1"])
def test_usage_error_when_cache_bytes_is_out_of_range(cache_bytes: object) -> None:
    with pytest.raises(UsageError, match="cache_bytes must be"):
        check_cache_bytes(cache_bytes)  # type: ignore[arg-type]


def test_default_bytes_are_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in [(0, MIN_CACHE_BYTES), (8 * 2**30, 2**29), (2**40, MAX_CACHE_BYTES)]:
        monkeypatch.setattr(prompt_cache, "available_memory_bytes", lambda available=available: available)
        assert default_cache_bytes() == expected


def test_earlier_answer_is_the_prefix_of_a_later_prompt(vlm: FastVLM) -> None:
    first = vlm.generate(PICTURE, "What is it?", **VARIED)
    again = vlm.generate(PICTURE, "What is it?", **VARIED)
    other = vlm.generate(PICTURE, "Why?", **VARIED)
    assert again.token_ids == first.token_ids
    assert (first.timings.reused_tokens, again.timings.reused_tokens) == (0, first.prompt_tokens - 1)
    assert other.timings.reused_tokens > vlm.config.tokens_per_image
    vlm.engine.clear_caches()
    assert vlm.generate(PICTURE, "Why?", **VARIED).token_ids == other.token_ids


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_kept_cache_ends_where_the_answer_does(vlm: FastVLM, computing_on: Callable, device: str) -> None:
    """On a GPU a step is launched ahead, so that the cache holds more than the answer."""
    computing_on(device)
    text = vlm.generate(None, "What is it?", **VARIED).text
    vlm.engine.clear_caches()
    stopped = vlm.generate(None, "What is it?", stop=text[1:3], **VARIED)
    assert len(stopped.token_ids) < 8
    (entry,) = vlm.engine.prefix_cache._entries
    assert {layer.offset for layer in entry.cache} == {len(entry.key)}
    assert {layer.buffers[0].shape[2] for layer in entry.cache} == {len(entry.key)}


def test_no_bytes_for_caches_keep_nothing(vlm: FastVLM) -> None:
    plain = FastVLM(vlm.folder, vlm.engine.encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0, cache_bytes=0)
    timings = [plain.generate(PICTURE, "Hi", system="S", max_tokens=2).timings for _ in range(2)]
    assert [(one.reused_tokens, one.cached_images) for one in timings] == [(0, 0)] * 2


PICTURES = [np.full((90, 120, 3), value, np.uint8) for value in (0, 60, 120, 180, 240)]
ASKED = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}


def plain(value: int) -> ImageItem:
    return ImageItem(np.full((3, 8, 8), value, np.uint8))


def test_last_features_are_kept_and_the_oldest_used_go_first() -> None:
    cache = FeatureCache(max_bytes=2 * 16)
    features = [np.full((1, 1, 4), value, np.float32) for value in range(3)]
    for value in (0, 1):
        cache.put(plain(value), features[value])
    assert cache.get(plain(0)) is features[0]
    cache.put(plain(2), features[2])
    assert cache.get(plain(1)) is None
    assert cache.get(plain(0)) is features[0]
    assert cache.get(plain(2)) is features[2]
    assert (cache.hits, cache.nbytes) == (3, 32)
    cache.put(plain(3), np.zeros((1, 1, 9), np.float32))
    assert cache.nbytes == 0, "features that do not fit are not kept"
    cache.clear()
    assert cache.get(plain(2)) is None


def test_pixels_that_are_written_to_later_are_no_other_images() -> None:
    cache, square = FeatureCache(1000), plain(1).pixels
    cache.put(ImageItem(square), np.zeros((1, 1, 4), np.float32))
    square[:] = 2
    assert cache.get(ImageItem(square)) is None
    assert cache.get(plain(1)) is not None


def test_second_question_about_an_image_does_not_encode_it_again(vlm: FastVLM) -> None:
    first = vlm.generate(PICTURES[1], "What is it?", max_tokens=1)
    second = vlm.generate(Image.fromarray(PICTURES[1]), "Why?", max_tokens=1)  # the same picture in another form
    assert len(vlm.engine.encoder.calls) == 1
    assert (first.timings.cached_images, second.timings.cached_images) == (0, 1)
    assert vlm.generate(PICTURES[1], "Why?", max_tokens=1, fit="crop").timings.cached_images == 0


@pytest.mark.slow
@pytest.mark.parametrize(("order", "encoded"), [([0, 1, 0, 1], 2), ([0, 1, 2, 3, 4, 0], 5), ([2, 2, 2], 1)])
def test_answers_are_the_same_with_and_without_the_caches(vlm: FastVLM, order: list[int], encoded: int) -> None:
    def ask(forget: bool) -> list[tuple[int, ...]]:
        ids = []
        for index in order:
            if forget:
                vlm.engine.clear_caches()
            ids.append(vlm.generate(PICTURES[index], "What is it?", **ASKED).token_ids)
        return ids

    without, calls = ask(forget=True), len(vlm.engine.encoder.calls)
    assert calls == len(order)
    assert (len(set(without)) > 1) == (len(set(order)) > 1), "the answers should show which image was seen"
    vlm.engine.clear_caches()
    assert ask(forget=False) == without
    assert len(vlm.engine.encoder.calls) == calls + encoded


def test_several_images_in_one_request_are_remembered_each(vlm: FastVLM) -> None:
    vlm.generate(PICTURES[:2], "Compare.", max_tokens=1)
    found = vlm.generate([PICTURES[1], PICTURES[2], PICTURES[0]], "Compare.", max_tokens=1)
    assert found.timings.cached_images == 2
    assert len(vlm.engine.encoder.calls) == 3
