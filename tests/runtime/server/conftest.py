"""A small random model, and servers that run in a thread of the tests."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from fastvlm.models._mlx import mx
from fastvlm.models.config import FastVLMConfig
from fastvlm.models.language import load_language
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.folder import open_folder
from fastvlm.runtime.server.run import Server, bind, serve
from fastvlm.runtime.server.settings import Settings
from fastvlm.runtime.tokenizer import Tokenizer

from ..conftest import IMAGE_TOKEN_INDEX, FakeEncoder, language_weights

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def question(text: str = "What?", *images: bytes, **options: Any) -> dict[str, Any]:
    """The body of a chat request with images."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": text}] if images else text
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a streamed response. Its last must be `[DONE]` or an error."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if lines[-1] == "[DONE]":
        lines.pop()
    else:
        assert "error" in json.loads(lines[-1])
    return [json.loads(line) for line in lines]


def text_of(found: list[dict[str, Any]]) -> str:
    """The text of streamed chat events."""
    return "".join(choice["delta"].get("content", "") for event in found for choice in event.get("choices", ()))


@contextlib.contextmanager
def running(model: FastVLM, **settings: Any) -> Iterator[Server]:
    """A server in a thread. It must end within its time."""
    given = Settings(**{"port": 0, "stop_timeout_s": 5.0, "name": "model", **settings})
    ready: queue.Queue[Server] = queue.Queue()
    thread = threading.Thread(target=serve, args=(model, given, bind(given), ready.put))
    thread.start()
    server = ready.get(timeout=30)
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def model(tokenizer_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> FastVLM:
    """A random model with a context of 2,048 positions and a fake encoder."""
    folder = tmp_path_factory.mktemp("server")
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(content)
    fields = {"image_token_index": IMAGE_TOKEN_INDEX, "tokenizer_model_max_length": 2048}
    config = FastVLMConfig.from_dict({**RandomCheckpoint("tiny").config_dict, **fields})
    (folder / "config.json").write_text(json.dumps({**RandomCheckpoint("tiny").config_dict, **fields}))
    (folder / "fastvithd.mlpackage").mkdir()
    (folder / "fastvithd.mlpackage" / "Manifest.json").write_text("{}")
    mx.save_safetensors(str(folder / "model.safetensors"), language_weights(config))
    opened = open_folder(folder)
    language = load_language(opened.weights(), config)
    return FastVLM(opened, FakeEncoder(config.image_size, config.mm_hidden_size), language, Tokenizer(folder), 1.0)


@pytest.fixture(scope="session")
def start_server(model: FastVLM) -> Callable[..., AbstractContextManager[Server]]:
    """`start_server(**settings)`: a context with a server of the small model."""
    return lambda **settings: running(model, **settings)


@pytest.fixture(scope="module")
def server(model: FastVLM) -> Iterator[Server]:
    """A server with the default settings, one per module."""
    with running(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """An HTTP client of that server."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
