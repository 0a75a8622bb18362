"""The soak and the fuzz of `tests/soak`, for a few seconds each."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest

from fastvlm.runtime.server.run import Server

from ..processes import until

pytestmark = pytest.mark.slow

Start = Callable[..., AbstractContextManager[Server]]
SOAK = Path(__file__).resolve().parents[2] / "soak"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SOAK / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for a script that imports another
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    pytest.importorskip("schemathesis")
    return script("fuzz_server")


def test_fuzzed_requests_get_documented_responses(
    fuzz: ModuleType, start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with start_server(max_tokens=4) as server:
        statuses, faults = fuzz.fuzz(server.url, 40, 0)
    assert faults == []
    assert {status for _, status in statuses} >= {200, 400}
    assert "Traceback" not in caplog.text


def test_clients_of_all_kinds_get_what_they_should(
    fuzz: ModuleType, start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("psutil")
    with start_server(max_tokens=400, max_body_mb=1, max_queue=256) as server:
        soak = script("soak_server").Soak(server.url, 150, 0)
        soak.work(8, os.getpid())
        assert until(lambda: server.service.in_flight == 0)
    assert soak.faults == []
    assert len(soak.counts) == 5
    assert "Traceback" not in caplog.text
