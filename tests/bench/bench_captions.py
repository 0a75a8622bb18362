"""Prints the images per second of bulk captions: `python tests/bench/bench_captions.py FOLDER [--images 16]`.

Compares the pipeline with a loop that decodes each image when the batch asks for it, alternating in one process, and
prints the rate of each stage alone. The encoders are the reference executor in this process and in a child, and
children that sleep, as the Neural Engine lets this process wait without using the CPU. Their times are those of the
decoder times `--ratios`. `--sleeping-decoder PREFILL STEP` makes the decoder sleep too, as a GPU does.

The share is that of the slower half, the encoder or the decoder alone. Decoding of images is in neither, and takes CPU
time from the decoder.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import fastvlm
from fastvlm.models._mlx import mx
from fastvlm.models.images import open_image, preprocess
from fastvlm.models.qwen2 import Qwen2
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
        if (folder / f"{n:04d}.jpg").exists():
            continue
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


def squared(path: Path, image_size: int) -> object:
    """Decodes and scales an image."""
    return preprocess(open_image(path), image_size, "pad")


def decode_rate(folder: Path, image_size: int, pool: Executor) -> float:
    """Returns the images per second of decoding and scaling alone, in threads or processes that run already."""
    paths = sorted(folder.iterdir())
    list(pool.map(squared, paths[:2], [image_size] * 2))
    start = time.perf_counter()
    list(pool.map(squared, paths, [image_size] * len(paths)))
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


class SleepingDecoder(Qwen2):
    """The decoder, which sleeps in addition to what it computes."""

    prefill_seconds = step_seconds = 0.0

    def __call__(self, inputs_embeds: mx.array, cache: list | None = None, all_positions: bool = False) -> mx.array:
        time.sleep(self.prefill_seconds if inputs_embeds.shape[1] > 1 else self.step_seconds)
        return super().__call__(inputs_embeds, cache, all_positions)


def encoder_rate(encoder: VisionEncoder, count: int) -> float:
    """Returns the images per second of an encoder alone, with a queue if it has a process."""
    pixel_values = np.zeros((1, 3, encoder.image_size, encoder.image_size), np.float32)
    start, pending = time.perf_counter(), deque()
    for _ in range(count):
        if not isinstance(encoder, EncoderProcess):
            encoder.encode(pixel_values)
            continue
        pending.append(encoder.submit(pixel_values))
        if len(pending) > 2:
            pending.popleft().result()
    while pending:
        pending.popleft().result()
    return count / (time.perf_counter() - start)


def encoders(
    model: FastVLM, kinds: list[str], seconds: float, ratios: list[float]
) -> Iterator[tuple[str, VisionEncoder]]:
    """Yields the encoders that were asked for."""
    shapes, package = Shapes.of(model.config), model.folder.package
    if "inside" in kinds:
        yield "in process", model.engine.encoder
    if "child" in kinds:
        yield "own process", EncoderProcess(package, shapes, backend="reference")
    for ratio in ratios if "sleeping" in kinds else ():
        program = (str(CHILD), "slow", str(ratio * seconds), "-")
        yield f"child that sleeps {1000 * ratio * seconds:.0f} ms", EncoderProcess(package, shapes, program=program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", default=["inside", "child", "sleeping"])
    parser.add_argument("--pictures", type=Path, help="keep the images in this folder for the next run")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0])
    parser.add_argument("--loop-images", type=int, help="images of the loop and the decoder alone, all by default")
    parser.add_argument("--sleeping-decoder", type=float, nargs=2, metavar="SECONDS")
    given = parser.parse_args()
    few = min(given.images, given.loop_images or given.images)
    options = {"max_tokens": given.tokens, "ignore_eos": True}
    vlm = fastvlm.load(given.folder, "reference")
    if given.sleeping_decoder:
        SleepingDecoder.prefill_seconds, SleepingDecoder.step_seconds = given.sleeping_decoder
        vlm.engine.language.language_model.__class__ = SleepingDecoder

    def with_encoder(encoder: VisionEncoder) -> FastVLM:
        return FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0)

    with tempfile.TemporaryDirectory() as name:
        root = given.pictures or Path(name)
        folder, fewer, small = (root / kind for kind in ("images", "fewer", "small"))
        for path, count, megapixels in (
            (folder, given.images, given.megapixels),
            (fewer, few, given.megapixels),
            (small, few, 0.01),
        ):
            path.mkdir(parents=True, exist_ok=True)
            make_images(path, count, megapixels)
        blind = with_encoder(NoEncoder(Shapes.of(vlm.config)))
        size, spawn = vlm.engine.encoder.image_size, multiprocessing.get_context("spawn")
        pools = {"1 thread": ThreadPoolExecutor(1), "2 threads": ThreadPoolExecutor(2),
                 "2 processes": ProcessPoolExecutor(2, spawn)}  # fmt: skip
        rates = {
            f"decode JPEGs, {kind}": lambda pool=pool: decode_rate(fewer, size, pool) for kind, pool in pools.items()
        }
        rates["decoder alone"] = lambda: pipeline_rate(blind, small, options)
        list(Captioner(blind, PROMPT, options).rows(list(Source([small]))[:2]))
        alone = alternating(rates, given.runs)
        for pool in pools.values():
            pool.shutdown()
        print(
            f"{given.images} JPEGs of {given.megapixels:g} MP ({few} in the loop and alone), {given.tokens} tokens, "
            f"batches of {BATCH}"
        )
        for stage, rate in alone.items():
            print(f"  {stage:<28} {rate:6.2f} images/s")
        for title, encoder in encoders(vlm, given.encoders, 1 / alone["decoder alone"], given.ratios):
            model = with_encoder(encoder)
            if isinstance(encoder, EncoderProcess):
                encoder.wait_ready()
            encoding = encoder_rate(encoder, min(few, 8))
            found = alternating(
                {"loop": lambda m=model: loop_rate(m, fewer, options),
                 "pipeline": lambda m=model: pipeline_rate(m, folder, options)}, given.runs,
            )  # fmt: skip
            slower = min(encoding, alone["decoder alone"])
            print(
                f"  {title:<28} encoder alone {encoding:6.2f}, loop {found['loop']:6.2f}, pipeline "
                f"{found['pipeline']:6.2f} images/s: {found['pipeline'] / found['loop']:.2f} x the loop, "
                f"{found['pipeline'] / slower:.2f} of the slower half (loop {found['loop'] / slower:.2f})"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
