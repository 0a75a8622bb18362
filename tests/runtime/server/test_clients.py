"""The clients that people use: OpenAI's for Python and JavaScript, LiteLLM and curl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest

from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.server.run import Server

from .conftest import CHAT, data_url, png, question, running

pytestmark = pytest.mark.slow

KEY = "a-key-for-clients"


@pytest.fixture(scope="module")
def locked(model: FastVLM) -> Iterator[Server]:
    """A server with a key."""
    with running(model, api_key=KEY, max_body_mb=1) as server:
        yield server


def messages(text: str = "What?", *images: bytes) -> list[dict[str, Any]]:
    return question(text, *images)["messages"]


@pytest.fixture(scope="module")
def client(locked: Server) -> Any:
    """The official client."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0)


def test_openai_client_asks_about_images(client: Any, model: FastVLM) -> None:
    expected = model.generate([png(1), png(2)], "What?", max_tokens=8)
    answer = client.chat.completions.create(model="model", messages=messages("What?", png(1), png(2)), max_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_openai_client_streams(client: Any, model: FastVLM) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 12}
    chunks = list(client.chat.completions.create(model="model", messages=messages("Go on"), **options))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == model.generate(None, "Go on", max_tokens=12).text
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].timings["ttft_ms"] > 0


def test_openai_client_continues_a_conversation(client: Any) -> None:
    history: list[Any] = messages("What?", png(3))
    for text in ("And?", "So?"):
        answer = client.chat.completions.create(model="model", messages=history, max_tokens=6)
        history += [answer.choices[0].message, {"role": "user", "content": text}]
    answer = client.chat.completions.create(model="model", messages=history, max_tokens=6)
    assert answer.usage.completion_tokens > 0


class Shape(pydantic.BaseModel):
    """A form to fill in."""

    colour: Literal["red", "blue"]
    corners: Annotated[int, pydantic.Field(ge=0, le=9)]


def test_openai_client_parses_into_a_model(client: Any) -> None:
    given = {"model": "model", "messages": messages("Describe it.", png(1)), "max_tokens": 60}
    answer = client.chat.completions.parse(response_format=Shape, **given)
    shape = answer.choices[0].message.parsed
    assert isinstance(shape, Shape)
    assert shape.colour in ("red", "blue")


def test_openai_client_sees_errors_as_its_own(client: Any, locked: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="model", messages=messages(), n=2)
    assert (refused.value.param, refused.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=messages())
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model="model", messages=messages("x" * 2**20))
    assert large.value.status_code == 413


def test_openai_client_lists_models_and_completes(client: Any) -> None:
    assert [card.id for card in client.models.list()] == ["model"]
    assert client.models.retrieve("model").id == "model"
    whole = client.completions.create(model="model", prompt="A red", max_tokens=5)
    pieces = client.completions.create(model="model", prompt="A red", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_openai_client_closes_a_stream_early(client: Any, locked: Server) -> None:
    from ..processes import until

    with client.chat.completions.create(model="model", messages=messages(), stream=True, max_tokens=1000) as stream:
        next(iter(stream))
    assert until(lambda: locked.service.in_flight == 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_litellm_asks_and_streams(locked: Server, model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it downloads one
    litellm = pytest.importorskip("litellm")
    given = {"model": "openai/model", "api_base": f"{locked.url}/v1", "api_key": KEY, "max_tokens": 8}
    expected = model.generate(png(4), "What?", max_tokens=8).text
    whole = litellm.completion(messages=messages("What?", png(4)), **given)
    assert whole.choices[0].message.content == expected
    chunks = litellm.completion(messages=messages("What?", png(4)), stream=True, **given)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_curl_asks_and_streams(locked: Server, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    body = tmp_path / "body.json"
    body.write_text(json.dumps(question("What?", png(5), stream=True)))
    command = ["curl", "-sN", locked.url + CHAT, "-H", f"Authorization: Bearer {KEY}", "--json", f"@{body}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("data: [DONE]")
    assert done.stdout.count("data: {") >= 3


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL + "/v1", apiKey: process.env.KEY, maxRetries: 0 });
const content = [{ type: "text", text: "What?" }, { type: "image_url", image_url: { url: process.env.IMAGE } }];
const asked = { model: "model", messages: [{ role: "user", content }], max_tokens: 8 };
const whole = await client.chat.completions.create(asked);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
let status = 0;
try { await client.chat.completions.create({ ...asked, n: 2 }); } catch (error) { status = error.status; }
console.log(JSON.stringify([whole.choices[0].message.content, text, status]));
"""
"""Asks for a whole answer, a streamed one, and one that is refused."""


def test_openai_client_of_node_asks_and_streams(locked: Server, model: FastVLM, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no Node here")
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"]
    try:
        installed = subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        installed = False
    if not installed:
        pytest.skip("npm cannot install the package openai here")
    (tmp_path / "ask.mjs").write_text(NODE)
    environment = {**os.environ, "URL": locked.url, "KEY": KEY, "IMAGE": data_url(png(6))}
    done = subprocess.run(
        ["node", "ask.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    expected = model.generate(png(6), "What?", max_tokens=8).text
    assert json.loads(done.stdout or done.stderr) == [expected, expected, 400]
