"""The wait after an answer: it sees an encoder's process that ended meanwhile."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent


class Model:
    """Answers; its encoder's process gets another number when it was restarted."""

    def __init__(self, pids: list[int | None]) -> None:
        self._pids = iter(pids)
        self.engine = SimpleNamespace(encoder=SimpleNamespace(name="coreml", pid=next(self._pids)))
        self.asked: list[np.ndarray] = []

    def generate(self, image: np.ndarray, prompt: str, **options: object) -> None:
        self.asked.append(image)
        self.engine.encoder.pid = next(self._pids)


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], None]:
    monkeypatch.syspath_prepend(str(HERE))
    script = importlib.import_module("after_answer")

    def run(model: Model) -> None:
        monkeypatch.setattr(script.fastvlm, "load", lambda *_, **__: model, raising=False)
        monkeypatch.setattr(sys, "argv", ["after_answer.py", "folder", "--seconds", "0.05"])
        script.main()

    return run


def test_process_that_survives_passes(wait: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model([1, 7, 7, 7, 7])
    wait(model)
    found = json.loads(capsys.readouterr().out)
    assert found["own_process"] and found["answers"] == 3 and found["allocations"] > 0
    assert not any((a == b).all() for a, b in zip(model.asked, model.asked[1:], strict=False))


@pytest.mark.parametrize("pids", [[1, 7, 8, 8], [1, 7, 7, 9], [1, 7, None, 7]])
def test_process_that_was_started_again_fails(wait: Callable, pids: list[int | None]) -> None:
    with pytest.raises(SystemExit, match="the encoder process ended while nothing was asked of it"):
        wait(Model(pids))


def test_encoder_in_this_process_is_said_to_be(wait: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    wait(Model([None] * 4))
    assert json.loads(capsys.readouterr().out)["own_process"] is False


def test_wait_after_the_last_answer_is_watched_too(wait: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("after_answer")
    model, waits = Model([1, 7, 7, 7]), []

    def allocate(seconds: float) -> int:
        waits.append(seconds)
        if len(waits) == 3:
            model.engine.encoder.pid = None
        return 1

    monkeypatch.setattr(script, "allocate", allocate)
    with pytest.raises(SystemExit, match="ended"):
        wait(model)
