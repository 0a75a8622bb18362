"""MLIR bytecode, written here as the format says: numbers, sections, strings, and the names of constants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.export.mlir_bytecode import (
    MAGIC,
    RESOURCE_OFFSETS,
    RESOURCES,
    STRINGS,
    Reader,
    Section,
    read_sections,
    read_strings,
    resources,
    varint,
    with_stable_names,
    written,
    written_strings,
)
from fastvlm.models.errors import PackageError

HEAD = MAGIC + varint(6) + b"MLIR\0"
BLOBS = (b"weights", b"scales and more", b"weights")


def blob_entry(blob: bytes, begin: int) -> bytes:
    head = varint(16) + varint(len(blob))
    return head + b"\xcb" * (-(begin + len(head)) % 16) + blob


def file_with(names: list[bytes], blobs: tuple[bytes, ...] = BLOBS) -> bytes:
    """A file of one dialect whose blobs have `names`, between two sections that are only copied."""
    body, offsets = b"", varint(0) + varint(3) + varint(len(names))
    for place, blob in enumerate(blobs):
        entry = blob_entry(blob, len(body))
        offsets += varint(place) + varint(len(entry)) + b"\0"
        body += entry
    sections = [
        Section(4, None, b"operations"),
        Section(RESOURCE_OFFSETS, None, offsets),
        Section(RESOURCES, 16, body),
        Section(STRINGS, None, written_strings([*names, b"images"])),
        Section(8, 32, b"properties"),
    ]
    return written(HEAD, sections)


DRAWN = file_with([b"resource_1", b"resource_18446744073709551615", b"resource_22"])


@given(st.integers(0, 2**64 - 1))
def test_number_of_any_length_is_read_as_it_was_written(value: int) -> None:
    reader = Reader(varint(value))
    assert reader.number() == value and reader.at_end


def test_numbers_have_the_bytes_of_the_format() -> None:
    assert varint(0) == b"\x01" and varint(1) == b"\x03" and varint(127) == b"\xff"
    assert varint(128) == b"\x02\x02" and varint(2**63) == b"\0" + (2**63).to_bytes(8, "little")


@given(st.lists(st.binary().filter(lambda text: b"\0" not in text)))
def test_strings_are_read_as_they_were_written(strings: list[bytes]) -> None:
    assert read_strings(written_strings(strings)) == strings


def test_sections_are_written_as_they_were_read() -> None:
    head, sections = read_sections(DRAWN)
    assert head == HEAD and written(head, sections) == DRAWN
    assert [section.alignment for section in sections] == [None, None, 16, None, 32]
    for section in sections:
        if section.alignment:
            assert DRAWN.index(section.body) % section.alignment == 0


def test_blobs_are_found_by_name() -> None:
    assert resources(DRAWN) == [
        ("resource_1", b"weights"),
        ("resource_18446744073709551615", b"scales and more"),
        ("resource_22", b"weights"),
    ]


def test_files_that_differ_in_drawn_names_become_equal() -> None:
    other = file_with([b"resource_999", b"resource_3", b"resource_12345678901234567890"])
    assert other != DRAWN and with_stable_names(other) == with_stable_names(DRAWN)
    stable = resources(with_stable_names(DRAWN))
    assert [blob for _, blob in stable] == list(BLOBS)
    assert len({name for name, _ in stable}) == len(BLOBS)  # equal blobs keep names of their own
    assert with_stable_names(with_stable_names(DRAWN)) == with_stable_names(DRAWN)


def test_files_of_other_weights_stay_different() -> None:
    other = file_with([b"resource_1", b"resource_2", b"resource_3"], (b"weighty", *BLOBS[1:]))
    names = [[name for name, _ in resources(with_stable_names(data))] for data in (DRAWN, other)]
    assert names[0][0] != names[1][0] and names[0][1] == names[1][1]


def test_chosen_names_and_other_strings_stay() -> None:
    stable = with_stable_names(file_with([b"my_weights", b"resource_1", b"resource_x"]))
    assert [name for name, _ in resources(stable)][0::2] == ["my_weights", "resource_x"]
    assert read_strings(read_sections(stable)[1][3].body)[-1] == b"images"


def test_file_without_constants_stays() -> None:
    plain = written(HEAD, [Section(STRINGS, None, written_strings([b"images"]))])
    assert with_stable_names(plain) == plain and resources(plain) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04 a zip file", "not MLIR bytecode"),
        (MAGIC + varint(99) + b"MLIR\0", "of a known version"),
        (DRAWN[:-5], "truncated"),
        (HEAD + b"\x04", "truncated"),
    ],
)
def test_damaged_or_foreign_file_is_one_line(data: bytes, words: str) -> None:
    with pytest.raises(PackageError, match=words):
        with_stable_names(data)
