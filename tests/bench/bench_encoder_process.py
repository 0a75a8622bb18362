"""The encoder in a process of its own, compared with one in process, within one run.

    python tests/bench/bench_encoder_process.py MODEL_FOLDER

Prints three tables: a whole `generate` in new processes, captions with an encoder that takes its time without using the
CPU (as the Neural Engine does), and captions with the reference executor.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import fastvlm
from fastvlm.models.images import to_pixel_values
from fastvlm.runtime.batch import Batch
from fastvlm.runtime.encoder_process import EncoderProcess
from fastvlm.runtime.encoders import ReferenceEncoder, Shapes
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.request import prepare

CHILD = Path(__file__).resolve().parents[1] / "runtime" / "bad_child.py"
SAMPLE = Path(__file__).resolve().parents[2] / "runtime" / "samples" / "shapes.png"
IMAGES, TOKENS, BATCH = 64, 32, 8
ROUNDS = 9


class Sleeping:
    """An encoder in process that takes its time without using the CPU."""

    name, projected, compile_ms = "sleeping", False, 0.0

    def __init__(self, shapes: Shapes, seconds: float) -> None:
        self.image_size, self._shapes, self._seconds = shapes.image_size, shapes, seconds

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        time.sleep(self._seconds)
        return np.zeros(self._shapes.output(""), np.float32) + pixel_values.mean()


def generate_once(folder: Path, *extra: str) -> tuple[float, float]:
    """Seconds of a whole command, and its `encode_ms`."""
    command = [sys.executable, "-m", "fastvlm", "generate", str(folder), "-i", str(SAMPLE), "-p", "Describe the image.",
               "--backend", "reference", "--max-tokens", "8", "--json", *extra]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, json.loads(done.stdout)["timings"]["encode_ms"]


def commands(folder: Path) -> None:
    found: dict[str, list[tuple[float, float]]] = {"in process": [], "own process": []}
    for _ in range(ROUNDS):
        found["in process"].append(generate_once(folder))
        found["own process"].append(generate_once(folder, "--encoder-process"))
    print(f"generate, {ROUNDS} new processes each, alternating (medians)")
    for name, runs in found.items():
        seconds, encode_ms = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"  {name:<12} {1000 * seconds:7.0f} ms whole   {encode_ms:7.1f} ms encode, cold")
    pairs = zip(found["own process"], found["in process"], strict=True)
    print(f"  difference   {1000 * statistics.median(a[0] - b[0] for a, b in pairs):+7.0f} ms whole (bar: +150)")


def encodes(folder: Path) -> None:
    """Warm images, alternating."""
    opened = fastvlm.load(folder, "reference")
    shapes, package = Shapes.of(opened.config), opened.folder.package
    inside = ReferenceEncoder(package, shapes)
    pixel_values = to_pixel_values(np.random.default_rng(0).integers(0, 255, (3, shapes.image_size, shapes.image_size)))
    pixel_values = pixel_values.astype(np.float32)
    times: dict[str, list[float]] = {"in process": [], "own process": []}
    with EncoderProcess(package, shapes, backend="reference") as apart:
        for turn in range(40):
            for name, encoder in (("in process", inside), ("own process", apart)):
                start = time.perf_counter()
                encoder.encode(pixel_values)
                if turn >= 10:
                    times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(column) for name, column in times.items()}
    print("encode, warm, alternating (medians of 30)")
    for name, ms in medians.items():
        print(f"  {name:<12} {ms:7.2f} ms")
    print(f"  difference   {medians['own process'] - medians['in process']:+7.2f} ms (bar: +3)")


def images() -> Iterable[np.ndarray]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 255, (90, 120, 3), dtype=np.uint8) for _ in range(IMAGES))


def rate(model: FastVLM) -> float:
    """Captions per second."""
    asked = (prepare(image, "Describe the image.", max_tokens=TOKENS, ignore_eos=True) for image in images())
    model.engine.feature_cache.clear()
    start = time.perf_counter()
    outcomes = list(Batch(model.engine, BATCH).outcomes(asked))
    seconds = time.perf_counter() - start
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return IMAGES / seconds


def captions(folder: Path) -> None:
    vlm = fastvlm.load(folder, "reference")
    shapes = Shapes.of(vlm.config)

    def with_encoder(encoder: object) -> FastVLM:
        return FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0)

    decoding = with_encoder(Sleeping(shapes, 0.0))
    rate(decoding)
    seconds = 1 / statistics.median(rate(decoding) for _ in range(3))
    program = (str(CHILD), "slow", str(seconds), "-")
    apart = with_encoder(EncoderProcess(vlm.folder.package, shapes, program=program))
    apart.engine.encoder.wait_ready()
    rows: dict[str, Callable[[], FastVLM]] = {
        "decoder alone": lambda: decoding,
        "in turn": lambda: with_encoder(Sleeping(shapes, seconds)),
        "own process": lambda: apart,
    }
    show(
        f"{IMAGES} captions, encoder that waits {1000 * seconds:.1f} ms an image (the decoder's time of one)",
        rows,
        1 / seconds,
    )
    real = with_encoder(EncoderProcess(vlm.folder.package, shapes, backend="reference"))
    real.engine.encoder.wait_ready()
    inside = with_encoder(ReferenceEncoder(vlm.folder.package, shapes))
    show(f"{IMAGES} captions, reference executor", {"in process": lambda: inside, "own process": lambda: real})


def show(title: str, rows: dict[str, Callable[[], FastVLM]], encoder_rate: float = float("inf")) -> None:
    """Ratios are to the slower half: the first row, or the encoder alone."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(3):
        for name, model in rows.items():
            found[name].append(rate(model()))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    slower = min(next(iter(medians.values())), encoder_rate)
    print(title)
    for name, value in medians.items():
        print(f"  {name:<14} {value:7.2f} captions/s   {value / slower:5.2f} x")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    encodes(folder)
    captions(folder)
    commands(folder)
