"""Layer by layer, a decoder computes what the whole one does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastvlm.models._mlx import mx
from fastvlm.models.language import from_checkpoint, load_language, settled_config
from fastvlm.models.layerwise import checkpoint_reader, run_layerwise, saved_reader
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.decoder import DecoderScheme, saved_tensors

BEFORE, AFTER = [5, 9, 700], [1, 2, 3, 4]


def whole_logits(side: object, image: mx.array) -> np.ndarray:
    decoder = side.language_model
    parts = [decoder.embed(mx.array([BEFORE])), side.multi_modal_projector(image), decoder.embed(mx.array([AFTER]))]
    return np.array(decoder(mx.concatenate(parts, axis=1), all_positions=True)[0, -len(AFTER) :])


def test_logits_are_those_of_the_whole_decoder(tolerance: Callable[[str], float]) -> None:
    checkpoint = RandomCheckpoint("tiny")
    image = mx.random.normal((1, 16, 512), key=mx.random.key(0))
    found = run_layerwise(checkpoint_reader(checkpoint), checkpoint.config, BEFORE, image, AFTER)
    expected = whole_logits(from_checkpoint(checkpoint), image)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(np.array(found.logits), expected, rtol=0, atol=tolerance("decoder_logits_float32"))
    assert 0 < found.largest < 1000
    assert 0 <= found.largest_layer < 3


def test_quantized_logits_are_those_of_the_loaded_folder(tolerance: Callable[[str], float]) -> None:
    checkpoint = RandomCheckpoint("tiny")
    image = mx.random.normal((1, 16, 512), key=mx.random.key(1))
    weights = dict(saved_tensors(checkpoint, DecoderScheme(4, 64)))
    config = settled_config(weights, checkpoint.config, (64, 4))
    side = load_language(weights, config, quantization=(64, 4), expand=True)
    from dataclasses import replace

    read = saved_reader(weights, replace(config, quantization=(64, 4)))
    found = run_layerwise(read, config, BEFORE, image, AFTER)
    np.testing.assert_allclose(
        np.array(found.logits), whole_logits(side, image), rtol=0, atol=tolerance("decoder_logits_float32")
    )
    leftover = {name for name in weights if ".layers." in name}
    assert leftover == set()  # each was taken out, so that it could be freed
