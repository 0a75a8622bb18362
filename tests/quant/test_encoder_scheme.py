"""The scheme of the encoder: its arguments."""

from __future__ import annotations

from typing import Any

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.quant.encoder_scheme import EncoderScheme, encoder_scheme, parsed_bytes


@pytest.mark.parametrize(
    ("text", "number"), [("80M", 80_000_000), ("80MB", 80_000_000), ("1.5g", 1_500_000_000), ("500 k", 500_000), (7, 7)]
)
def test_sizes_are_read_with_decimal_units(text: str | int, number: int) -> None:
    assert parsed_bytes(text) == number


@pytest.mark.parametrize("text", ["", "M", "-3", "80X", "8 0", "1e6", "80MM"])
def test_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="max_bytes must be a number of bytes"):
        parsed_bytes(text)


def test_mixed_keeps_40_db_by_default() -> None:
    assert encoder_scheme("mixed").min_snr == 40
    assert encoder_scheme("mixed", 30.0).as_dict() == {"quant": "mixed", "min_snr": 30.0, "weights": {}}
    assert encoder_scheme("mixed", max_bytes="80M").as_dict() == {
        "quant": "mixed",
        "max_bytes": 80_000_000,
        "weights": {},
    }
    assert encoder_scheme(None) == EncoderScheme("int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("int8", 40.0), r"min_snr and max_bytes need quant='mixed' \(got 'int8'\)"),
        ((None, None, "80M"), "need quant='mixed'"),
        (("mixed", 40.0, "80M"), "exclude each other"),
        (("mixed", 70.0), r"min_snr must be between 5 and 55 dB \(got 70\)"),
        (("mixed", float("nan")), "min_snr must be between"),
        (("int5",), "quant must be one of"),
    ],
)
def test_invalid_arguments_are_named(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder_scheme(*options)
