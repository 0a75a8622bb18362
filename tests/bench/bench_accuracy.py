"""`make accuracy`: the bytes, the noise and the accuracy of each scheme.

Every folder is an export of one checkpoint. It is verified and answers the same held-out questions, greedily, with the
reference executor. Encoder schemes have a float16 decoder, so that only one thing changes at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastvlm

COMBINATIONS: tuple[dict[str, Any], ...] = (
    {"quant": "fp16", "decoder_bits": 16},
    {"quant": "int8", "decoder_bits": 8},
    {"quant": "int8", "decoder_bits": 4},
    *({"quant": quant, "decoder_bits": 16} for quant in ("int8", "pal8", "pal6", "pal4", "mixed", "w8a8", "int4")),
    *({"quant": "fp16", "decoder_bits": bits} for bits in (8, 6, 5, 4, "mixed")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--limit", type=int, default=2000, help="questions for each folder")
    parser.add_argument("--rows", type=int, default=len(COMBINATIONS), help="only the first of the combinations")
    parser.add_argument("--schemes", nargs="+", help="only these encoder schemes, with a float16 decoder")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the JSON")
    arguments = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        for options in chosen(arguments.schemes)[: arguments.rows]:
            figures.append(measure(arguments.model, Path(scratch), options, arguments.limit))
            print(row(figures[0], figures[-1]) if len(figures) > 1 else header(figures[0]), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n")


def chosen(schemes: list[str] | None) -> Sequence[dict[str, Any]]:
    """Returns the combinations of a float16 decoder with `schemes`, or all."""
    return COMBINATIONS if schemes is None else [{"quant": scheme, "decoder_bits": 16} for scheme in schemes]


def measure(model: str, scratch: Path, options: dict[str, Any], limit: int) -> dict[str, Any]:
    """Exports and evaluates one combination. Floors and lint are not enforced."""
    exported = fastvlm.export(
        model, scratch / "model", force=True, allow_lint=True, allow_shortfall=True, **options
    ).as_dict()
    evaluation = fastvlm.evaluate(scratch / "model", limit=limit, backend="reference")
    files = exported["file_bytes"]
    encoder_bytes = sum(size for name, size in files.items() if ".mlpackage/" in name)
    return {
        **options,
        "encoder_bytes": encoder_bytes,
        "decoder_bytes": sum(size for name, size in files.items() if name.endswith(".safetensors")),
        "parity": exported["parity"],
        "accuracy": evaluation.as_dict()["accuracy"],
        "seconds": evaluation.as_dict()["seconds"],
    }


def header(first: dict[str, Any]) -> str:
    names = ["encoder", "decoder", "encoder MB", "decoder MB", "features dB", "logits dB", *first["accuracy"]]
    return "\n".join((line(names), line(["---"] * len(names)), row(first, first)))


def row(first: dict[str, Any], figures: dict[str, Any]) -> str:
    parity = figures["parity"]
    return line(
        [
            figures["quant"],
            str(figures["decoder_bits"]),
            f"{figures['encoder_bytes'] / 1e6:.2f} ({figures['encoder_bytes'] / first['encoder_bytes']:.2f})",
            f"{figures['decoder_bytes'] / 1e6:.2f} ({figures['decoder_bytes'] / first['decoder_bytes']:.2f})",
            f"{parity['image_features']['snr_db']:.1f}",
            f"{parity['logits']['snr_db']:.1f}",
            *(f"{100 * kind['accuracy']:.1f}" for kind in figures["accuracy"].values()),
        ]
    )


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
