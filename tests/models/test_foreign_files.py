"""Files of other programs: each row of the tables is recognized, and no file that is read is taken for one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from fastvlm.models import foreign_files
from fastvlm.models.foreign_files import (
    FOLDERS,
    HEADS,
    IMAGE_HEADS,
    checkpoints_inside,
    foreign_bytes,
    foreign_file,
    foreign_folder,
    foreign_image,
    foreign_text,
    is_system_file,
    pickles_in,
)
from fastvlm.models.images import FORMATS


@pytest.mark.parametrize(("head", "expected"), HEADS)
def test_each_head_is_recognized(head: bytes, expected: foreign_files.Foreign) -> None:
    assert foreign_bytes(head + b"rest") == expected
    assert str(expected).endswith(".")


@pytest.mark.parametrize(("head", "expected"), IMAGE_HEADS)
def test_each_image_head_is_recognized(head: bytes, expected: foreign_files.Foreign) -> None:
    assert foreign_image(head + b"rest") == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_no_format_that_is_read_counts_as_foreign(kind: str) -> None:
    if kind == "JPEG2000":
        return  # named in case Pillow lacks it
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(stream, kind)
    assert foreign_image(stream.getvalue()) is None or kind == "AVIF"


@settings(max_examples=25)
@given(st.dictionaries(st.text("abc.", min_size=1, max_size=600), st.integers(0, 4), min_size=1, max_size=5))
def test_safetensors_and_json_are_not_foreign(sizes: dict[str, int]) -> None:
    content = save({name: np.ones(size, np.float32) for name, size in sizes.items()})
    assert foreign_bytes(content) is None
    assert foreign_text(content) is None
    assert foreign_text(b'{"a": 1, "b": [2, 3]}') is None


def test_length_of_a_header_may_look_like_a_pickle() -> None:
    header = json.dumps({"a" * 560: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    assert foreign_bytes(b"\x80\x02" + content[2:]) is None


@given(st.binary(max_size=80))
def test_any_bytes_are_judged_without_an_error(head: bytes) -> None:
    for judge in (foreign_bytes, foreign_text, foreign_image):
        found = judge(head)
        assert found is None or "\n" not in str(found)


@pytest.mark.parametrize("row", FOLDERS, ids=lambda row: row.patterns[0])
def test_each_folder_is_recognized_by_its_first_pattern(tmp_path: Path, row: foreign_files.ForeignFolder) -> None:
    (tmp_path / row.patterns[0].replace("*", "x")).write_bytes(b"")
    assert foreign_folder(tmp_path) == row
    assert row.remedy.endswith(".")
    (tmp_path / row.patterns[0].replace("*", "x")).rename(tmp_path / "._file")
    assert foreign_folder(tmp_path) is None


def test_pickles_without_weights_are_left_out(tmp_path: Path) -> None:
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "rng_state_0.pth",
        "pytorch_model.bin",
        "._pytorch_model.bin",
        "a.pt",
    ):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in pickles_in(tmp_path)] == ["a.pt", "pytorch_model.bin"]


def test_folders_with_a_config_come_before_those_with_a_name(tmp_path: Path) -> None:
    for name in ("checkpoint-5", "other", "logs"):
        (tmp_path / name).mkdir()
    assert checkpoints_inside(tmp_path) == ["checkpoint-5"]
    (tmp_path / "other" / "config.json").write_text("{}")
    assert checkpoints_inside(tmp_path) == ["other"]


def test_system_files_and_unreadable_ones_are_told_apart(tmp_path: Path) -> None:
    assert is_system_file(Path("x/._a.json"))
    assert is_system_file(Path(".DS_Store"))
    assert not is_system_file(Path(".gitattributes"))
    assert foreign_file(tmp_path / "missing") is None
