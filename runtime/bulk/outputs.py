"""The outputs next to a log: none, a table, text or XMP files, or webdataset shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args
from xml.sax.saxutils import escape

from ...models.errors import OutputError, UsageError
from .log import CaptionLog
from .tables import require_pyarrow, write_table

OutputFormat = Literal["jsonl", "csv", "parquet", "txt", "xmp", "webdataset"]

BY_SUFFIX: dict[str, OutputFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}

LOG_NAME = "captions.jsonl"
"""The log of an output that is a folder."""

PARTIAL = ".captions.partial"
"""The name of a text or XMP file while it is written."""

SHARD_SAMPLES = 10_000
"""The samples of a webdataset shard."""

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
"""An XMP sidecar with a description, which photo applications show as the caption."""


def format_of(out: Path, chosen: str | None = None) -> OutputFormat:
    """Returns the format of an output, by its suffix if none was chosen.

    Raises:
        UsageError: the format is unknown, or does not fit the kind of output.
    """
    kind = chosen or BY_SUFFIX.get(out.suffix.lower())
    names = ", ".join(get_args(OutputFormat))
    if kind is None and not out.is_dir():
        ending = f"suffix {out.suffix}" if out.suffix else "no suffix"
        raise UsageError(
            f"{out}: the suffix must be one of {', '.join(BY_SUFFIX)} (got {ending}). Rename it, or set format to one "
            f"of {names}.",
            "format",
        )
    if kind not in get_args(OutputFormat):
        raise UsageError(f"{out}: format must be one of {names} (got {chosen}). Choose one for a folder.", "format")
    folder = kind in ("txt", "xmp") or (kind == "webdataset" and out.suffix.lower() != ".tar")
    if folder and out.exists() and not out.is_dir():
        raise UsageError(f"{out} must be a folder for format={kind!r}. Name another output.", "format")
    if not folder and out.is_dir():
        raise UsageError(f"{out} is a folder, and format={kind!r} needs a file. Name another output.", "format")
    if kind in ("csv", "parquet") and out.suffix.lower() != f".{kind}":
        raise UsageError(f"{out} must end in .{kind} for format={kind!r}. Name another output.", "format")
    return kind  # type: ignore[return-value]


class Output:
    """JSON lines: the log and nothing else. The base of the other outputs.

    Attributes:
        log_path: the file of the log.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log_path = out

    def begin(self, log: CaptionLog) -> None:
        """Completes or removes what an interrupted run left, before anything is added. Raises OutputError."""

    def refusal(self, key: str) -> str | None:
        """Returns why the caption of a key cannot be written, or None. It is asked before the image is captioned."""
        return None

    def add(self, log: CaptionLog, key: str, entry: Mapping[str, Any], image: Path | bytes | None) -> str | None:
        """Writes an answer, or an error, and its line in the log. Returns the error. Raises OutputError."""
        log.add(key, entry)
        return entry.get("error")

    def end(self, log: CaptionLog) -> None:
        """Completes the output after the last image. Raises OutputError."""


