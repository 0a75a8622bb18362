"""Many clients at once: every answer is what it would be alone, and an end of one is not an end of another."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm.models._mlx import mx
from fastvlm.models.errors import (
    CancelledError,
    CrashError,
    FastVLMError,
    MachineError,
    PromptError,
    QueueFullError,
    UnavailableError,
    UsageError,
)
from fastvlm.models.qwen2 import Qwen2Model
from fastvlm.runtime.batch import BatchDecoder, Piece, Row
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.prompt import Message
from fastvlm.runtime.request import Request, prepare
from fastvlm.runtime.scheduler import PREFILL_POSITIONS, Answer, Scheduler

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
OTHER = 255 - PICTURE
SECONDS = 60
"""The limit of every wait. A test that reaches it fails."""

Make = Callable[..., Scheduler]


@pytest.fixture
def make(vlm: FastVLM) -> Iterator[Make]:
    """Makes schedulers of the model `vlm`, which are closed after the test."""
    made: list[Scheduler] = []

    def scheduler(**options: Any) -> Scheduler:
        made.append(Scheduler(vlm.engine, **options))
        return made[-1]

    yield scheduler
    for one in made:
        one.close()


@pytest.fixture
def alone(vlm: FastVLM) -> Callable[[Request], Generation]:
    """Returns the answer to a request without a batch and without caches."""
    engine, language = vlm.engine, vlm.engine.language
    plain = FastVLM(vlm.folder, engine.encoder, language, engine.tokenizer, 0.0, cache_bytes=0)
    return lambda request: plain.engine.stream(request).read()


class Heard:
    """A listener that records its events, and may cancel the answer after some pieces."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.events: list[Any] = []
        self.answer: Answer | None = None
        self._cancel_after = cancel_after
        self._ready = threading.Event()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if self._cancel_after is not None and len(self.events) == self._cancel_after:
            self._ready.wait(SECONDS)
            assert self.answer is not None
            self.answer.cancel()

    def listen_to(self, answer: Answer) -> None:
        self.answer = answer
        self._ready.set()


def ask(prompt: str = "Hi", image: Any = None, **options: Any) -> Request:
    return prepare(image, prompt, **{"max_tokens": 6, "ignore_eos": True, **options})


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


questions = st.builds(
    lambda image, prompt, length, seed: ask(prompt, image, max_tokens=length, temperature=float(seed > 0), seed=seed),
    st.sampled_from([None, PICTURE, OTHER, [PICTURE, OTHER]]),
    st.text("abc ?é", max_size=200),
    st.integers(1, 12),
    st.integers(0, 3),
)
plans = st.lists(st.tuples(questions, st.sampled_from([None, None, None, 1, 2, 4])), min_size=1, max_size=10)


@pytest.mark.slow
@given(plan=plans, size=st.integers(1, 4), kept=st.sampled_from([0, 10**5, 10**9]), pause=st.booleans())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_one_by_one_in_any_schedule(
    vlm: FastVLM, alone: Callable, plan: list[tuple[Request, int | None]], size: int, kept: int, pause: bool
) -> None:
    engine = vlm.engine
    engine.clear_caches()
    engine.prefix_cache.max_bytes = kept
    with Scheduler(engine, size) as scheduler:
        heard = [Heard(cancel_after) for _, cancel_after in plan]
        for one, (request, _) in zip(heard, plan, strict=True):
            one.listen_to(scheduler.submit(request, one))
            time.sleep(0.002 * pause)
        assert scheduler.drain(SECONDS)
    assert engine.prefix_cache.nbytes <= kept
    for one, (request, cancel_after) in zip(heard, plan, strict=True):
        expected = alone(request)
        *pieces, last = one.events
        assert all(isinstance(piece, Piece) for piece in pieces)
        text, ids = "".join(piece.text for piece in pieces), sum((piece.token_ids for piece in pieces), ())
        if isinstance(last, Generation):
            assert (last.token_ids, last.text, last.finish_reason) == (
                expected.token_ids,
                expected.text,
                expected.finish_reason,
            )
            assert (text, ids) == (last.text, last.token_ids)
        else:
            assert isinstance(last, CancelledError)
            assert cancel_after == len(pieces)
            assert expected.token_ids[: len(ids)] == ids


@pytest.mark.slow
def test_each_answer_ends_at_its_own_stop_string(make: Make, alone: Callable) -> None:
    options = [{"temperature": 1.0, "seed": n, "max_tokens": 30} for n in range(6)]
    stops = [alone(ask(f"Q{n}", PICTURE, **own)).text[n : n + 2] for n, own in enumerate(options)]
    requests = [
        ask(f"Q{n}", PICTURE, stop=stop or "x", **own) for n, (own, stop) in enumerate(zip(options, stops, strict=True))
    ]
    scheduler = make(batch_size=3)
    found = [answer.result(SECONDS) for answer in [scheduler.submit(request) for request in requests]]
    assert [(one.token_ids, one.text, one.stop_reason) for one in found] == [
        (one.token_ids, one.text, one.stop_reason) for one in map(alone, requests)
    ]


