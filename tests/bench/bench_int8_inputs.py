"""The noise of w8a8 by its parts: weights, int8 inputs by kind and by remedy, and the trade of noise for arithmetic.

    python tests/bench/bench_int8_inputs.py random:0.5b --image-size 256

The encoder runs in torch, in float32. Ranges come from the embedded calibration images and their variations, and the
SNR of `image_features` from the embedded verification images: drawings / photographs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from fastvlm.export.evening import even_channels
from fastvlm.export.rewrite import (
    branch_convolutions,
    follow_gelu,
    path_convolutions,
    rewrite,
    stream_maxima,
    stream_scales,
)
from fastvlm.export.write_encoder import noise_images
from fastvlm.models.fastvit import FastViT
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.calibration import calibration_images, verification_images
from fastvlm.quant.encoder import convolutions, plan_of, quantize, stored_by_plan, stored_uniformly
from fastvlm.quant.input_ranges import INT8_MAX, InputRange, InputStatistics, chosen_range, collected
from fastvlm.quant.int8_inputs import input_costs, int8_inputs
from fastvlm.quant.range_images import range_images
from fastvlm.quant.search import decibels, noise_of, outputs

KINDS = ("drawings", "photographs")
CONVOLUTIONS = ("fc1", "fc2", "qkv", "proj")
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""The shares of the multiplications in float16 that the trade is shown for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--image-size", type=int, default=256)
    arguments = parser.parse_args()
    for what, snr_db in measured(arguments.model, arguments.image_size):
        print(f"| {what} | {' / '.join(f'{value:.1f}' for value in snr_db)} dB |", flush=True)


def measured(model: str, image_size: int) -> Iterator[tuple[str, list[float]]]:
    """Yields a part of w8a8, and the SNR of `image_features` in dB by the kind of images."""
    network, images = opened(model, image_size)
    names = branch_convolutions(network)
    verification = verification_images(image_size)
    by_kind = {kind: [i for i, found in zip(verification, verification.kinds, strict=True) if found == kind]
               for kind in KINDS}  # fmt: skip
    expected = {kind: [outputs(network, image) for image in found] for kind, found in by_kind.items()}

    def snr_db(ranges: Mapping[str, InputRange]) -> list[float]:
        with int8_inputs(network, ranges):
            return [
                decibels(noise_of(expected[kind], [outputs(network, image) for image in found]))
                for kind, found in by_kind.items()
            ]

    reaching, fitted, evened = ranges_of(network, names, images)
    yield "float weights, int8 inputs, ranges to the largest value", snr_db(reaching)
    yield "the same, ranges of least error, zero points behind GELU", snr_db(fitted)
    even_channels(network, {name: found.exponents for name, found in evened.items() if found.exponents})
    yield "the same, channels evened out", snr_db(evened)
    for kind in CONVOLUTIONS:
        chosen = {name: found for name, found in evened.items() if name.endswith(kind)}
        yield f"the same, of {kind} alone", snr_db(chosen)
    costs = input_costs(network, evened, noise_images(image_size))
    calibration = images[: len(calibration_images(image_size))]
    stored = stored_uniformly(opened(model, image_size)[0], "int8", path_convolutions(network))
    quantize(network, stored_by_plan(network, plan_of(network, stored)), calibration)
    yield "int8 weights, evened out", snr_db({})
    yield "the same, all int8 inputs", snr_db(evened)
    whole, share, left = sum(cost.multiplications for cost in costs.values()), 0.0, dict(evened)
    limits = iter(SHARES)
    limit = next(limits)
    for name in sorted(costs, key=lambda name: -costs[name].noises.mean() / costs[name].multiplications):
        more = share + costs[name].multiplications / whole
        if more > limit:
            yield f"the same, {share:.0%} of the multiplications in float16 ({len(left)} int8 inputs)", snr_db(left)
            limit = next((other for other in limits if other > more), 1.0)
        share = more
        del left[name]
        if limit == 1.0:
            break
    network = opened(model, image_size)[0]
    quantize(network, stored, calibration)
    yield "int8 weights alone, not evened out", snr_db({})


def opened(model: str, image_size: int) -> tuple[torch.nn.Sequential, Sequence[np.ndarray]]:
    """Returns the rewritten encoder, and the images for ranges."""
    calibration = calibration_images(image_size)
    encoder = FastViT.from_checkpoint(open_checkpoint(model))
    with torch.inference_mode():
        scales = stream_scales(stream_maxima(encoder, map(torch.from_numpy, calibration)))
    with torch.no_grad():
        return rewrite(encoder, image_size, scales), range_images(calibration, image_size)


class Largest(InputStatistics):
    """Statistics that know the largest magnitude too."""

    largest = 0.0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        super().add(x, y)
        self.largest = max(self.largest, float(np.abs(x).max()))


def ranges_of(
    network: torch.nn.Sequential, names: Sequence[str], images: Sequence[np.ndarray]
) -> tuple[dict[str, InputRange], ...]:
    """Returns ranges that reach the largest value, ranges of least error, and those with channels evened out."""
    convs, gelu = convolutions(network), follow_gelu(names)
    statistics = {name: Largest(convs[name].in_channels, convs[name].out_channels, name in gelu) for name in names}
    with collected(convs, statistics):
        for image in images:
            outputs(network, image)
    found: tuple[dict[str, InputRange], ...] = ({}, {}, {})
    for name, sums in statistics.items():
        weight = convs[name].weight.numpy()[:, :, 0, 0]
        options = (
            InputRange(np.float16(sums.largest / INT8_MAX)),
            chosen_range(weight, sums, False),
            chosen_range(weight, sums, name not in gelu),
        )
        for ranges, option in zip(found, options, strict=True):
            if option is not None:
                ranges[name] = option
    return found


if __name__ == "__main__":
    main()
