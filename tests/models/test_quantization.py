"""The `quantization` object of `config.json`, with and without layers of their own."""

from __future__ import annotations

import pytest

from fastvlm.models.errors import ConfigError
from fastvlm.models.quantization import Affine, Quantization

HEAD = "language_model.lm_head"


def test_layers_that_are_named_differ_from_the_rest() -> None:
    written = {"group_size": 64, "bits": 4, HEAD: {"group_size": 32, "bits": 8}}
    read = Quantization.from_dict(written)
    assert read.of(HEAD) == Affine(32, 8)
    assert read.of("language_model.model.norm") == Affine(64, 4)
    assert read.as_dict() == written


def test_the_other_fields_of_mlx_lm_are_accepted() -> None:
    read = Quantization.from_dict({"group_size": 64, "bits": 4, "mode": "affine", HEAD: False})
    assert read == Quantization(Affine(64, 4))


def test_bits_per_weight_count_scales_and_biases() -> None:
    assert Affine(64, 4).bits_per_weight == 4.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 64}, "'bits' is missing"),
        ({"group_size": 64, "bits": 7}, r"got 64 and 7"),
        ({"group_size": 48, "bits": 4}, r"got 48 and 4"),
        ({"group_size": 64, "bits": 4, HEAD: {"bits": 4}}, "'group_size' is missing"),
        ({"group_size": 64, "bits": 4, HEAD: 8}, "'language_model.lm_head' must be an object, got 8"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mode must be 'affine', got 'mxfp4'"),
    ],
)
def test_others_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quantization.from_dict(values)
