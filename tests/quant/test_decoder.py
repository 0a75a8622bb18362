"""The saved decoder: plain as mlx-lm's, calibrated closer to the original, mixed where the bits matter most."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.models._mlx import mx, nn
from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import WeightsError
from fastvlm.models.kv_cache import KVCache
from fastvlm.models.language import load_language
from fastvlm.models.layerwise import (
    LayerwiseDecoder,
    Prompt,
    checkpoint_reader,
    embedded,
    run_layerwise,
    saved_reader,
)
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.tensor_names import saved_name
from fastvlm.quant.affine_groups import Packed
from fastvlm.quant.decoder import PARTS, check_language_tensors, chosen_bits, dequantized, mixed_bits, saved_tensors
from fastvlm.quant.decoder_scheme import DecoderScheme, decoder_scheme
from fastvlm.quant.metrics import compare, kl_divergence
from fastvlm.quant.prompts import calibration_prompts, probe_prompt

SCHEME = DecoderScheme("mixed", avg_bits=5.5)

FEW = 10
"""The calibration prompts of a test, of some 30."""


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quantized_matrices_equal_mlx_layers(bits: int, group_size: int) -> None:
    checkpoint = RandomCheckpoint("tiny")
    saved = dict(saved_tensors(checkpoint, DecoderScheme(bits, group_size)))
    name = "model.layers.1.mlp.down_proj.weight"
    layer = nn.Linear(384, 128, bias=False)
    layer.weight = mx.array(checkpoint.read(name, "mlx")).astype(mx.float16)
    expected = layer.to_quantized(group_size, bits)
    stem = saved_name(name).removesuffix("weight")
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(saved[stem + part], expected[part])


def test_matrices_are_rounded_on_the_cpu_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may round differently, but a checkpoint must always give the same bytes."""
    streams, quantize = [], mx.quantize

    def watched(weight: mx.array, **options: Any) -> tuple[mx.array, ...]:
        streams.append(options.get("stream"))
        return quantize(weight, **options)

    monkeypatch.setattr(mx, "quantize", watched)
    list(saved_tensors(RandomCheckpoint("tiny"), DecoderScheme(8, 64, True)))
    assert streams
    assert set(streams) == {mx.cpu}


def test_quantized_layers_are_those_of_mlx_lm() -> None:
    mlx_qwen2 = pytest.importorskip("mlx_lm.models.qwen2", reason="mlx-lm is not installed")
    checkpoint = RandomCheckpoint("tiny")
    decoder = checkpoint.config.decoder
    fields = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps",
              "vocab_size", "num_key_value_heads", "rope_theta", "tie_word_embeddings")  # fmt: skip
    args = {field: getattr(decoder, field) for field in fields}
    theirs = mlx_qwen2.Model(mlx_qwen2.ModelArgs(model_type="qwen2", **args))
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    quantized, _ = quantize_model(theirs, {"model_type": "qwen2"}, 64, 4)
    expected = {f"language_model.{name}" for name, _ in tree_flatten(quantized.parameters())}
    ours = {name for name, _ in saved_tensors(checkpoint, DecoderScheme(4, 64)) if name.startswith("language_model.")}
    assert ours == expected


