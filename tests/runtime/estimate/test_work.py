"""The counted work: operations and weights."""

from __future__ import annotations

import pytest

from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.runtime.estimate.roofline import (
    published_config,
)
from fastvlm.runtime.estimate.work import body_weights, decoder_weights, encoder_cost, encoder_layers, prefill_flops


def test_encoder_costs_equal_the_census() -> None:
    """FastViTHD at 1024 px takes 487 GFLOP. 122.5 M of its 125 M parameters are weights of convolutions."""
    cost = encoder_cost(FastViTConfig(), 1024, bits=16)
    assert cost.flops == 486_707_822_592
    assert cost.weight_bytes == pytest.approx(245e6, rel=1e-3)
    small = encoder_cost(FastViTConfig(), 256, bits=16)
    assert 16 < cost.flops / small.flops < 16.5  # attention grows faster than the rest


def test_encoder_has_its_convolutions_and_products() -> None:
    """The census of the exported program has 198 convolutions and 12 matrix products at any size."""
    layers = list(encoder_layers(FastViTConfig(), 512))
    assert len(layers) == 198 + 12
    assert sum(layer.weights == 0 for layer in layers) == 12


def test_decoder_has_the_weights_of_the_half_billion() -> None:
    """Qwen2-0.5B has 494 M parameters, of which 0.06 M are biases and norms."""
    decoder = published_config().decoder
    assert decoder_weights(decoder) == pytest.approx(493.96e6, rel=1e-3)
    assert prefill_flops(decoder, 1) == pytest.approx(2 * decoder_weights(decoder), rel=1e-4)
    more = prefill_flops(decoder, 201) - prefill_flops(decoder, 200)
    assert more < 1.6 * body_weights(decoder) * 2  # attention grows, but logits are of the last position alone
