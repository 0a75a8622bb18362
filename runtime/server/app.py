"""The routes of the server, and what happens to a request on its way: admit, read, translate, submit, answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

import pydantic
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..._version import __version__
from ...models.errors import FastVLMError
from ...models.images import Fit
from ..fastvlm import FastVLM
from ..scheduler import Scheduler
from . import openapi
from .errors import ApiError, from_library, from_validation
from .exchange import AnswerResponse, Exchange
from .images import ImageReader
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, Health, ModelCard, ModelList, Options
from .security import Gate
from .settings import Settings
from .translate import Reply, Translated, chat_request, completion_request

log = logging.getLogger("fastvlm.server")

BODY_SECONDS = 60.0
"""The time that a client has to send its body: 32 MiB at 5 Mbit/s."""

MAX_BODIES = 8
"""Bodies of the largest size that may be in memory at once. Others are refused until they have been read."""

PAGE = Path(__file__).with_name("page")
"""The files of the page at `/`."""

CLIENT_GONE = 499
"""The status in the log and the metrics of a client that left before its response."""

Body = TypeVar("Body", bound=Options)


class Service:
    """One model, the scheduler that shares it among clients, and what the routes do.

    Attributes:
        stopping: True once no more requests are taken.
        in_flight: requests that are read, wait or run.
        body_bytes: bytes of the bodies that are in memory.
    """

    def __init__(self, model: FastVLM, scheduler: Scheduler, settings: Settings) -> None:
        self.model = model
        self.scheduler = scheduler
        self.settings = settings
        self.name = settings.name or model.folder.path.resolve().name
        self.metrics = Metrics(scheduler.stats)
        self.stopping = False
        self._images = ImageReader(settings, model.engine.encoder.image_size)
        self._created = int(time.time())
        # A thread for each request, because some wait for a host with an image. `ImageReader` bounds the work.
        self._readers = ThreadPoolExecutor(settings.max_in_flight, "fastvlm-reader")
        self._exchanges: set[Exchange] = set()
        self.in_flight = 0
        self.body_bytes = 0

    def app(self) -> ASGIApp:
        """Returns the application."""
        handlers = {ApiError: _refuse, HTTPException: _refuse_status, Exception: _report}
        inner = Starlette(routes=self.routes(), exception_handlers=handlers)  # type: ignore[arg-type]
        return _Log(Gate(inner, self.settings), self.metrics)

    def routes(self) -> list[BaseRoute]:
        """Returns the routes."""
        routes: list[BaseRoute] = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.one_model),
            Route("/health", self.health),
            Route("/metrics", self.metrics_text),
            Route("/openapi.json", self.openapi),
        ]
        if PAGE.is_dir():
            routes += [Route("/", self.page), Mount("/page", StaticFiles(directory=PAGE))]
        return routes

    def stop_answers(self) -> None:
        """Ends all answers that still run, each with an error that its client sees."""
        for exchange in tuple(self._exchanges):
            exchange.stop(_stopping())

    def close(self) -> None:
        """Ends the reading threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: Request) -> AnswerResponse:
        """Answers a conversation."""
        fit = cast("Fit", self.model.config.image_aspect_ratio)

        def translate(body: ChatRequest) -> Translated:
            return chat_request(body, self.settings, self._images, fit, self.model.config.max_context)

        return await self._answer(request, ChatRequest, translate)

    async def complete(self, request: Request) -> AnswerResponse:
        """Continues a text."""
        rows = self.model.engine.language.vocabulary_rows

        def translate(body: CompletionRequest) -> Translated:
            return completion_request(body, self.settings, rows, self.model.config.max_context)

        return await self._answer(request, CompletionRequest, translate)

    async def models(self, request: Request) -> Response:
        """Lists the served model."""
        return _json(ModelList(data=[self._card()]))

    async def one_model(self, request: Request) -> Response:
        """Describes the served model."""
        self._check_model(request.path_params["model"])
        return _json(self._card())

    async def health(self, request: Request) -> Response:
        """Reports the state of the server."""
        if self.stopping:
            raise _stopping()
        stats = self.scheduler.stats()
        return _json(Health(model=self.name, version=__version__, running=stats.running, queued=stats.queued))

    async def metrics_text(self, request: Request) -> Response:
        """Reports metrics for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """Returns the OpenAPI document."""
        content = json.dumps(openapi.document(self.settings.api_key is not None))
        return Response(content, media_type="application/json")

    async def page(self, request: Request) -> Response:
        """Returns the page at `/`."""
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html")

    async def _answer(
        self, request: Request, kind: type[Body], translate: Callable[[Body], Translated]
    ) -> AnswerResponse:
        """Returns the response to a request for an answer, which is submitted by then.

        Raises:
            ApiError: the request is refused.
        """
        self._admit()
        exchange = Exchange(timeout_s=self.settings.timeout_s)
        content = bytearray()
        try:
            await self._read(request, content)
            body = await asyncio.get_running_loop().run_in_executor(
                self._readers, self._submit, bytes(content), kind, translate, exchange
            )
        except BaseException as error:
            exchange.stop(error if isinstance(error, Exception) else _stopping())
            self.in_flight -= 1
            if isinstance(error, FastVLMError):
                raise from_library(error) from error
            raise
        finally:
            self.body_bytes -= len(content)
        self._exchanges.add(exchange)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        token_bytes = self.model.engine.tokenizer.token_bytes
        reply = Reply(self.name, isinstance(body, ChatRequest), include_usage, token_bytes, lambda: exchange.queue_ms)
        return AnswerResponse(
            exchange, reply.whole, reply.events if body.stream else None, lambda: self._finished(exchange)
        )

    def _admit(self) -> None:
        """Counts a request before its body is read. Raises ApiError if there are too many."""
        if self.stopping:
            raise _stopping()
        if self.in_flight >= self.settings.max_in_flight:
            raise ApiError(429, f"{self.in_flight} requests run or wait. Try again later.", code="queue_full")
        self.in_flight += 1

    def _finished(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)
        self.in_flight -= 1
        generation = exchange.generation
        if generation is not None:
            self.metrics.answer(generation, exchange.queue_ms)

    async def _read(self, request: Request, content: bytearray) -> None:
        """Appends the body of a request to `content`, and counts it. Raises ApiError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the Content-Type must be application/json. Set it.", code="unsupported_media_type")
        limit = self.settings.max_body_bytes
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    content += chunk
                    self.body_bytes += len(chunk)
                    if len(content) > limit:
                        raise _too_large(limit)
                    if self.body_bytes > MAX_BODIES * limit:
                        raise ApiError(429, "too many large requests at once. Try again later.", code="queue_full")
        except TimeoutError:
            raise ApiError(408, f"the body must come within {BODY_SECONDS:g} s", code="timeout") from None

    def _submit(
        self, content: bytes, kind: type[Body], translate: Callable[[Body], Translated], exchange: Exchange
    ) -> Body:
        """Validates a body and submits its request, on a reading thread. Returns the body."""
        try:
            body = kind.model_validate_json(content)
        except pydantic.ValidationError as error:
            try:
                document = json.loads(content)
            except (ValueError, RecursionError):
                document = None
            raise from_validation(error, document) from None
        if body.model is not None:
            self._check_model(body.model)
        made = translate(body)
        exchange.submit(self.scheduler, made.request, streams=bool(body.stream), preprocess_ms=made.preprocess_ms)
        return body

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"model must be {self.name!r}, the one that is served (got {name!r:.60})",
                param="model",
                code="model_not_found",
            )

    def _card(self) -> ModelCard:
        config = self.model.config
        return ModelCard(
            id=self.name,
            created=self._created,
            context_length=config.max_context,
            image_tokens=config.tokens_per_image,
            image_size=self.model.engine.encoder.image_size,
        )


class _Log:
    """Middleware that logs each request and counts it, and the last stop of errors that nobody expected."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            pass  # while its body was read
        except Exception:
            log.exception("a request failed")
        route = scope.get("route")
        path = route.path if isinstance(route, Route) else "other"
        self._metrics.request(path, status)
        log.info("%s %s %d %.0f ms", scope["method"], path, status, 1000 * (time.perf_counter() - start))


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body must have at most {limit:,} bytes. Scale the images down.", code="body_too_large")


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping. Try again later.", code="stopping")


async def _refuse(request: Request, error: ApiError) -> Response:
    return error.response()


async def _refuse_status(request: Request, error: HTTPException) -> Response:
    """Returns the error for a path or a method that does not exist."""
    reason = {404: "there is nothing at this path", 405: "this path does not take this method"}.get(
        error.status_code, error.detail
    )
    return ApiError(
        error.status_code,
        f"{reason}. See /openapi.json.",
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
        headers=error.headers,
    ).response()


async def _report(request: Request, error: Exception) -> Response:
    """Returns the error of a fault in the server. `_Log` logs it."""
    return ApiError(500, "the server failed. Its log has the reason.", code="internal_error").response()
