"""The encoder as a Core AI asset, an `.aimodel`: written with repeatable bytes, run and summarized by Apple's packages.

Each task runs in a process of its own, as in `coreai`, and this module is both sides. An asset is a folder with the
program in MLIR bytecode, the hash of that file, and `metadata.json`. Two exports would differ in the names of constants
(`mlir_bytecode`), in the time of writing, and in the order of the metadata's keys, none of which a client reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.errors import PackageError
from ..models.files import read_json_object, write_json
from ..models.folder_layout import ASSET_NAME
from ..quant.schemes import StoredWeight
from .coreai import converted, run_asset, run_child, with_stored_convolutions
from .mlir_bytecode import with_stable_names
from .recipe import PackageInterface

PROGRAM, PROGRAM_HASH, METADATA = "main.mlirb", "main.hash", "metadata.json"
"""The files of an asset."""

WRITTEN_AT = "creationDate"
"""The key of the metadata that is left out. Apple's packages read assets without it."""

DESCRIPTION = "FastViTHD vision encoder of FastVLM, reparameterized"

MODULE = "fastvlm.export.coreai_asset"


class InFloat16(nn.Module):
    """A rewritten network as an asset has it: computed in float16, with images and results of another type."""

    def __init__(self, network: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.half()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.half()).to(self.dtype)


def write_asset(
    network: nn.Sequential,
    stored: Mapping[str, StoredWeight],
    image_size: int,
    asset: Path,
    interface: PackageInterface,
    metadata: Mapping[str, str],
) -> None:
    """Writes `network` (from `rewrite`) as `asset`, which computes in float16. Equal inputs give equal bytes.

    Args:
        network: it has the values of `stored` already, and is not changed.
        stored: the compressed weights by the names of their convolutions.
        metadata: entries about the writer.

    Raises:
        CrashError: Apple's converter failed.
    """
    scratch = asset.with_name("scratch")
    scratch.mkdir(parents=True)
    given = {
        "network": network,
        "stored": dict(stored),
        "image_size": image_size,
        "dtype": interface.output_dtype,
        "output": interface.output_name,
        "metadata": dict(metadata),
    }
    torch.save(given, scratch / "network.pt")
    run_child(MODULE, "write", str(scratch), failed=f"{asset.name} was not written.", scratch=str(scratch))
    make_repeatable(scratch / ASSET_NAME)
    (scratch / ASSET_NAME).rename(asset)
    shutil.rmtree(scratch)


def make_repeatable(asset: Path) -> None:
    """Replaces what differs between two writings of one program."""
    program = with_stable_names((asset / PROGRAM).read_bytes())
    (asset / PROGRAM).write_bytes(program)
    (asset / PROGRAM_HASH).write_bytes(hashlib.sha256(program).digest())
    metadata = {key: value for key, value in read_metadata(asset).items() if key != WRITTEN_AT}
    write_json(asset / METADATA, json.loads(json.dumps(metadata, sort_keys=True)))  # the keys inside it too


def read_metadata(asset: Path) -> dict[str, Any]:
    """Returns the content of `metadata.json`. Raises PackageError."""
    check_asset(asset)
    return read_json_object(asset / METADATA, PackageError)


def check_asset(asset: Path) -> None:
    """Raises PackageError unless `asset` has a program. Apple's loader ends the process over a missing one."""
    if not asset.exists():
        raise PackageError(f"{asset} does not exist.")
    if not (asset / PROGRAM).is_file():
        raise PackageError(f"{asset} is not a Core AI asset: it has no {PROGRAM}. Export the model again.")


def run_images(asset: Path, images: Sequence[np.ndarray], interface: PackageInterface) -> list[np.ndarray]:
    """Runs a saved asset in Apple's interpreter, and returns its output for each image, float32.

    Args:
        images: (1, 3, S, S) float32 each.

    Raises:
        PackageError: it is not an asset.
        CrashError: the process ended early. The message has its last line, or its signal.
    """
    check_asset(asset)
    with tempfile.TemporaryDirectory(prefix="fastvlm-coreai-") as scratch:
        np.savez(Path(scratch, "images.npz"), *(image.astype(interface.output_dtype) for image in images))
        run_child(MODULE, "run", scratch, str(asset.absolute()), failed=f"{asset} was not run.", scratch=scratch)
        with np.load(Path(scratch, "results.npz")) as found:
            return [found[f"arr_{index}"] for index in range(len(images))]


def summary(asset: Path) -> dict[str, Any]:
    """Returns Apple's summary of a saved asset: `version`, `inputs`, `outputs`, `operations`, `numbers` by type.

    Raises:
        PackageError: it is not an asset.
        CrashError: the process ended early.
    """
    check_asset(asset)
    with tempfile.TemporaryDirectory(prefix="fastvlm-coreai-") as scratch:
        run_child(MODULE, "summarize", scratch, str(asset.absolute()), failed=f"{asset} was not read.", scratch=scratch)
        return dict(json.loads(Path(scratch, "summary.json").read_bytes()))


def _write(scratch: Path) -> None:
    # A file of the parent process, in the output's partial folder.
    given = torch.load(scratch / "network.pt", weights_only=False)
    network, size, dtype = given["network"], given["image_size"], getattr(torch, given["dtype"])
    with_stored_convolutions(network, given["stored"])
    program = converted(InFloat16(network, dtype), torch.zeros(1, 3, size, size, dtype=dtype), [given["output"]])

    def describe(metadata: Any) -> None:
        metadata.author, metadata.model_description = "fastvlm", DESCRIPTION
        for key, value in given["metadata"].items():
            metadata.set_custom(key, value)

    program.save_asset(scratch / ASSET_NAME).update_metadata(describe)


def _run(scratch: Path, path: str) -> None:
    with np.load(scratch / "images.npz") as found:
        images = [found[f"arr_{index}"] for index in range(len(found.files))]
    results = asyncio.run(run_asset(_loaded(path), images))
    np.savez(scratch / "results.npz", *(next(iter(one.values())) for one in results))


def _summarize(scratch: Path, path: str) -> None:
    found = _loaded(path).summary(include_statistics=True)
    (name,) = found.function_names
    write_json(
        scratch / "summary.json",
        {
            "version": found._compatibility_version,
            "inputs": dict(found.function_inputs(name)),
            "outputs": dict(found.function_outputs(name)),
            "operations": dict(found.operation_distribution),
            "numbers": dict(found.storage_types),
        },
    )


def _loaded(path: str) -> Any:
    import coreai.authoring  # before the runtime, which fails to load otherwise
    from coreai.authoring.asset import AIModelAsset

    assert coreai.authoring
    return AIModelAsset.load(path)


TASKS: Mapping[str, Callable[..., None]] = {"write": _write, "run": _run, "summarize": _summarize}


def main(arguments: Sequence[str]) -> None:
    """Runs one of `TASKS` in the child. The arguments are the task, its scratch folder, and an asset."""
    task, scratch, *asset = arguments
    TASKS[task](Path(scratch), *asset)


if __name__ == "__main__":
    main(sys.argv[1:])
