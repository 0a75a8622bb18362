"""The noise of w8a8 by its parts: weights alone, int8 inputs by kind, all of them, and those that an export chooses.

    python tests/bench/bench_int8_inputs.py random:0.5b --image-size 256

The encoder runs in torch, in float32. Scales come from the embedded calibration images, and the SNR of `image_features`
from the embedded verification images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
import torch

from fastvlm.export.rewrite import branch_convolutions, path_convolutions, rewrite, stream_maxima, stream_scales
from fastvlm.export.write_encoder import quantized_with_inputs
from fastvlm.models.fastvit import FastViT
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.calibration import calibration_images, verification_images
from fastvlm.quant.encoder import stored_uniformly
from fastvlm.quant.int8_inputs import int8_inputs, int8_scales
from fastvlm.quant.search import decibels, noise_of, outputs

KINDS = ("fc1", "fc2", "qkv", "proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--image-size", type=int, default=256)
    arguments = parser.parse_args()
    for what, snr_db in measured(arguments.model, arguments.image_size).items():
        print(f"| {what} | {snr_db:.1f} dB |", flush=True)


def measured(model: str, image_size: int) -> dict[str, float]:
    """Returns the SNR of `image_features` in dB for each part of w8a8."""
    calibration, embedded = calibration_images(image_size), verification_images(image_size)
    verification = [image for image, kind in zip(embedded, embedded.kinds, strict=True) if kind != "noise"]
    encoder = FastViT.from_checkpoint(open_checkpoint(model))
    with torch.inference_mode():
        scales = stream_scales(stream_maxima(encoder, map(torch.from_numpy, calibration)))
    with torch.no_grad():
        network = rewrite(encoder, image_size, scales)
    expected = [outputs(network, image) for image in verification]
    inputs = int8_scales(network, branch_convolutions(network), calibration)

    def snr_db(chosen: Mapping[str, np.float16]) -> float:
        with int8_inputs(network, chosen):
            return decibels(noise_of(expected, [outputs(network, image) for image in verification]))

    by_kind = {kind: {name: scale for name, scale in inputs.items() if name.endswith(kind)} for kind in KINDS}
    found = {f"float weights, int8 inputs of {kind}": snr_db(chosen) for kind, chosen in by_kind.items()}
    found["float weights, all int8 inputs"] = snr_db(inputs)
    stored = stored_uniformly(network, "int8", path_convolutions(network))
    kept = quantized_with_inputs(network, stored, calibration, on_stage=lambda _: None)
    found["int8 weights alone"] = snr_db({})
    found["int8 weights, all int8 inputs"] = snr_db(int8_scales(network, list(inputs), calibration))
    found[f"int8 weights, the chosen {len(kept)} of {len(inputs)} int8 inputs"] = snr_db(kept)
    return found


if __name__ == "__main__":
    main()
