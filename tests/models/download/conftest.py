"""The local server for the download tests."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

serving = runpy.run_path(str(Path(__file__).resolve().parents[2] / "hub_server.py"))["serving"]


@pytest.fixture
def server() -> Iterator[Any]:
    """The server of `tests/hub_server.py`."""
    with serving() as state:
        yield state


@pytest.fixture
def serve_repository(server: Any) -> Callable[[str, dict[str, bytes]], None]:
    """Returns `serve_repository("owner/name", files)`."""
    return server.add_repository
