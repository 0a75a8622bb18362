"""`fastvlm download`: what goes to stdout, what to stderr, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from fastvlm.cli.download import download_command
from fastvlm.models.errors import UsageError
from fastvlm.models.references import TINY_FOLDER


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's archive, from a file instead of the network."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for file in TINY_FOLDER.iterdir():
            opened.write(file, f"llava/{file.name}")

    def fetch(url: str, target: Path, **options: object) -> str:
        target.write_bytes(packed.getvalue())
        return "0" * 64

    monkeypatch.setattr("fastvlm.models.download.apple.fetch", fetch)


def test_folder_goes_to_stdout_and_the_licence_is_told_once(
    archive: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download_command("0.5b-stage3", to=tmp_path / "model")
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'model'}\n"
    assert err.count("for research only") == 1
    assert "no checksum is published for it; the archive's sha256 is 000" in err
    download_command("0.5b-stage3", to=tmp_path / "model")
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_id", "options", "message"),
    [
        ("FastVLM", {}, r"neither a hub id \(owner/name\) nor one of 0.5b-stage2, 0.5b-stage3"),
        ("0.5b-stage3", {"revision": "main"}, "--revision is for the hub"),
        ("apple/FastVLM-0.5B", {"sha256": "0"}, "--sha256 is for archives"),
    ],
)
def test_options_that_do_not_belong_are_refused(model_id: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        download_command(model_id, **options)
