"""The described program: packed integers and the input for an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram.program import Program, TensorType, inputs_for, pack_bits, unpack_bits


@settings(max_examples=100)
@given(data=st.data(), bits=st.sampled_from([1, 2, 3, 4, 6, 8]), signed=st.booleans())
def test_unpack_bits_follows_the_least_significant_bit_first(data: st.DataObject, bits: int, signed: bool) -> None:
    low = -(1 << bits - 1) if signed else 0
    values = data.draw(st.lists(st.integers(low, low + (1 << bits) - 1), max_size=40))
    number = sum((value & ((1 << bits) - 1)) << (bits * i) for i, value in enumerate(values))
    packed = np.frombuffer(number.to_bytes((len(values) * bits + 7) // 8, "little"), dtype=np.uint8)
    assert unpack_bits(packed, bits, len(values), signed).tolist() == values


def program_with(*names: str, color_layout: str | None = None) -> Program:
    inputs = tuple(TensorType(name, "fp32", (1, 3, 2, 2)) for name in names)
    images = {name: color_layout for name in names if color_layout}
    return Program(inputs, (), (), 8, "CoreML7", {}, Path("made up"), images)


def test_image_input_takes_0_to_255_and_a_tensor_input_0_to_1() -> None:
    pixel_values = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2) / np.float32(255)
    assert inputs_for(program_with("images"), pixel_values)["images"] is pixel_values
    pixels = inputs_for(program_with("images", color_layout="RGB"), pixel_values)["images"]
    assert pixels.reshape(-1).tolist() == list(range(12))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (program_with(), "made up: must have one input, got 0"),
        (program_with("x", "y"), "made up: must have one input, got 2"),
        (program_with("x", color_layout="BGR"), "made up: x must take RGB images, got BGR"),
    ],
)
def test_other_inputs_are_refused(program: Program, message: str) -> None:
    with pytest.raises(PackageError, match=f"^{message}$"):
        inputs_for(program, np.zeros((1, 3, 2, 2), np.float32))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_pack_bits_is_the_inverse_of_unpack_bits(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, 37).astype(np.uint8)
    packed = pack_bits(values, bits)
    assert packed.size == (37 * bits + 7) // 8
    assert unpack_bits(packed, bits, 37).tolist() == values.tolist()
