"""The messages of the protocol: OpenAI's requests and responses, as far as this server supports them.

One source for validation and for the OpenAPI document. Fields that would change an answer and are not supported take
their neutral value alone. Fields that change nothing are accepted. Others are refused, as OpenAI does.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ..logprobs import MAX_TOP
from ..timings import Timings as EngineTimings

MAX_MESSAGES = 1000
"""The most messages of a conversation: far more than a context holds."""

MAX_STOP = 16
"""The most stop strings of a request. OpenAI takes 4."""

MAX_CHOICES = 1000
"""The most answers to choose from."""

MAX_STOP_CHARACTERS = 1000
"""The longest stop string, since each token is compared with all of them."""

NULL_FIELD = "Accepted as null. Tables, like those of Ray Data, give each part the fields of all parts."

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class Part(BaseModel):
    """The base of everything that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Part):
    """A piece of text."""

    type: Literal["text"]
    text: str
    image_url: None = Field(None, description=NULL_FIELD)


class ImageUrl(Part):
    """The place of an image."""

    url: str = Field(description="A data URL (`data:image/png;base64,...`), or a URL of a host that the server allows.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Accepted, and without effect.")


class ImagePart(Part):
    """An image in a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl
    text: None = Field(None, description=NULL_FIELD)


UserContent = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Part):
    """Instructions before a conversation."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Part):
    """A question, with images or without. Images between texts keep their places, others come before the text."""

    role: Literal["user"]
    content: str | list[UserContent]
    name: str | None = None


class AssistantMessage(Part):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Part):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted, and without effect.")


class JsonSchema(Part):
    """A JSON schema with its name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Every answer follows its schema, so this is without effect.")


class TextFormat(Part):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


MAX_REQUEST_BEAMS = 8
"""The most beams of one request. Each takes as much memory as an answer, and no place in the batch."""


class Options(Part):
    """The options that both kinds of completions share."""

    model: str | None = Field(None, description="The id of the served model. It can be left out.")
    max_tokens: Count | None = Field(None, description="The most tokens of the answer, up to the server's limit.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0, the default, is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="An extension. 0 means all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="An extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="An extension.")
    seed: Seed | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_REQUEST_BEAMS)] | None = Field(
        None, description="An extension: beam search, without sampling, a stream or a constraint."
    )
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(None, description="An extension, for beams.")
    early_stopping: bool | Literal["never"] | None = Field(None, description="An extension, for beams.")
    regex: str | None = Field(None, description="An extension: a regular expression for the whole answer.")
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        None, description="An extension: the answers to choose from."
    )
    grammar: str | None = Field(None, description="An extension: a context-free grammar in Lark's syntax.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")


class ChatRequest(Options):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = Field(None, description="The same as `max_tokens`, and preferred to it.")
    response_format: ResponseFormat | None = None
    fit: Literal["pad", "crop"] | None = Field(None, description="An extension: the fit of images into a square.")
    logprobs: bool | None = Field(None, description="Report the log-probability of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = Field(
        None, description="The alternatives per token, with `logprobs`."
    )
    modalities: list[Literal["text"]] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Accepted, and without effect.")
    store: bool | None = Field(None, description="Accepted, and without effect: nothing is stored.")
    service_tier: str | None = Field(None, description="Accepted, and without effect.")
    safety_identifier: str | None = Field(None, description="Accepted, and without effect.")
    prompt_cache_key: str | None = Field(None, description="Accepted, and without effect.")


class CompletionRequest(Options):
    """The body of `POST /v1/completions`: a text to continue, without a chat template and without images."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    ) = Field(description="A text, a list of one text, or token ids.")
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = Field(
        None, description="Report the log-probability of each token, and of this many of the likeliest ones."
    )
    suffix: Literal[""] | None = None


class PromptTokensDetails(BaseModel):
    """The part of the prompt that was not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """The tokens of one request. An image counts with all its positions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


Timings = pydantic.create_model(
    "Timings",
    __doc__="The time of an answer by stage, in milliseconds. `ttft_ms` is the sum of its stages, without the queue.",
    queue_ms=(float, ...),
    ttft_ms=(float, ...),
    **{  # type: ignore[call-overload]
        field.name: (typing.get_type_hints(EngineTimings)[field.name], ...)
        for field in dataclasses.fields(EngineTimings)
    },
)
"""`runtime.timings.Timings.as_dict()`, with the time in the queue."""

FinishReason = Literal["stop", "length"]


class TopLogprob(BaseModel):
    """A token and the natural logarithm of its probability."""

    token: str
    """Its text. An incomplete character is U+FFFD."""
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer, with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """The log-probabilities of an answer, or of a piece of one."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """The log-probabilities of a continuation, or of a piece of one, with an entry per token in each list.

    A token that is not valid UTF-8 alone is written as `bytes:` and its bytes, such as `bytes:\\xf0\\x9f`.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The likeliest tokens at this place, and the chosen one, with their log-probabilities."""
    text_offset: list[int]
    """The characters of the answer that earlier tokens completed."""


class AnswerMessage(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """An answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings  # type: ignore[valid-type]


class Delta(BaseModel):
    """The next piece of a streamed answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of an answer, or its end."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat answer. The one with `finish_reason` also has `timings`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None  # type: ignore[valid-type]


class TextChoice(BaseModel):
    """A continuation, or a piece of one."""

    index: Literal[0] = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answer to a completion request, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    timings: Timings | None = None  # type: ignore[valid-type]


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fastvlm"] = "fastvlm"
    context_length: int
    image_tokens: int
    image_size: int
    """The sides of the encoder's input in px. Larger images are scaled down to it."""


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok"] = "ok"
    model: str
    version: str
    running: int
    queued: int


class ErrorDetail(BaseModel):
    """The reason for a refusal."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail
