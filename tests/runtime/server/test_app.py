"""The routes of a running server, by plain HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import GenerationOptions
from fastvlm.runtime.prompt import RAW, Message
from fastvlm.runtime.request import Request
from fastvlm.runtime.sampling import SamplingOptions
from fastvlm.runtime.server import app, images
from fastvlm.runtime.server.run import Server

from ..processes import until
from .conftest import CHAT, COMPLETE, events, png, question, text_of

Start = Callable[..., AbstractContextManager[Server]]


def sent(server: Server, body: bytes, all_but: int = 0) -> socket.socket:
    """Returns a connection with a chat request, of which the last `all_but` bytes are missing."""
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) - all_but])
    return connection


@pytest.mark.parametrize("images", [0, 1, 2])
def test_answer_has_the_ids_of_generate(client: httpx.Client, model: FastVLM, images: int) -> None:
    pictures = [png(n) for n in range(images)]
    expected = model.generate(pictures, "What is it?", max_tokens=8)
    answer = client.post(CHAT, json=question("What is it?", *pictures)).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    assert answer["usage"]["total_tokens"] == expected.prompt_tokens + len(expected.token_ids)


def test_stream_adds_up_to_the_whole_answer(client: httpx.Client) -> None:
    whole = client.post(CHAT, json=question("Tell me.", max_tokens=20)).json()
    body = question("Tell me.", max_tokens=20, stream=True, stream_options={"include_usage": True})
    with client.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
    assert text_of(found) == whole["choices"][0]["message"]["content"]
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({event["id"] for event in found}) == 1
    *_, end, usage = found
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 20


def test_stages_of_an_answer_add_up(client: httpx.Client) -> None:
    timings = client.post(CHAT, json=question("What?", png(5))).json()["timings"]
    stages = ("preprocess_ms", "encode_ms", "project_ms", "prefill_ms", "sample_ms")
    assert timings["ttft_ms"] == pytest.approx(sum(timings[name] for name in stages), abs=0.01)
    assert timings["queue_ms"] >= 0


def test_same_image_again_is_cached(client: httpx.Client) -> None:
    first, second = (client.post(CHAT, json=question(text, png(6))).json() for text in ("What?", "Where?"))
    assert first["timings"]["cached_images"] == 0
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert second["timings"]["cached_images"] == 1 or cached > first["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert second["timings"]["encode_ms"] < first["timings"]["encode_ms"]


def test_conversation_has_the_answer_of_chat(client: httpx.Client, model: FastVLM) -> None:
    conversation = model.chat(png(7), "Be brief.")
    first = conversation.ask("What?", max_tokens=8)
    body = question("What?", png(7))
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    answer = client.post(CHAT, json=body).json()["choices"][0]["message"]
    assert answer["content"] == first.text
    body["messages"] += [answer, {"role": "user", "content": "And?"}]
    again = client.post(CHAT, json=body)
    assert again.status_code == 200


def test_completion_has_no_template(client: httpx.Client, model: FastVLM) -> None:
    ids = model.engine.tokenizer.encode("A red")
    by_text, by_list, by_ids = (
        client.post(COMPLETE, json={"prompt": prompt, "max_tokens": 5}).json() for prompt in ("A red", ["A red"], ids)
    )
    assert by_text["usage"]["prompt_tokens"] == len(ids)
    assert by_text["choices"][0]["text"] == by_list["choices"][0]["text"] == by_ids["choices"][0]["text"]


def test_completion_streams(client: httpx.Client) -> None:
    whole = client.post(COMPLETE, json={"prompt": "A red", "max_tokens": 5}).json()
    with client.stream("POST", COMPLETE, json={"prompt": "A red", "max_tokens": 5, "stream": True}) as response:
        found = events(response)
    assert "".join(event["choices"][0]["text"] for event in found) == whole["choices"][0]["text"]
    assert found[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_string_ends_the_answer(client: httpx.Client) -> None:
    text = client.post(CHAT, json=question("Tell me.", max_tokens=20)).json()["choices"][0]["message"]["content"]
    answer = client.post(CHAT, json=question("Tell me.", max_tokens=20, stop=[text[5:8]])).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (text[: text.find(text[5:8])], "stop")


def test_seed_repeats_an_answer(client: httpx.Client) -> None:
    answers = [
        client.post(CHAT, json=question("Tell me.", max_tokens=12, temperature=1.5, seed=seed)).json()
        for seed in (-1, -1, 2)
    ]
    one, same, other = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert one == same != other


def test_answer_follows_its_form(client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    answer = client.post(CHAT, json=question(max_tokens=50, response_format=form)).json()["choices"][0]
    assert json.loads(answer["message"]["content"])["n"] in (1, 2)
    chosen = client.post(COMPLETE, json={"prompt": "A", "choice": ["red", "blue"]}).json()["choices"][0]
    assert chosen["text"] in ("red", "blue")
    with client.stream("POST", CHAT, json=question(regex="ab{3}", stream=True, temperature=1.0)) as response:
        assert text_of(events(response)) == "abbb"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"grammar": 'start: "a"'}, "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}},
            "response_format",
        ),
    ],
)
def test_malformed_form_is_refused(client: httpx.Client, form: dict, param: str) -> None:
    response = client.post(CHAT, json=question(**form))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_models_and_health_describe_the_server(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "model"
    assert card["context_length"] == 2048
    assert client.get("/v1/models/model").json() == card
    assert client.get("/v1/models/other").status_code == 404
    health = client.get("/health").json()
    assert (health["status"], health["running"]) == ("ok", 0)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "messages", "missing_parameter"),
        (question(nonsense=1), 400, "nonsense", "unknown_parameter"),
        (question(n=2), 400, "n", "invalid_value"),
        (question(temperature=3), 400, "temperature", "invalid_value"),
        (question(max_tokens="5"), 400, "max_tokens", "invalid_value"),
        (question(tools=[{}]), 400, "tools", "invalid_value"),
        (question(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value"),
        (question(model="gpt"), 404, "model", "model_not_found"),
        (question("x " * 3000), 400, "messages", "context_length_exceeded"),
        (question("<image> and <image>", png()), 400, "messages", "invalid_prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text", None),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages[0]", "invalid_value"),
    ],
)
def test_refusal_names_the_field(client: httpx.Client, body: dict, status: int, param: str, code: str | None) -> None:
    response = client.post(CHAT, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert code is None or error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("url", ["http://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "data:text/plain,a"])
def test_image_is_not_read_from_elsewhere(client: httpx.Client, url: str) -> None:
    body = question("What?", png())
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    response = client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_image")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"nul", b'"\xff"', b'{"messages": "\\ud800"}', b"[" * 5000])
def test_body_that_is_not_json_is_refused(client: httpx.Client, content: bytes) -> None:
    response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_other_media_types_are_refused(client: httpx.Client) -> None:
    response = client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415


def test_unknown_paths_and_methods_are_refused(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    response = client.get(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("announced", [True, False])
def test_body_over_the_limit_is_refused(start_server: Start, announced: bool) -> None:
    content = json.dumps(question("x" * 2**20)).encode()
    with start_server(max_body_mb=1) as server:
        parts = content if announced else (content[n : n + 65536] for n in range(0, len(content), 65536))
        response = httpx.post(server.url + CHAT, content=parts, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_bodies_in_memory_are_bounded(start_server: Start) -> None:
    content = json.dumps(question("x" * (2**20 - 200))).encode()
    with start_server(max_body_mb=1) as server, contextlib.ExitStack() as stack:
        for _ in range(app.MAX_BODIES):
            stack.enter_context(sent(server, content, all_but=1))
        assert until(lambda: server.service.body_bytes == app.MAX_BODIES * (len(content) - 1))
        refused = httpx.post(server.url + CHAT, content=content, headers={"Content-Type": "application/json"})
        stack.close()
        assert until(lambda: server.service.body_bytes == server.service.in_flight == 0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")


def test_slow_host_of_an_image_does_not_hold_up_others(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 5.0)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        slow = question("What?", png())
        slow["messages"][0]["content"][0]["image_url"]["url"] = f"http://{place}/a.png"
        with start_server(allow_url=(place,)) as server:
            threads = [
                threading.Thread(target=httpx.post, args=(server.url + CHAT,), kwargs={"json": slow, "timeout": 30})
                for _ in range(10)
            ]
            for thread in threads:
                thread.start()
            assert until(lambda: server.service.in_flight == 10)
            start = time.monotonic()
            assert httpx.post(server.url + CHAT, json=question()).status_code == 200
            assert time.monotonic() - start < 4
            silent.close()
            for thread in threads:
                thread.join()


def test_limits_of_images_hold(start_server: Start) -> None:
    with start_server(max_images=1, max_pixels=1000) as server:
        two = httpx.post(server.url + CHAT, json=question("What?", png(), png()))
        large = httpx.post(server.url + CHAT, json=question("What?", png(0, (50, 50))))
        small = httpx.post(server.url + CHAT, json=question("What?", png(0, (20, 50))))
    assert (two.status_code, two.json()["error"]["code"]) == (400, "too_many_images")
    assert (large.status_code, large.json()["error"]["code"]) == (400, "invalid_image")
    assert "1000 pixels" in large.json()["error"]["message"]
    assert small.status_code == 200


def test_limit_of_tokens_ends_answers(start_server: Start) -> None:
    with start_server(max_tokens=3) as server:
        answer = httpx.post(server.url + CHAT, json=question(max_tokens=50)).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_full_queue_is_refused_at_once(start_server: Start) -> None:
    long = json.dumps(question(max_tokens=1000, stream=True)).encode()
    with start_server(batch_size=1, max_queue=1) as server:
        with sent(server, long), sent(server, long):
            assert until(lambda: server.service.in_flight == 2)
            refused = httpx.post(server.url + CHAT, json=question())
        assert until(lambda: server.service.in_flight == 0)
        accepted = httpx.post(server.url + CHAT, json=question())
    assert (refused.status_code, accepted.status_code) == (429, 200)
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_place(start_server: Start, stream: bool) -> None:
    with start_server(batch_size=1) as server:
        body = question(max_tokens=1000, stream=stream)
        with (
            pytest.raises(httpx.TimeoutException),
            httpx.stream("POST", server.url + CHAT, json=body, timeout=0.3) as response,
        ):
            next(response.iter_lines())
            raise httpx.ReadTimeout("enough")
        assert until(lambda: httpx.get(server.url + "/health").json()["running"] == 0, 5)
        assert not server.service.in_flight


def test_many_clients_get_their_own_answers(client: httpx.Client, model: FastVLM) -> None:
    questions = [f"Question {n}?" for n in range(12)]
    expected = [model.generate(png(n % 3), text, max_tokens=8).text for n, text in enumerate(questions)]
    answers = [""] * len(questions)

    def ask(n: int) -> None:
        answer = client.post(CHAT, json=question(questions[n], png(n % 3))).json()
        answers[n] = answer["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_answer_over_its_time_is_ended(start_server: Start) -> None:
    with start_server(timeout_s=0.2) as server:
        whole = httpx.post(server.url + CHAT, json=question(max_tokens=1000))
        with httpx.stream("POST", server.url + CHAT, json=question(max_tokens=1000, stream=True)) as response:
            found = events(response)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    assert found[-1]["error"]["code"] == "timeout"


def test_log_has_no_secrets(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastvlm.server")
    with start_server(api_key="very-secret-key") as server:
        headers = {"Authorization": "Bearer very-secret-key"}
        httpx.post(server.url + CHAT + "?token=hidden", json=question("a private question"), headers=headers)
        httpx.get(server.url + "/hidden", headers=headers)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert not [word for word in ("secret", "hidden", "private") if word in caplog.text]


def test_page_is_served_where_it_exists(client: httpx.Client) -> None:
    page = Path(__file__).parents[3] / "runtime" / "server" / "page" / "index.html"
    assert client.get("/").status_code == (200 if page.is_file() else 404)


def reported(content: list[dict]) -> list[tuple[str, list[str]]]:
    """The tokens and alternatives of a response."""
    for token in [token for one in content for token in (one, *one["top_logprobs"])]:
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
    return [(one["token"], [other["token"] for other in one["top_logprobs"]]) for one in content]


def test_log_probabilities_are_those_of_generate(client: httpx.Client, model: FastVLM) -> None:
    expected = model.generate(None, "What is it?", max_tokens=8, logprobs=2).logprobs
    assert expected is not None
    body = question("What is it?", logprobs=True, top_logprobs=2)
    whole = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        choices = [choice for event in events(response) for choice in event["choices"]]
    text = {n: model.engine.tokenizer.token_bytes(n).decode(errors="replace") for one in expected for n, _ in one.top}
    assert reported(whole["content"]) == [(text[one.token_id], [text[n] for n, _ in one.top]) for one in expected]
    values = [one.logprob for one in expected]
    assert [one["logprob"] for one in whole["content"]] == pytest.approx(values, rel=0, abs=5e-5)
    pieces = [one for choice in choices if "logprobs" in choice for one in choice["logprobs"]["content"]]
    assert reported(pieces) == reported(whole["content"])
    assert [one["logprob"] for one in pieces] == pytest.approx(values, rel=0, abs=5e-5)
    plain = client.post(CHAT, json=question("What is it?")).json()["choices"][0]
    assert plain["logprobs"] is None


def test_alternatives_need_log_probabilities(client: httpx.Client) -> None:
    response = client.post(CHAT, json=question(top_logprobs=2))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "top_logprobs")
    assert client.post(CHAT, json=question(logprobs=True, num_beams=2)).status_code == 400


def test_log_probabilities_of_completions_are_those_of_the_engine(client: httpx.Client, model: FastVLM) -> None:
    body = {"prompt": "A red", "max_tokens": 8, "logprobs": 2, "temperature": 1.0, "seed": 3}
    options = GenerationOptions(8, sampling=SamplingOptions(temperature=1.0, seed=3), logprobs=2)
    stream = model.engine.stream(Request((), (Message(RAW, "A red"),), None, options, 0.0))
    text, expected = "".join(stream), stream.generation.logprobs
    assert expected is not None
    whole = client.post(COMPLETE, json=body).json()["choices"][0]
    with client.stream("POST", COMPLETE, json={**body, "stream": True}) as response:
        pieces = [event["choices"][0]["logprobs"] for event in events(response) if "logprobs" in event["choices"][0]]
    found = whole["logprobs"]
    assert whole["text"] == text
    for reply in (found, {name: [one for piece in pieces for one in piece[name]] for name in found}):
        assert (reply["tokens"], reply["text_offset"]) == (found["tokens"], found["text_offset"])
        for n, one in enumerate(expected):
            token, likeliest = reply["tokens"][n], reply["top_logprobs"][n]
            assert reply["token_logprobs"][n] == likeliest[token] == pytest.approx(one.logprob, rel=0, abs=5e-5)
            assert list(likeliest.values())[:2] == pytest.approx([value for _, value in one.top], rel=0, abs=5e-5)
            assert len(likeliest) == 2 + (one.token_id not in [token_id for token_id, _ in one.top])
    assert client.post(COMPLETE, json={"prompt": "A red", "max_tokens": 1}).json()["choices"][0]["logprobs"] is None
    assert client.post(COMPLETE, json={**body, "logprobs": 21}).status_code == 400