class TableOutput(Output):
    """CSV or parquet, which is written as a whole from the log after the last image."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.log_path = out.with_name(f"{out.name}.jsonl")
        if out.suffix == ".parquet":
            require_pyarrow("parquet")
        if out.exists() and not self.log_path.exists():
            raise UsageError(f"{out} exists without its log {self.log_path.name}. Choose another name, or remove it.")

    def end(self, log: CaptionLog) -> None:
        write_table(self.out, log.entries)


class Sidecars(Output):
    """A text or XMP file for each image, next to it if the output is the folder of the images.

    The log precedes the file, so that only the file of its last line can be missing after a kill. A file that exists
    already is never overwritten: its image gets a line with an error.
    """

    def __init__(self, out: Path, kind: Literal["txt", "xmp"]) -> None:
        super().__init__(out)
        made_folder(out)
        self.log_path = out / f".{LOG_NAME}"
        self._kind = kind

    def begin(self, log: CaptionLog) -> None:
        if log.last is not None and "error" not in log.last:
            path = self._path(log.last["file"])
            if path is not None and not path.exists():
                self._write(path, log.last)
            if path is not None:
                path.with_name(PARTIAL).unlink(missing_ok=True)

    def refusal(self, key: str) -> str | None:
        path = self._path(key)
        if path is None:
            return f"{key} is outside of the folders that were named, so {self.out} has no place for its caption."
        if path.exists() or path.is_symlink():
            return f"{path} exists. Remove it, and the line of {key} in {self.log_path}."
        return None

    def add(self, log: CaptionLog, key: str, entry: Mapping[str, Any], image: Path | bytes | None) -> str | None:
        path = self._path(key)
        refused = None if "error" in entry else self.refusal(key)  # another image may have its name meanwhile
        if refused is not None:
            entry = {"error": refused}
        log.add(key, entry)
        if "error" not in entry and path is not None:
            self._write(path, entry)
        return entry.get("error")

    def _path(self, key: str) -> Path | None:
        """Returns the file of a key, or None if it would be outside of the folder."""
        name = PurePosixPath(key)
        if name.is_absolute() or ".." in name.parts or not name.name:
            return None
        suffix = f".{self._kind}"
        return self.out / (name.with_suffix(suffix) if self._kind == "txt" else name.with_name(name.name + suffix))

    def _write(self, path: Path, entry: Mapping[str, Any]) -> None:
        text = "\n".join(texts(entry))
        content = f"{text}\n" if self._kind == "txt" else XMP.format(escape(printable(text)))
        partial = path.with_name(PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content.encode(errors="backslashreplace"))
            partial.replace(path)
        except OSError as reason:
            partial.unlink(missing_ok=True)
            raise OutputError(
                f"{path} cannot be written: {reason.strerror}. Run the same command again to resume."
            ) from None


class Shards(Output):
    """Webdataset shards: per image its bytes, a .txt and a .json, in tar archives that any reader can read meanwhile.

    The log follows the archive and has the end of each sample, so a kill leaves at most a sample that is overwritten.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self._single = out.suffix.lower() == ".tar"
        if not self._single:
            made_folder(out)
        self.log_path = out.with_name(f"{out.name}.jsonl") if self._single else out / LOG_NAME
        if not self.log_path.exists() and (out.exists() if self._single else any(out.glob("*.tar"))):
            raise UsageError(f"{out} has shards without their log {self.log_path.name}. Choose another output.")
        self._shard, self._end, self._samples = 0, 0, 0

    def begin(self, log: CaptionLog) -> None:
        log.keep_empty = True  # a shard may have its first sample before the log has a line
        at = (log.last or {}).get("shard")
        if at is None:
            return
        try:
            self._shard, self._samples, self._end = int(at["number"]), int(at["samples"]), int(at["end"])
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{log.path}: the last line has no place in a shard. Choose another output.") from None
        path = self._path()
        size = path.stat().st_size if path.exists() else 0
        if size < self._end:
            raise OutputError(f"{path} must have at least {self._end:,} bytes (got {size:,}). Remove the output.")

    def add(self, log: CaptionLog, key: str, entry: Mapping[str, Any], image: Path | bytes | None) -> str | None:
        if "error" not in entry and image is not None:
            if self._samples == SHARD_SAMPLES and not self._single:
                self._shard, self._samples, self._end = self._shard + 1, 0, 0
            name = f"{self._shard:05d}{self._samples:05d}" if not self._single else f"{self._samples:09d}"
            content = image if isinstance(image, bytes) else image.read_bytes()
            self._append(sample(name, key, entry, content))
            self._samples += 1
        at = {"number": self._shard, "samples": self._samples, "end": self._end}
        log.add(key, {**entry, "shard": at})
        return entry.get("error")

    def _append(self, members: bytes) -> None:
        path = self._path()
        try:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(self._end)  # removes the end of the archive, or part of a sample
                file.seek(self._end)
                file.write(members)
                file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive
        except OSError as reason:
            raise OutputError(
                f"{path} cannot be written: {reason.strerror}. Run the same command again to resume."
            ) from None
        self._end += len(members)

    def _path(self) -> Path:
        return self.out if self._single else self.out / f"{self._shard:05d}.tar"


def output_for(out: Path, chosen: str | None = None) -> Output:
    """Returns the output for a path, see `format_of`.

    Raises:
        UsageError: the path does not fit the format, or has files that fastvlm did not write.
        OutputError: a folder cannot be made.
        MachineError: the format needs pyarrow, which is missing.
    """
    kind = format_of(out, chosen)
    if kind in ("csv", "parquet"):
        return TableOutput(out)
    if kind == "txt" or kind == "xmp":
        return Sidecars(out, kind)
    return Shards(out) if kind == "webdataset" else Output(out)


def made_folder(out: Path) -> None:
    """Makes a folder if it does not exist. Raises OutputError."""
    try:
        out.mkdir(exist_ok=True)
    except OSError as reason:
        raise OutputError(f"{out} cannot be made: {reason.strerror}.") from None


def texts(entry: Mapping[str, Any]) -> list[str]:
    """Returns the answers of a line as texts, one per prompt."""
    return [answer["text"] for answer in entry.get("answers", [entry])]


def sample(name: str, key: str, entry: Mapping[str, Any], image: bytes) -> bytes:
    """Returns the members of a webdataset sample: the image, its caption, and everything as JSON."""
    suffix = PurePosixPath(key).suffix.lower() or image_suffix(image)
    caption = "\n".join(texts(entry))
    described = json.dumps({"file": key, **entry}, ensure_ascii=False)
    archive = io.BytesIO()
    for end, content in (
        (suffix, image),
        (".txt", caption.encode(errors="backslashreplace")),
        (".json", described.encode(errors="backslashreplace")),
    ):
        member = tarfile.TarInfo(name + end)
        member.size = len(content)
        archive.write(member.tobuf(tarfile.PAX_FORMAT))
        archive.write(content)
        archive.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return archive.getvalue()


def image_suffix(image: bytes) -> str:
    """Returns the suffix of an image without a name, by its first bytes. Readers of shards decode by it."""
    for head, suffix in ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif")):
        if image.startswith(head):
            return suffix
    return ".img"


def printable(text: str) -> str:
    """Returns a text without the control characters that XML forbids."""
    return "".join(c for c in text if c >= " " or c in "\n\t")
