"""The encoder in a separate process, compared with one in process, within one run.

    python tests/bench/bench_encoder_process.py FOLDER [--rounds N] [--images N]

Prints the times of warm encodes, captions with an encoder that waits without using the CPU (like the Neural Engine),
captions with the reference executor, and whole `generate` commands in new processes.
"""

from __future__ import annotations

import argparse
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
from fastvlm.runtime.encoders import ReferenceEncoder, Shapes, VisionEncoder
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.request import prepare

CHILD = Path(__file__).resolve().parents[1] / "runtime" / "bad_child.py"
SAMPLE = Path(__file__).resolve().parents[2] / "runtime" / "samples" / "shapes.png"
TOKENS, BATCH = 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an exported folder with a package")
    parser.add_argument("--rounds", type=int, default=9, help="commands of each kind")
    parser.add_argument("--images", type=int, default=64, help="images of each captioning run")
    arguments = parser.parse_args()
    compare_encodes(arguments.folder)
    compare_captions(arguments.folder, arguments.images)
    compare_commands(arguments.folder, arguments.rounds)


class SleepingEncoder:
    """An encoder in process that waits without using the CPU."""

    name, projected, compile_ms = "sleeping", False, 0.0

    def __init__(self, shapes: Shapes, seconds: float) -> None:
        self.image_size, self._shapes, self._seconds = shapes.image_size, shapes, seconds

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        time.sleep(self._seconds)
        return np.zeros(self._shapes.output(""), np.float32) + pixel_values.mean()


def generate_once(folder: Path, *extra: str) -> tuple[float, float]:
    """Returns the seconds of a whole command, and its `encode_ms`."""
    command = [sys.executable, "-m", "fastvlm", "generate", str(folder), "-i", str(SAMPLE), "-p", "Describe the image.",
               "--backend", "reference", "--max-tokens", "8", "--json", *extra]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, json.loads(done.stdout)["timings"]["encode_ms"]


def compare_commands(folder: Path, rounds: int) -> None:
    """Prints the times of `generate` in new processes, alternating."""
    found: dict[str, list[tuple[float, float]]] = {"in process": [], "own process": []}
    for _ in range(rounds):
        found["in process"].append(generate_once(folder))
        found["own process"].append(generate_once(folder, "--encoder-process"))
    print(f"generate, {rounds} new processes each, alternating (medians)")
    for name, runs in found.items():
        seconds, encode_ms = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"  {name:<12} {1000 * seconds:7.0f} ms whole   {encode_ms:7.1f} ms encode, cold")
    pairs = zip(found["own process"], found["in process"], strict=True)
    print(f"  difference   {1000 * statistics.median(a[0] - b[0] for a, b in pairs):+7.0f} ms whole (bar: +150)")


def compare_encodes(folder: Path) -> None:
    """Prints the times of warm encodes, alternating."""
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


def random_images(count: int) -> Iterable[np.ndarray]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 255, (90, 120, 3), dtype=np.uint8) for _ in range(count))


def rate(model: FastVLM, count: int) -> float:
    """Returns the captions per second of `count` images."""
    images = random_images(count)
    requests = (prepare(image, "Describe the image.", max_tokens=TOKENS, ignore_eos=True) for image in images)
    model.engine.clear_caches()
    start = time.perf_counter()
    outcomes = list(Batch(model.engine, BATCH).outcomes(requests))
    seconds = time.perf_counter() - start
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return count / seconds


def compare_captions(folder: Path, count: int) -> None:
    """Prints the rates of captions with a sleeping encoder and with the reference executor."""
    vlm = fastvlm.load(folder, "reference")
    shapes = Shapes.of(vlm.config)

    def with_encoder(encoder: VisionEncoder) -> FastVLM:
        return FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0)

    decoding = with_encoder(SleepingEncoder(shapes, 0.0))
    rate(decoding, count)
    seconds = 1 / statistics.median(rate(decoding, count) for _ in range(3))
    program = (str(CHILD), "slow", str(seconds), "-")
    apart = with_encoder(EncoderProcess(vlm.folder.package, shapes, program=program))
    apart.engine.encoder.wait_ready()
    rows: dict[str, Callable[[], FastVLM]] = {
        "decoder alone": lambda: decoding,
        "in turn": lambda: with_encoder(SleepingEncoder(shapes, seconds)),
        "own process": lambda: apart,
    }
    title = f"{count} captions, encoder that waits {1000 * seconds:.1f} ms per image (the decoder's time)"
    show(title, rows, count, encoder_rate=1 / seconds)
    real = with_encoder(EncoderProcess(vlm.folder.package, shapes, backend="reference"))
    real.engine.encoder.wait_ready()
    inside = with_encoder(ReferenceEncoder(vlm.folder.package, shapes))
    rows = {"in process": lambda: inside, "own process": lambda: real}
    show(f"{count} captions, reference executor", rows, count)


def show(title: str, rows: dict[str, Callable[[], FastVLM]], count: int, encoder_rate: float = float("inf")) -> None:
    """Prints the median rate of three alternating runs of each row.

    Ratios are to the slower half: the first row, or the encoder alone.
    """
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(3):
        for name, model in rows.items():
            found[name].append(rate(model(), count))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    slower = min(next(iter(medians.values())), encoder_rate)
    print(title)
    for name, value in medians.items():
        print(f"  {name:<14} {value:7.2f} captions/s   {value / slower:5.2f} x")


if __name__ == "__main__":
    main()
