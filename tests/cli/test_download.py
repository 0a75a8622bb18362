"""`fastvlm download`: stdout, stderr, and refused options."""

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
    """Apple's archive, from memory instead of the network."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for file in TINY_FOLDER.iterdir():
            opened.write(file, f"llava/{file.name}")

    def fetch(url: str, target: Path, **options: object) -> str:
        target.write_bytes(packed.getvalue())
        return "0" * 64

    monkeypatch.setattr("fastvlm.models.download.apple.fetch", fetch)


def test_folder_goes_to_stdout_and_licence_to_stderr(
    archive: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download_command("0.5b-stage3", out=tmp_path / "model")
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'model'}\n"
    assert err.count("for research only") == 1
    assert "publishes no checksum for it. The archive's sha256 is 000" in err
    download_command("0.5b-stage3", out=tmp_path / "model")
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_id", "options", "message"),
    [
        ("FastVLM", {}, r"neither a hub id \(owner/name\) nor one of 0.5b-stage2, 0.5b-stage3"),
        ("0.5b-stage3", {"revision": "main"}, "revision is for hub ids"),
        ("apple/FastVLM-0.5B", {"sha256": "0"}, "sha256 is for archives"),
    ],
)
def test_options_of_the_other_source_are_refused(model_id: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        download_command(model_id, **options)
