"""`python tests/bench/bench_mlprograms.py`: small encoders, converted by coremltools and run by the executor.

Each encoder is converted for several systems and precisions. Its outputs are compared with torch's, relative to the
largest value. An encoder that coremltools cannot convert is reported, and does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import ENCODERS

from fastvlm.models.errors import FastVLMError
from fastvlm.models.mlprogram import load
from fastvlm.models.versions import import_coremltools

TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(ENCODERS), help="names of encoders")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--precisions", nargs="*", default=["float32", "float16"])
    parser.add_argument("--out", type=Path, default=None, help="a file for the JSON lines")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    ct = import_coremltools()
    logging.disable(logging.CRITICAL)
    rows = []
    for name in arguments.only:
        start = time.perf_counter()
        for row in measure(ct, name, arguments.targets, arguments.precisions):
            rows.append(row)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        found = {
            f"{row['target']} {row['precision']}": row.get("error", row["result"])
            for row in rows
            if row["name"] == name
        }
        print(f"{name} ({time.perf_counter() - start:.0f} s): {found}", flush=True)
    print(total(rows))


def measure(ct: Any, name: str, targets: list[str], precisions: list[str]) -> list[dict[str, Any]]:
    """Returns one row for each target and precision."""
    torch.manual_seed(0)
    try:
        network, inputs = ENCODERS[name]()
        with torch.inference_mode():
            expected = network(*inputs).numpy()
            traced = torch.jit.trace(network, inputs, check_trace=False)
    except Exception as reason:
        return [{"name": name, "target": "", "precision": "", "result": f"not made: {first_line(reason)}"}]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            for precision in precisions:
                row = {"name": name, "target": target, "precision": precision}
                path = Path(folder) / f"{target}-{precision}.mlpackage"
                try:
                    convert(ct, traced, inputs, target, precision, path)
                except Exception as reason:
                    rows.append({**row, "result": f"not converted: {first_line(reason)}"})
                    continue
                rows.append({**row, **run(path, inputs, expected)})
    return rows


def convert(ct: Any, traced: Any, inputs: Any, target: str, precision: str, path: Path) -> None:
    types = [
        ct.TensorType(
            name=f"x{i}", shape=tuple(tensor.shape), dtype=np.int32 if tensor.dtype is torch.int32 else np.float32
        )
        for i, tensor in enumerate(inputs)
    ]
    model = ct.convert(
        traced,
        inputs=types,
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=getattr(ct.precision, precision.upper()),
        skip_model_load=True,
    )
    model.save(str(path))


def run(path: Path, inputs: Any, expected: np.ndarray) -> dict[str, Any]:
    """Returns the largest error relative to the largest value, or why the package does not run."""
    try:
        (found,) = load(path).predict({f"x{i}": tensor.numpy() for i, tensor in enumerate(inputs)}).values()
    except FastVLMError as reason:
        return {"result": f"not run: {first_line(reason)}"}
    error = np.abs(found.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-6)
    return {"result": "runs", "error": float(f"{error:.1e}")}


def first_line(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:160]}"


def total(rows: list[dict[str, Any]]) -> str:
    """Returns the counts: encoders that convert, programs that run, and the errors of those in float32."""
    converted = [row for row in rows if row["result"] == "runs" or row["result"].startswith("not run")]
    running = [row for row in converted if row["result"] == "runs"]
    exact = [row for row in running if row["precision"] == "float32"]
    within = sum(row["error"] <= 1e-5 for row in exact)
    names = {row["name"] for row in converted}
    largest = max((row["error"] for row in running if row["precision"] == "float16"), default=0.0)
    return (
        f"{len(names)} encoders convert; {len(running)} of {len(converted)} programs run; "
        f"{within} of {len(exact)} in float32 within 1e-5; float16 at most {largest:.1e}"
    )


if __name__ == "__main__":
    main()
