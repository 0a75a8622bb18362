"""Comparisons in float32 are not shortened by hardware."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastvlm.models.float32 import TF32_VARIABLE, disable_tf32

pytestmark = pytest.mark.slow


def test_products_are_kept_in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TF32_VARIABLE)
    disable_tf32()
    assert os.environ[TF32_VARIABLE] == "0"


def test_a_users_choice_of_precision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TF32_VARIABLE, "1")
    disable_tf32()
    assert os.environ[TF32_VARIABLE] == "1"


@pytest.mark.parametrize(
    "words", [["verify", "nowhere", "--against", "nothing"], ["export", "nothing", "-o", "nowhere"]]
)
def test_command_asks_for_float32_before_mlx_is_imported(words: list[str]) -> None:
    code = f"""
import os, sys
from importlib.abc import MetaPathFinder
os.environ.pop({TF32_VARIABLE!r}, None)
class Seen(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "mlx" and os.environ.get({TF32_VARIABLE!r}) != "0":
            os._exit(7)
sys.meta_path.insert(0, Seen())
sys.argv = ["fastvlm", *{words!r}]
from fastvlm.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing" in done.stderr, done.stderr


def test_suite_runs_in_full_float32() -> None:
    assert os.environ[TF32_VARIABLE] == "0"
