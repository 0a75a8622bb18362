"""Between the protocol and the engine: a client's body becomes a request, and an answer a client's body."""

from __future__ import annotations

import codecs
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel

from ...models.images import Fit
from ...models.tokenizer_files import IMAGE_TOKEN
from ..batch import Piece
from ..beam_search import BeamOptions
from ..generate import Generation, GenerationOptions, options_from
from ..logprobs import TokenLogprob
from ..prompt import RAW, Message
from ..request import Request
from ..sampling import SamplingOptions
from ..structured import constraint_from
from ..timings import LapClock
from .errors import ApiError
from .images import ImageReader
from .protocol import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Completion,
    CompletionRequest,
    Delta,
    FinishReason,
    ImagePart,
    JsonSchemaFormat,
    PromptTokensDetails,
    ResponseFormat,
    TextChoice,
    TextFormat,
    TextLogprobs,
    TextPart,
    Timings,
    Usage,
)
from .settings import Settings

MAX_TOKEN_CHARACTERS = 128
"""The longest token of Qwen2's vocabulary, 128 blanks. A text with more characters per position cannot fit."""


@dataclass(frozen=True)
class Translated:
    """A request for the engine, and the time that its images took, which the engine does not see."""

    request: Request
    preprocess_ms: float


def chat_request(body: ChatRequest, settings: Settings, reader: ImageReader, fit: Fit, max_context: int) -> Translated:
    """Returns the request of a conversation, with its images as squares. `fit` and `max_context` are the model's.

    Raises:
        ApiError: there are too many images, or an option is not supported.
        ImageError: an image cannot be read.
        UsageError: an option is out of range.
    """
    urls: list[str] = []
    messages = [_message(message, urls) for message in body.messages]
    _check_length(sum(len(message.content) for message in messages), "messages", max_context)
    if len(urls) > settings.max_images:
        raise ApiError(
            400,
            f"messages must have at most {settings.max_images} images (got {len(urls)})",
            param="messages",
            code="too_many_images",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            400, "top_logprobs needs logprobs=true. Leave it out.", param="top_logprobs", code="invalid_value"
        )
    count, schema = body.max_completion_tokens or body.max_tokens, _schema(body.response_format)
    options = _options(body, count, settings, schema, (body.top_logprobs or 0) if body.logprobs else None)
    fit = body.fit or fit
    clock = LapClock()
    contents = [reader.read(url) for url in urls]
    open_ms = clock.lap_ms()
    squares, decode_ms, preprocess_ms = reader.squares(contents, fit)
    return Translated(Request(squares, tuple(messages), fit, options, open_ms + decode_ms), preprocess_ms)


def completion_request(
    body: CompletionRequest, settings: Settings, vocabulary_rows: int, max_context: int
) -> Translated:
    """Returns the request of a text to continue, or of its ids, which must be less than `vocabulary_rows`.

    Raises:
        ApiError: an id is not one of the model's.
        UsageError: an option is out of range.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], str):
        prompt = prompt[0]
    text, ids = (prompt, None) if isinstance(prompt, str) else ("", tuple(prompt))
    _check_length(len(text), "prompt", max_context)
    if ids and max(ids) >= vocabulary_rows:
        raise ApiError(
            400,
            f"prompt must have token ids below {vocabulary_rows:,} (got {max(ids):,})",
            param="prompt",
            code="invalid_value",
        )
    options = _options(body, body.max_tokens, settings, None, body.logprobs)
    return Translated(Request((), (Message(RAW, text, ids=ids),), None, options, 0.0), 0.0)


def _message(message: Any, urls: list[str]) -> Message:
    """Returns a message for the engine, and appends the URLs of its images."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, message.content)
    urls.extend(part.image_url.url for part in message.content if isinstance(part, ImagePart))
    return _in_order(role, message.content)


