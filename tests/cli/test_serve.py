"""`fastvlm serve` as a user starts and stops it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm.cli.serve import _Lines
from fastvlm.models.errors import MachineError

pytestmark = pytest.mark.slow

QUESTION = {"messages": [{"role": "user", "content": "What?"}]}


class Served:
    """A running `fastvlm serve`."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.lines: list[str] = []
        for line in process.stderr:
            self.lines.append(line)
            if found := re.match(r"serving on (http://\S+)/v1", line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=lambda: self.lines.extend(process.stderr), daemon=True)
        self._reader.start()

    def post(self, key: str | None = None, **options: object) -> object:
        body = json.dumps({**QUESTION, **options}).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        return urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/chat/completions", body, headers))

    def end(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(10)
        return code


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`start(*options)`: a server on a free port."""
    with contextlib.ExitStack() as stack:

        def begin(*options: object, **environment: str) -> Served:
            command = [sys.executable, "-m", "fastvlm.cli.main", "serve", model, "--port", 0, *options]
            process = stack.enter_context(
                subprocess.Popen(
                    list(map(str, command)),
                    cwd=tmp_path,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **environment},
                )
            )
            stack.callback(process.kill)
            return Served(process)

        yield begin


def test_ctrl_c_ends_an_idle_server_with_0(start: Callable[..., Served]) -> None:
    served = start()
    with served.post(max_tokens=2) as response:
        assert json.load(response)["usage"]["completion_tokens"] <= 2
    assert served.end(signal.SIGINT) == 0
    assert any(re.search(r"POST /v1/chat/completions 200 \d+ ms", line) for line in served.lines)
    assert not any("Traceback" in line for line in served.lines)


def test_running_answer_ends_before_the_server(start: Callable[..., Served]) -> None:
    served = start("--max-tokens", 400)
    with served.post(stream=True, max_tokens=400) as response:
        assert response.readline().startswith(b"data: ")
        served.process.send_signal(signal.SIGTERM)
        rest = response.read()
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert served.end() == 0


def test_second_signal_ends_at_once(start: Callable[..., Served]) -> None:
    served = start("--max-tokens", 100_000)
    with served.post(stream=True, max_tokens=100_000, temperature=1.0) as response:
        assert response.readline().startswith(b"data: ")
        served.process.send_signal(signal.SIGTERM)
        response.readline()
        assert served.end(signal.SIGINT) in (130, 143)  # of whichever signal Python handles last


def test_key_of_the_environment_is_asked_for(start: Callable[..., Served]) -> None:
    served = start("--host", "0.0.0.0", "--quiet", FASTVLM_API_KEY="key-of-the-environment")
    served.url = served.url.replace("0.0.0.0", "127.0.0.1")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        served.post(max_tokens=1)
    with served.post("key-of-the-environment", max_tokens=1) as response:
        assert response.status == 200
    assert served.end(signal.SIGINT) == 0
    assert not any("key-of" in line for line in served.lines)
    assert not any(" 200 " in line for line in served.lines)


def test_port_in_use_is_one_line(fastvlm: Callable, one_line_error: Callable, model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_line_error(fastvlm("serve", model, "--port", port, cwd=tmp_path), f"port {port} of 127.0.0.1 is in use")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--host", "0.0.0.0"), ("--api-key",)),
        (("--api-key", "short"), ("--api-key must have at least 8",)),
        (("--allow-origin", "example.org"), ("--allow-origin must be an origin",)),
        (("--timeout", "0"), ("--timeout must be",)),
        ((), ("nothing-here is not a folder. Make a model folder",)),
    ],
)
def test_wrong_option_or_folder_is_one_line(
    fastvlm: Callable, one_line_error: Callable, tmp_path: Path, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    one_line_error(fastvlm("serve", tmp_path / "nothing-here", "--port", 0, *options, cwd=tmp_path), *parts)


def test_missing_extra_is_named(fastvlm: Callable, one_line_error: Callable, tmp_path: Path) -> None:
    code = "import sys; sys.modules['starlette'] = None; from fastvlm.cli.main import main; main()"
    done = fastvlm("serve", tmp_path, cwd=tmp_path, start=("-c", code))
    one_line_error(done, 'pip install "fastvlm[serve]"', "missing: starlette")


def test_other_commands_do_not_import_the_server() -> None:
    code = "import fastvlm.cli.main, sys; print(*sorted({'starlette', 'uvicorn', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_log_names_options_on_one_line() -> None:
    error = MachineError("it ended.\nLeave out encoder_process=True.", "encoder_process")
    record = logging.LogRecord("fastvlm.server", logging.ERROR, "", 0, "an answer failed: %s", (error,), None)
    assert _Lines().format(record)[8:] == " an answer failed: it ended. Leave out --encoder-process."
