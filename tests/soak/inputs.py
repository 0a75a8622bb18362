"""The undamaged files of the soak, made by the commands and writers that make them for users."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

SHARD_BYTES = 400_000
QUERY = "model.layers.1.self_attn.q_proj"


def make_inputs(folder: Path, model: Path | None, bench: Path | None) -> tuple[Path, Path, Path]:
    """Returns an exported model folder, a checkpoint, and a folder with everything else."""
    import fastvlm
    from fastvlm.models.references import TINY_FOLDER

    if model is None:
        model = folder / "model"
        fastvlm.export("random:tiny", model, quant="int8", image_size=128, allow_shortfall=True)
    extra = folder / "extra"
    extra.mkdir()
    make_checkpoints(extra)
    make_questions(extra / "questions")
    fastvlm.export("random:tiny", extra / "layout-mlx", encoder="mlx", image_size=128, allow_shortfall=True)
    fastvlm.bundle(extra / "layout-mlx", "mlx-swift-lm", extra / "bundle")
    with zipfile.ZipFile(extra / "checkpoint.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in ("config.json", "tokenizer.json"):
            archive.write(TINY_FOLDER / file, f"tiny/{file}")
    make_reports(model, extra, bench)
    return model, TINY_FOLDER, extra


def make_checkpoints(extra: Path) -> None:
    """Writes `random:tiny` in the other layouts and in shards, and an adapter for it."""
    import checkpoint_writer
    from safetensors.numpy import save_file

    from fastvlm.models import safetensors_files
    from fastvlm.models.random_checkpoint import RandomCheckpoint

    source = RandomCheckpoint("tiny")
    checkpoint_writer.write_checkpoint(source, extra / "hf", "hf")
    checkpoint_writer.write_checkpoint(source, extra / "mlx", "mlx")
    with mock.patch.object(safetensors_files, "MAX_SHARD_BYTES", SHARD_BYTES):
        checkpoint_writer.write_checkpoint(source, extra / "shards", "apple")
    rows, columns = source.tensors[f"{QUERY}.weight"].shape
    name, adapter = f"base_model.model.{QUERY}", extra / "adapter"
    adapter.mkdir()
    shapes = {"A": (4, columns), "B": (rows, 4)}
    factors = {f"{name}.lora_{part}.weight": np.ones(shape, np.float32) for part, shape in shapes.items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {"v_proj": 2}}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **patterns}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def make_questions(folder: Path) -> None:
    """Writes questions in each supported layout, about two small images."""
    folder.mkdir()
    for n in range(2):
        for name in (f"{n}.png", f"{n}.jpg"):
            Image.new("RGB", (8, 6), (90 * n, 200, 30)).save(folder / name)
    two = [(n, f"{n}.png") for n in range(2)]
    own = [{"image": png, "question": f"What is {n}?", "answer": ["a", "b"], "kind": "k", "id": n} for n, png in two]
    vqa = [{"question_id": n, "image_id": str(n), "question": "what?", "answers": ["stop"] * 10} for n, _ in two]
    asked = {"question": "When?", "question_types": ["form"], "answers": ["1/8/93"]}
    doc = [{"questionId": n, "image": png, **asked} for n, png in two]
    chart = [{"imgname": png, "query": "How many?", "label": str(12 + n)} for n, png in two]
    contents = {"textvqa.json": {"data": vqa}, "docvqa.json": {"data": doc}, "test_human.json": chart, "mine.json": own}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in own))


def make_reports(model: Path, extra: Path, bench: Path | None) -> None:
    """Writes the files of `bench --report`, `eval --report` and `caption`."""
    from fastvlm.runtime.bulk.log import CaptionLog

    evaluate = ("eval", model, "--data", extra / "questions/mine.json", "--report", extra / "eval.json")
    measure = ("bench", model, "--runs", "2", "--max-tokens", "2", "--report", extra / "bench.json")
    if bench is not None:
        (extra / "bench.json").write_bytes(bench.read_bytes())
    for command in (evaluate, *(() if bench else (measure,))):
        subprocess.run([sys.executable, "-m", "fastvlm.cli.main", *map(str, command)], capture_output=True, check=True)
    with CaptionLog(extra / "captions.jsonl", "run") as file:
        for n in range(5):
            file.add(f"{n}.png", {"text": f"thing {n}", "tokens": 3} if n else {"error": "no image"})
