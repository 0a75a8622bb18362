"""The decoder of an exported folder, with faults that verification must find."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastvlm.export.exporter import export
from fastvlm.export.verify import verify
from fastvlm.export.verify_decoder import verify_decoder
from fastvlm.models.errors import VerificationError
from fastvlm.models.random_checkpoint import RandomCheckpoint

from .edits import edit_weights, swap_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("random:tiny", tmp_path_factory.mktemp("verify") / "model").folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


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


def test_answers_are_compared_token_by_token(exported: Path) -> None:
    logits = json.loads((exported / "fastvlm.json").read_text())["parity"]["logits"]
    assert logits["greedy_tokens"] == 16
    assert logits["greedy_prefix"] <= 16 * logits["greedy_same"] + 1e-9
    assert 0 < logits["kl"] < 0.01


def test_no_answer_is_written_when_the_weights_are_too_large(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm.export.verify_decoder.MAX_RESIDENT_BYTES", 1e5)
    features = np.random.default_rng(0).standard_normal((1, 16, 512), dtype=np.float32)
    result = verify_decoder(exported, RandomCheckpoint("tiny"), features)
    assert (result.greedy_tokens, result.greedy_same, result.greedy_prefix) == (0, None, 0)
    assert result.logits.snr_db > 25
