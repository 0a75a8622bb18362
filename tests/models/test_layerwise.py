"""The layer-by-layer run computes the same as the whole decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastvlm.models._mlx import mx
from fastvlm.models.language import load_language, settled_config
from fastvlm.models.layerwise import (
    LayerwiseDecoder,
    LayerwiseRun,
    Prompt,
    checkpoint_reader,
    run_layerwise,
    saved_reader,
)
from fastvlm.models.quantization import Affine, Quantization
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.decoder import saved_tensors
from fastvlm.quant.decoder_scheme import DecoderScheme

QUANTIZATION = Quantization(Affine(64, 4))


def prompt(seed: int) -> Prompt:
    image = np.random.default_rng(seed).standard_normal((1, 16, 512), dtype=np.float32)
    return Prompt([5, 9, 700], image, [1, 2, 3, 4])


def whole_logits(side: object, asked: Prompt) -> np.ndarray:
    decoder, image = side.language_model, side.multi_modal_projector(mx.array(asked.image_features))
    before, after = (decoder.embed(mx.array([ids])) for ids in (asked.before, asked.after))
    return np.array(decoder(mx.concatenate([before, image, after], axis=1), all_positions=True)[0, -len(asked.after) :])


def test_logits_are_those_of_the_whole_decoder(language_side: Callable, tolerance: Callable[[str], float]) -> None:
    checkpoint = RandomCheckpoint("tiny")
    found = run_layerwise(LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config), prompt(0))
    expected = whole_logits(language_side(checkpoint), prompt(0))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=tolerance("decoder_logits_float32"))
    assert 0 < found.largest < 1000
    assert 0 <= found.largest_layer < 3


def test_quantized_logits_are_those_of_the_loaded_folder(tolerance: Callable[[str], float]) -> None:
    checkpoint = RandomCheckpoint("tiny")
    weights = dict(saved_tensors(checkpoint, DecoderScheme(4, 64)))
    config = replace(settled_config(weights, checkpoint.config, QUANTIZATION), quantization=QUANTIZATION)
    side = load_language(weights, config, quantization=QUANTIZATION, expand=True)
    found = run_layerwise(LayerwiseDecoder(saved_reader(weights, config), config), prompt(1))
    np.testing.assert_allclose(
        found.logits, whole_logits(side, prompt(1)), rtol=0, atol=tolerance("decoder_logits_float32")
    )
    assert weights == {}  # each was taken out, so that it could be freed


def test_every_tensor_is_seen_with_its_part() -> None:
    from mlx.utils import tree_flatten

    checkpoint = RandomCheckpoint("tiny")
    run = LayerwiseRun(LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config), prompt(2))
    seen = []
    for name, part in run.parts():
        seen += (
            [name] if isinstance(part, mx.array) else [f"{name}.{key}" for key, _ in tree_flatten(part.parameters())]
        )
    assert sorted(seen) == sorted(dict(saved_tensors(checkpoint, DecoderScheme(16))))
