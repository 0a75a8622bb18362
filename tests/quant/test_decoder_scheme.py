"""The scheme of the decoder: its arguments, and its layers."""

from __future__ import annotations

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.models.quantization import Affine, Quantization
from fastvlm.quant.decoder_scheme import DecoderScheme


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, r"decoder_bits must be one of 4, 5, 6, 8, 16, mixed \(got 7\)"),
        ({"group_size": 16}, "group_size must be one of"),
        ({"quantizer": "awq"}, r"decoder_quantizer must be one of rtn, gptq \(got 'awq'\)"),
        ({"bits": "mixed"}, "decoder_avg_bits and decoder_bits='mixed' need"),
        ({"bits": 4, "avg_bits": 5.0}, "decoder_avg_bits and decoder_bits='mixed' need"),
        ({"bits": "mixed", "avg_bits": 4.4}, "between 4.5 and 8.5 in groups of 64"),
        ({"bits": "mixed", "avg_bits": 5.0, "layers": {"a": 3}}, r"a must have bits of .* \(got 3\)"),
    ],
)
def test_invalid_scheme_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DecoderScheme(**options)


def test_mixed_scheme_of_another_decoder_is_refused() -> None:
    with pytest.raises(UsageError, match="the bits of c are missing. Pass a recipe for this decoder"):
        DecoderScheme("mixed", avg_bits=5.0, layers={"a": 4}).affine("c")


def test_mixed_scheme_lists_only_uncommon_layers() -> None:
    scheme = DecoderScheme("mixed", avg_bits=5.0).with_layers({"a": 4, "b": 8, "c": 4})
    assert scheme.quantization() == Quantization(Affine(64, 4), {"b": Affine(64, 8)})
