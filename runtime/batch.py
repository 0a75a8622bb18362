"""Batched decoding: each step reads the weights once for all answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..models._mlx import mx, on_cpu
from ..models.errors import FastVLMError, UsageError
from ..models.images import ImageSource
from ..models.kv_cache import CACHE_STEP, KVCache, extracted, selected, stacked
from .engine import Engine, PrefillResult, PreparedRequest
from .generate import AnswerReader, DecodeResult, Generation, decode_one_token, default_lookahead
from .logprobs import TokenLogprob
from .prompt_cache import CachedPrompt, evaluate
from .request import Request, prepare
from .sampling import id_on_host, ids_on_host, pick

BATCH_SIZE = 8
"""Answers decoded at a time. A step of eight takes little longer than a step of one."""

MAX_DONE = 16
"""Outcomes that wait for an earlier answer, per place of the batch, before no further request is taken."""

Asked = Request | PreparedRequest

Outcome = Generation | FastVLMError


def requests_for(
    images: Sequence[ImageSource | Sequence[ImageSource] | None],
    prompts: str | Sequence[str],
    options: Mapping[str, Any],
) -> Iterator[Request]:
    """Yields a request for each image and prompt, lazily, so that few images are open at once.

    Raises:
        UsageError: (at once) the numbers of images and prompts differ.
        FastVLMError: (while iterating) see `prepare`.
    """
    texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(images):
        raise UsageError(
            f"prompts must be one string, or one per image (got {len(texts)} prompts, {len(images)} images)", "prompts"
        )
    return (prepare(image, text, **options) for image, text in zip(images, texts, strict=True))


@dataclass(frozen=True)
class Piece:
    """The next part of an answer: text, and the ids that it was decoded from."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each id, if the request asks for them."""

    def __add__(self, later: Piece) -> Piece:
        """Returns both as one."""
        return Piece(self.text + later.text, self.token_ids + later.token_ids, self.logprobs + later.logprobs)


class Row:
    """An answer being decoded.

    Attributes:
        token: the input id (1,) of its next step. It is lazy while an earlier step is in flight.
        ids: the ids read so far, with one that ends the answer.
        launched: steps that were launched and whose ids were not read yet.
        computed: ids whose keys and values are in the cache, or will be after the launched steps.
        ended: True once the answer is complete.
    """

    def __init__(self, engine: Engine, request: Request, prefilled: PrefillResult) -> None:
        self.request = request
        self.prefilled = prefilled
        self.token = prefilled.first_token
        self.ids: list[int] = []
        self.launched = 0
        self.computed = 0
        self.ended = False
        stop, searched = request.options.stop, request.options.beams.num_beams > 1
        self._reader = AnswerReader(engine.tokenizer, engine.stop_ids(request), stop, at_once=searched)

    @property
    def may_step(self) -> bool:
        """True if another step may be launched for this answer."""
        return len(self.ids) + self.launched < self.prefilled.max_new_tokens

    def push(self, token_id: int) -> Piece:
        """Appends an id, which may end the answer, and returns what is new."""
        known = self._reader.count
        text = self._reader.push(token_id)
        self.ids.append(token_id)
        self.ended = self._reader.ended or len(self.ids) >= self.prefilled.max_new_tokens
        if self.ended:
            text += self._reader.flush()
        if self._reader.count == known:
            return Piece(text, ())
        reported = self.prefilled.sampler.logprobs
        return Piece(text, (token_id,), () if reported is None else (reported.read(known),))

    @property
    def result(self) -> DecodeResult:
        """The answer so far."""
        return self._reader.result


@dataclass(frozen=True, eq=False)
class Step:
    """A step of some rows that was launched."""

    rows: list[Row]
    ids: mx.array
    """The next id of each row (B,), lazy."""


class BatchDecoder:
    """The rows of a batch, which join and leave between steps, and the cache that they share.

    As in `decode`, `lookahead` steps are launched before ids are read, so that a GPU never waits for the host. If an
    answer has ended in the meantime, its id from such a step is dropped.

    `keep_turns` keeps the cache of each answer that ends for the next turn of its chat.

    Attributes:
        rows: the answers that continue.
    """

    def __init__(self, engine: Engine, lookahead: int | None = None, keep_turns: bool = False) -> None:
        self.rows: list[Row] = []
        self._keep_turns = keep_turns
        self._engine = engine
        self._lookahead = default_lookahead() if lookahead is None else lookahead
        self._steps: deque[Step] = deque()
        self._cache: list[KVCache] = []
        self._cached: list[Row] = []
        """The rows of the cache, in its order."""

    def join(self, row: Row) -> Piece:
        """Appends the first token to an answer, which joins the next step unless it ends here."""
        piece = row.push(id_on_host(row.token))
        if not row.ended:
            self.rows.append(row)
        return piece

    def leave(self, row: Row) -> None:
        """Removes an answer before its end. The next step is without it."""
        self.rows = [other for other in self.rows if other is not row]
        if not self.rows:
            self.clear()

    def clear(self) -> None:
        """Removes all answers, also after an error inside a step."""
        self.rows, self._cached, self._cache = [], [], []
        self._steps.clear()

    def step(self) -> list[tuple[Row, Piece]]:
        """Reads one more token for every answer, after later steps were launched. Answers that end leave the batch."""
        found: list[tuple[Row, Piece]] = []
        engine = self._engine
        with engine.lock, engine.mlx_stream():
            while self._steps and not any(row in self.rows for row in self._steps[0].rows):
                self._steps.popleft()  # all its answers have ended in the meantime
            while len(self._steps) <= self._lookahead and self._launch():
                pass
            step = self._steps.popleft()
            for row, token_id in zip(step.rows, ids_on_host(step.ids), strict=True):
                row.launched -= 1
                if row in self.rows:
                    found.append((row, row.push(token_id)))
            self.rows = [row for row in self.rows if not row.ended]
            if any(row.ended for row in self._cached):
                self._gather([row for row in self._cached if not row.ended])
        if not self.rows:
            self.clear()
        return found

    def _launch(self) -> bool:
        """Launches a step of all answers that may have another token. Returns False if there are none."""
        rows = [row for row in self.rows if row.may_step]
        if not rows:
            return False
        last = self._steps[-1] if self._steps else None
        self._gather(rows)
        rows = self._cached
        unchanged = last is not None and last.rows == rows
        tokens = last.ids if last and unchanged else mx.concatenate([row.token for row in rows])  # (B,)
        logits = decode_one_token(self._engine.language.language_model, tokens, self._cache)  # (B, V)
        samplers = [row.prefilled.sampler for row in rows]
        ids = pick(samplers, logits)
        mx.async_eval(ids, *(sampler.state for sampler in samplers))
        self._steps.append(Step(rows, ids))
        for place, row in enumerate(rows):
            row.token = ids[place : place + 1]
            row.launched += 1
            row.computed += 1
        return True

    def _gather(self, rows: list[Row]) -> None:
        """Removes rows that are not in `rows` from the cache, and appends those that are new."""
        if self._keep_turns:
            self._keep([place for place, row in enumerate(self._cached) if row not in rows])
        places = [place for place, row in enumerate(self._cached) if row in rows]
        if len(places) < len(self._cached):
            self._cache = [selected(layer, places) for layer in self._cache] if places else []
        kept = [self._cached[place] for place in places]
        new = [row for row in rows if row not in kept]
        if new:
            room = min(max(row.prefilled.max_new_tokens for row in rows), CACHE_STEP)
            layers = zip(*([self._cache] if kept else []), *(row.prefilled.cache for row in new), strict=True)
            self._cache = [stacked(layer, room) for layer in layers]
        self._cached = kept + new

    def _keep(self, places: Sequence[int]) -> None:
        """Stores the prompts and answers of some rows of the cache for later prompts."""
        for row, place in ((self._cached[place], place) for place in places):
            known = row.ids[: row.computed]
            length = row.prefilled.prompt_tokens + len(known)
            cache = [extracted(layer, place, length) for layer in self._cache]
            if on_cpu():
                evaluate(cache)
            else:
                mx.async_eval([layer.buffers for layer in cache])  # the next step must not wait for it
            self._engine.prefix_cache.add([*row.prefilled.items, *known], cache)


@runtime_checkable
class Arriving(Protocol):
    """Requests that are prepared elsewhere, so that the next one may not be ready."""

    @property
    def is_ready(self) -> bool:
        """True if the next request can be taken without waiting."""


