"""The `.aimodel` of an encoder: its bytes, what Apple's interpreter computes with it, and files that are none."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.export.coreai_asset import make_repeatable, read_metadata, run_images, summary, write_asset
from fastvlm.export.recipe import PackageInterface
from fastvlm.export.rewrite import ProjectorConvs, rewrite
from fastvlm.models.errors import CrashError, PackageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import ASSET_NAME
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.encoder import apply_weights, convolutions, stored_by_plan
from fastvlm.quant.metrics import compare
from fastvlm.quant.schemes import PaletteWeight, StoredWeight, is_candidate, with_groups

needs_coreai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None,
    reason="the extra coreai is not installed (Apple's wheels: Linux x86_64, macOS 26 and later)",
)

SCHEMES = ("int8", "pal8", "pal6", "pal4")
SIZE = 128


INTERFACE = PackageInterface(io="float16", with_projector=True)


def stored_network() -> tuple[torch.nn.Sequential, dict[str, StoredWeight]]:
    """A small encoder and projector with weights in all schemes in turn, 4-bit palettes in groups of channels."""
    checkpoint = RandomCheckpoint("tiny")
    with torch.no_grad():
        network = rewrite(
            FastViT.from_checkpoint(checkpoint), SIZE, projector=ProjectorConvs.from_checkpoint(checkpoint)
        )
    convs = convolutions(network)
    chosen = [one for one, conv in convs.items() if is_candidate(conv.weight.numpy())]
    stored = stored_by_plan(network, {one: SCHEMES[i % len(SCHEMES)] for i, one in enumerate(chosen)})
    stored = {one: with_groups(convs[one].weight.numpy(), weight) for one, weight in stored.items()}
    assert any(isinstance(weight, PaletteWeight) and weight.lut.ndim == 2 for weight in stored.values())
    apply_weights(network, stored, {})
    return network, stored


def files(asset: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in asset.iterdir()}


@pytest.fixture(scope="module")
def asset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asset") / ASSET_NAME
    write_asset(*stored_network(), SIZE, path, INTERFACE, {"fastvlm.quant": "all"})
    return path


@needs_coreai
@pytest.mark.slow
def test_asset_computes_what_torch_computes_with_its_weights(asset: Path, tolerance: Callable[[str], float]) -> None:
    images = [np.random.default_rng(seed).random((1, 3, SIZE, SIZE), dtype=np.float32) for seed in range(2)]
    network, _ = stored_network()
    found = run_images(asset, images, INTERFACE)
    for image, features in zip(images, found, strict=True):
        with torch.inference_mode():
            expected = network(torch.from_numpy(image)).numpy()
        assert compare(expected, features, "features").snr_db > tolerance("coreai_asset_snr_db")
    assert not np.array_equal(*found)


@needs_coreai
@pytest.mark.slow
def test_files_have_no_trace_of_the_run(asset: Path) -> None:
    metadata, found = read_metadata(asset), files(asset)
    assert [path.name for path in asset.parent.iterdir()] == [ASSET_NAME]
    assert found["main.hash"] == hashlib.sha256(found["main.mlirb"]).digest()
    assert metadata["author"] == "fastvlm" and "creationDate" not in metadata
    assert all(str(asset.parent).encode() not in content for content in found.values())


@needs_coreai
@pytest.mark.slow
def test_metadata_has_one_order_of_its_keys(asset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(asset, tmp_path / ASSET_NAME))
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["creatorDefinedMetadata"] = {"b": "2", "a": "1"}
    (copy / "metadata.json").write_text(json.dumps(metadata))
    make_repeatable(copy)
    assert list(read_metadata(copy)["creatorDefinedMetadata"]) == ["a", "b"]


@needs_coreai
@pytest.mark.slow
def test_summary_has_interface_and_stored_types(asset: Path) -> None:
    found = summary(asset)
    assert found["inputs"].keys() == {"images"} and found["outputs"].keys() == {"image_embeds"}
    assert "Float16" in found["inputs"]["images"] and "Float16" in found["outputs"]["image_embeds"]
    assert found["version"] == "27.0" and {"Int8", "UInt8", "UInt6", "UInt4"} <= found["numbers"].keys()
    assert found["operations"]["conv2d"] == len(convolutions(stored_network()[0]))


@pytest.mark.parametrize("task", [summary, lambda path: run_images(path, [], INTERFACE), read_metadata])
def test_asset_that_is_missing_or_has_no_program_is_one_line(tmp_path: Path, task: Callable[[Path], object]) -> None:
    with pytest.raises(PackageError, match=r"fastvithd\.aimodel does not exist"):
        task(tmp_path / ASSET_NAME)
    (tmp_path / ASSET_NAME).mkdir()
    with pytest.raises(PackageError, match=r"it has no main\.mlirb"):
        task(tmp_path / ASSET_NAME)


@needs_coreai
@pytest.mark.slow
def test_damaged_program_is_one_line(asset: Path, tmp_path: Path) -> None:
    damaged = tmp_path / ASSET_NAME
    damaged.mkdir()
    (damaged / "metadata.json").write_bytes(files(asset)["metadata.json"])
    (damaged / "main.mlirb").write_bytes(files(asset)["main.mlirb"][:5000])
    with pytest.raises(CrashError, match=r"Core AI: its process .*was not run") as raised:
        run_images(damaged, [np.zeros((1, 3, SIZE, SIZE), np.float32)], INTERFACE)
    assert "\n" not in str(raised.value)


def test_metadata_that_is_not_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "main.mlirb").write_bytes(b"")
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(PackageError, match=r"metadata\.json"):
        read_metadata(tmp_path)


def test_foreign_program_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "main.mlirb").write_bytes(b"something else")
    (tmp_path / "metadata.json").write_text(json.dumps({"creationDate": "today"}))
    before = files(tmp_path)
    with pytest.raises(PackageError, match="not MLIR bytecode"):
        make_repeatable(tmp_path)
    assert files(tmp_path) == before