def _check_length(characters: int, param: str, max_context: int) -> None:
    """Refuses a text that cannot fit, because encoding it would hold up other answers for seconds."""
    if characters > MAX_TOKEN_CHARACTERS * max_context:
        raise ApiError(
            400,
            f"{param} must fit the context of {max_context:,} tokens (got {characters:,} characters). Shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def _in_order(role: str, parts: Sequence[TextPart | ImagePart]) -> Message:
    """Returns the message of text and images. The engine puts images first, as in training, unless text separates them.

    Many clients send an image after its question, without meaning the order.
    """
    kinds = [isinstance(part, ImagePart) for part in parts]
    count = sum(kinds)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    apart = count and any(not kind for kind in kinds[kinds.index(True) : len(kinds) - kinds[::-1].index(True)])
    if not apart or any(IMAGE_TOKEN in text for text in texts):
        return Message(role, "\n".join(texts), count)
    pieces = [f"{IMAGE_TOKEN}\n" if isinstance(part, ImagePart) else part.text for part in parts]
    return Message(role, "".join(pieces), count)


def _schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """Returns the JSON schema of a response format, or None for free text."""
    if isinstance(form, JsonSchemaFormat) and form.json_schema.schema_ is not None:
        return form.json_schema.schema_
    return None if form is None or isinstance(form, TextFormat) else {"type": "object"}


def _options(
    body: ChatRequest | CompletionRequest,
    max_tokens: int | None,
    settings: Settings,
    schema: dict[str, Any] | None,
    logprobs: int | None,
) -> GenerationOptions:
    """Returns the options of an answer. Raises UsageError."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options needs stream=true. Leave it out.", param="stream_options", code="invalid_value"
        )
    sampling = SamplingOptions(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=None if body.seed is None else body.seed % 2**64,
    )
    if body.grammar is not None and not settings.allow_grammar:
        raise ApiError(
            400,
            "grammars are refused, since some never end. Start the server with --allow-grammar, or send a regex or a "
            "schema.",
            param="grammar",
            code="grammar_not_allowed",
        )
    constraint = constraint_from(schema, body.regex, body.choice, body.grammar)
    beams = BeamOptions(
        num_beams=body.num_beams or 1,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=body.early_stopping or False,
    )
    if beams.num_beams > 1 and body.stream:
        raise ApiError(
            400, "num_beams above 1 gives a whole answer. Leave stream out.", param="num_beams", code="invalid_value"
        )
    count = min(max_tokens or settings.max_tokens, settings.max_tokens)
    return options_from(body.stop or (), count, False, sampling, constraint, beams, logprobs)


class Reply:
    """The bodies of the responses to one request.

    `chat` selects their form, `token_bytes` gives the bytes of a token, and `queue_ms` is called at the end.
    """

    def __init__(
        self,
        model: str,
        chat: bool,
        include_usage: bool,
        token_bytes: Callable[[int], bytes],
        queue_ms: Callable[[], float],
    ) -> None:
        self._chat = chat
        self._token_bytes = token_bytes
        self._include_usage = include_usage
        self._queue_ms = queue_ms
        self._characters, self._offset = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
        self._common: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, generation: Generation) -> bytes:
        """Returns the body of a whole answer."""
        reason = finish_reason(generation)
        measured: dict[str, Any] = {"usage": usage(generation), "timings": self._timings(generation)}
        body: BaseModel
        if self._chat:
            choice = Choice(
                message=AnswerMessage(content=generation.text),
                logprobs=None if generation.logprobs is None else self._logprobs(generation.logprobs),
                finish_reason=reason,
            )
            body = ChatCompletion(**self._common, choices=[choice], **measured)
        else:
            reported = None if generation.logprobs is None else self._text_logprobs(generation.logprobs)
            choices = [TextChoice(text=generation.text, logprobs=reported, finish_reason=reason)]
            body = Completion(**self._common, choices=choices, **measured)
        return body.model_dump_json().encode()

    def events(self, part: Piece | Generation | None) -> list[bytes]:
        """Returns the events of a stream for its start (None), for a piece, and for its end."""
        if part is None:
            return [self._event(Delta(role="assistant", content=""), "")] if self._chat else []
        if isinstance(part, Piece):
            return [self._event(Delta(content=part.text), part.text, logprobs=part.logprobs)]
        timings = self._timings(part)
        end = [self._event(Delta(), "", finish_reason=finish_reason(part), timings=timings)]
        if self._include_usage:
            end.append(self._event(None, "", usage=usage(part)))
        return end

    def _event(
        self,
        delta: Delta | None,
        text: str,
        *,
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
        **measured: Any,
    ) -> bytes:
        chunk: BaseModel
        if self._chat:
            of_chat = self._logprobs(logprobs) if logprobs else None
            choices = [] if delta is None else [ChunkChoice(delta=delta, logprobs=of_chat, finish_reason=finish_reason)]
            chunk = ChatChunk(**self._common, choices=choices, **measured)
        else:
            of_text = self._text_logprobs(logprobs) if logprobs else None
            texts = [] if delta is None else [TextChoice(text=text, logprobs=of_text, finish_reason=finish_reason)]
            chunk = Completion(**self._common, choices=texts, **measured)
        content = chunk.model_dump(mode="json", exclude_none=True)
        for choice in content["choices"]:
            choice.setdefault("finish_reason", None)
        return _json(content)

    def _logprobs(self, found: tuple[TokenLogprob, ...]) -> ChoiceLogprobs:
        def named(token_id: int, logprob: float) -> dict[str, Any]:
            content = self._token_bytes(token_id)
            return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

        return ChoiceLogprobs.model_validate(
            {
                "content": [
                    {**named(one.token_id, one.logprob), "top_logprobs": [named(*other) for other in one.top]}
                    for one in found
                ]
            }
        )

    def _text_logprobs(self, found: tuple[TokenLogprob, ...]) -> TextLogprobs:
        """Returns the form of completions. The offsets continue from one piece to the next."""

        def named(token_id: int) -> str:
            content = self._token_bytes(token_id)
            try:
                return content.decode()
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

        reported = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for one in found:
            likeliest: dict[str, float] = {}
            for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
                likeliest.setdefault(named(token_id), logprob)
            reported.tokens.append(named(one.token_id))
            reported.token_logprobs.append(one.logprob)
            reported.top_logprobs.append(likeliest)
            reported.text_offset.append(self._offset)
            self._offset += len(self._characters.decode(self._token_bytes(one.token_id)))
        return reported

    def _timings(self, generation: Generation) -> BaseModel:
        return cast("BaseModel", Timings(queue_ms=round(self._queue_ms(), 3), **generation.timings.as_dict()))


def usage(generation: Generation) -> Usage:
    """Returns the token counts of an answer."""
    count = len(generation.token_ids)
    return Usage(
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=count,
        total_tokens=generation.prompt_tokens + count,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.timings.reused_tokens),
    )


def finish_reason(generation: Generation) -> FinishReason:
    """Returns OpenAI's reason. A full context is `length` there."""
    return "stop" if generation.finish_reason == "stop" else "length"


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
