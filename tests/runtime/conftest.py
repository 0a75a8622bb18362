"""Fixtures: a small model folder with random weights, and an encoder in place of its package."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.config import FastVLMConfig
from fastvlm.models.language import expected_shapes, load_language
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.tokenizer_files import added_token
from fastvlm.runtime import engine as engine_module
from fastvlm.runtime import request as request_module
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.folder import open_folder
from fastvlm.runtime.generate import read_answer
from fastvlm.runtime.timings import LapClock
from fastvlm.runtime.tokenizer import Tokenizer

IMAGE_TOKEN_INDEX = 1023


class FakeEncoder:
    """Features that depend on every patch: its mean colour, times fixed weights."""

    name = "fake"
    projected = False
    compile_ms = 0.0

    def __init__(self, image_size: int, channels: int) -> None:
        self.image_size = image_size
        self.calls: list[np.ndarray] = []
        self._weights = np.random.default_rng(0).normal(size=(3, channels)).astype(np.float32)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        self.calls.append(pixel_values)
        side = self.image_size // 64
        patches = pixel_values.reshape(3, side, 64, side, 64).mean((2, 4))  # (3, side, side)
        return (patches.reshape(3, -1).T @ self._weights)[None]  # (1, side * side, channels)


class EventLog:
    """The launches of steps, the waits for results and the reads of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self._quiet = False
        for module, attribute, name in ((mx, "async_eval", "launch"), (mx, "eval", "wait")):
            monkeypatch.setattr(module, attribute, self._noted(getattr(module, attribute), name))
        for attribute in ("item", "tolist"):
            monkeypatch.setattr(mx.array, attribute, self._noted(getattr(mx.array, attribute), "read"))

    def _noted(self, function: Callable, name: str) -> Callable:
        def noted(*arguments: Any) -> Any:
            if not self._quiet:
                self.names.append(name)
            return function(*arguments)

        return noted

    def apart(self, function: Callable) -> Callable:
        """Returns `function` without its own events."""

        def quiet(*arguments: Any) -> Any:
            self._quiet = True
            try:
                return function(*arguments)
            finally:
                self._quiet = False

        return quiet


def language_weights(config: FastVLMConfig) -> dict[str, mx.array]:
    rng, drawn = np.random.default_rng(0), {}
    for name, shape in expected_shapes(config).items():
        noise = rng.normal(size=shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
        drawn[name] = mx.array((1 + 0.1 * noise if "norm" in name else noise).astype(np.float32))
    return drawn


@pytest.fixture(scope="session")
def tokenizer_files() -> dict[str, bytes]:
    """The tokenizer of `random:tiny`, with `<image>` added as by an export."""
    files = dict(RandomCheckpoint("tiny").tokenizer_files())
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["added_tokens"].append(added_token(IMAGE_TOKEN_INDEX, "<image>"))
    return {**files, "tokenizer.json": json.dumps(tokenizer).encode()}


@pytest.fixture
def write_tokenizer(tokenizer_files: dict[str, bytes], tmp_path: Path) -> Callable[..., Path]:
    """A folder with the tokenizer. Options change `tokenizer_config.json`, or with None drop an entry."""

    def write(**settings: Any) -> Path:
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)
        config = {**json.loads(tokenizer_files["tokenizer_config.json"]), **settings}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({name: value for name, value in config.items() if value is not None})
        )
        return folder

    return write


@pytest.fixture
def tokenizer(write_tokenizer: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(write_tokenizer())


@pytest.fixture
def write_folder(write_tokenizer: Callable[..., Path]) -> Callable[..., Path]:
    """A model folder with an empty package. Options change `config.json`, `manifest` the manifest (None: none)."""

    def write(manifest: dict[str, Any] | None = {}, **fields: Any) -> Path:  # noqa: B006 - never changed
        folder = write_tokenizer()
        config = {**RandomCheckpoint("tiny").config_dict, "image_token_index": IMAGE_TOKEN_INDEX, **fields}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "fastvithd.mlpackage").mkdir()
        (folder / "fastvithd.mlpackage" / "Manifest.json").write_text("{}")
        mx.save_safetensors(str(folder / "model.safetensors"), language_weights(FastVLMConfig.from_dict(config)))
        if manifest is not None:
            table = {
                path.relative_to(folder).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            whole = {"format": 1, "trained": True, "notes": [], "files": table, **manifest}
            (folder / "fastvlm.json").write_text(json.dumps(whole))
        return folder

    return write


@pytest.fixture
def open_vlm() -> Callable[[Path], FastVLM]:
    """The model in a folder, with a `FakeEncoder` in place of the package."""

    def load(folder: Path) -> FastVLM:
        opened = open_folder(folder)
        config = opened.config
        language = load_language(opened.weights(), config, quantization=config.quantization)
        encoder = FakeEncoder(config.image_size, config.mm_hidden_size)
        return FastVLM(opened, encoder, language, Tokenizer(folder), load_ms=1.0)

    return load


@pytest.fixture
def vlm(write_folder: Callable[..., Path], open_vlm: Callable[[Path], FastVLM]) -> FastVLM:
    return open_vlm(write_folder())


class StandingClock:
    """A clock that advances only during the calls that `slow` names, so a busy machine does not change it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self._monkeypatch = monkeypatch

    def __call__(self) -> float:
        return self.seconds

    def slow(self, owner: object, name: str, seconds: float) -> None:
        """Makes each call of `owner.name` take a time from here on."""
        call = getattr(owner, name)

        def slowly(*args: Any, **named: Any) -> Any:
            self.seconds += seconds
            return call(*args, **named)

        self._monkeypatch.setattr(owner, name, slowly)


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    """The clock that times answers."""
    clock = StandingClock(monkeypatch)
    for module in (engine_module, request_module):
        monkeypatch.setattr(module, "LapClock", functools.partial(LapClock, clock))
    monkeypatch.setattr(engine_module, "read_answer", functools.partial(read_answer, clock=clock))
    return clock
