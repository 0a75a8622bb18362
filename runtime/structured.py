"""Structured answers: from a schema, regular expression, choice or grammar to the tokens that may come next.

`llguidance` parses the specification and finds the tokens. It is imported when the first one is given.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models._mlx import mx
from ..models.errors import FastVLMError, UsageError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance
    from numpy.typing import NDArray

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The form of JSON answers, as `json.dumps` writes it. With free whitespace a small model can write spaces forever."""

MAX_BYTES = 2**20
"""The largest specification in bytes. Larger ones exceed llguidance's own limits, but only after seconds of work."""

MAX_NUMBER = 2**53
"""The largest number in a schema. llguidance computes with doubles, which have the whole numbers up to it."""

MAX_STEP = 1000
"""The largest `multipleOf` in a schema. llguidance has a state per remainder, and takes minutes for 2**31."""

LARGE_NUMBER = re.compile(r"\d{16}|\d[eE]\+?\d\d")
"""The form of a number that may be larger, in the text of a grammar."""

LIMITS: dict[str, Any] = {"verbose_errors": False}
"""The limits of the parser, llguidance's own: 50,000 items for a mask, a million steps to prepare a grammar ..."""

Schema = Mapping[str, Any] | str | type
"""A JSON schema as a mapping or as JSON, or a Pydantic model class."""


@dataclass(frozen=True)
class Constraint:
    """The form that an answer must have, checked without a model.

    Attributes:
        argument: the name of the Python argument that it came from: `schema`, `regex`, `choice` or `grammar`.
        source: the grammar in llguidance's own form.
        model: the Pydantic model class, if `schema` was one.
    """

    argument: str
    source: str
    model: Any = None

    def parsed(self, text: str) -> Any:
        """Returns what a complete answer holds: an instance of the model, JSON's value, or None without a schema.

        Raises:
            UsageError: the validators of the model, which the schema cannot express, refuse the answer.
        """
        if self.argument != "schema":
            return None
        if self.model is None:
            return json.loads(text)
        try:
            return self.model.model_validate_json(text)
        except ValueError as reason:
            raise UsageError(
                f"the answer does not pass the validators of {self.model.__name__}: {_one_line(str(reason))}. Express "
                "them in the fields, so that the schema has them."
            ) from None


def constraint_from(
    schema: Schema | None = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    grammar: str | None = None,
) -> Constraint | None:
    """Returns the constraint that one of the arguments describes, or None without any.

    Args:
        schema: a JSON schema as a mapping or as JSON, or a Pydantic model class.
        regex: a regular expression for the whole answer, in the syntax of Rust's `regex`.
        choice: the answers to choose from.
        grammar: a context-free grammar in Lark's syntax, whose start rule is `start`.

    Raises:
        UsageError: several are given, or one is malformed or has parts that cannot be followed.
    """
    arguments = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
    given = [name for name, value in arguments.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise UsageError(f"an answer has one form (got {' and '.join(given)}). Leave all but one out.", *given)
    from llguidance import LLMatcher

    name, model = given[0], None
    if schema is not None:
        model = schema if isinstance(schema, type) else None
        source = LLMatcher.grammar_from_json_schema(_schema_text(schema), overrides=JSON_FORM)  # type: ignore[arg-type]
    elif choice is not None:
        source = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in _choices(choice)))
    else:
        make = LLMatcher.grammar_from_regex if name == "regex" else LLMatcher.grammar_from_lark
        text = _checked_text(name, arguments[name])
        if name == "grammar" and "%json" in text and LARGE_NUMBER.search(text):
            raise UsageError(f"grammar: numbers in %json must be at most {MAX_NUMBER:,}. Use a string.", "grammar")
        source = make(text)
    if reason := LLMatcher.validate_grammar(source):
        raise _refusal(name, reason)
    return Constraint(name, source, model)


