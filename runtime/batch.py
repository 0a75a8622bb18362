"""Many answers decoded together: each step reads the weights once for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models._mlx import mx
from ..models.errors import FastVLMError, UsageError
from ..models.images import ImageSource
from ..models.kv_cache import CACHE_STEP, KVCache, selected, stacked
from .generate import AnswerReader, Generation, decode_one_token, default_lookahead
from .request import Request, prepare
from .reuse import Memory
from .sampling import id_on_host, ids_on_host, pick
from .start import Prepared, Start

if TYPE_CHECKING:
    from .fastvlm import FastVLM

BATCH_SIZE = 8
"""Answers decoded at a time: a step of eight takes little longer than a step of one."""

Outcome = Generation | FastVLMError


def requests_for(
    images: Sequence[ImageSource | Sequence[ImageSource] | None],
    prompts: str | Sequence[str],
    options: Mapping[str, Any],
) -> Iterator[Request]:
    """A request for each image and prompt, made when it is asked for: images are not all open at once.

    Raises:
        UsageError: (at once) there are not as many images as prompts.
        FastVLMError: (when it is asked for) see `prepare`.
    """
    texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(images):
        raise UsageError(
            f"there should be one prompt, or one for each image; found prompts: {len(texts)}, images: {len(images)}"
        )
    return (prepare(image, text, **options) for image, text in zip(images, texts, strict=True))


@dataclass(eq=False)
class Row:
    """An answer being decoded."""

    number: int
    request: Request
    start: Start
    cold: bool
    reader: AnswerReader
    token: mx.array
    """The id (1,) that its next step takes in; not yet evaluated while that of an earlier step is in flight."""
    count: int = 0
    """Ids read so far."""
    launched: int = 0
    """Steps launched whose ids are not read yet."""

    @property
    def may_step(self) -> bool:
        return self.count + self.launched < self.start.room


@dataclass(frozen=True, eq=False)
class Step:
    """One more token for some rows, launched."""

    rows: list[Row]
    ids: mx.array
    """(B,), of each of the rows."""


class Upcoming:
    """The next requests, in their order. An encoder that works beside the decoder has the images of a few of them."""

    def __init__(self, model: FastVLM, requests: Iterable[Request | FastVLMError]) -> None:
        self._model = model
        self._waiting = enumerate(requests)
        self._more = True
        self._taken: deque[tuple[int, Request | Prepared | FastVLMError]] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._taken and not self._more

    @property
    def is_ready(self) -> bool:
        """Whether the next one need not wait for its images."""
        request = self._taken[0][1]
        return not isinstance(request, Prepared) or request.is_encoded

    def take(self) -> tuple[int, Request | Prepared | FastVLMError]:
        """The next one and its number."""
        return self._taken.popleft()

    def fill(self, count: int) -> None:
        """Asks for requests until there are `count`, or no more come."""
        while self._more and len(self._taken) < count:
            number, request = next(self._waiting, (-1, None))
            if request is None:
                self._more = False
            else:
                self._taken.append((number, request))

    def look_ahead(self) -> None:
        """Gives the images of the next few to the encoder; returns at once."""
        self.fill(self._model.ahead)
        for place, (number, request) in enumerate(self._taken):
            if place >= self._model.ahead:
                break
            if not isinstance(request, FastVLMError):
                try:
                    self._taken[place] = number, self._model.look_ahead(request)
                except FastVLMError as reason:
                    self._taken[place] = number, reason


class Batch:
    """A run of answers, some of them at a time. A place that becomes free is taken by the next request.

    As in `decode`, `lookahead` steps are launched before ids are read, so that a GPU never waits for the host. An
    answer may have ended in the meantime: what such a step found for it is dropped.
    """

    def __init__(self, model: FastVLM, size: int = BATCH_SIZE, lookahead: int | None = None) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"batch_size should be a whole number from 1; found {size!r:.60}")
        self._model = model
        self._size = size
        self._lookahead = default_lookahead() if lookahead is None else lookahead
        self._rows: list[Row] = []
        self._steps: deque[Step] = deque()
        self._cache: list[KVCache] = []
        self._cached: list[Row] = []
        """The rows that the cache holds, in its order."""
        self._done: dict[int, Outcome] = {}

    def outcomes(self, requests: Iterable[Request | FastVLMError]) -> Iterator[Outcome]:
        """See `FastVLM.answer_all`."""
        with self._model.memory.in_use():
            yield from self._outcomes(requests)

    def _outcomes(self, requests: Iterable[Request | FastVLMError]) -> Iterator[Outcome]:
        upcoming = Upcoming(self._model, requests)
        number = 0
        while True:
            self._begin_ready(upcoming)
            if self._rows:
                self._step()
            while number in self._done:
                yield self._done.pop(number)
                number += 1
            if not self._rows and upcoming.is_empty:
                return

    def _begin_ready(self, upcoming: Upcoming) -> None:
        """Begins answers while there is room for them. It waits for an image only where no other answer can go on."""
        while len(self._rows) < self._size:
            upcoming.fill(1)
            upcoming.look_ahead()  # in their order, so that the first image is the first to be encoded
            if upcoming.is_empty or (self._rows and not upcoming.is_ready):
                break
            number, request = upcoming.take()
            upcoming.look_ahead()  # another one, while this one begins
            self._begin(number, request)
        upcoming.look_ahead()

    def _begin(self, number: int, request: Request | Prepared | FastVLMError) -> None:
        """Begins an answer."""
        if isinstance(request, FastVLMError):
            self._done[number] = request
            return
        try:
            start, cold = self._model.start(request, Memory())
        except FastVLMError as reason:
            self._done[number] = reason
            return
        asked = request.request if isinstance(request, Prepared) else request
        eos = () if asked.options.ignore_eos else self._model.eos_token_ids
        reader = AnswerReader(self._model.tokenizer, eos, asked.options.stop)
        row = Row(number, asked, start, cold, reader, start.first)
        if self._goes_on(row, id_on_host(start.first)):
            self._rows.append(row)

    def _step(self) -> None:
        """Reads one more token for every answer, with later steps launched; answers that end with it leave."""
        model = self._model
        with model.turn, model.stream_of_turn():
            while self._steps and not any(row in self._rows for row in self._steps[0].rows):
                self._steps.popleft()  # all of them have ended meanwhile
            while len(self._steps) <= self._lookahead and self._launch():
                pass
            step = self._steps.popleft()
            for row, token_id in zip(step.rows, ids_on_host(step.ids), strict=True):
                row.launched -= 1
                if row in self._rows and not self._goes_on(row, token_id):
                    self._rows.remove(row)

    def _launch(self) -> bool:
        """Begins a step of all answers that may have another token; False when there is none."""
        rows = [row for row in self._rows if row.may_step]
        if not rows:
            return False
        last = self._steps[-1] if self._steps else None
        self._gather(rows)
        rows = self._cached
        unchanged = last is not None and last.rows == rows
        tokens = last.ids if last and unchanged else mx.concatenate([row.token for row in rows])  # (B,)
        logits = decode_one_token(self._model.language.language_model, tokens, self._cache)  # (B, V)
        samplers = [row.start.sampler for row in rows]
        ids = pick(samplers, logits)
        mx.async_eval(ids, *(sampler.state for sampler in samplers))
        self._steps.append(Step(rows, ids))
        for place, row in enumerate(rows):
            row.token = ids[place : place + 1]
            row.launched += 1
        return True

    def _gather(self, rows: list[Row]) -> None:
        """Brings the cache to `rows`: others leave, those that have begun since are put to it."""
        places = [place for place, row in enumerate(self._cached) if row in rows]
        if len(places) < len(self._cached):
            self._cache = [selected(layer, places) for layer in self._cache] if places else []
        kept = [self._cached[place] for place in places]
        begun = [row for row in rows if row not in kept]
        if begun:
            room = min(max(row.start.room for row in rows), CACHE_STEP)
            layers = zip(*([self._cache] if kept else []), *(row.start.cache for row in begun), strict=True)
            self._cache = [stacked(layer, room) for layer in layers]
        self._cached = kept + begun

    def _goes_on(self, row: Row, token_id: int) -> bool:
        """Hands a token to its answer. False when the answer ends with it, and is done."""
        row.reader.push(token_id)
        row.count += 1
        if not row.reader.ended and row.count < row.start.room:
            return True
        row.reader.flush()
        self._done[row.number] = self._model.generation(row.request, row.start, row.reader.ending, row.cold)
        return False
