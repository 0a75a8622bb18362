"""The commands that are killed, with their outputs and the checks of those."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

FASTVLM = (str(Path(sys.executable).with_name("fastvlm")),)
HUB_SERVER = Path(__file__).resolve().parents[1] / "hub_server.py"
HUB_ID = "someone/FastVLM-tiny"
ARCHIVE = "0.5b-stage3"
BYTES_PER_SECOND = 2_000_000
"""The speed of downloads. `tiny`'s weights then take seconds, so that kills hit the middle."""


@dataclass(frozen=True)
class Job:
    """A command that writes to `out`."""

    name: str
    command: tuple[str, ...]
    out: Path
    whole: Callable[[Path], None]
    """A check that raises if `out` is not complete."""
    resumes: bool = False
    """True if a run resumes what a killed run left, so that a part may remain."""
    removed_first: bool = False
    """True if an existing `out` leaves nothing to do, so that it is removed before each kill."""
    loser: str = ""
    """A part of the error of the second of two runs with one output, or empty if it is not specified."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, out: Path | None = None) -> subprocess.Popen[str]:
        """Starts the command, with another new output if `out` is given."""
        command = [part for part in self.command if out is None or part != "--force"]
        return subprocess.Popen(
            [str(out) if out and part == str(self.out) else part for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
        )

    def leftovers(self, but: Path) -> list[str]:
        """Returns the work folders next to `out`, except for `but`, which belongs to another process."""
        kinds = (f".{self.out.name}.partial-", f".{self.out.name}.replaced-", f".{self.out.name}.download")
        folders = [path for path in self.out.parent.iterdir() if path.is_dir() and path != but]
        return [path.name for path in folders if path.name.startswith(kinds)]


def whole_folder(folder: Path) -> None:
    from fastvlm.runtime.folder import open_folder

    open_folder(folder, verify_hashes=True)


def whole_bundle(folder: Path) -> None:
    from fastvlm.export.bundle.check import check_bundle
    from fastvlm.export.bundle.place import earlier_files
    from fastvlm.models.files import sha256

    faults = check_bundle(folder, "mlx-swift-lm").faults
    assert not faults, faults
    files = earlier_files(folder)
    changed = [name for name, digest in files.items() if sha256(folder / name) != digest]
    assert files and not changed, changed


def whole_checkpoint(folder: Path) -> None:
    """Checks that the downloaded files equal the served ones."""
    from fastvlm.models.checkpoint import FolderCheckpoint
    from fastvlm.models.download.archives import is_needed
    from fastvlm.models.references import TINY_FOLDER

    FolderCheckpoint(folder)
    served = {path.name: path.read_bytes() for path in TINY_FOLDER.iterdir() if is_needed(path.name)}
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "fastvlm-download.json"}
    assert there == served, sorted(there.keys() ^ served.keys()) or "a file differs"


def whole_captions(file: Path) -> None:
    """Checks that each line except for a cut last one is an answer, and that no file occurs twice."""
    lines = file.read_text().splitlines(keepends=True)
    names = [json.loads(line)["file"] for line in lines if line.endswith("\n")]
    assert len(names) == len(set(names)), names


def whole_training(folder: Path) -> None:
    """Checks that an existing checkpoint opens, with its report, and that an existing state can be resumed."""
    import torch

    from fastvlm.models.checkpoint import FolderCheckpoint

    if (folder / "state.pt").exists():
        assert torch.load(folder / "state.pt", weights_only=True)["step"] >= 1
    if (folder / "checkpoint").exists():
        FolderCheckpoint(folder / "checkpoint")
        json.loads((folder / "checkpoint" / "training.json").read_text())


def export_jobs(folder: Path) -> list[Job]:
    """Returns an export, and a bundle of another export, which is made here."""
    export = (*FASTVLM, "export", "random:tiny", "--image-size", "128", "--allow-shortfall")
    subprocess.run((*export, "--encoder", "mlx", "-o", str(folder / "mlx")), check=True, capture_output=True)
    model, bundled = folder / "model", folder / "bundle"
    bundle = (*FASTVLM, "bundle", str(folder / "mlx"), "--for", "mlx-swift-lm", "--out", str(bundled))
    return [
        Job("export", (*export, "--force", "-o", str(model)), model, whole_folder, loser="exists: "),
        Job("bundle", bundle, bundled, whole_bundle),
    ]


def download_jobs(folder: Path, url: str) -> list[Job]:
    """Returns downloads from a hub and from Apple, both of which are a server at `url`."""
    hub, apple = folder / "from-hub", folder / "from-apple"
    own_hub = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    elsewhere = f"from fastvlm.models.download import archives; archives.BASE_URL = {url!r}; "
    archive = (sys.executable, "-c", f"{elsewhere}from fastvlm.cli.start import main; main()", "download", ARCHIVE)
    other = "another process is downloading"
    return [
        Job("download, hub", (*FASTVLM, "download", HUB_ID, "--out", str(hub)), hub, whole_checkpoint,
            removed_first=True, resumes=True, loser=other, environment=own_hub),
        Job("download, Apple", (*archive, "--out", str(apple)), apple, whole_checkpoint,
            removed_first=True, resumes=True, loser=other),
    ]  # fmt: skip


def other_jobs(folder: Path, model: Path) -> list[Job]:
    """Returns captions of a folder of images, and a training."""
    images, out, trained = folder / "images", folder / "captions.jsonl", folder / "trained"
    images.mkdir()
    for n in range(12):
        Image.new("RGB", (64, 64), (20 * n, 99, 30)).save(images / f"{n}.png")
    caption = (*FASTVLM, "caption", str(images), "--model", str(model), "-p", "What?", "--max-tokens", "4")
    train = (sys.executable, "-m", "fastvlm.models.tiny.train", "--steps", "2", "--threads", "1", "--out", str(trained))
    return [
        Job("captions", (*caption, "--out", str(out)), out, whole_captions,
            removed_first=True, resumes=True, loser="is being written by another process"),
        Job("training", train, trained, whole_training, removed_first=True, resumes=True),
    ]  # fmt: skip