def _schema_text(schema: Schema) -> str:
    """Returns a schema as JSON. Raises UsageError unless it is an object."""
    found: Any = schema
    if isinstance(schema, type):
        if not hasattr(schema, "model_json_schema"):
            raise UsageError(f"schema must be a mapping, JSON or a Pydantic model (got {schema.__name__}).", "schema")
        found = _library_result(schema.model_json_schema)
    elif isinstance(schema, str):
        text = _checked_text("schema", schema)
        found = _library_result(lambda: json.loads(text))
    if not isinstance(found, Mapping):
        raise UsageError(f"schema must be a JSON object (got {type(found).__name__}).", "schema")
    found = _library_result(lambda: json.loads(json.dumps(dict(found))))  # plain values, without cycles
    _check_numbers(found)
    return _checked_text("schema", _library_result(lambda: json.dumps(_closed(found), ensure_ascii=False)))


def _check_numbers(part: Any) -> None:
    """Raises UsageError for a number that llguidance rounds. Some of them crash its process too."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += part.values()
            step = part.get("multipleOf")
            if isinstance(step, int | float) and not isinstance(step, bool) and not 1e-6 <= step <= MAX_STEP:
                raise UsageError(f"schema: multipleOf must be from 1e-6 to {MAX_STEP:,} (got {step!r:.60}).", "schema")
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, int | float) and not abs(part) <= MAX_NUMBER:
            raise UsageError(
                f"schema: numbers must be from -{MAX_NUMBER:,} to {MAX_NUMBER:,} (got {part!r:.60}). Use a string.",
                "schema",
            )


def _closed(schema: Mapping[str, Any]) -> Any:
    """Returns a schema whose objects have no other keys than they list, unless it says so itself.

    A small model would go on with keys of its own. An answer to the closed schema is valid for the given one too.
    Schemas that join parts with `allOf` stay as they are, since each part would refuse the keys of the others.
    """
    return schema if _has_joined_parts(schema) else _closed_part(schema)


def _closed_part(part: Any) -> Any:
    if isinstance(part, list | tuple):
        return [_closed_part(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    closed: dict[str, Any] = {}
    for key, value in part.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            closed[key] = {name: _closed_part(inner) for name, inner in value.items()}
        elif key in ("items", "prefixItems", "anyOf", "oneOf"):
            closed[key] = _closed_part(value)
        else:
            closed[key] = value
    if "properties" in part and not _OPENING.intersection(part):
        closed["additionalProperties"] = False
    return closed


_OPENING = frozenset(("additionalProperties", "unevaluatedProperties", "patternProperties"))
"""The keywords by which a schema itself says which other keys an object may have."""

_JOINING = frozenset(("allOf", "anyOf", "oneOf", "if", "$ref", "dependentSchemas"))
"""The keywords that add another part to an object with properties."""


def _has_joined_parts(part: Any) -> bool:
    """Returns True if an object gets its keys from several parts."""
    if isinstance(part, list | tuple):
        return any(map(_has_joined_parts, part))
    if not isinstance(part, Mapping):
        return False
    several = isinstance(part.get("allOf"), list | tuple) and len(part["allOf"]) > 1
    joined = "properties" in part and bool(_JOINING.intersection(part))
    return several or joined or any(map(_has_joined_parts, part.values()))


def _library_result(call: Any) -> Any:
    """Returns what `call` returns. Its exceptions are a fault of the schema."""
    try:
        return call()
    except (ValueError, TypeError, RecursionError) as reason:
        raise _refusal("schema", str(reason)) from None
    except Exception as reason:  # Pydantic's errors, whose module is not imported here
        raise _refusal("schema", str(reason)) from None


def _choices(choice: Any) -> list[str]:
    texts = list(choice) if isinstance(choice, list | tuple) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"choice must be strings of at least one character (got {choice!r:.60}).", "choice")
    return [_checked_text("choice", text) for text in dict.fromkeys(texts)]


def _checked_text(name: str, text: Any) -> str:
    """Returns a string that is Unicode, not empty and not huge. Raises UsageError."""
    if not isinstance(text, str) or not text:
        raise UsageError(f"{name} must be a string of at least one character (got {text!r:.60}).", name)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as reason:
        raise UsageError(f"{name} is not valid Unicode at character {reason.start:,}. Correct it.", name) from None
    if size > MAX_BYTES:
        raise UsageError(f"{name} must have at most {MAX_BYTES:,} bytes (got {size:,}). Shorten it.", name)
    return text


def _refusal(name: str, reason: str) -> UsageError:
    return UsageError(f"{name}: it cannot be followed ({_one_line(reason)}). Change that part.", name)


def _one_line(reason: str) -> str:
    """Returns the gist of a library's message: the error of a regular expression, or the first line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or ["no reason given"]
    error = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return f"{error.rstrip('.: '):.200}"


