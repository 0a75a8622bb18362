"""`fastvlm caption` as a user types it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[2] / "runtime" / "samples"


def test_folder_is_captioned_and_resumed(fastvlm: Callable, here: Callable, model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out.jsonl"

    def caption(start: Callable, *words: object) -> subprocess.CompletedProcess:
        given = (folder, "--model", model, "-p", "What?", "--out", out, "--max-tokens", 4, "--ignore-eos")
        return start("caption", *given, *words, cwd=tmp_path)

    folder.mkdir()
    for name in ("number.png", "shapes.png"):
        shutil.copy(SAMPLES / name, folder)
    first = caption(fastvlm)
    assert first.returncode == 0, first.stderr
    assert "2 images in" in first.stderr
    (folder / "broken.png").write_bytes(b"x")
    shutil.copy(SAMPLES / "word.png", folder)
    second = caption(here, "--batch-size", 1)
    assert second.returncode == 1
    assert "broken.png is" in second.stderr
    assert "4 images in" in second.stderr
    assert "2 of them from an earlier run" in second.stderr
    assert "1 of 4 images have no caption" in second.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == ["number.png", "shapes.png", "broken.png", "word.png"]
    other = caption(here, "--seed", 3)
    assert (other.returncode, other.stdout) == (1, "")
    assert "another model, prompt or options" in other.stderr


def test_patterns_shards_and_prompts_fill_a_table(here: Callable, model: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(SAMPLES.glob("*.png"))))
    given = ("--model", model, "-p", "What?", "-p", "Which color?", "--max-tokens", 2, "--ignore-eos")
    rows = []
    for source, shard in (
        ((f"{SAMPLES}/*.png",), "1/2"),
        ((f"{SAMPLES}/*.png",), "2/2"),
        (("--from", "list.txt"), "1/1"),
    ):
        out = tmp_path / f"{shard[0]}{len(source)}.csv"
        done = here("caption", *source, *given, "-o", out, "--shard", shard, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows.append(list(csv.DictReader(out.open())))
    assert sorted(row["file"] for row in rows[0] + rows[1]) == ["number.png", "shapes.png", "word.png"]
    assert [row["tokens_2"] for row in rows[2]] == ["2", "2", "2"]
    wrong = here("caption", SAMPLES, *given, "-o", "c.csv", "--shard", "3/2", cwd=tmp_path)
    assert "--shard must be K/N with K from 1 to N (got 3/2)" in wrong.stderr
    assert not (tmp_path / "c.csv.jsonl").exists()


def test_options_of_a_cluster_need_the_engine(fastvlm: Callable, here: Callable, model: Path, tmp_path: Path) -> None:
    given = ("caption", SAMPLES, "--model", model, "-o", "c.jsonl")
    done = here(*given, "--actors", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: --actors needs --engine ray.\n")
    nowhere = fastvlm(*given, "--engine", "ray", "--address", "127.0.0.1:1", cwd=tmp_path)
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("error: --address 127.0.0.1:1 has no Ray cluster: Connection refused.")
    assert not (tmp_path / "c.jsonl").exists()


def test_model_and_out_are_required(here: Callable, tmp_path: Path) -> None:
    assert here("caption", ".", "-o", "c.jsonl", cwd=tmp_path).returncode == 2
    assert here("caption", ".", "--model", "m", cwd=tmp_path).returncode == 2
