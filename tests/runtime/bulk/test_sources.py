"""The images of a run: each kind of input under stable keys, lazily."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvlm.models.errors import ImageError, UsageError
from fastvlm.runtime.bulk import sources
from fastvlm.runtime.bulk.sources import Source, label, part_of

NAMES = ["a.PNG", "b.png", "c/d.jpg", "c-1.png", "e.webp"]


def encoded(n: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (n, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the working directory with images under NAMES, and other files."""
    monkeypatch.chdir(tmp_path)
    folder = Path("pictures")
    for n, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(n))
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "loop").symlink_to("..")
    return folder


def contents(source: Source) -> dict[str, bytes]:
    """Returns the bytes of each image, loaded in turn."""
    found = {}
    for item in source:
        image = item.load()
        found[item.key] = image if isinstance(image, bytes) else image.read_bytes()
    return found


def packed(pictures: Path, path: str) -> None:
    """Writes a zip or tar archive of a folder."""
    names = [*NAMES, "notes.txt", ".hidden.png"]
    if path.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(pictures / name, name)
        return
    with tarfile.open(path, "w:gz" if path.endswith("gz") else "w") as tar:
        for name in names:
            tar.add(pictures / name, name)


def test_folder_is_in_the_order_of_names_without_hidden_files(pictures: Path) -> None:
    assert list(contents(Source([pictures]))) == ["a.PNG", "b.png", "c/d.jpg", "c-1.png", "e.webp"]
    assert Source([pictures]).count() == 5


@pytest.mark.parametrize("archive", ["p.zip", "p.tar", "p.tar.gz", "p.tgz"])
def test_archive_has_the_images_of_its_folder(pictures: Path, archive: str) -> None:
    packed(pictures, archive)
    expected = {f"{archive}/{key}": image for key, image in contents(Source([pictures])).items()}
    assert contents(Source([archive])) == expected
    assert Source([archive]).count() == (5 if archive == "p.zip" else None)


def test_several_inputs_have_their_names_in_keys(pictures: Path) -> None:
    packed(pictures, "p.zip")
    keys = list(contents(Source([pictures, "p.zip", "pictures/b.png"])))
    assert keys[0] == "pictures/a.PNG" and keys[5] == "p.zip/a.PNG" and keys[10:] == []
    assert list(contents(Source(["pictures/b.png"]))) == ["pictures/b.png"]


def test_pattern_has_keys_below_its_fixed_part(pictures: Path) -> None:
    (pictures / "loop").unlink()  # `**` follows links
    assert list(contents(Source(["pictures/c/*"]))) == ["d.jpg"]
    assert list(contents(Source(["pictures/**/*.jpg"]))) == ["c/d.jpg"]
    assert list(contents(Source([f"{pictures.absolute()}/*/*.jpg"]))) == ["c/d.jpg"]
    with pytest.raises(ImageError, match=r"x\*\.png matches nothing"):
        list(Source(["x*.png"]))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_list_has_paths_as_they_stand(pictures: Path, end: str) -> None:
    Path("list").write_bytes(end.join(["pictures/b.png", "", "pictures/gone.png"]).encode())
    items = list(Source(listed=Path("list")))
    assert [item.key for item in items] == ["pictures/b.png", "pictures/gone.png"]
    assert items[1].load() == Path("pictures/gone.png"), "a missing file is an error of its row"
    Path("list").write_bytes(b"x" * sources.MAX_PATH_BYTES)
    with pytest.raises(ImageError, match="line 1 is not a path"):
        list(Source(listed=Path("list")))


@given(st.lists(st.text(max_size=9), unique=True), st.integers(1, 9))
def test_shards_are_a_partition_that_depends_on_keys_alone(keys: list[str], parts: int) -> None:
    assert all(1 <= part_of(key, parts) <= parts for key in keys)
    assert part_of("a/b.jpg", 100) == 97


def test_each_image_is_in_one_shard(pictures: Path) -> None:
    found = [list(contents(Source([pictures], shard=(k, 3)))) for k in (1, 2, 3)]
    assert sorted(itertools.chain(*found)) == sorted(NAMES)
    for wrong in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(UsageError, match="shard must be K/N"):
            Source([pictures], shard=wrong)


def test_image_errors_when_there_is_nothing_to_caption(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has no images"):
        list(Source([tmp_path]))
    for inputs, listed in (([tmp_path / "gone"], None), ([], tmp_path / "gone")):
        with pytest.raises(ImageError, match=r"gone (does not exist|is not a file)"):
            Source(inputs, listed)
    with pytest.raises(UsageError, match="no images were named"):
        Source()


@pytest.mark.parametrize("name", ["p.zip", "p.tar"])
def test_damaged_archive_is_an_image_error(pictures: Path, name: str) -> None:
    packed(pictures, name)
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: len(content) // 3])
    with pytest.raises(ImageError, match=f"{name} cannot be read as a"):
        contents(Source([name]))


def test_damaged_member_of_a_zip_is_an_error_of_its_row(pictures: Path) -> None:
    packed(pictures, "p.zip")
    content = Path("p.zip").read_bytes()
    Path("p.zip").write_bytes(content.replace(encoded(1), encoded(1)[::-1], 1))
    items = list(Source(["p.zip"]))
    errors = []
    for item in Source(["p.zip"]):
        try:
            item.load()
        except ImageError as reason:
            errors.append((item.key, str(reason)))
    assert len(items) == 5 and [key for key, _ in errors] == ["p.zip/b.png"]
    assert "b.png of p.zip cannot be read: Bad CRC-32" in errors[0][1]


def test_member_that_declares_too_many_bytes_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 10)
    for name in ("p.zip", "p.tar"):
        packed(pictures, name)
        with pytest.raises(ImageError, match=r"must have at most 10 bytes"):
            contents(Source([name]))


def test_name_that_is_not_utf_8_has_a_label() -> None:
    assert label(Path(os.fsdecode(b"a/\xff.png"))) == "a/\\xff.png"
    assert label(Path("a/é.png")) == "a/é.png"