class Upcoming:
    """The next requests in order. An encoder process encodes the images of the first few ahead."""

    def __init__(self, engine: Engine, requests: Iterable[Asked | Outcome]) -> None:
        self._engine = engine
        self._source = requests if isinstance(requests, Arriving) else None
        self._waiting = enumerate(requests)
        self._more = True
        self._taken: deque[tuple[int, Asked | Outcome]] = deque()

    @property
    def is_empty(self) -> bool:
        """True if all requests were taken."""
        return not self._taken and not self._more

    @property
    def is_ready(self) -> bool:
        """True if the next request is here, and its images are encoded."""
        if not self._taken:
            return False
        request = self._taken[0][1]
        return not isinstance(request, PreparedRequest) or request.is_encoded

    def take(self) -> tuple[int, Asked | Outcome]:
        """Returns the next request and its number."""
        return self._taken.popleft()

    def fill(self, count: int, wait: bool = True) -> None:
        """Takes requests from the source until `count` are here or the source is empty.

        Without `wait` it ends at a request that is not ready.
        """
        while self._more and len(self._taken) < count and (wait or self._source is None or self._source.is_ready):
            number, request = next(self._waiting, (-1, None))
            if request is None:
                self._more = False
            else:
                self._taken.append((number, request))

    def look_ahead(self) -> None:
        """Submits the images of the next few requests to the encoder process, and returns at once."""
        self.fill(self._engine.encode_ahead_limit, wait=False)
        for place, (number, request) in enumerate(self._taken):
            if place >= self._engine.encode_ahead_limit:
                break
            if isinstance(request, Request | PreparedRequest):
                try:
                    self._taken[place] = number, self._engine.encode_ahead(request)
                except FastVLMError as reason:
                    self._taken[place] = number, reason


class Batch:
    """Continuous batching of a list of requests: the next one joins as soon as an answer ends."""

    def __init__(self, engine: Engine, size: int = BATCH_SIZE, lookahead: int | None = None) -> None:
        check_batch_size(size)
        self._engine = engine
        self._size = size
        self._decoder = BatchDecoder(engine, lookahead)
        self._numbers: dict[Row, int] = {}
        self._done: dict[int, Outcome] = {}

    def outcomes(self, requests: Iterable[Asked | Outcome]) -> Iterator[Outcome]:
        """Yields the answer to each request, or the error that prevented it, in the order of the requests.

        An answer or error among the requests passes through. Requests are taken one by one, when the batch has room,
        and two more if the encoder has a process of its own.
        """
        with self._engine.memory.in_use():
            yield from self._outcomes(requests)

    def _outcomes(self, requests: Iterable[Asked | Outcome]) -> Iterator[Outcome]:
        upcoming = Upcoming(self._engine, requests)
        number = 0
        while True:
            self._begin_ready(upcoming)
            if self._decoder.rows:
                for row, _ in self._decoder.step():
                    self._finish(row)
            while number in self._done:
                yield self._done.pop(number)
                number += 1
            if not self._decoder.rows and upcoming.is_empty:
                return

    def _begin_ready(self, upcoming: Upcoming) -> None:
        """Starts answers while there is room. It waits for an image only if no other answer can continue."""
        while len(self._decoder.rows) < self._size and len(self._done) < MAX_DONE * self._size:
            upcoming.fill(1, wait=not self._decoder.rows)
            upcoming.look_ahead()  # in their order, so that the first image is the first to be encoded
            if upcoming.is_empty or (self._decoder.rows and not upcoming.is_ready):
                break
            number, request = upcoming.take()
            upcoming.look_ahead()  # another one, while this one begins
            self._begin(number, request)
        upcoming.look_ahead()

    def _begin(self, number: int, request: Asked | Outcome) -> None:
        """Computes the prompt and the first token of an answer."""
        if isinstance(request, Generation | FastVLMError):
            self._done[number] = request
            return
        asked = request.request if isinstance(request, PreparedRequest) else request
        try:
            if asked.options.beams.num_beams > 1:  # its beams are a batch of their own
                self._done[number] = self._engine.stream(asked).read()
                return
            prefilled = self._engine.prefill(request, CachedPrompt(), answer_capacity=0)
        except FastVLMError as reason:
            self._done[number] = reason
            return
        row = Row(self._engine, asked, prefilled)
        self._numbers[row] = number
        self._decoder.join(row)
        self._finish(row)

    def _finish(self, row: Row) -> None:
        """Notes an answer that has ended."""
        if row.ended:
            number = self._numbers.pop(row)
            self._done[number] = outcome_of(self._engine, row)


def outcome_of(engine: Engine, row: Row) -> Outcome:
    """Returns the answer of a row that has ended, or the error of its constraint."""
    try:
        return engine.generation(row.request, row.prefilled, row.result)
    except FastVLMError as reason:
        return reason


def check_batch_size(size: int) -> None:
    """Raises UsageError unless `size` is a whole number from 1."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"batch_size must be an integer of at least 1 (got {size!r:.60})", "batch_size")
