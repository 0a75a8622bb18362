"""Bundles of small models: the clients' contracts with the small encoder's numbers in place of FastViTHD's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm.export.bundle.contracts import APPLE_APP, CONTRACTS, MLX_VLM
from fastvlm.export.bundle.write import bundle
from fastvlm.export.exporter import export
from fastvlm.models.random_checkpoint import TINY_ENCODER


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`random:tiny` by encoder: in a package, and in MLX."""
    root = tmp_path_factory.mktemp("folders")
    return {
        "coreml": export("random:tiny", root / "coreml", quant="fp16").folder,
        "mlx": export("random:tiny", root / "mlx", encoder="mlx").folder,
    }


@pytest.fixture(scope="session", autouse=True)
def small_contracts() -> None:
    """The app's and mlx-vlm's code hold FastViTHD's numbers at 1024 px; random:tiny has others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTRACTS, "apple-app", replace(APPLE_APP, image_size=256, channels=512))
        patch.setitem(CONTRACTS, "mlx-vlm", replace(MLX_VLM, architecture=replace(TINY_ENCODER, reparameterized=True)))
        yield


@pytest.fixture(scope="session")
def bundles(folders: dict[str, Path], small_contracts: None, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A bundle by client."""
    root = tmp_path_factory.mktemp("bundles")
    encoders = {"apple-app": "coreml", "mlx-swift-lm": "mlx", "mlx-vlm": "mlx"}
    return {client: bundle(folders[encoder], client, root / client).path for client, encoder in encoders.items()}
