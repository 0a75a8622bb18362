"""A Core AI asset in Apple's interpreter next to the Core ML package in the executor: arithmetic, bytes and accuracy.

    python tests/bench/bench_coreai.py                          # tiny: stages in both precisions, bytes, 300 questions
    python tests/bench/bench_coreai.py --golden ../shared/golden    # the small reference encoders as well

The executor runs in float16 and in `float16-accumulate`, which has the roundings of the interpreter's operations.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvlm
from fastvlm.export.coreai import Staged, interpret, stage_names
from fastvlm.export.coreai_asset import run_images
from fastvlm.export.judge import ACCUMULATE, run_executor
from fastvlm.export.options import silent
from fastvlm.export.recipe import PackageInterface
from fastvlm.export.rewrite import rewrite
from fastvlm.export.verify_encoder import last_convolutions
from fastvlm.export.write_encoder import convert_encoder
from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import ASSET_NAME, PACKAGE_NAME, folder_bytes
from fastvlm.models.mlprogram import read_package
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.calibration import verification_images
from fastvlm.quant.metrics import compare
from fastvlm.runtime.evaluation.run import evaluate, row_of

GOLDEN = ("llava_small_reparam_tied", "llava_small_train_untied", "hf_fast_vlm_small")


def arithmetic(name: str, model: str | Path, size: int) -> None:
    """Prints the SNR of the stages, compared with torch in float32, by side and precision."""
    encoder = FastViT.from_checkpoint(open_checkpoint(model))
    with torch.no_grad():
        network = rewrite(encoder, size)
    image = verification_images(size)[2]
    stages, tensor = stage_names(network), torch.from_numpy(image)
    for parameter in network.parameters():  # as both files store them
        parameter.data = parameter.data.half().float()
    with torch.inference_mode():
        expected = dict(zip(stages, (one.numpy() for one in Staged(network, torch.float32)(tensor)), strict=True))
    theirs = interpret(network, {}, image)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / PACKAGE_NAME
        convert_encoder(network, size, {}, package, metadata={}, on_stage=silent)
        saved, marks = read_package(package), last_convolutions(encoder.config)
        ours, alike = (run_executor(saved, marks, image, precision) for precision in ("float16", ACCUMULATE))
    sides = (theirs["float32"].results, theirs["float16"].results, ours, alike)
    print(f"\n| {name}, {size} px | Core AI fp32 | Core AI fp16 | executor fp16 | fp16 sums | fp16 sums, to Core AI |")
    print("|---|---|---|---|---|---|")
    for stage in stages:
        rows = [compare(expected[stage], side[stage], stage).snr_db for side in sides]
        rows.append(compare(theirs["float16"].results[stage], alike[stage], stage).snr_db)
        print(f"| {stage} | {' | '.join(f'{row:.1f} dB' for row in rows)} |", flush=True)


class FromFeatures:
    """A vision encoder whose features are known: those of Apple's interpreter, by the bytes of the pixels."""

    projected, compile_ms = False, 0.0

    def __init__(self, features: dict[bytes, np.ndarray], image_size: int) -> None:
        self.features, self.image_size, self.name = features, image_size, "coreai"

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.features[pixel_values.tobytes()]


class Recording:
    """An encoder that also keeps the pixels that it was given."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.pixels = encoder, dict[bytes, np.ndarray]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        self.pixels[pixel_values.tobytes()] = pixel_values.copy()
        return self.encoder.encode(pixel_values)


def accuracy(quant: str, questions: int) -> None:
    """Prints bytes, SNR and accuracy of `tiny` in both formats, with one decoder."""
    with tempfile.TemporaryDirectory() as scratch:
        result = fastvlm.export("tiny", Path(scratch) / "model", format="both", quant=quant)
        model = fastvlm.load(result.folder, backend="reference")
        recording = model.engine.encoder = Recording(model.engine.encoder)
        package = evaluated(model, questions)
        pixels = list(recording.pixels.values())
        features = run_images(result.folder / ASSET_NAME, pixels, PackageInterface())
        model.engine.encoder = FromFeatures(dict(zip(recording.pixels, features, strict=True)), recording.image_size)
        model.engine.clear_caches()
        asset = evaluated(model, questions)
        found = result.verification
        sizes = (folder_bytes(result.folder / PACKAGE_NAME), folder_bytes(result.folder / ASSET_NAME))
    print(f"\n| `tiny`, {quant} | bytes | image_features | {questions} questions right |\n|---|---|---|---|")
    print(
        f"| package, executor | {sizes[0]:,} | {found.encoder.output.snr_db:.1f} dB | {row_of(package).accuracy:.1%} |"
    )
    print(f"| asset, Core AI | {sizes[1]:,} | {found.asset.output.snr_db:.1f} dB | {row_of(asset).accuracy:.1%} |")
    same = np.mean([one == other for one, other in zip(package, asset, strict=True)])
    print(f"the same score: {same:.1%} of questions, {len(pixels)} images")


def evaluated(model: fastvlm.FastVLM, questions: int) -> list[float]:
    """Returns the score of each question."""
    return [answer.score for answer in evaluate(model, limit=questions).answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=None, help="a folder with the small reference checkpoints")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    arithmetic("tiny", "tiny", arguments.size)
    for name in GOLDEN if arguments.golden else ():
        arithmetic(name, arguments.golden / name, arguments.size)
    accuracy(arguments.quant, arguments.questions)


if __name__ == "__main__":
    main()