@pytest.mark.slow
def test_threads_get_the_ids_that_each_gets_alone(make: Make, alone: Callable) -> None:
    requests = [ask(f"Question {n}", [PICTURE, OTHER, None][n % 3], temperature=1.0, seed=n) for n in range(16)]
    expected = [alone(request).token_ids for request in requests]
    scheduler, found = make(batch_size=5), {}

    def client(n: int) -> None:
        found[n] = [scheduler.submit(requests[n]).result(SECONDS).token_ids for _ in range(3)]

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == {n: [expected[n]] * 3 for n in range(16)}
    assert scheduler.stats().finished == 48


def test_generate_may_be_called_while_the_scheduler_runs(vlm: FastVLM, make: Make, alone: Callable) -> None:
    answers = [make().submit(ask(f"Q{n}", max_tokens=40)) for n in range(3)]
    assert vlm.generate(None, "Hi", max_tokens=6, ignore_eos=True).token_ids == alone(ask()).token_ids
    assert [len(answer.result(SECONDS).token_ids) for answer in answers] == [40] * 3


def test_queue_full_error_when_max_queue_requests_wait(vlm: FastVLM, make: Make) -> None:
    scheduler = make(batch_size=1, max_queue=2)
    with vlm.engine.lock:  # nothing is computed meanwhile
        running = scheduler.submit(ask())
        until(lambda: scheduler.stats().running == 1)
        waiting = [scheduler.submit(ask()) for _ in range(2)]
        assert scheduler.stats().queued == 2
        with pytest.raises(QueueFullError, match=r"waiting requests: 2\)"):
            scheduler.submit(ask())
        waiting[0].cancel()  # leaves the queue at once
        assert scheduler.stats().queued == 1
        waiting.append(scheduler.submit(ask()))
    with pytest.raises(CancelledError):
        waiting[0].result(SECONDS)
    ids = [answer.result(SECONDS).token_ids for answer in (running, *waiting[1:])]
    assert len(set(ids)) == 1
    assert 0 <= running.queue_ms < waiting[2].queue_ms


def test_unavailable_error_when_a_request_waited_too_long(vlm: FastVLM, make: Make) -> None:
    scheduler, heard = make(batch_size=1, queue_timeout_s=0.05), Heard()
    with vlm.engine.lock:
        running = scheduler.submit(ask())
        until(lambda: scheduler.stats().running == 1)
        waiting = scheduler.submit(ask(), heard)
        time.sleep(0.06)
    with pytest.raises(UnavailableError, match=r"waited for 0.05 s"):
        waiting.result(SECONDS)
    assert len(running.result(SECONDS).token_ids) == 6
    scheduler.close()
    assert [type(event) for event in heard.events] == [UnavailableError]
    assert scheduler.stats().failed == 1


def test_prompt_error_is_the_end_of_its_answer_alone(make: Make) -> None:
    scheduler, heard = make(), Heard()
    wrong = scheduler.submit(ask("a" * 100_000), heard)
    fine = scheduler.submit(ask())
    with pytest.raises(PromptError, match="the context has"):
        wrong.result(SECONDS)
    assert len(fine.result(SECONDS).token_ids) == 6
    scheduler.close()
    assert [type(event) for event in heard.events] == [PromptError]


def test_listener_that_raises_ends_its_answer_alone(make: Make) -> None:
    scheduler = make()

    def broken(event: object) -> None:
        raise ValueError("no place to write")

    answers = [scheduler.submit(ask(f"Q{n}", max_tokens=30), [None, broken][n % 2]) for n in range(4)]
    for answer in answers[1::2]:
        with pytest.raises(CancelledError, match="listener raised ValueError: no place to write"):
            answer.result(SECONDS)
    assert [len(answer.result(SECONDS).token_ids) for answer in answers[::2]] == [30, 30]


