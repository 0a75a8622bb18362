"""Tables: images in a column of parquet files or of a `datasets` folder, and captions as CSV or parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.errors import ImageError, MachineError, OutputError, UsageError
from ...models.files import read_json_object

if TYPE_CHECKING:
    import pyarrow

TABLE_SUFFIXES = (".parquet", ".arrow")

BATCH_ROWS = 64
"""The rows of a table that are read at a time, images included."""

GROUP_ROWS = 10_000
"""The rows of a group of a written parquet file. One group is held in memory."""

PATH_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename")
"""The columns of strings that are taken for paths of images."""

STATE, SPLITS = "state.json", "dataset_dict.json"
"""The files by which a folder of `datasets` is recognized: of one split, and of several."""


def require_pyarrow(what: str) -> None:
    """Raises MachineError if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise MachineError(f'{what} needs pyarrow, which is missing. Run `pip install "fastvlm[bulk]"`.')


def is_data_set(folder: Path) -> bool:
    """Returns whether `datasets` wrote a folder."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def arrow_files(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yields each split of a folder that `datasets` wrote, with its Arrow files. A single split has an empty name."""
    if not (folder / STATE).is_file():
        for split in read_json_object(folder / SPLITS, ImageError)["splits"]:
            for _, files in arrow_files(folder / str(split)):
                yield str(split), files
        return
    listed = read_json_object(folder / STATE, ImageError).get("_data_files")
    try:
        names = [str(entry["filename"]) for entry in listed]  # type: ignore[union-attr]
    except (TypeError, KeyError):
        raise ImageError(f"{folder / STATE} does not name its data files. Save the data set again.") from None
    yield "", [folder / Path(name).name for name in names]


def table_items(
    files: Iterable[Path], name: str, column: str | None = None
) -> Iterator[tuple[str, Callable[[], Path | bytes]]]:
    """Yields a key and a loader for each row of parquet or Arrow files.

    The key is the path if the column has paths, else `name` and the number of the row.

    Raises:
        ImageError: a file cannot be read.
        UsageError: `column` is not one with images, or there is none.
        MachineError: pyarrow is not installed.
    """
    require_pyarrow("a table of images")
    import pyarrow

    row = 0
    for path in files:
        try:
            for batch in _batches(path, column):
                for cell in batch.column(0):
                    value = cell.as_py()
                    if isinstance(value, str):
                        yield value, lambda value=value, path=path: path.parent / value  # type: ignore[misc]
                    else:
                        yield f"{name}/{row}" if name else str(row), _loader(value, path, row)
                    row += 1
        except (pyarrow.ArrowException, OSError) as reason:
            raise ImageError(f"{path} cannot be read as a table: {str(reason).splitlines()[0]:.200}.") from None


def _loader(value: Any, path: Path, row: int) -> Callable[[], Path | bytes]:
    def load() -> Path | bytes:
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return bytes(content)
        if isinstance(value, dict) and value.get("path"):
            return path.parent / str(value["path"])
        raise ImageError(f"row {row} of {path} has no image.")

    return load


def _batches(path: Path, column: str | None) -> Iterator[pyarrow.RecordBatch]:
    """Yields batches of the column with images."""
    import pyarrow
    from pyarrow import ipc, parquet

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            chosen = image_column(file.schema_arrow, path, column)
            yield from file.iter_batches(BATCH_ROWS, columns=[chosen])
        return
    with pyarrow.memory_map(str(path)) as mapped, ipc.open_stream(mapped) as stream:
        chosen = image_column(stream.schema, path, column)
        for batch in stream:
            yield batch.select([chosen])


