"""Prints the images per second of bulk captions: `python tests/bench/bench_captions.py FOLDER [--images 16]`.

Compares the pipeline with a loop that decodes each image when the batch asks for it, alternating in one process, and
prints the rate of each stage alone. The slowest stage is the one that limits. The encoders are the reference executor
in this process and in a child, and a child that sleeps for as long as the decoder takes, as the Neural Engine lets
this process wait without using the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import fastvlm
from fastvlm.models.images import open_image, preprocess
from fastvlm.runtime.batch import Batch
from fastvlm.runtime.bulk.pipeline import Captioner
from fastvlm.runtime.bulk.sources import Source
from fastvlm.runtime.encoder_process import EncoderProcess
from fastvlm.runtime.encoders import Shapes, VisionEncoder
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.request import prepare

CHILD = Path(__file__).resolve().parents[1] / "runtime" / "bad_child.py"
PROMPT = "Describe the image."
BATCH = 8


def make_images(folder: Path, count: int, megapixels: float) -> None:
    """Writes JPEGs of 4:3 with smooth colors and noise, so that they take as long to decode as photos."""
    rng = np.random.default_rng(0)
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((height * 4 // 3, height), Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-8, 8, smooth.shape, dtype=np.int16)
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(folder / f"{n:04d}.jpg", quality=90)


def loop_rate(model: FastVLM, folder: Path, options: dict) -> float:
    """Returns the images per second of a loop without a pipeline."""
    model.engine.clear_caches()
    paths = sorted(folder.iterdir())
    start = time.perf_counter()
    outcomes = list(Batch(model.engine, BATCH).outcomes(prepare(path, PROMPT, **options) for path in paths))
    assert len(outcomes) == len(paths)
    return len(paths) / (time.perf_counter() - start)


def pipeline_rate(model: FastVLM, folder: Path, options: dict) -> float:
    """Returns the images per second of the pipeline."""
    model.engine.clear_caches()
    start = time.perf_counter()
    rows = list(Captioner(model, PROMPT, options, batch_size=BATCH).rows(Source([folder])))
    assert not any(row.error or row.repeated for row in rows)
    return len(rows) / (time.perf_counter() - start)


def decode_rate(model: FastVLM, folder: Path, workers: int) -> float:
    """Returns the images per second of decoding and scaling alone, in threads."""

    def pixels(path: Path) -> object:
        return preprocess(open_image(path), model.engine.encoder.image_size, "pad")

    paths = sorted(folder.iterdir())
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(pixels, paths))
    return len(paths) / (time.perf_counter() - start)


def alternating(rates: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Returns the median of several rates, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for _, (name, rate) in itertools.product(range(runs), rates.items()):
        found[name].append(rate())
    return {name: statistics.median(values) for name, values in found.items()}


class NoEncoder:
    """Zeros in no time, so that the rate is the decoder's."""

    name, projected, compile_ms = "none", False, 0.0

    def __init__(self, shapes: Shapes) -> None:
        self.image_size = shapes.image_size
        self._features = np.zeros(shapes.output(""), np.float32)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._features


def encoders(model: FastVLM, kinds: list[str], seconds: float) -> Iterator[tuple[str, VisionEncoder]]:
    """Yields the encoders that were asked for."""
    shapes, package = Shapes.of(model.config), model.folder.package
    if "inside" in kinds:
        yield "in process", model.engine.encoder
    if "child" in kinds:
        yield "own process", EncoderProcess(package, shapes, backend="reference")
    if "sleeping" in kinds:
        program = (str(CHILD), "slow", str(seconds), "-")
        yield f"child that sleeps {1000 * seconds:.0f} ms", EncoderProcess(package, shapes, program=program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", default=["inside", "child", "sleeping"])
    given = parser.parse_args()
    options = {"max_tokens": given.tokens, "ignore_eos": True}
    vlm = fastvlm.load(given.folder, "reference")

    def with_encoder(encoder: VisionEncoder) -> FastVLM:
        return FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0)

    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name) / "images", Path(name) / "small"
        for path, megapixels in ((folder, given.megapixels), (small, 0.01)):
            path.mkdir()
            make_images(path, given.images, megapixels)
        blind = with_encoder(NoEncoder(Shapes.of(vlm.config)))
        rates = {f"decode JPEGs, {n} thread(s)": lambda n=n: decode_rate(vlm, folder, n) for n in (1, 2)}
        rates["decoder alone"] = lambda: pipeline_rate(blind, small, options)
        pipeline_rate(blind, small, options)
        alone = alternating(rates, given.runs)
        print(f"{given.images} JPEGs of {given.megapixels:g} MP, {given.tokens} tokens, batches of {BATCH}")
        for stage, rate in alone.items():
            print(f"  {stage:<28} {rate:6.2f} images/s")
        for title, encoder in encoders(vlm, given.encoders, 1 / alone["decoder alone"]):
            model = with_encoder(encoder)
            if isinstance(encoder, EncoderProcess):
                encoder.wait_ready()
            found = alternating(
                {"loop": lambda m=model: loop_rate(m, folder, options),
                 "pipeline": lambda m=model: pipeline_rate(m, folder, options)}, given.runs,
            )  # fmt: skip
            gain = found["pipeline"] / found["loop"]
            share = found["pipeline"] / alone["decoder alone"]
            print(f"  {title:<28} loop {found['loop']:6.2f}, pipeline {found['pipeline']:6.2f} images/s: {gain:.2f} x, "
                  f"{share:.2f} of the decoder's rate")  # fmt: skip
            sys.stdout.flush()


if __name__ == "__main__":
    main()
