"""`python tests/bench/bench_packages.py FOLDER`: every .mlpackage below a folder, run once on random inputs.

Prints one row for each package: its operations, what is missing, and whether the outputs are finite. Repositories often
leave large weight files out. `--random-weights` writes one of random numbers at the program's own offsets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.models.errors import FastVLMError
from fastvlm.models.mlprogram import Model, Program, load, model_class
from fastvlm.models.mlprogram.package import _TYPE_CODES, _decode_type

ENTRY = struct.Struct("<IIQQQ32x")
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
INNER = "loops or branches"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--random-weights", action="store_true", help="write missing weight files")
    parser.add_argument("--out", type=Path, default=None, help="a file for the JSON lines")
    arguments = parser.parse_args()
    rows, seen = [], set()
    for path in sorted(path for folder in arguments.folders for path in folder.rglob("*.mlpackage")):
        digest = hashlib.sha256((path / MODEL).read_bytes()).hexdigest() if (path / MODEL).is_file() else str(path)
        if digest in seen:
            continue
        seen.add(digest)
        row = {"package": "/".join(path.parts[-3:]), **measure(path, arguments.random_weights)}
        rows.append(row)
        print(f"{row['package']}: {row['result']} {row.get('seconds', '')}", flush=True)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    programs = [row for row in rows if row["operations"]]
    straight = [row for row in programs if INNER not in row["result"]]
    running = sum(row["result"].startswith("runs") for row in straight)
    print(f"{len(rows)} packages, {len(programs)} ML Programs, {running} of {len(straight)} without {INNER} run")


def measure(path: Path, random_weights: bool) -> dict[str, Any]:
    """Returns the row of a package."""
    row: dict[str, Any] = {"operations": 0, "weights": "real"}
    try:
        message = model_class().FromString((path / MODEL).read_bytes())
        row["version"] = dict(message.description.metadata.userDefined).get("com.github.apple.coremltools.version", "")
        kinds = Counter(kind for kind in operations(message) if kind != "const" and not kind.startswith("constexpr"))
        row |= {"operations": kinds.total(), "kinds": dict(kinds)}
        if kinds and random_weights and write_weights(message, path):
            row["weights"] = "random"
        start = time.perf_counter()
        model = load(path)
        results = model.predict(inputs(model, np.random.default_rng(0)))
        row["seconds"] = round(time.perf_counter() - start, 1)
        arrays = [np.asarray(value) for value in results.values() if not isinstance(value, dict | str | int)]
        finite = all(np.isfinite(array.astype(np.float64)).all() for array in arrays)
        row["result"] = "runs" if finite else "runs, not finite"
    except (FastVLMError, OSError, ValueError) as reason:
        row["result"] = INNER if "inner blocks" in str(reason) else str(reason).replace(str(path), path.name)[:200]
    except Exception as reason:  # protobuf's own
        row["result"] = f"{type(reason).__name__}: {str(reason)[:80]}"
    return row


def operations(message: Any) -> Iterator[str]:
    """Yields the kind of every operation in a parsed model."""
    for function in message.mlProgram.functions.values():
        for operation in function.block_specializations[function.opset].operations:
            yield operation.type


def values(message: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (type, blob) of each value in a blob file."""
    for function in message.mlProgram.functions.values():
        for operation in function.block_specializations[function.opset].operations:
            given = [*operation.attributes.values()]
            given += [
                b.value for a in operation.inputs.values() for b in a.arguments if b.WhichOneof("binding") == "value"
            ]
            for value in given:
                if value.WhichOneof("value") == "blobFileValue":
                    yield value.type, value.blobFileValue


def write_weights(message: Any, path: Path) -> bool:
    """Writes the missing weight files of a package, with positive vectors and small matrices."""
    rng = np.random.default_rng(0)
    missing: dict[Path, list[tuple[int, Any]]] = {}
    for type, blob in values(message):
        file = (path / MODEL).parent / blob.fileName.removeprefix("@model_path/")
        if not file.is_file() or file.read_bytes()[:7] == b"version":  # a pointer of git-lfs
            missing.setdefault(file, []).append((blob.offset, _decode_type("weight", type)))
    for file, entries in missing.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as target:
            target.write(struct.pack("<II56x", len(entries), 2))
            for offset, type in entries:
                target.seek(offset)
                target.write(ENTRY.pack(0xDEADBEEF, _TYPE_CODES[type.dtype], type.nbytes, offset + 64, 0))
                if type.dtype in ("fp16", "fp32"):
                    width = max(1, type.elements // max(1, type.shape[0])) if type.shape else 1
                    whole = rng.uniform(0.5, 1.5, type.elements) if type.rank < 2 else rng.normal(size=type.elements)
                    data = whole / (1 if type.rank < 2 else np.sqrt(width))
                    target.write(data.astype({"fp16": np.float16, "fp32": np.float32}[type.dtype]).tobytes())
                else:
                    target.write(rng.integers(0, 4, type.nbytes).astype(np.uint8).tobytes())
    return bool(missing)


def inputs(model: Model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns random inputs: pixels for images, small numbers for integers."""
    program: Program = model.program
    data = {}
    for tensor in program.inputs:
        feature = program.features[tensor.name]
        shape = tensor.shape
        if not tensor.is_fixed:
            shape = (*shape[:2], *feature.shape) if feature.color else feature.shape
            shape = tuple(size if size > 0 else 1 for size in shape)
        if feature.color:
            data[tensor.name] = rng.integers(0, 256, shape).astype(np.float32)
        elif tensor.dtype in ("fp16", "fp32"):
            data[tensor.name] = rng.random(shape).astype(np.float32)
        else:
            data[tensor.name] = rng.integers(0, 2, shape).astype(np.int32)
    return data


if __name__ == "__main__":
    main()
