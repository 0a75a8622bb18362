"""The bits of a mixed decoder go to the layers with the largest saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.language import load_language
from fastvlm.models.layerwise import LayerwiseDecoder, Prompt, checkpoint_reader, run_layerwise, saved_reader
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.decoder import saved_tensors
from fastvlm.quant.decoder_scheme import DecoderScheme, decoder_scheme
from fastvlm.quant.decoder_sensitivity import chosen_bits, mixed_bits
from fastvlm.quant.metrics import kl_divergence
from fastvlm.quant.prompts import calibration_prompts, probe_prompt

SCHEME = DecoderScheme("mixed", avg_bits=5.5)


def prompts(checkpoint: RandomCheckpoint) -> list[Prompt]:
    features = np.random.default_rng(0).standard_normal((1, 16, 512), dtype=np.float32)
    return calibration_prompts(checkpoint.tokenizer_files()["tokenizer.json"], [features], 1024)


@cache
def measured() -> dict[str, int]:
    checkpoint = RandomCheckpoint("tiny")
    return mixed_bits(checkpoint, SCHEME, prompts(checkpoint), lambda _: None)


def test_costly_and_small_layers_get_more_bits() -> None:
    costs, sizes = {"a": 1.0, "b": 1e-3, "c": 1.0}, {"a": 100, "b": 100, "c": 100_000}
    bits = chosen_bits(costs, sizes, replace(SCHEME, avg_bits=4.506))
    assert bits == {"a": 8, "b": 6, "c": 4}


@pytest.mark.parametrize("avg_bits", [4.5, 4.7, 6.0, 8.0, 8.5])
def test_average_is_kept_and_used_up(avg_bits: float) -> None:
    rng = np.random.default_rng(0)
    sizes = {str(k): int(rng.integers(1, 20)) * 1000 for k in range(60)}
    costs = {name: float(rng.exponential()) for name in sizes}
    bits = chosen_bits(costs, sizes, replace(SCHEME, avg_bits=avg_bits))
    average = 0.5 + sum(sizes[name] * bits[name] for name in sizes) / sum(sizes.values())
    assert avg_bits - 0.07 < average <= avg_bits  # the largest of the layers is 6 % of all


def test_a_matrix_that_matters_more_is_measured_to(write_checkpoint: Callable[..., Path]) -> None:
    """A value projection that is ten times as large has a larger measured cost."""
    layer = "model.layers.1.self_attn.v_proj.weight"

    def enlarge(tensors: dict) -> None:
        tensors[layer] *= 10

    checkpoint = FolderCheckpoint(write_checkpoint(change=enlarge))
    found = mixed_bits(checkpoint, SCHEME, prompts(RandomCheckpoint("tiny")), lambda _: None)
    name = f"language_model.{layer.removesuffix('.weight')}"
    assert found[name] == 8
    assert measured()[name] < 8


@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
def test_mixed_diverges_less_than_uniform_bits_of_one_size(
    golden: Path, tolerance: Callable[[str], float], name: str
) -> None:
    checkpoint = FolderCheckpoint(golden / name)
    tokenizer, rows = checkpoint.tokenizer_files()["tokenizer.json"], checkpoint.config.decoder.vocab_size
    features = [array for key, array in np.load(golden / name / "expected.npz").items() if key.endswith("features")]
    asked, calibration = probe_prompt(tokenizer, features[-1], rows), calibration_prompts(tokenizer, features[:1], rows)
    original = run_layerwise(LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config), asked)
    kl, nbytes = [], []
    mixed = DecoderScheme("mixed", 32, avg_bits=6.0)
    for scheme in (DecoderScheme(5, 32), mixed.with_layers(mixed_bits(checkpoint, mixed, calibration, lambda _: None))):
        weights = dict(saved_tensors(checkpoint, scheme))
        nbytes.append(sum(array.nbytes for array in weights.values()))
        config = replace(checkpoint.config, quantization=scheme.quantization())
        saved = run_layerwise(LayerwiseDecoder(saved_reader(weights, config), config), asked)
        kl.append(kl_divergence(original.logits, saved.logits))
    assert nbytes[1] <= nbytes[0]
    assert kl[1] < tolerance("mixed_divergence") * kl[0]


def test_mlx_lm_reads_mixed_layers_as_we_do(tmp_path: Path, tolerance: Callable[[str], float]) -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    checkpoint = RandomCheckpoint("tiny")
    scheme = SCHEME.with_layers(measured())
    assert len(set(scheme.layers.values())) > 1
    quantization, prefix = scheme.quantization(), "language_model."
    weights = dict(saved_tensors(checkpoint, scheme))
    theirs = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), theirs)
    written = {name.removeprefix(prefix): value for name, value in quantization.as_dict().items()}
    config = {**checkpoint.config_dict, "model_type": "qwen2", "quantization": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = utils.load_model(tmp_path)
    ids = mx.array([[5], [17], [90], [3]])  # alone, since attention over several tokens may add up in another order
    ours = load_language(weights, checkpoint.config, quantization=quantization, expand=False)
    expected = ours.language_model(ours.language_model.embed(ids), all_positions=True)
    np.testing.assert_array_equal(np.array(model(ids).astype(mx.float32)), np.array(expected.astype(mx.float32)))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("8",), DecoderScheme(8)),
        ((4,), DecoderScheme(4, quantizer="gptq")),
        (("5", "rtn"), DecoderScheme(5, quantizer="rtn")),
        (("mixed",), DecoderScheme("mixed", quantizer="gptq", avg_bits=5.0)),
        (("mixed", "rtn", 6.5), DecoderScheme("mixed", quantizer="rtn", avg_bits=6.5)),
    ],
)
def test_arguments_that_are_left_out_have_defaults(asked: tuple, expected: DecoderScheme) -> None:
    assert decoder_scheme(*asked) == expected