def test_cancelled_answer_leaves_before_the_next_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = BatchDecoder.step
    monkeypatch.setattr(BatchDecoder, "step", lambda self: sizes.append(len(self.rows)) or original(self))
    scheduler, heard = make(), Heard(cancel_after=3)
    heard.listen_to(scheduler.submit(ask(max_tokens=1000), heard))
    assert scheduler.drain(SECONDS)
    assert len(sizes) == len([event for event in heard.events if isinstance(event, Piece) for _ in event.token_ids]) - 1
    assert (scheduler.stats().running, scheduler.stats().cancelled) == (0, 1)
    heard.answer.cancel()  # again, after the end
    assert scheduler.stats().cancelled == 1


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("[malloc] Unable to allocate\nmore")])
def test_failed_step_ends_its_answers_and_no_later_ones(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    original, calls = BatchDecoder._launch, iter(range(10**6))

    def failing(self: BatchDecoder) -> bool:
        if next(calls) == 2:
            raise error
        return original(self)

    monkeypatch.setattr(BatchDecoder, "_launch", failing)
    scheduler, heard = make(), Heard()
    failed = scheduler.submit(ask(max_tokens=50), heard)
    with pytest.raises(MachineError, match=type(error).__name__) as caught:
        failed.result(SECONDS)
    assert "\n" not in str(caught.value)
    assert len(scheduler.submit(ask()).result(SECONDS).token_ids) == 6
    assert [type(event) for event in heard.events[-2:]] == [Piece, MachineError]


def test_failed_image_ends_its_answer_alone(vlm: FastVLM, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = vlm.engine.encoder.encode

    def failing(pixel_values: np.ndarray) -> np.ndarray:
        if pixel_values.mean() > 0.5:
            raise CrashError("the process that encodes images ended.")
        return encode(pixel_values)

    monkeypatch.setattr(vlm.engine.encoder, "encode", failing)
    scheduler, dark, bright = make(), np.zeros_like(PICTURE), np.full_like(PICTURE, 255)
    answers = [scheduler.submit(ask("Hi", image)) for image in (dark, bright, None, dark)]
    with pytest.raises(CrashError, match="ended"):
        answers[1].result(SECONDS)
    assert [len(answers[n].result(SECONDS).token_ids) for n in (0, 2, 3)] == [6] * 3
    assert (scheduler.stats().finished, scheduler.stats().failed) == (3, 1)


def test_drain_refuses_new_requests_and_waits_for_others(vlm: FastVLM, make: Make) -> None:
    scheduler = make(batch_size=1)
    with vlm.engine.lock:
        answers = [scheduler.submit(ask()) for _ in range(3)]
        assert not scheduler.drain(0.01)
        with pytest.raises(UnavailableError, match="closed"):
            scheduler.submit(ask())
    assert scheduler.drain(SECONDS)
    assert all(answer.done for answer in answers)
    assert [len(answer.result().token_ids) for answer in answers] == [6] * 3


def test_close_cancels_what_is_left(vlm: FastVLM, make: Make) -> None:
    scheduler, heard = make(batch_size=2), [Heard() for _ in range(5)]
    answers = [scheduler.submit(ask(max_tokens=10_000), one) for one in heard]
    until(lambda: scheduler.stats().generated_tokens > 5)
    scheduler.close()
    scheduler.close()
    for answer, one in zip(answers, heard, strict=True):
        with pytest.raises(CancelledError):
            answer.result(0)
        assert isinstance(one.events[-1], CancelledError)
        assert not any(isinstance(event, FastVLMError) for event in one.events[:-1])
    with pytest.raises(UnavailableError):
        scheduler.submit(ask())
    assert (scheduler.stats().running, scheduler.stats().queued) == (0, 0)


def test_result_raises_timeout_error_while_the_answer_continues(vlm: FastVLM, make: Make) -> None:
    with vlm.engine.lock:
        answer = make().submit(ask())
        with pytest.raises(TimeoutError):
            answer.result(0.01)
    assert len(answer.result(SECONDS).token_ids) == 6


def test_batch_has_at_most_batch_size_answers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = BatchDecoder.step
    monkeypatch.setattr(BatchDecoder, "step", lambda self: sizes.append(len(self.rows)) or original(self))
    scheduler = make(batch_size=3)
    answers = [scheduler.submit(ask(f"Q{n}", max_tokens=12)) for n in range(8)]
    assert [len(answer.result(SECONDS).token_ids) for answer in answers] == [12] * 8
    assert max(sizes) == 3
    assert len(sizes) < 8 * 11 / 2


def test_constrained_answers_run_among_others(make: Make, alone: Callable) -> None:
    choices = ["yes", "no", "perhaps"]
    requests = [ask(f"Q{n}", choice=choices[: n + 1] if n < 3 else None, max_tokens=20) for n in range(5)]
    scheduler = make(batch_size=4)
    found = [answer.result(SECONDS) for answer in [scheduler.submit(request) for request in requests]]
    assert [one.token_ids for one in found] == [alone(request).token_ids for request in requests]
    assert all(one.text in choices for one in found[:3])


def test_long_prompt_is_read_in_parts_between_steps(
    vlm: FastVLM, make: Make, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ask("why " * 400, PICTURE)
    expected = alone(long).token_ids
    read: list[int] = []
    original = Qwen2Model.__call__

    def recorded(self: Qwen2Model, x: mx.array, *rest: Any, **named: Any) -> mx.array:
        read.append(x.shape[1])
        return original(self, x, *rest, **named)

    monkeypatch.setattr(Qwen2Model, "__call__", recorded)
    scheduler = make()
    running = scheduler.submit(ask(max_tokens=10_000))
    until(lambda: scheduler.stats().generated_tokens > 2)
    assert scheduler.submit(long).result(SECONDS).token_ids == expected
    running.cancel()
    parts = [length for length in read if length > 1][1:]
    assert len(parts) > 400 // PREFILL_POSITIONS
    assert max(parts) <= PREFILL_POSITIONS
    places = [place for place, length in enumerate(read) if length > 1]
    assert all(after - before > 1 for before, after in itertools.pairwise(places)), "a step in between"


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_next_turn_of_a_chat_reads_its_own_tokens_alone(vlm: FastVLM, kv_bits: int | None) -> None:
    engine = FastVLM(vlm.folder, vlm.engine.encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0, kv_bits).engine
    first = ask("What is it?", PICTURE, temperature=1.0, seed=1)
    with Scheduler(engine, 3) as scheduler:
        others = [scheduler.submit(ask(f"Another {n}", max_tokens=3 * n)) for n in range(1, 4)]
        before = scheduler.submit(first).result(SECONDS)
        turn = Message("assistant", before.text, ids=before.token_ids)
        second = replace(first, messages=(*first.messages, turn, Message("user", "Why?")))
        after = scheduler.submit(second).result(SECONDS)
        for other in others:
            other.result(SECONDS)
    assert after.timings.reused_tokens == before.prompt_tokens + len(before.token_ids) - 1
    assert (after.timings.cached_images, len(vlm.engine.encoder.calls)) == (1, 1)
    engine.clear_caches()
    assert engine.stream(second).read().token_ids == after.token_ids


def test_second_question_about_an_image_reads_its_own_tokens_alone(vlm: FastVLM, make: Make, alone: Callable) -> None:
    requests = [ask(question, PICTURE) for question in ("What is it?", "Why is it so?")]
    expected = [alone(request).token_ids for request in requests]
    calls, scheduler = len(vlm.engine.encoder.calls), make()
    first, second = (scheduler.submit(request).result(SECONDS) for request in requests)
    assert [first.token_ids, second.token_ids] == expected
    assert len(vlm.engine.encoder.calls) == calls + 1
    assert (first.timings.reused_tokens, second.timings.cached_images) == (0, 1)
    assert second.prompt_tokens - second.timings.reused_tokens < 30
    assert scheduler.stats().cached_tokens == second.timings.reused_tokens


@pytest.mark.slow
def test_memory_stays_flat_over_many_requests(vlm: FastVLM, make: Make) -> None:
    vlm.engine.prefix_cache.max_bytes = 2 * 10**6
    scheduler, used = make(batch_size=4, max_queue=1000), []
    for turn in range(5):
        images = [np.full((30, 30, 3), 50 * turn + n, np.uint8) for n in range(10)]
        answers = [scheduler.submit(ask(f"{turn} {n}", images[n % 10], max_tokens=2 + n % 5)) for n in range(100)]
        for answer in answers[::7]:
            answer.cancel()
        for answer in answers:
            with contextlib.suppress(CancelledError):
                answer.result(SECONDS)
        until(lambda: scheduler.stats().running == 0)
        used.append((mx.get_active_memory(), sum(type(thing) is Row for thing in gc.get_objects())))
    stats = scheduler.stats()
    assert (stats.finished + stats.cancelled, stats.failed, stats.queued) == (500, 0, 0)
    assert 10**6 < vlm.engine.prefix_cache.nbytes <= 2 * 10**6
    assert max(rows for _, rows in used) <= 4
    assert max(memory for memory, _ in used[1:]) - used[0][0] < 10**6


@pytest.mark.parametrize(
    "options",
    [{"max_queue": 0}, {"max_queue": 1.5}, {"queue_timeout_s": 0}, {"queue_timeout_s": -1}, {"batch_size": 0}],
)
def test_usage_error_when_an_argument_is_out_of_range(make: Make, options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        make(**options)


@pytest.mark.slow
def test_beam_searches_and_forms_run_beside_other_answers(make: Make, alone: Callable[[Request], Generation]) -> None:
    options = [{}, {"num_beams": 3}, {"schema": {"enum": ["a red one", 12]}}, {"num_beams": 2, "length_penalty": 2.0}]
    requests = [prepare(PICTURE, "What is it?", max_tokens=8, **one) for one in options * 2]
    expected = [alone(request).token_ids for request in requests]
    scheduler = make(batch_size=3)
    assert [scheduler.submit(request).result(SECONDS).token_ids for request in requests] == expected
    together = [scheduler.submit(request) for request in requests]
    assert [answer.result(SECONDS).token_ids for answer in together] == expected
