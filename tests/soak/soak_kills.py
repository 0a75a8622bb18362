"""Kills commands at random moments: what they write is absent or whole, and nothing else is touched.

    python tests/soak/soak_kills.py --minutes 15 --kills 100

Each command is first left alone, to see how long it takes, then gets SIGINT, SIGTERM or SIGKILL at seeded moments of
that span. After each kill the output is looked at; the next run of the command, at the same place, must succeed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
FASTVLM = (sys.executable, "-m", "fastvlm.cli.main")


@dataclass(frozen=True)
class Job:
    """A command that writes to `out`."""

    name: str
    command: tuple[str, ...]
    out: Path
    whole: Callable[[Path], None]
    """Raises when what stands at `out` is not complete."""
    resumes: bool = False
    """Whether what a killed run leaves is gone on with, and so may be there in part."""


def whole_folder(folder: Path) -> None:
    from fastvlm.runtime.folder import open_folder

    open_folder(folder, verify_hashes=True)


def whole_bundle(folder: Path) -> None:
    from fastvlm.export.bundle.check import check_bundle

    faults = check_bundle(folder, "mlx-vlm").faults
    assert not faults, faults


def whole_captions(file: Path) -> None:
    """Each line but a torn last one is an answer, and no file comes twice."""
    lines = file.read_text().splitlines(keepends=True)
    names = [json.loads(line)["file"] for line in lines if line.endswith("\n")]
    assert len(names) == len(set(names)), names


def whole_training(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        from fastvlm.models.safetensors_header import read_header

        read_header(file)


def jobs(folder: Path, model: Path) -> list[Job]:
    images = folder / "images"
    images.mkdir()
    for n in range(12):
        Image.new("RGB", (64, 64), (20 * n, 99, 30)).save(images / f"{n}.png")
    export = (*FASTVLM, "export", "random:tiny", "--image-size", "128", "--allow-shortfall", "--force")
    bundle = (*FASTVLM, "bundle", str(folder / "mlx"), "--target", "mlx-vlm", "--to")
    caption = (*FASTVLM, "generate", str(model), "--images", str(images), "-p", "What?", "--max-tokens", "4", "--out")
    train = (sys.executable, "-m", "fastvlm.models.tiny.train", "--steps", "2", "--out")
    found = [Job("export", (*export, "-o", str(folder / "model")), folder / "model", whole_folder)]
    if known("bundle"):
        source = (*export, "--layout", "mlx", "-o", str(folder / "mlx"))
        subprocess.run(source, check=True, capture_output=True)
        found.append(Job("bundle", (*bundle, str(folder / "bundle")), folder / "bundle", whole_bundle))
    if "--images" in help_of("generate"):
        out = folder / "captions.jsonl"
        found.append(Job("captions", (*caption, str(out)), out, whole_captions, resumes=True))
    trained = folder / "trained"
    found.append(Job("training", (*train, str(trained)), trained, whole_training, resumes=True))
    return found


def help_of(*command: str) -> str:
    return subprocess.run((*FASTVLM, *command, "--help"), capture_output=True, text=True).stdout


def known(command: str) -> bool:
    return f" {command} " in help_of()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, deadline = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    tally: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak-kills-") as name:
        folder = Path(name)
        from fastvlm.export.exporter import export

        export("random:tiny", folder / "ready", image_size=128, allow_shortfall=True)
        chosen = [job for job in jobs(folder, folder / "ready") if options.only in job.name]
        others = bystanders(folder, chosen)
        seconds = {job.name: alone(job) for job in chosen}
        print({name: round(span, 1) for name, span in seconds.items()}, flush=True)
        for n in range(options.kills):
            if time.monotonic() > deadline:
                break
            job = chosen[n % len(chosen)]
            faults += kill(job, rng.choice(SIGNALS), rng.random() * seconds[job.name], tally)
        for job in chosen:
            faults += rerun(job)
        faults += [
            f"{path} was touched"
            for path, content in others.items()
            if not path.is_file() or path.read_text() != content
        ]
        faults += two_at_once(chosen[0]) if chosen[0].name == "export" else []
    for (job_name, outcome), count in sorted(tally.items()):
        print(f"{job_name:<12}{outcome:<40}{count:>5}")
    print(f"{sum(tally.values())} kills, {len(faults)} faults", *faults, sep="\n")
    sys.exit(bool(faults))


def bystanders(folder: Path, chosen: list[Job]) -> dict[Path, str]:
    """Other people's files, with names that come near those of ours."""
    files = {}
    for job in chosen:
        for name in (f".{job.out.name}.partial-notes", f".{job.out.name}.partial-1.txt", f"{job.out.name}.txt"):
            files[folder / name] = f"mine: {name}"
    for path, content in files.items():
        path.write_text(content)
    return files


def alone(job: Job) -> float:
    start = time.monotonic()
    result = subprocess.run(job.command, capture_output=True, text=True)
    assert result.returncode == 0, (job.name, result.stderr)
    job.whole(job.out)
    return time.monotonic() - start


def kill(job: Job, number: signal.Signals, delay: float, tally: Counter[tuple[str, str]]) -> list[str]:
    """Starts the job, sends the signal after `delay` seconds, and looks at what is there."""
    if job.name == "captions":
        job.out.unlink(missing_ok=True)
    process = subprocess.Popen(job.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    what = f"{job.name} after {delay:.2f} s of {number.name}"
    faults = []
    if "Traceback" in errors and delay > 0.5 and "fastvlm" in job.command[2]:
        faults.append(f"{what}: {errors[-600:]}")
    state = "absent"
    if job.out.exists():
        state = "whole"
        try:
            job.whole(job.out)
        except Exception as error:
            faults.append(f"{what}: {job.out} is broken: {error!s:.300}")
    if number != signal.SIGKILL and not job.resumes and (left := leftovers(job)):
        faults.append(f"{what}: left {left}")
    outcome = "finished before" if process.returncode == 0 else number.name
    tally[job.name, f"{outcome}, {state}"] += 1
    return faults


def leftovers(job: Job) -> list[str]:
    kinds = (f".{job.out.name}.partial-", f".{job.out.name}.replaced-")
    return [path.name for path in job.out.parent.iterdir() if path.name.startswith(kinds) and path.is_dir()]


def rerun(job: Job) -> list[str]:
    try:
        alone(job)
    except Exception as error:
        return [f"{job.name} cannot be run again: {error!s:.600}"]
    return [f"{job.name} left {left}"] if (left := leftovers(job)) else []


def two_at_once(job: Job) -> list[str]:
    """Two processes that write to one new place: one wins, the other says so."""
    place = job.out.with_name("contested")
    command = [str(place) if part == str(job.out) else part for part in job.command if part != "--force"]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in pair]
    whole_folder(place)
    won = [code for _, code in ends if code == 0]
    lost = [text.strip().splitlines()[-1] for text, code in ends if code]
    print(f"two at once: {len(won)} won; the other said: {lost}")
    right = len(won) == 1 and "exists: pass --force" in lost[0]
    return [] if right else [f"two at once ended as {ends}"]


if __name__ == "__main__":
    main()
