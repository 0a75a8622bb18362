"""Encoders with the ranges of the published ones, exported in each scheme and executed with float16's rounding.

    python tests/bench/bench_ranges.py [--sizes 0.5b ...] [--schemes int8 ...] [--image-size 256] [--out DIR]

Prints a Markdown table: the SNR and the PSNR of `image_features` on drawings, photographs and standard-normal noise,
and the largest result inside as a share of float16's range. Published figures of FastVLM's encoder are PSNRs. With
`--plain` the checkpoint's own encoder runs in plain float16 before, and the first part that overflows is named.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvlm.export.options import ExportOptions
from fastvlm.export.recipe import planned_recipe
from fastvlm.export.verify import rebuilt
from fastvlm.export.verify_encoder import EncoderVerification, verify_encoder
from fastvlm.export.write_encoder import write_encoder
from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import PACKAGE_NAME
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.calibration import calibration_images, verification_images
from fastvlm.quant.search import Float16Results, rounded

SIZES = ("0.5b", "1.5b", "7b")
SCHEMES = ("fp16", "int8", "pal8", "mixed", "w8a8")
KINDS = ("drawings", "photographs", "noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--image-size", type=int, default=256, help="the side of the input in pixels")
    parser.add_argument("--plain", action="store_true", help="run the un-rewritten encoders in plain float16 too")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the JSON")
    arguments = parser.parse_args()
    figures = []
    for size in arguments.sizes if arguments.plain else ():
        for kind, part in plain_float16(size, arguments.image_size).items():
            print(f"random:{size} in plain float16, {kind}: {part or 'finite'}", flush=True)
    print(line(["encoder", "scheme", "MB", *(f"{kind}, SNR (PSNR) dB" for kind in KINDS), "range used, same order"]))
    print(line(["---"] * (4 + len(KINDS))), flush=True)
    for size in arguments.sizes:
        for scheme in arguments.schemes:
            found = measure(size, scheme, arguments.image_size)
            figures.append({"size": size, "scheme": scheme, **found})
            print(row(figures[-1]), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "ranges.json").write_text(json.dumps(figures, indent=2) + "\n")


def plain_float16(size: str, image_size: int) -> dict[str, str | None]:
    """Returns the first part of the un-rewritten encoder that is not finite in float16, by the kind of images."""
    encoder = FastViT.from_checkpoint(RandomCheckpoint(size)).reparameterize()
    images = verification_images(image_size)
    found: dict[str, str | None] = {}
    for image, kind in zip(images, images.kinds, strict=True):
        with torch.inference_mode(), Float16Results():
            x, part = encoder.patch_embed(rounded(torch.from_numpy(image))), None
            for index, module in enumerate(encoder.network):
                x = rounded(module(x))
                if part is None and not torch.isfinite(x).all():
                    part = f"network.{index}"
        found[kind] = found.get(kind) or part
    return found


def measure(size: str, scheme: str, image_size: int) -> dict[str, Any]:
    """Exports one encoder in one scheme and runs it."""
    checkpoint = RandomCheckpoint(size)
    recipe = planned_recipe(ExportOptions(quant=scheme, image_size=image_size), image_size, None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        written = write_encoder(folder, checkpoint, recipe, calibration_images(image_size), lambda _: None)
        network = rebuilt(checkpoint, {**recipe.as_dict(), **written.as_dict()})
        package, scales = folder / PACKAGE_NAME, written.stream_scales
        found = verify_encoder(package, written.images, written.reference, written.reference.features, network, scales)
        nbytes = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    return {"bytes": nbytes, "stream_scales": list(scales), "largest_feature": largest(written), **as_dict(found)}


def largest(written: Any) -> float:
    """Returns the largest magnitude of the checkpoint's own features."""
    return float(max(np.abs(features).max() for features in written.reference.features))


def as_dict(found: EncoderVerification) -> dict[str, Any]:
    """Returns the figures of a verification."""
    return {
        "kinds": {kind: agreement.as_dict() for kind, agreement in found.kinds.items()},
        "float16_load": found.load,
        "stages_snr_db": found.stages,
        "weight_failures": found.weights.failures,
    }


def row(figures: dict[str, Any]) -> str:
    """Returns a row of the table."""
    kinds = [figures["kinds"].get(kind) for kind in KINDS]
    agreements = ["not finite" if kind is None else f"{kind['snr_db']:.1f} ({kind['psnr_db']:.1f})" for kind in kinds]
    used = ", ".join(f"{max(figures['float16_load'][kind].values()):.1%}" for kind in KINDS)
    return line([figures["size"], figures["scheme"], f"{figures['bytes'] / 1e6:.1f}", *agreements, used])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