class Vocabulary:
    """The bytes of every token of a model, from which constraints find the tokens that may come next.

    `rows` is the height of the head. Control tokens and the rows past the tokenizer are never allowed, except for the
    end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._rows = tokenizer, rows
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < rows]

    def start(self, constraint: Constraint, ignore_eos: bool = False) -> AllowedTokens:
        """Returns the allowed tokens at the beginning of an answer. `ignore_eos` delays its end as long as possible.

        Raises:
            UsageError: the constraint is too complex, or the model has no end token.
        """
        from llguidance import LLMatcher, LLParserLimits

        if not self._eos_token_ids:
            raise UsageError(
                f"{constraint.argument} needs an end token, and this model has none. Add eos_token_id to its "
                "config.json.",
                constraint.argument,
            )
        matcher = LLMatcher(self._tokens, constraint.source, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise _refusal(constraint.argument, matcher.get_error())
        return AllowedTokens(matcher, constraint.argument, self._eos_token_ids, ignore_eos)

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        """The tokens as a tree of bytes. It takes half a second for the 151,936 rows of Qwen2."""
        from llguidance import LLTokenizer

        wrapper: Any = _Wrapper(self._tokenizer, self._rows, self._eos_token_ids[0])
        return LLTokenizer(wrapper, eos_token=self._eos_token_ids)


class _Wrapper:
    """The interface that llguidance expects of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, rows: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(rows)]
        self.special_token_ids = [token_id for token_id in tokenizer.control_tokens.values() if token_id < rows]
        self._single = {token: token_id for token_id, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str) -> list[int]:
        """Returns ids whose bytes are those of `text`: an id per byte if the tokenizer would normalize it to others."""
        ids, wanted = self._tokenizer.encode(text), text.encode()
        same = b"".join(map(self._tokenizer.token_bytes, ids)) == wanted
        return ids if same else [self._single[bytes([byte])] for byte in wanted]


class AllowedTokens:
    """The tokens that may come next in one answer.

    Attributes:
        ended: True once an end token was taken. Then every token is allowed, since none is read.
        error: the error that ended the answer early, if the parser met one of its limits.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, argument: str, eos_token_ids: Sequence[int], ignore_eos: bool
    ) -> None:
        self._matcher, self._argument = matcher, argument
        self._eos_token_ids, self._ignore_eos = list(eos_token_ids), ignore_eos
        self.ended = False
        self.error: FastVLMError | None = None

    def advance(self, token_id: int) -> None:
        """Takes the token that was chosen."""
        self.ended = self.ended or token_id in self._eos_token_ids
        if not self.ended:
            self._matcher.consume_token(token_id)

    def mask(self) -> NDArray[np.uint8]:
        """Returns a number per row of the head (V,), not 0 where the token may come next.

        After an error only end tokens may come, so that the other answers of a batch continue.
        """
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        if self._matcher.is_error():
            self.error = self.error or _refusal(self._argument, self._matcher.get_error())
            allowed = np.zeros_like(allowed)
            allowed[self._eos_token_ids] = 1
        elif self._ignore_eos:
            others = allowed.copy()
            others[self._eos_token_ids] = 0
            allowed = others if others.any() else allowed
        return allowed

    def apply(self, logits: mx.array) -> mx.array:
        """Returns logits (V,) with -inf for the tokens that may not come next, not yet evaluated."""
        return logits if self.ended else mx.where(mx.array(self.mask()), logits, -mx.inf)
