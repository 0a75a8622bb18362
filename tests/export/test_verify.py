"""The verification of exported folders, with faults that users have met or could meet."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.export.exporter import export
from fastvlm.export.verify import verify, verify_decoder
from fastvlm.models.errors import FastVLMError, ImageError, ModelFolderError, VerificationError
from fastvlm.models.random_checkpoint import RandomCheckpoint

from .edits import edit_weights, sign, swap_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(random_tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_tiny, tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"])
def test_one_flipped_bit_is_seen(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-100] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"does not match its manifest in {name}"):
        verify(copy, "random:tiny")


def test_hidden_files_are_skipped_and_other_strays_are_not(copy: Path) -> None:
    (copy / ".DS_Store").write_bytes(b"\0")
    (copy / "fastvithd.mlpackage" / ".DS_Store").write_bytes(b"\0")
    assert verify(copy, "random:tiny").passed
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="does not match its manifest in model.safetensors.index.json"):
        verify(copy, "random:tiny")


def test_package_of_another_export_is_seen(copy: Path, tmp_path: Path) -> None:
    other = export("random:tiny", tmp_path / "other", quant="fp16").folder
    shutil.rmtree(copy / "fastvithd.mlpackage")
    shutil.copytree(other / "fastvithd.mlpackage", copy / "fastvithd.mlpackage")
    with pytest.raises(ModelFolderError, match="from different exports"):
        verify(copy, "random:tiny")


@pytest.mark.parametrize("image_size", [None, "256", 100])
def test_odd_recipes_are_one_line(copy: Path, image_size: object) -> None:
    sign(copy, image_size=image_size)
    with pytest.raises(FastVLMError, match="image_size"):
        verify(copy, "random:tiny")


def test_a_good_folder_passes_with_the_figures_of_its_manifest(random_tiny: Path) -> None:
    result = verify(random_tiny, "random:tiny")
    assert result.passed
    figures = result.as_dict()
    assert set(figures.pop("modes_snr_db")) == {"float16", "float16-accumulate"}  # which an export does not measure
    assert figures == json.loads((random_tiny / "fastvlm.json").read_text())["parity"]


def test_stale_package_with_newer_weights_fails_even_if_signed(copy: Path, write_checkpoint: Callable) -> None:
    """A round of training moved the encoder by a twentieth; the package was forgotten."""
    generator = torch.Generator().manual_seed(0)

    def train(tensors: dict) -> None:
        for name, tensor in tensors.items():
            if "vision_tower" in name and tensor.ndim > 1:
                tensors[name] = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    result = verify(copy, write_checkpoint(change=train))
    assert not result.passed
    assert result.failures[0].startswith("encoder ")
    assert "more weights differ" in result.failures[4]
    assert result.decoder.weights.failures == []


def test_another_checkpoints_package_fails(copy: Path, write_checkpoint: Callable) -> None:
    def change(tensors: dict) -> None:
        for name in tensors:
            if name.endswith("convffn.fc1.weight"):
                tensors[name] = tensors[name].flip(0)

    result = verify(copy, write_checkpoint(change=change))
    assert not result.passed
    assert any(failure.startswith("image_features of drawings reach") for failure in result.failures)
    assert result.decoder.weights.failures == []


def test_images_of_a_folder_are_verified_on(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a folder"):
        verify(copy, "random:tiny", images=tmp_path / "none")
    samples = Path(__file__).resolve().parents[2] / "runtime" / "samples"
    result = verify(copy, "random:tiny", images=samples)
    assert result.passed
    assert result.as_dict() != json.loads((copy / "fastvlm.json").read_text())["parity"]


@pytest.mark.parametrize("lost", ["fastvlm.json", "config.json", "fastvithd.mlpackage", "model.safetensors"])
def test_incomplete_folders_are_one_line(copy: Path, lost: str) -> None:
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FastVLMError) as caught:
        verify(copy, "random:tiny")
    assert "\n" not in str(caught.value)


def test_folder_without_a_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"fastvlm.json does not exist"):
        verify(tmp_path, "random:tiny")
    with pytest.raises(ModelFolderError, match=r"gone is not a folder"):
        verify(tmp_path / "gone", "random:tiny")


def test_decoder_beyond_float16_fails(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        layer = "language_model.model.layers.2.mlp"
        for part in ("scales", "biases"):  # as large as float16 holds, and undone behind the product
            tensors[f"{layer}.up_proj.{part}"] *= np.float16(60_000)
            tensors[f"{layer}.down_proj.{part}"] /= np.float16(60_000)

    edit_weights(copy, change)
    result = verify(copy, "random:tiny")
    assert result.decoder.largest_layer == 2
    assert any("decoder layer 2 reaches" in failure for failure in result.failures)


def test_nan_in_the_decoder_is_an_error(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["multi_modal_projector.linear_0.weight"][0, 0] = np.nan

    edit_weights(copy, change)
    with pytest.raises(VerificationError, match=r"projector.linear_0.weight holds 1 NaN or infinite"):
        verify(copy, "random:tiny")


def test_scrambled_projector_fails(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        weight = tensors["multi_modal_projector.linear_0.weight"]
        tensors["multi_modal_projector.linear_0.weight"] = weight[::-1].copy()

    edit_weights(copy, change)
    result = verify(copy, "random:tiny")
    assert not result.passed
    assert any("logits reach" in failure for failure in result.failures)


@pytest.fixture(scope="module", params=["rtn", "gptq"])
def at_four_bits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "model"
    return export("random:tiny", out, decoder_bits=4, decoder_quantizer=request.param).folder


LAYERS = [f"model.layers.1.{name}" for name in ("self_attn.v_proj", "mlp.down_proj")] + ["model.embed_tokens"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("factor", "word"), [(1.02, "large"), (0.98, "small")])
def test_a_scale_of_the_decoder_that_is_off_by_two_percent_fails(
    at_four_bits: Path, tmp_path: Path, layer: str, factor: float, word: str
) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for part in ("scales", "biases"):
            tensors[f"language_model.{layer}.{part}"] *= np.float16(factor)

    folder = Path(shutil.copytree(at_four_bits, tmp_path / "model"))
    assert decoder_failures(folder) == []
    edit_weights(folder, change)
    (failure,) = decoder_failures(folder)
    assert re.fullmatch(rf"language_model.{layer}.weight is \d\.\d% too {word}", failure)


def test_two_swapped_rows_of_the_decoder_fail(at_four_bits: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for part in ("weight", "scales", "biases"):
            swap_rows(tensors[f"language_model.model.layers.2.mlp.up_proj.{part}"])

    folder = Path(shutil.copytree(at_four_bits, tmp_path / "model"))
    edit_weights(folder, change)
    assert decoder_failures(folder) == [
        "language_model.model.layers.2.mlp.up_proj.weight differs in 2 of 384 rows (the first: 3)"
    ]


def decoder_failures(folder: Path) -> list[str]:
    """Without the encoder, which is as it was."""
    features = np.random.default_rng(0).standard_normal((1, 16, 512), dtype=np.float32)
    return verify_decoder(folder, RandomCheckpoint("tiny"), features).weights.failures


@pytest.mark.parametrize("name", ["q_proj.bias", "input_layernorm.weight"])
def test_a_vector_that_differs_fails(copy: Path, name: str) -> None:
    full = f"language_model.model.layers.0.{'self_attn.' if 'proj' in name else ''}{name}"
    edit_weights(copy, lambda tensors: swap_rows(tensors[full]))
    (failure,) = decoder_failures(copy)
    assert failure.startswith(f"{full} must keep 60 dB ")


def test_export_of_another_size_is_one_line(copy: Path) -> None:
    with pytest.raises(VerificationError, match="another model's export"):
        verify_decoder(copy, RandomCheckpoint("0.5b"), np.zeros((1, 16, 512), np.float32))


def test_answers_are_compared_token_by_token(random_tiny: Path) -> None:
    logits = json.loads((random_tiny / "fastvlm.json").read_text())["parity"]["logits"]
    assert logits["greedy_tokens"] == 16
    assert logits["greedy_prefix"] <= 16 * logits["greedy_same"] + 1e-9
    assert 0 < logits["kl"] < 0.01


def test_no_answer_is_written_when_the_weights_are_too_large(
    random_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm.export.verify.MAX_RESIDENT_BYTES", 1e5)
    features = np.random.default_rng(0).standard_normal((1, 16, 512), dtype=np.float32)
    result = verify_decoder(random_tiny, RandomCheckpoint("tiny"), features)
    assert (result.greedy_tokens, result.greedy_same, result.greedy_prefix) == (0, None, 0)
    assert result.logits.snr_db > 25
