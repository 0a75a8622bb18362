"""Every output: what is in it, how it resumes, and what it does not overwrite."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from fastvlm.models.errors import OutputError, UsageError
from fastvlm.runtime.bulk import outputs
from fastvlm.runtime.bulk.job import Job
from fastvlm.runtime.bulk.log import CaptionLog
from fastvlm.runtime.bulk.outputs import format_of, output_for, sample
from fastvlm.tests.runtime.bulk.conftest import BROKEN, NAMES

GOOD = [name for name in NAMES if name != BROKEN]
OUTPUTS = {
    "jsonl": ("out.jsonl", None),
    "csv": ("out.csv", None),
    "parquet": ("out.parquet", None),
    "tar": ("out.tar", None),
    "webdataset": ("shards", "webdataset"),
    "txt": ("texts", "txt"),
    "xmp": ("pictures", "xmp"),
}


def digests_in(out: Path, kind: str) -> dict[str, str]:
    """Returns the digest of each image that an output has, by its key or file."""
    if kind == "jsonl":
        entries = [json.loads(line) for line in out.read_text().splitlines()]
        return {entry["file"]: entry["answer"]["digest"] for entry in entries if "answer" in entry}
    if kind in ("csv", "parquet"):
        rows = list(csv.DictReader(out.open(newline=""))) if kind == "csv" else parquet.read_table(out).to_pylist()
        assert [row["file"] for row in rows] == NAMES
        assert {row["file"] for row in rows if row["error"]} == {BROKEN}
        return {row["file"]: row["answer.digest"] for row in rows if not row["error"]}
    if kind in ("tar", "webdataset"):
        shards = [out] if kind == "tar" else sorted(out.glob("*.tar"))
        return {key: value for shard in shards for key, value in shard_digests(shard).items()}
    names = {name: name + ".xmp" if kind == "xmp" else str(Path(name).with_suffix(".txt")) for name in GOOD}
    assert {str(path.relative_to(out)) for path in out.rglob(f"*.{kind}")} == set(names.values())
    return {name: text_of(out / file) for name, file in names.items()}


def text_of(path: Path) -> str:
    """Returns the digest in a text or XMP file."""
    text = path.read_text()
    if path.suffix == ".xmp":
        found = ElementTree.fromstring(text).find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
        assert found is not None
        text = str(found.text) + "\n"
    assert text.endswith('",\n<é>\n')
    return text[1:65]


def shard_digests(shard: Path) -> dict[str, str]:
    """Returns the digests of the images in a webdataset shard, which has three members for each."""
    found = {}
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        for image, text, described in zip(members[::3], members[1::3], members[2::3], strict=True):
            assert {Path(m.name).stem for m in (image, text, described)} == {Path(image.name).stem}
            content = tar.extractfile(image).read()  # type: ignore[union-attr]
            entry = json.load(tar.extractfile(described))  # type: ignore[arg-type]
            assert Path(image.name).suffix == Path(entry["file"]).suffix.lower()
            assert tar.extractfile(text).read().decode() == entry["text"]  # type: ignore[union-attr]
            found[entry["file"]] = hashlib.sha256(content).hexdigest()
            assert found[entry["file"]] == entry["answer"]["digest"]
    return found


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("stops", [(), (1,), (2, 1), (3,), (5,), (6,)], ids=str)
def test_interrupted_run_resumes(
    digest: Callable[..., Job], pictures: Path, tmp_path: Path, kind: str, stops: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(outputs, "SHARD_SAMPLES", 2)
    expected = {name: hashlib.sha256((pictures / name).read_bytes()).hexdigest() for name in GOOD}
    for count in stops:
        digest(*OUTPUTS[kind], stop_after=count)
    job = digest(*OUTPUTS[kind])
    assert (job.seen, job.known, job.failures) == (6, sum(stops), 1)
    assert digests_in(tmp_path / OUTPUTS[kind][0], kind) == expected
    assert [entry["file"] for entry in job.log.entries()] == NAMES
    if kind == "webdataset":
        assert len(list((tmp_path / "shards").glob("*.tar"))) == 3


@pytest.mark.parametrize("kind", OUTPUTS)
def test_complete_output_grows_with_its_folder(
    digest: Callable[..., Job], pictures: Path, tmp_path: Path, kind: str
) -> None:
    (pictures / "c-1.png").rename(tmp_path / "later")
    digest(*OUTPUTS[kind])
    (tmp_path / "later").rename(pictures / "c-1.png")
    assert digest(*OUTPUTS[kind]).known == 5
    log = output_for(tmp_path / OUTPUTS[kind][0], OUTPUTS[kind][1]).log_path
    assert sorted(json.loads(line)["file"] for line in log.read_text().splitlines()) == sorted(NAMES)


@pytest.mark.parametrize("kind", ["txt", "xmp"])
def test_file_that_the_log_precedes_is_written_on_resume(digest: Callable[..., Job], tmp_path: Path, kind: str) -> None:
    job = digest(*OUTPUTS[kind], stop_after=2)
    (written,) = (tmp_path / OUTPUTS[kind][0]).rglob(f"b*.{kind}")
    before = written.read_bytes()
    written.unlink()
    digest(*OUTPUTS[kind], stop_after=1)
    assert written.read_bytes() == before
    assert job.log.path.name == ".captions.jsonl"


def test_file_of_the_user_is_not_overwritten(digest: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "pictures" / "b.txt").write_text("mine")
    job = digest("pictures", "txt")
    assert (tmp_path / "pictures" / "b.txt").read_text() == "mine"
    assert job.failures == 2
    errors = {entry["file"]: entry["error"] for entry in job.log.entries() if "error" in entry}
    assert "b.txt exists. Remove it, and the line of b.png" in errors["b.png"]


def test_second_image_of_a_name_gets_an_error(digest: Callable[..., Job], pictures: Path, tmp_path: Path) -> None:
    (pictures / "b.gif").write_bytes((pictures / "b.png").read_bytes())
    job = digest("texts", "txt")
    assert [entry["file"] for entry in job.log.entries() if "error" in entry] == ["b.png", BROKEN]


@pytest.mark.parametrize("key", ["/a.png", "../a.png", "c/../../a.png", "."])
def test_text_file_outside_of_the_folder_is_refused(tmp_path: Path, key: str) -> None:
    refused = output_for(tmp_path / "texts", "txt").refusal(key)
    assert refused is not None and "has no place for its caption" in refused


@pytest.mark.parametrize("torn", [False, True])
def test_sample_that_the_log_lacks_is_overwritten(digest: Callable[..., Job], tmp_path: Path, torn: bool) -> None:
    digest("out.tar", stop_after=1)
    whole = (tmp_path / "out.tar").read_bytes()
    added = whole[:700] if torn else sample("000000001", "x.png", {"text": "x"}, b"x") + bytes(1024)
    (tmp_path / "out.tar").write_bytes(whole[:-1024] + added)
    digest("out.tar", stop_after=1)
    assert list(shard_digests(tmp_path / "out.tar")) == ["a.PNG", "b.png"]
    (tmp_path / "out.tar").write_bytes(whole[:512])
    with pytest.raises(OutputError, match=r"out\.tar must have at least .* \(got 512\)"):
        digest("out.tar")


def test_shard_without_a_log_is_not_touched(digest: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for path in ("out.tar", "shards/00000.tar", "out.csv", "out.parquet"):
        (tmp_path / path).write_bytes(b"mine")
    for out, kind in (("out.tar", None), ("shards", "webdataset"), ("out.csv", None), ("out.parquet", None)):
        with pytest.raises(UsageError, match=r"without (its|their) log"):
            digest(out, kind)
    assert (tmp_path / "out.tar").read_bytes() == (tmp_path / "out.csv").read_bytes() == b"mine"


def test_first_sample_without_a_line_is_overwritten(
    digest: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(log: CaptionLog, key: str, entry: object) -> None:
        raise OutputError("the disk is full")

    for out, kind in (("out.tar", None), ("shards", "webdataset")):
        with monkeypatch.context() as patched, pytest.raises(OutputError, match="full"):
            patched.setattr(CaptionLog, "add", full)
            digest(out, kind)
        digest(out, kind)
        assert list(digests_in(tmp_path / out, kind or "tar")) == GOOD


def test_archive_is_whole_after_every_sample(digest: Callable[..., Job], tmp_path: Path) -> None:
    for count in range(1, 4):
        digest("out.tar", stop_after=1)
        content = (tmp_path / "out.tar").read_bytes()
        assert content.endswith(bytes(1024))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            assert len(archive.getmembers()) == 3 * min(count, 2)


def test_webdataset_reads_the_shards(digest: Callable[..., Job], tmp_path: Path) -> None:
    import webdataset

    digest("out.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "out.tar"), shardshuffle=False).decode("pil"))
    assert [one["json"]["file"] for one in samples] == GOOD
    image = next(one["png"] for one in samples if "png" in one)
    assert image.size == (30, 21)


@pytest.mark.parametrize(
    ("out", "chosen", "expected"),
    [
        ("a.jsonl", None, "jsonl"),
        ("a.ndjson", None, "jsonl"),
        ("a.anything", "jsonl", "jsonl"),
        ("a.CSV", None, "csv"),
        ("a.tar", None, "webdataset"),
        ("a", "webdataset", "webdataset"),
        ("a", "txt", "txt"),
    ],
)
def test_format_follows_the_suffix(tmp_path: Path, out: str, chosen: str | None, expected: str) -> None:
    assert format_of(tmp_path / out, chosen) == expected


@pytest.mark.parametrize("out", ["out.xyz", "out.json", "out", "out.tar.gz"])
def test_unknown_suffix_is_an_error_that_lists_them(tmp_path: Path, out: str) -> None:
    with pytest.raises(UsageError, match=r"one of \.jsonl, \.ndjson, \.csv, \.parquet, \.tar \(got .*format to one of"):
        output_for(tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_usage_error_when_a_format_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, chosen in (("", None), ("file", "txt"), ("", "csv"), ("a.jsonl", "parquet"), ("a", "yaml")):
        with pytest.raises(UsageError, match="format"):
            format_of(tmp_path / out, chosen)
