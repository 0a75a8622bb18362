"""The encoder's architecture, derived from tensor names and shapes."""

from __future__ import annotations

import pytest

from fastvlm.models.errors import WeightsError
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.random_checkpoint import TINY_ENCODER, encoder_shapes


@pytest.mark.parametrize("config", [TINY_ENCODER, FastViTConfig()])
def test_architecture_is_derived_from_shapes(config: FastViTConfig) -> None:
    assert FastViTConfig.from_shapes(encoder_shapes(config)) == config


def test_mixed_forms_are_refused() -> None:
    shapes = encoder_shapes(TINY_ENCODER)
    shapes["network.6.reparam_conv.weight"] = (128, 1, 7, 7)
    with pytest.raises(WeightsError, match=r"mixes reparameterized tensors \(network.6.reparam_conv"):
        FastViTConfig.from_shapes(shapes)


@pytest.mark.parametrize("lost", ["conv_exp.se.expand.weight", "network.0.0.convffn.fc1.weight"])
def test_shapes_of_an_incomplete_encoder_are_refused(lost: str) -> None:
    shapes = encoder_shapes(TINY_ENCODER)
    del shapes[lost]
    with pytest.raises(WeightsError, match="not a whole FastViT"):
        FastViTConfig.from_shapes(shapes)


def test_wrong_number_of_stages_is_refused() -> None:
    shapes = {name: shape for name, shape in encoder_shapes(TINY_ENCODER).items() if not name.startswith("network.10")}
    with pytest.raises(WeightsError, match="reduce 32x"):
        FastViTConfig.from_shapes(shapes)
