"""The fixed beginning of prompts is read once, at load; and several threads may ask."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvlm
from fastvlm.models._mlx import mx
from fastvlm.models.kv_cache import KVCache
from fastvlm.models.qwen2 import Qwen2, Qwen2Model
from fastvlm.runtime import engine as engine_module
from fastvlm.runtime import fastvlm as runtime
from fastvlm.runtime.encoders import VisionEncoder
from fastvlm.runtime.engine import reusable_prefix
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.prompt import Message
from fastvlm.runtime.prompt_cache import (
    MAX_PREFIX_TOKENS,
    CachedPrompt,
    FeatureCache,
    ImageItem,
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

    room = 3

    def __init__(self, encoder: VisionEncoder, reading: threading.Event) -> None:
        self._encoder, self._reading = encoder, reading
        self.name, self.projected, self.compile_ms = encoder.name, encoder.projected, 0.0
        self.image_size = encoder.image_size

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