def test_untied_head_is_saved_and_a_redundant_one_is_not(write_checkpoint: Callable[..., Path]) -> None:
    def untie(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    def repeat(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    untied = check_language_tensors(FolderCheckpoint(write_checkpoint(change=untie)))
    tied = check_language_tensors(FolderCheckpoint(write_checkpoint(change=repeat)))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


def test_table_shorter_than_the_vocabulary_is_accepted(write_checkpoint: Callable[..., Path]) -> None:
    def cut(tensors: dict) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000]

    shapes = check_language_tensors(FolderCheckpoint(write_checkpoint(change=cut)))
    assert shapes["model.embed_tokens.weight"] == (1000, 128)


def test_unexpected_tensors_are_named(write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(change=lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(WeightsError, match=r"1 unexpected: .*extra\.weight"):
        check_language_tensors(FolderCheckpoint(folder))


def prompts(checkpoint: RandomCheckpoint) -> list[Prompt]:
    features = np.random.default_rng(0).standard_normal((1, 16, 512), dtype=np.float32)
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    return calibration_prompts(checkpoint.tokenizer_files()["tokenizer.json"], [features], rows)[:FEW]


@pytest.mark.slow
@pytest.mark.parametrize("quantize_embeddings", [True, False])
def test_calibrated_tensors_have_the_form_of_plain_ones(quantize_embeddings: bool) -> None:
    checkpoint = RandomCheckpoint("tiny")
    plain, calibrated = (
        dict(saved_tensors(checkpoint, DecoderScheme(5, 64, quantize_embeddings, quantizer), prompts(checkpoint)))
        for quantizer in ("rtn", "gptq")
    )
    assert {name: (array.shape, array.dtype) for name, array in plain.items()} == {
        name: (array.shape, array.dtype) for name, array in calibrated.items()
    }
    for name, left in plain.items():
        right = calibrated[name]
        if left.dtype == mx.float16 and not name.endswith((".scales", ".biases")):
            assert mx.array_equal(left, right), name  # nothing else is touched


@pytest.mark.slow
def test_calibrated_tensors_repeat_to_the_byte() -> None:
    checkpoint = RandomCheckpoint("tiny")
    first, second = (
        dict(saved_tensors(checkpoint, DecoderScheme(4, quantizer="gptq"), prompts(checkpoint))) for _ in range(2)
    )
    assert all(mx.array_equal(array, second[name]) for name, array in first.items())


def test_tied_table_is_calibrated_as_a_head(tolerance: Callable[[str], float]) -> None:
    """Products with hidden states keep more, and the rows that are looked up keep as much as in nearest levels."""
    checkpoint, scheme = RandomCheckpoint("tiny"), DecoderScheme(4, quantizer="gptq")
    table = np.array(checkpoint.read("model.embed_tokens.weight", "mlx"))
    weights = dict(saved_tensors(checkpoint, scheme, prompts(checkpoint)))
    layer, affine = "language_model.model.embed_tokens", scheme.affine("")
    saved = np.array(dequantized(Packed(*(np.array(weights[f"{layer}.{part}"]) for part in PARTS)), affine))
    nearest = np.array(mx.dequantize(*mx.quantize(mx.array(table), **affine.as_dict()), **affine.as_dict()))
    unseen = probe_prompt(checkpoint.tokenizer_files()["tokenizer.json"], np.ones((1, 4, 512), np.float32), len(table))
    hidden = final_states(checkpoint, unseen)
    noises = [np.square(hidden @ (found - table).T).sum() for found in (nearest, saved)]
    assert 10 * np.log10(noises[0] / noises[1]) > tolerance("tied_head_gain_db")
    assert ((saved - table) ** 2).sum() < 1.05 * ((nearest - table) ** 2).sum()


def final_states(checkpoint: RandomCheckpoint, prompt: Prompt) -> np.ndarray:
    """Returns the normed hidden states (L, D) of the original decoder."""
    decoder = LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config)
    x = embedded(prompt, decoder.projector(), decoder.table())
    for block in decoder.blocks():
        x = block(x, "causal", KVCache())
    return np.array(decoder.norm()(x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
def test_calibrated_logits_are_closer_on_unseen_input(
    golden: Path, tolerance: Callable[[str], float], name: str
) -> None:
    checkpoint = FolderCheckpoint(golden / name)
    tokenizer, rows = checkpoint.tokenizer_files()["tokenizer.json"], checkpoint.config.decoder.vocab_size
    features = [array for key, array in np.load(golden / name / "expected.npz").items() if key.endswith("features")]
    asked = probe_prompt(tokenizer, features[-1], rows)
    original = run_layerwise(LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config), asked)
    snr = {}
    for quantizer in ("rtn", "gptq"):
        scheme = DecoderScheme(4, 32, quantizer=quantizer)
        weights = dict(saved_tensors(checkpoint, scheme, calibration_prompts(tokenizer, features[:1], rows)[:FEW]))
        config = replace(checkpoint.config, quantization=scheme.quantization())
        saved = run_layerwise(LayerwiseDecoder(saved_reader(weights, config), config), asked)
        snr[quantizer] = compare(original.logits, saved.logits, "logits").snr_db
    assert snr["gptq"] > snr["rtn"] + tolerance("gptq_logits_gain_db")


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
