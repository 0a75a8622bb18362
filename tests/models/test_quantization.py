"""The `quantization` object of `config.json`, with and without layers of their own."""

from __future__ import annotations

import pytest

from fastvlm.models.errors import ConfigError, WeightsError
from fastvlm.models.quantization import Affine, Quantization, check_not_foreign
from fastvlm.models.safetensors_files import TensorInfo

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


@pytest.mark.parametrize(
    ("name", "dtype", "method", "message"),
    [
        ("a.weight.absmax", "U8", None, "by bitsandbytes .got a.weight.absmax.. Load it with transformers"),
        ("a.weight.absmax", "U8", "bitsandbytes", "by bitsandbytes"),
        ("a.qweight", "I32", "awq", "by awq .got a.qweight.. Pass the checkpoint that it was quantized from"),
        ("a.qweight", "I32", None, "by gptq"),
        ("a.weight_packed", "I32", "compressed-tensors", "by compressed-tensors"),
        ("a.weight", "F8_E4M3", None, "by fp8"),
        ("a.weight", "F8_E4M3", "new-method", "by new-method .*Pass the checkpoint that it was quantized from"),
    ],
)
def test_weights_of_other_quantizers_are_named(name: str, dtype: str, method: str | None, message: str) -> None:
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    with pytest.raises(WeightsError, match=f"the weights are quantized {message}"):
        check_not_foreign(config, {name: TensorInfo((4,), dtype)})


def test_settings_of_a_quantizer_without_its_weights_are_noted() -> None:
    tensors = {"a.weight": TensorInfo((4,), "BF16")}
    found = check_not_foreign({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, tensors)
    assert found == (
        "config.json has quantization_config of bitsandbytes, but the weights are floating-point: it is ignored",
    )
    assert check_not_foreign({}, tensors) == ()
    assert check_not_foreign({"quantization_config": {"group_size": 64, "bits": 4}}, tensors) == ()


def test_packed_column_without_settings_is_bitsandbytes() -> None:
    with pytest.raises(WeightsError, match="quantized by bitsandbytes .got a.weight"):
        check_not_foreign({}, {"a.weight": TensorInfo((32768, 1), "U8")})
