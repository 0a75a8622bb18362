"""Structured answers: whatever the weights, an answer follows its schema, expression, choice or grammar."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pydantic
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import UsageError
from fastvlm.models.references import open_checkpoint
from fastvlm.runtime import structured as structured_module
from fastvlm.runtime.batch import Batch
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.folder import ModelFolder
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.request import prepare
from fastvlm.runtime.structured import Vocabulary, constraint_from
from fastvlm.runtime.tokenizer import Tokenizer

from .conftest import EventLog, FakeEncoder

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
COLOR = {"enum": ["red", "green", "blue"]}
SHAPE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "color": COLOR,
        "corners": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "color"],
    "additionalProperties": False,
}

words = st.text('aB é漢"\\\n{}[],:0😀\u0300\U0002f800', max_size=6)  # the last two are normalized
bounds = st.tuples(st.integers(-2000, 2000), st.integers(0, 3000)).map(lambda pair: (pair[0], sum(pair)))
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    bounds.map(lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[1]}),
    st.integers(0, 6).map(lambda length: {"type": "string", "minLength": length // 2, "maxLength": length}),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}(-[0-9]{2})?$"}),
    st.lists(st.one_of(words, st.integers(-(2**53), 2**53), st.none()), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
    words.map(lambda value: {"const": value}),
)


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    properties = st.dictionaries(words, inner, max_size=3)
    objects = st.tuples(properties, st.integers(0, 3)).map(
        lambda pair: {
            "type": "object",
            "properties": pair[0],
            "required": list(pair[0])[: pair[1]],
            "additionalProperties": False,
        }
    )
    arrays = st.tuples(inner, st.integers(0, 3)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1] // 2, "maxItems": pair[1]}
    )
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=2).map(lambda found: {"anyOf": found}))


schemas = st.recursive(leaves, nested, max_leaves=6)


def opened(folder: Path, language_side: Callable) -> FastVLM:
    """Returns the model of a source checkpoint, with a `FakeEncoder`."""
    checkpoint = FolderCheckpoint(folder)
    encoder = FakeEncoder(checkpoint.config.image_size, checkpoint.config.mm_hidden_size)
    model_folder = ModelFolder(folder, checkpoint.config, trained=True, notes=())
    return FastVLM(model_folder, encoder, language_side(checkpoint), Tokenizer(folder), load_ms=0.0)


@pytest.fixture(scope="module")
def tiny(language_side: Callable) -> FastVLM:
    return opened(open_checkpoint("tiny").folder, language_side)


def check_valid(answer: Generation, schema: dict[str, Any]) -> None:
    assert answer.finish_reason == "stop", answer.text
    value = json.loads(answer.text)
    jsonschema.validate(value, schema)
    assert answer.parsed == value
    assert answer.text == json.dumps(value, ensure_ascii=False) or "\\" in answer.text or "." in answer.text


relaxed = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
brief = settings(relaxed, max_examples=8)


@given(schema=schemas, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0, 3.0]))
@brief
def test_answers_of_random_weights_satisfy_any_schema(
    vlm: FastVLM, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    options = {"schema": schema, "seed": seed, "temperature": temperature, "max_tokens": 600}
    check_valid(vlm.generate([None, PICTURE][seed % 2], "Hi", **options), schema)


@pytest.mark.slow
@given(schema=schemas)
@relaxed
def test_answers_of_tiny_satisfy_any_schema(tiny: FastVLM, schema: dict[str, Any]) -> None:
    check_valid(tiny.generate(PICTURE, "Describe the image.", schema=schema, max_tokens=600), schema)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
def test_answers_of_reference_checkpoints_satisfy_any_schema(golden: Path, language_side: Callable, name: str) -> None:
    model = opened(golden / name, language_side)
    if not model.engine.eos_token_ids:
        pytest.skip("the checkpoint has no end token")

    @given(schema=schemas, temperature=st.sampled_from([0.0, 1.0]))
    @relaxed
    def check(schema: dict[str, Any], temperature: float) -> None:
        options = {"schema": schema, "temperature": temperature, "seed": 1, "max_tokens": 600}
        check_valid(model.generate(PICTURE, "Describe the image.", **options), schema)

    check()


OPEN = {"type": "object", "properties": {"a": {"type": "boolean"}}}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, {**OPEN, "additionalProperties": False}),
        ({"type": "array", "items": OPEN}, {"type": "array", "items": {**OPEN, "additionalProperties": False}}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [{**OPEN, "additionalProperties": False}, {"type": "null"}]}),
        ({**OPEN, "additionalProperties": True}, {**OPEN, "additionalProperties": True}),
        ({"type": "object"}, {"type": "object"}),
        ({"allOf": [OPEN, OPEN]}, {"allOf": [OPEN, OPEN]}),
        ({**OPEN, "anyOf": [OPEN]}, {**OPEN, "anyOf": [OPEN]}),
        ({"enum": [OPEN]}, {"enum": [OPEN]}),
    ],
)
def test_objects_have_just_the_keys_that_are_listed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert constraint_from(schema=schema) == constraint_from(schema=expected)
    assert "additionalProperties" not in OPEN  # the given schema is not changed


@pytest.mark.parametrize("images", [None, PICTURE, [PICTURE, 255 - PICTURE]], ids=["none", "one", "two"])
def test_images_of_a_prompt_leave_the_constraint_alone(vlm: FastVLM, images: Any) -> None:
    options = {"schema": SHAPE, "temperature": 2.0, "seed": 5, "max_tokens": 200}
    chat = vlm.chat(images)
    for question in ("What is it?", "And now?"):  # the second one begins in the cache
        check_valid(chat.ask(question, **options), SHAPE)


@given(choice=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), seed=st.integers(0, 9))
@example(choice=["a\u0300 \u1100\u1161"], seed=0)  # the tokenizer would compose these
@example(choice=["\U0002f800b"], seed=0)  # ... and replace this one by another character
@brief
def test_choice_is_one_of_the_strings(vlm: FastVLM, choice: list[str], seed: int) -> None:
    answer = vlm.generate(None, "Which?", choice=choice, temperature=3.0, seed=seed)
    assert answer.text in choice
    assert answer.finish_reason == "stop"
    assert answer.parsed is None


@pytest.mark.parametrize(
    "pattern", [r"[a-f]{2,9}", r"(yes|no), (\d{1,3}%)", r"\p{Lu}[^\n]{0,9}\.", r"[a-zA-Z]{1,5} \(é\)?漢"]
)
def test_regex_matches_the_whole_answer(vlm: FastVLM, pattern: str) -> None:
    for seed in range(5):
        answer = vlm.generate(None, "Hi", regex=pattern, temperature=2.0, seed=seed, max_tokens=300)
        assert re.fullmatch(pattern.replace(r"\p{Lu}", "[^a-z ]"), answer.text), answer.text


def test_grammar_is_followed(vlm: FastVLM) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/'
    for seed in range(5):
        answer = vlm.generate(None, "Hi", grammar=grammar, temperature=2.0, seed=seed, max_tokens=100)
        assert re.fullmatch(r"[1-9]\d?(\+[1-9]\d?)*", answer.text)


choices = st.lists(st.text("abcde é漢", min_size=1, max_size=9), min_size=1, max_size=5, unique=True)


@given(choice=choices, data=st.data())
@brief
def test_mask_allows_only_tokens_that_can_continue(tokenizer: Tokenizer, choice: list[str], data: Any) -> None:
    """Compares with the definition: a token may come next if a choice begins with the bytes so far and its own."""
    eos, rows = tokenizer.control_tokens["<|im_end|>"], 1100
    allowed = Vocabulary(tokenizer, rows, (eos,)).start(constraint_from(choice=choice))
    wanted, so_far = [text.encode() for text in choice], b""
    while not allowed.ended:
        found = np.flatnonzero(allowed.mask()).tolist()
        assert (eos in found) == (so_far in wanted)
        for token_id in set(found) - {eos}:
            token = tokenizer.token_bytes(token_id)
            assert token and any(text.startswith(so_far + token) for text in wanted)
        taken = data.draw(st.sampled_from(found))
        so_far += tokenizer.token_bytes(taken)
        allowed.advance(taken)


@given(choice=choices)
@brief
def test_mask_allows_the_ids_of_the_tokenizer(tokenizer: Tokenizer, choice: list[str]) -> None:
    eos = tokenizer.control_tokens["<|im_end|>"]
    vocabulary = Vocabulary(tokenizer, 1100, (eos,))
    for text in choice:
        allowed = vocabulary.start(constraint_from(choice=choice))
        for token_id in [*tokenizer.encode(text), eos]:
            assert allowed.mask()[token_id]
            allowed.advance(token_id)


def test_rows_past_the_tokenizer_and_control_tokens_are_never_allowed(tokenizer: Tokenizer) -> None:
    eos = tokenizer.control_tokens["<|im_end|>"]
    found = Vocabulary(tokenizer, 1500, (eos, 4000)).start(constraint_from(regex=r"(?s:.)*")).mask()
    others = [token_id for token_id in tokenizer.control_tokens.values() if token_id != eos]
    assert found.shape == (1500,)
    assert not found[max(tokenizer.control_tokens.values()) + 1 :].any()
    assert not found[others].any()
    assert found[eos] and found[tokenizer.encode("a")].all()


@pytest.mark.slow
@given(
    kinds=st.lists(st.sampled_from(["schema", "choice", "regex", "none"]), min_size=1, max_size=5),
    greedy=st.booleans(),
    lookahead=st.integers(0, 2),
)
@relaxed
def test_batches_with_and_without_constraints_answer_as_one_by_one(
    vlm: FastVLM, kinds: list[str], greedy: bool, lookahead: int
) -> None:
    forms = {"schema": {"schema": SHAPE}, "choice": {"choice": ["a", "abc"]}, "regex": {"regex": "[a-z]{3,12}"}}
    sampling = {} if greedy else {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.1, "top_k": 50}
    requests = [
        prepare(None, f"Q{n}", max_tokens=10 + n, **forms.get(kind, {}), **sampling) for n, kind in enumerate(kinds)
    ]
    expected = [vlm.engine.stream(request).read() for request in requests]
    found = list(Batch(vlm.engine, 3, lookahead).outcomes(requests))
    assert [(one.token_ids, one.text, one.finish_reason) for one in found] == [
        (one.token_ids, one.text, one.finish_reason) for one in expected
    ]


def test_stream_gives_the_whole_answer_in_pieces(vlm: FastVLM) -> None:
    options = {"schema": SHAPE, "temperature": 1.0, "seed": 2, "max_tokens": 200}
    stream = vlm.stream(None, "Hi", **options)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.generation.text == vlm.generate(None, "Hi", **options).text
    assert vlm.generate_batch([None] * 2, "Hi", **options)[1].parsed == stream.generation.parsed


@pytest.mark.parametrize(("options", "reason"), [({"max_tokens": 9}, "length"), ({"stop": '"color'}, "stop")])
def test_answer_that_ends_early_is_a_prefix_that_is_not_parsed(vlm: FastVLM, options: dict, reason: str) -> None:
    whole = vlm.generate(None, "Hi", schema=SHAPE, max_tokens=200)
    found = vlm.generate(None, "Hi", schema=SHAPE, **options)
    assert whole.text.startswith(found.text) and len(found.text) < len(whole.text)
    assert (found.finish_reason, found.parsed) == (reason, None)


def test_ignore_eos_ends_where_nothing_else_may_come(vlm: FastVLM) -> None:
    for seed in range(4):
        options = {"temperature": 2.0, "seed": seed, "ignore_eos": True, "max_tokens": 60}
        answer = vlm.generate(None, "Hi", regex="[ab]{1,9}", **options)
        assert len(answer.text) == 9
        assert answer.finish_reason == "stop"


class Shape(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    corners: int = pydantic.Field(ge=0, le=12)
    parts: list[Shape] = pydantic.Field(default=[], max_length=0)


class Refusing(pydantic.BaseModel):
    size: int = pydantic.Field(ge=0, le=9)

    @pydantic.field_validator("size")
    @classmethod
    def refuse(cls, value: int) -> int:
        raise ValueError("never right")


def test_pydantic_model_is_a_schema_and_its_instance_the_result(vlm: FastVLM) -> None:
    answer = vlm.generate(PICTURE, "Hi", schema=Shape, temperature=1.0, seed=1)
    assert isinstance(answer.parsed, Shape)
    assert answer.parsed == Shape.model_validate_json(answer.text)
    assert json.loads(answer.text)["corners"] == answer.parsed.corners


def test_usage_error_when_validators_refuse_the_answer(vlm: FastVLM) -> None:
    answer = vlm.generate(None, "Hi", schema=Refusing)
    with pytest.raises(UsageError, match="validators of Refusing"):
        answer.parsed  # noqa: B018


CIRCLE: dict[str, Any] = {"type": "array"}
CIRCLE["items"] = CIRCLE


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"schema": {"type": "objekt"}}, "schema: .*Invalid type: objekt"),
        ({"schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ."uniqueItems'),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "Unsatisfiable schema"),
        ({"schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "does not fetch"),
        ({"schema": "{"}, "schema: .*Expecting property name"),
        ({"schema": "[1]"}, "must be a JSON object .got list"),
        ({"schema": "[" * 100_000}, "schema: "),
        ({"schema": 3}, "must be a JSON object .got int"),
        ({"schema": int}, "Pydantic model .got int"),
        ({"schema": '{"items": ' * 600 + "{}" + "}" * 600}, "recursion"),
        ({"schema": CIRCLE}, "Circular reference"),
        ({"schema": {"const": object()}}, "not JSON serializable"),
        ({"schema": {"const": "\ud800"}}, "schema is not valid Unicode"),
        ({"schema": {"enum": ["x" * 2**20]}}, "at most 1,048,576 bytes"),
        ({"schema": {"enum": [-(2**63)]}}, "numbers must be from -9,007,199,254,740,992"),  # crashes llguidance 1.9
        ({"schema": {"items": [{"minimum": 2**53 + 1}]}}, "numbers must be"),
        ({"schema": {"type": "number", "multipleOf": 2**31}}, "multipleOf must be"),
        ({"schema": {"maximum": math.nan}}, "numbers must be"),
        ({"grammar": 'start: %json {"enum": [-9223372036854775808]}'}, "numbers in %json"),
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": ""}, "regex must be a string of at least one character"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"regex": "(" * 1000 + ")" * 1000}, "regex: "),
        ({"choice": []}, "choice must be strings"),
        ({"choice": "red"}, "choice must be strings"),
        ({"choice": ["a", ""]}, "choice must be strings"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "start: " + "(" * 9999}, "grammar: "),
        ({"regex": "a", "choice": ["a"]}, "one form .got regex and choice"),
    ],
)
def test_usage_error_in_one_line_when_a_form_is_malformed(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        prepare(None, "Hi", **arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert set(caught.value.arguments) == set(arguments)


def test_usage_error_when_the_model_has_no_end_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="choice needs an end token"):
        Vocabulary(tokenizer, 1100, ()).start(constraint_from(choice=["a"]))


def test_constraint_that_is_too_complex_ends_only_its_answer(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = prepare(None, "Hi", grammar='start: a\na: "x" a a | "x" a | "x"', max_tokens=100, ignore_eos=True)
    fine = prepare(None, "Hi", max_tokens=12)
    expected = vlm.engine.stream(fine).read().token_ids
    monkeypatch.setattr(structured_module, "LIMITS", {"step_max_items": 60, "verbose_errors": False})
    with pytest.raises(UsageError, match="grammar: .*Too many items"):
        vlm.engine.stream(bad).read()
    found = list(Batch(vlm.engine, 3).outcomes([fine, bad, fine]))
    assert [type(one) for one in found] == [Generation, UsageError, Generation]
    assert found[0].token_ids == found[2].token_ids == expected


def test_allowed_tokens_are_found_while_the_pass_is_computed(
    vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, computing_on: Callable
) -> None:
    computing_on("gpu")
    events = EventLog(monkeypatch)
    mask = structured_module.AllowedTokens.mask
    monkeypatch.setattr(structured_module.AllowedTokens, "mask", lambda self: events.names.append("mask") or mask(self))
    monkeypatch.setattr(vlm.engine, "prefill", events.apart(vlm.engine.prefill))
    vlm.engine.stream(prepare(None, "Hi", regex="a{4}")).read()
    steps = [name for name in events.names if name != "read"]
    start = steps.index("launch")
    # the pass and the token of each step are launched one after the other, with the mask between them
    assert steps[start : start + 6] == ["launch", "mask", "launch"] * 2
