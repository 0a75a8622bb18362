"""Answers on their way to clients that are slow, silent or gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from fastvlm.models.errors import PromptError
from fastvlm.runtime.batch import Piece
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.request import prepare
from fastvlm.runtime.scheduler import Scheduler
from fastvlm.runtime.server import exchange as exchange_module
from fastvlm.runtime.server.errors import ApiError
from fastvlm.runtime.server.exchange import AnswerResponse, ClientGone, Exchange


@pytest.fixture(scope="module")
def scheduler(model: FastVLM) -> Iterator[Scheduler]:
    with Scheduler(model.engine) as scheduler:
        yield scheduler


def ask(scheduler: Scheduler, max_tokens: int = 8, streams: bool = True, timeout_s: float = 30.0) -> Exchange:
    exchange = Exchange(timeout_s=timeout_s)
    exchange.submit(scheduler, prepare(None, "What?", max_tokens=max_tokens, ignore_eos=True), streams=streams)
    return exchange


class Client:
    """A client of an ASGI application, which takes `reads` messages and then no more."""

    def __init__(self, reads: int = 10**9, leaves: bool = False) -> None:
        self.taken: list[dict[str, Any]] = []
        self.aborted = False
        self._reads = reads
        self._leaves = leaves

    async def send(self, message: dict[str, Any]) -> None:
        if len(self.taken) == self._reads:
            await asyncio.Event().wait()
        self.taken.append(message)

    async def receive(self) -> dict[str, Any]:
        if not self._leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    def abort(self) -> None:
        self.aborted = True

    async def take(self, exchange: Exchange, streams: bool = True) -> float:
        """Returns the seconds until the response is over."""
        start = time.monotonic()
        finished: list[bool] = []
        response = AnswerResponse(
            exchange,
            lambda generation: generation.text.encode(),
            (lambda part: [b"-" if part is None else b"." if isinstance(part, Piece) else b"end"]) if streams else None,
            lambda: finished.append(True),
        )
        await response({"type": "http", "state": {"abort": self.abort}}, self.receive, self.send)
        assert finished == [True]
        return time.monotonic() - start

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.taken)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


def idle(scheduler: Scheduler) -> Callable[[], Awaitable[None]]:
    async def wait() -> None:
        while scheduler.stats().running:
            await asyncio.sleep(0.01)

    return wait


def test_pieces_add_up_to_the_answer(scheduler: Scheduler) -> None:
    async def work() -> None:
        exchange, text = ask(scheduler, 20), ""
        while isinstance(event := await exchange.next(10), Piece):
            text += event.text
        assert isinstance(event, Generation)
        assert event.text == text
        assert await exchange.result() == exchange.generation == event

    run(work)


def test_stream_ends_with_done(scheduler: Scheduler) -> None:
    async def work() -> None:
        client = Client()
        await client.take(ask(scheduler))
        start, *_, last = client.taken
        assert (start["status"], last["more_body"]) == (200, False)
        assert client.body.startswith(b"data: -\n\ndata: .\n\n")
        assert client.body.endswith(b"data: end\n\ndata: [DONE]\n\n")

    run(work)


@pytest.mark.parametrize("streams", [True, False])
def test_client_that_does_not_read_loses_its_answer(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    monkeypatch.setattr(exchange_module, "SEND_SECONDS", 0.2)

    async def work() -> None:
        client = Client(reads=2 if streams else 0)
        assert await client.take(ask(scheduler, 1500 if streams else 2, streams), streams) < 5
        assert client.aborted
        await idle(scheduler)()

    run(work)


def test_pieces_that_wait_for_a_client_are_bounded(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "MAX_WAITING_PIECES", 5)

    async def work() -> None:
        exchange = ask(scheduler, 1500)
        await idle(scheduler)()
        while exchange.generation is None and len(exchange._pieces) <= 5:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        with pytest.raises(ClientGone):
            await exchange.next(1)
        await idle(scheduler)()
        assert len(exchange._pieces) < 100

    run(work)


def test_client_that_leaves_ends_its_answer(scheduler: Scheduler) -> None:
    async def work() -> None:
        for streams in (True, False):
            client = Client(leaves=True)
            assert await client.take(ask(scheduler, 1500, streams), streams) < 10
            assert client.taken == []
            await idle(scheduler)()

    run(work)


def test_stopped_answer_ends_with_an_event(scheduler: Scheduler) -> None:
    async def work() -> None:
        exchange, client = ask(scheduler, 1500), Client()
        response = asyncio.create_task(client.take(exchange))
        while not client.taken:
            await asyncio.sleep(0.01)
        exchange.stop(ApiError(503, "the server is stopping", code="stopping"))
        await response
        last = client.body.rstrip().rpartition(b"\n\n")[2]
        assert b'"code":"stopping"' in last
        assert b"[DONE]" not in client.body

    run(work)


@pytest.mark.parametrize(("seconds", "waits"), [(30.0, True), (0.0, False)])
def test_first_text_is_sent_before_the_next_step(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, seconds: float, waits: bool
) -> None:
    monkeypatch.setattr(exchange_module, "FIRST_TEXT_SECONDS", seconds)
    steps_meanwhile: list[int] = []

    class SlowLoop(Client):
        async def send(self, message: dict[str, Any]) -> None:
            if b"data: ." in message.get("body", b"") and not steps_meanwhile:
                before = scheduler.stats().generated_tokens
                await asyncio.sleep(0.1)  # steps of `tiny` take some milliseconds
                steps_meanwhile.append(scheduler.stats().generated_tokens - before)
            await super().send(message)

    async def work() -> None:
        await SlowLoop().take(ask(scheduler, 60))
        assert (steps_meanwhile[0] == 0) == waits

    run(work)


def test_error_before_the_first_token_has_its_status(scheduler: Scheduler) -> None:
    async def work() -> None:
        client = Client()
        exchange = Exchange(timeout_s=30)
        exchange.submit(scheduler, prepare(None, "x " * 3000), streams=True)
        with pytest.raises(ApiError) as raised:
            await client.take(exchange)
        assert raised.value.status == 400
        assert client.taken == []

    run(work)


def test_silence_is_filled_with_comments(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "STATUS_SECONDS", 0.0)
    monkeypatch.setattr(exchange_module, "KEEP_ALIVE_SECONDS", 0.001)

    async def work() -> None:
        client = Client()
        await client.take(ask(scheduler))
        assert b": keep-alive\n\n" in client.body
        assert client.body.endswith(b"data: [DONE]\n\n")

    run(work)


def test_answer_over_its_time_frees_its_place(scheduler: Scheduler) -> None:
    async def work() -> None:
        exchange = ask(scheduler, 1500, timeout_s=0.05)
        with pytest.raises(ApiError, match="more than 0.05 s"):
            await exchange.result()
        await idle(scheduler)()

    run(work)


def test_answer_that_was_stopped_before_its_start_is_cancelled(scheduler: Scheduler) -> None:
    async def work() -> None:
        exchange = Exchange(timeout_s=30)
        exchange.stop(ClientGone())
        cancelled = scheduler.stats().cancelled
        exchange.submit(scheduler, prepare(None, "What?", max_tokens=1500, ignore_eos=True), streams=True)
        while scheduler.stats().cancelled == cancelled:
            await asyncio.sleep(0.01)
        assert exchange.generation is None

    run(work)


def test_preprocessing_is_part_of_the_time_to_first_token(scheduler: Scheduler) -> None:
    async def work() -> None:
        exchange = Exchange(timeout_s=30)
        exchange.submit(scheduler, prepare(None, "What?", max_tokens=1), streams=False, preprocess_ms=1e6)
        timings = (await exchange.result()).timings
        assert timings.preprocess_ms > 1e6
        assert timings.ttft_ms > 1e6

    run(work)


def test_errors_of_the_engine_reach_the_client(scheduler: Scheduler) -> None:
    async def work() -> None:
        exchange = Exchange(timeout_s=30)
        exchange.submit(scheduler, prepare(None, "x " * 3000), streams=False)
        for _ in range(2):  # as often as it is asked
            with pytest.raises(ApiError, match="the context has") as raised:
                await exchange.result()
        assert isinstance(raised.value.__cause__ or PromptError(), PromptError)

    run(work)
