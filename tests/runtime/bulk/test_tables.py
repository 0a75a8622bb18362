"""Tables: images in their columns, and captions as CSV and parquet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvlm.models.errors import ImageError, MachineError, UsageError
from fastvlm.runtime.bulk import tables
from fastvlm.runtime.bulk.sources import Source
from fastvlm.runtime.bulk.tables import columns_of, write_table


def encoded(n: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (n, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def loaded(*inputs: Path, column: str | None = None) -> dict[str, bytes | Path]:
    return {item.key: item.load() for item in Source(inputs, column=column)}


@pytest.mark.parametrize("name", ["image", "picture"])
def test_parquet_has_bytes_structs_or_paths(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 2)
    images = [encoded(n) for n in range(5)]
    structs = [{"bytes": image, "path": None} for image in images]
    for column in (images, structs):
        table = pyarrow.table({"caption": list("abcde"), name: column})
        parquet.write_table(table, tmp_path / "t.parquet")
        assert list(loaded(tmp_path / "t.parquet").values()) == images
    assert list(loaded(tmp_path / "t.parquet")) == [f"{tmp_path}/t.parquet/{n}" for n in range(5)]
    parquet.write_table(pyarrow.table({"file_name": ["a.png", "b/c.png"]}), tmp_path / "t.parquet")
    assert loaded(tmp_path / "t.parquet") == {"a.png": tmp_path / "a.png", "b/c.png": tmp_path / "b/c.png"}
    assert Source([tmp_path / "t.parquet"]).count() == 2


def test_folders_of_datasets_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    rows = [{"bytes": encoded(n), "path": None} for n in range(3)]
    data = Dataset.from_dict({"label": [1, 2, 3], "image": rows}).cast_column("image", ImageFeature())
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    images = [encoded(n) for n in range(3)]
    assert loaded(tmp_path / "one") == dict(zip(("0", "1", "2"), images, strict=True))
    two = loaded(tmp_path / "two")
    assert list(two) == [f"{split}/{n}" for split in ("train", "test") for n in range(3)]
    assert list(two.values()) == 2 * images


def test_column_is_chosen_by_name_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"thumb": [b"a"], "image": [b"b"], "n": [1]}), path)
    assert list(loaded(path).values()) == [b"b"]
    assert list(loaded(path, column="thumb").values()) == [b"a"]
    with pytest.raises(UsageError, match="must have images or paths in column='n'"):
        loaded(path, column="n")
    parquet.write_table(pyarrow.table({"n": [1]}), path)
    with pytest.raises(UsageError, match=r"has no column of images or paths \(got n\)"):
        loaded(path)


def test_damaged_tables_and_empty_rows_are_image_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"image": [b"a", None]}), path)
    items = list(Source([path]))
    with pytest.raises(ImageError, match=r"row 1 of .* has no image"):
        items[1].load()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ImageError, match="cannot be read as a table"):
        loaded(path)


def test_machine_error_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'pip install "fastvlm\[bulk\]"'):
        loaded(tmp_path / "t.parquet")


ENTRIES: list[dict[str, Any]] = [
    {"file": "a", "error": "broken"},
    {"file": "b", "text": 'x,\n"y"', "tokens": 3, "finish_reason": "stop", "answer": {"n": 1, "tags": ["é", "b"]}},
    {"file": "c", "text": "", "tokens": 0, "finish_reason": "length"},
    {"file": "d", "text": "z", "tokens": 1, "finish_reason": "stop", "answer": {"n": 0.5, "tags": [], "ok": True}},
]


def test_structured_answers_become_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", lambda: iter(ENTRIES))
    rows = list(csv.DictReader((tmp_path / "t.csv").open(newline="")))
    assert list(rows[0]) == [
        "file", "text", "tokens", "finish_reason", "answer.n", "answer.tags", "answer.ok", "error",
    ]  # fmt: skip
    assert rows[1]["text"] == 'x,\n"y"' and rows[1]["answer.tags"] == '["é", "b"]'
    assert [row["error"] for row in rows] == ["broken", "", "", ""]
    write_table(tmp_path / "t.parquet", lambda: iter(ENTRIES))
    table = parquet.read_table(tmp_path / "t.parquet")
    assert [str(table.schema.field(f"answer.{name}").type) for name in ("n", "tags", "ok")] == [
        "double", "string", "bool",
    ]  # fmt: skip
    assert table["answer.n"].to_pylist() == [None, 1.0, None, 0.5]


def test_several_prompts_have_numbered_columns() -> None:
    answers = [{"text": "x", "tokens": 1, "finish_reason": "stop"}, {"text": "y", "answer": [1]}]
    cells = columns_of({"file": "a", "answers": answers})
    assert (cells["text_1"], cells["text_2"], cells["answer_2"], cells["error"]) == ("x", "y", "[1]", None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
ANSWERS = st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=3), min_size=1, max_size=5)


@pytest.mark.slow
@given(ANSWERS)
def test_any_structured_answer_can_be_written(answers: list[dict[str, Any]]) -> None:
    import tempfile

    entries = [{"file": str(n), "text": "t", "answer": answer} for n, answer in enumerate(answers)]

    def read() -> Iterator[dict[str, Any]]:
        return iter(entries)

    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "t.parquet", read)
        rows = parquet.read_table(Path(folder) / "t.parquet").to_pylist()
    assert [row["file"] for row in rows] == [entry["file"] for entry in entries]
    for row, answer in zip(rows, answers, strict=True):
        for name, value in answer.items():
            cell = row[f"answer.{name}"]
            assert (cell is None) == (value is None)
            if isinstance(value, float) and isinstance(cell, float):
                assert math.isclose(cell, value)


def test_table_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("before")

    def failing() -> Iterator[dict[str, Any]]:
        yield ENTRIES[0]
        raise UsageError("stopped")

    for suffix in (".csv", ".parquet"):
        with pytest.raises(UsageError, match="stopped"):
            write_table(path.with_suffix(suffix), failing)
    assert path.read_text() == "before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["t.csv"]
