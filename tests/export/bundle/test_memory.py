"""The memory estimate of a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastvlm.export.bundle import memory
from fastvlm.export.bundle.contracts import CONTRACTS, MLX_VLM
from fastvlm.export.bundle.memory import PHONES, Estimate, estimate
from fastvlm.export.bundle.write import bundle
from fastvlm.models.errors import UsageError


def test_memory_counts_every_part(folders: dict[str, Path]) -> None:
    found = estimate(folders["mlx"], CONTRACTS["mlx-vlm"], 1000)
    assert found.parts["key-value cache"] == 2 * 3 * 2 * 32 * 1000 * 2  # layers, heads, width, float16
    assert found.parts["encoder, running"] == 3 * 64 * 64 * 64 * 4  # hidden width of stage 0 at a quarter of 256
    weights = (folders["mlx"] / "model.safetensors").stat().st_size
    assert found.parts["decoder"] + found.parts["encoder"] == weights
    assert found.total_bytes == sum(found.parts.values())
    twice = estimate(folders["mlx"], CONTRACTS["mlx-vlm"], 2000)
    assert twice.parts["key-value cache"] == 2 * found.parts["key-value cache"]
    wider = estimate(folders["mlx"], CONTRACTS["mlx-swift-lm"], 1000)  # its features are float32
    for part in ("key-value cache", "prefill"):
        assert wider.parts[part] == 2 * found.parts[part]


@pytest.mark.parametrize(("longest", "counted"), [(1024, 1024), (32768, 2048)])
def test_memory_counts_on_no_more_context_than_a_model_has(
    folders: dict[str, Path], tmp_path: Path, longest: int, counted: int
) -> None:
    folder = shutil.copytree(folders["mlx"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    assert estimate(folder, MLX_VLM).context == counted


@pytest.mark.parametrize("context", [0, -1, 10**9])
def test_context_beyond_the_model_is_refused(folders: dict[str, Path], context: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="context must be between 1 and the model's 32768 tokens"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "b", context=context)


@pytest.mark.parametrize(
    ("parts", "advice"),
    [
        ({"decoder": 1e9}, []),
        ({"decoder": 2.3e9}, ["4 GB (iPhone 12 mini): only with the entitlement"]),
        ({"decoder": 8e9}, ["4 GB", "6 GB", "8 GB (iPhone 15 Pro): will not fit", "the decoder with 4 bits"]),
        ({"decoder": 1e9, "key-value cache": 9e9}, ["4 GB", "6 GB", "8 GB", "less than 2048 tokens"]),
    ],
)
def test_advice_says_what_would_help(parts: dict[str, int], advice: list[str]) -> None:
    found = Estimate({name: int(size) for name, size in parts.items()}, 2048).advice
    assert len(found) == len(advice)
    assert all(expected in text for expected, text in zip(advice, found, strict=True))


def test_phones_name_their_source() -> None:
    assert all(phone.source.startswith("https://") and phone.limit_bytes < phone.entitled_bytes for phone in PHONES)
    assert memory.DEFAULT_CONTEXT == 2048
