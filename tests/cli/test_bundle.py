"""`fastvlm bundle` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def mlx_model(here: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported `random:tiny` with its encoder in MLX."""
    folder = tmp_path_factory.mktemp("bundle")
    done = here("export", "random:tiny", "--encoder", "mlx", "-o", "mlx-model", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "mlx-model"


def test_bundle_is_written_and_checked(fastvlm: Callable, here: Callable, mlx_model: Path, tmp_path: Path) -> None:
    done = fastvlm("bundle", mlx_model, "--for", "mlx-swift-lm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "for mlx-swift-lm, checked" in done.stdout
    assert "key-value cache" in done.stdout
    assert "6 GB phone (iPhone 13 Pro: 3.1 GB, 4.2 GB with the entitlement): fits" in done.stdout
    out = tmp_path / "mlx-model-mlx-swift-lm"  # the default folder
    good = here("bundle", out, "--for", "mlx-swift-lm", "--check", cwd=tmp_path)
    assert (good.returncode, good.stdout) == (0, f"{out} is valid for mlx-swift-lm\n")
    judged = here("bundle", out, "--for", "apple-app", "--check", "--json", cwd=tmp_path)
    assert judged.returncode == 1
    result = json.loads(judged.stdout)
    assert result["passed"] is False
    assert "image_token_index" in result["faults"][0]


def test_zip_is_written_to_out(here: Callable, mlx_model: Path, tmp_path: Path) -> None:
    done = here("bundle", mlx_model, "--for", "mlx-swift-lm", "--zip", "-o", "assets.zip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["assets.zip"]


@pytest.mark.parametrize(
    "words",
    [(), ("model",), ("--for", "mlx-vlm"), ("m", "--for", "android"), ("m", "--for", "mlx-vlm", "--check", "-o", "b")],
)
def test_wrong_usage_exits_with_2(here: Callable, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert here("bundle", *words, cwd=tmp_path).returncode == 2
