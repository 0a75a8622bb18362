"""Many answers decoded together: each step reads the weights once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models._mlx import mx
from ..models.errors import FastVLMError, UsageError
from ..models.images import ImageSource
from ..models.kv_cache import CACHE_STEP, KVCache, selected, stacked
from .generate import AnswerReader, Generation, decode_one_token
from .request import Request, prepare
from .reuse import Memory, evaluated
from .sampling import id_on_host
from .start import Start

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


@dataclass
class Row:
    """An answer on its way."""

    number: int
    request: Request
    start: Start
    cold: bool
    reader: AnswerReader
    token: mx.array
    """The last id (1,)."""
    count: int = 0
    """Ids so far."""


class Batch:
    """A run of answers, some of them at a time. A place that becomes free is taken by the next request."""

    def __init__(self, model: FastVLM, size: int = BATCH_SIZE) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"batch_size should be a whole number from 1; found {size!r:.60}")
        self._model = model
        self._size = size
        self._rows: list[Row] = []
        self._cache: list[KVCache] = []
        """Of the rows at the beginning of `_rows`: the others have begun since."""
        self._done: dict[int, Outcome] = {}

    def outcomes(self, requests: Iterable[Request | FastVLMError]) -> Iterator[Outcome]:
        """See `FastVLM.answer_all`."""
        waiting = enumerate(requests)
        number, more = 0, True
        while more or self._rows or self._done:
            while more and len(self._rows) < self._size:
                more = self._begin_next(waiting)
            if self._rows:
                self._step()
            while number in self._done:
                yield self._done.pop(number)
                number += 1

    def _begin_next(self, waiting: Iterator[tuple[int, Request | FastVLMError]]) -> bool:
        """Begins one more answer; False when there is none."""
        number, request = next(waiting, (-1, None))
        if request is None:
            return False
        if isinstance(request, FastVLMError):
            self._done[number] = request
            return True
        try:
            start, cold = self._model.start(request, Memory())
        except FastVLMError as reason:
            self._done[number] = reason
            return True
        eos = () if request.options.ignore_eos else self._model.eos_token_ids
        reader = AnswerReader(self._model.tokenizer, eos, request.options.stop)
        row = Row(number, request, start, cold, reader, start.first)
        if self._goes_on(row, start.first):
            self._rows.append(row)
        return True

    def _step(self) -> None:
        """One more token for every answer; those that end with it leave."""
        model = self._model
        with model.turn, model.stream_of_turn():
            self._gather()
            tokens = mx.concatenate([row.token for row in self._rows])  # (B,)
            logits = decode_one_token(model.language.language_model, tokens, self._cache)  # (B, V)
            picked = [row.start.sampler(logits[n]) for n, row in enumerate(self._rows)]
            mx.eval(picked, [row.start.sampler.state for row in self._rows])
            going_on = [n for n, row in enumerate(self._rows) if self._goes_on(row, picked[n])]
            if len(going_on) < len(self._rows):
                self._keep(going_on)

    def _keep(self, going_on: list[int]) -> None:
        """Lets the other rows go."""
        self._rows = [self._rows[n] for n in going_on]
        self._cache = [selected(layer, going_on) for layer in self._cache] if going_on else []
        evaluated(self._cache)

    def _gather(self) -> None:
        """Puts the keys and values of the answers that have begun to those of the others."""
        known = self._cache[0].rows if self._cache else 0
        begun = [row.start.cache for row in self._rows[known:]]
        if begun:
            room = min(max(row.start.room for row in self._rows), CACHE_STEP)
            layers = zip(*([self._cache] if known else []), *begun, strict=True)
            self._cache = [stacked(layer, room) for layer in layers]

    def _goes_on(self, row: Row, token: mx.array) -> bool:
        """Hands a token to its answer. False when the answer ends with it, and is done."""
        row.reader.push(id_on_host(token))
        row.token, row.count = token, row.count + 1
        if not row.reader.ended and row.count < row.start.room:
            return True
        row.reader.flush()
        self._done[row.number] = self._model.generation(row.request, row.start, row.reader.ending, row.cold)
        return False
