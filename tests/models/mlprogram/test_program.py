"""The described program: packed integers and the input for an image."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.mlprogram.program import unpack_bits


@settings(max_examples=100)
@given(data=st.data(), bits=st.sampled_from([1, 2, 3, 4, 6, 8]), signed=st.booleans())
def test_unpack_bits_follows_the_least_significant_bit_first(data: st.DataObject, bits: int, signed: bool) -> None:
    low = -(1 << bits - 1) if signed else 0
    values = data.draw(st.lists(st.integers(low, low + (1 << bits) - 1), max_size=40))
    number = sum((value & ((1 << bits) - 1)) << (bits * i) for i, value in enumerate(values))
    packed = np.frombuffer(number.to_bytes((len(values) * bits + 7) // 8, "little"), dtype=np.uint8)
    assert unpack_bits(packed, bits, len(values), signed).tolist() == values