def image_column(schema: pyarrow.Schema, path: Path, column: str | None) -> str:
    """Returns the column with images: structs with bytes, as `datasets` writes, then bytes, then paths."""
    from pyarrow import types

    def is_bytes(kind: pyarrow.DataType) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_text(kind: pyarrow.DataType) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind))

    structs = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binaries = [f.name for f in schema if is_bytes(f.type)]
    texts = [f.name for f in schema if is_text(f.type)]
    if column is not None:
        if column in (*structs, *binaries, *texts):
            return column
        raise UsageError(
            f"{path} must have images or paths in column={column!r} (its columns: {', '.join(schema.names)})", "column"
        )
    for name in (*structs, *sorted(binaries, key="image".__ne__), *(name for name in PATH_COLUMNS if name in texts)):
        return name
    raise UsageError(f"{path} has no column of images or paths (got {', '.join(schema.names)}). Pass column", "column")


def columns_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the line of an image as the cells of a table, in their order.

    The answers to several prompts are numbered from 1. The properties of a structured answer are columns of their own.
    """
    cells: dict[str, Any] = {"file": entry["file"]}
    answers = entry.get("answers")
    for number, answer in enumerate([entry] if answers is None else answers, 1):
        end = "" if answers is None else f"_{number}"
        for name in ("text", "tokens", "finish_reason"):
            cells[name + end] = answer.get(name)
        content = answer.get("answer")
        if isinstance(content, dict):
            cells.update({f"answer{end}.{name}": flat(value) for name, value in content.items()})
        elif content is not None:
            cells[f"answer{end}"] = flat(content)
    cells["error"] = entry.get("error")
    return cells


def flat(value: Any) -> Any:
    """Returns a value of a cell: lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def merged_columns(entries: Iterable[Mapping[str, Any]]) -> dict[str, type]:
    """Returns every column of some lines, with the type of its values: str if they differ.

    Images with an error lack the columns of answers, so the order is that of the longest line so far.
    """
    kinds: dict[str, type] = {}
    for entry in entries:
        cells = columns_of(entry)
        if not cells.keys() <= kinds.keys():
            known = kinds
            kinds = {name: known.get(name, type(None)) for name in (*cells, *known)}
        for name, value in cells.items():
            kind = str if type(value) is int and abs(value) >= 2**63 else type(value)
            if value is not None and kinds[name] is not kind:
                kinds[name] = kind if kinds[name] is type(None) else wider(kinds[name], kind)
    error = kinds.pop("error", type(None))
    return {**kinds, "error": error}


def wider(one: type, other: type) -> type:
    """Returns a type for values of two types."""
    return float if {one, other} == {int, float} else str


def write_table(path: Path, read: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
    """Writes captions as CSV or parquet, by the suffix. `path` changes only once the table is complete.

    `read` returns an iterator over the lines, and is called twice, so that they are never held.

    Raises:
        OutputError: the file cannot be written.
        MachineError: pyarrow is not installed, and the table is parquet.
    """
    columns = merged_columns(read())
    partial = path.with_name(f".{path.name}.partial")
    try:
        (_write_parquet if path.suffix == ".parquet" else _write_csv)(partial, columns, read())
        partial.replace(path)
    except OSError as reason:
        raise OutputError(
            f"{path} cannot be written: {reason.strerror or reason}. Run the same command again."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _write_csv(path: Path, columns: Mapping[str, type], entries: Iterator[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(columns_of(entry) for entry in entries)


def _write_parquet(path: Path, columns: Mapping[str, type], entries: Iterator[Mapping[str, Any]]) -> None:
    require_pyarrow("parquet")
    import pyarrow
    from pyarrow import parquet

    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, kinds.get(kind, pyarrow.string())) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for group in groups(entries):
            rows = [{name: _cell(value, columns[name]) for name, value in columns_of(entry).items()} for entry in group]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _cell(value: Any, kind: type) -> Any:
    if kind is str and value is not None:
        text = value if isinstance(value, str) else json.dumps(value)
        return text.encode(errors="backslashreplace").decode()
    return value


def groups(entries: Iterator[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Yields lists of up to GROUP_ROWS entries."""
    group: list[Mapping[str, Any]] = []
    for entry in entries:
        group.append(entry)
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group
