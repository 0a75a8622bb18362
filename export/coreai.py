"""The rewritten encoder in Core AI's format, and its results in Apple's interpreter, stage by stage.

Core AI is the successor of Core ML on macOS and iOS 27. Apple's packages for Python convert and run its models on Linux
too. That runs in a process of its own, because a fault of the native interpreter ends the process. This module is both
sides: `interpret` starts the process, which runs `main`. `coreai_asset` does the same for the file of an export.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.errors import CrashError, MachineError
from ..models.folder_layout import INPUT_NAME
from ..quant.encoder import convolutions
from ..quant.schemes import PaletteWeight, StoredWeight
from .rewrite import EngineAttentionBlock, EngineRepMixerBlock

INSTALL = 'pip install "fastvlm[coreai]"'

PRECISIONS = ("float32", "float16")
"""The types that the interpreter computes in. float32 shows the rewrite alone, float16 also what rounding costs."""

STEM_PARTS = 3
"""The number of convolutions, each a part of the rewritten network, in front of the first stage."""

LAST_WORDS = 200
"""The number of characters of the child's last line that an error quotes."""


@dataclass(frozen=True)
class Interpreted:
    """The results of Apple's interpreter in one precision."""

    results: Mapping[str, np.ndarray]
    """By stage (`stem`, `stage 0`, ...): (1, C, H, W). `output` is (1, N, C). float32."""
    seconds: float
    """The time of the run, without the conversion."""
    nbytes: int
    """The size of the `.aimodel`."""


class Staged(nn.Module):
    """A rewritten network that returns its stages' residual streams too, computed in one type.

    Images and results are float32. Results are a tuple in the order of `stage_names`.
    """

    def __init__(self, network: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype
        self.ends = stage_ends(network)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, found = images.to(self.dtype), []
        for index, part in enumerate(self.network):
            x = part(x)
            if index in self.ends:
                found.append(x.float())
        return (*found, x.float())


def stage_ends(network: nn.Sequential) -> list[int]:
    """Returns the places of the last parts of the stem and of each stage in a rewritten network."""
    blocks = [isinstance(part, EngineRepMixerBlock | EngineAttentionBlock) for part in network]
    return [STEM_PARTS - 1, *(i for i, block in enumerate(blocks) if block and not blocks[i + 1])]


def stage_names(network: nn.Sequential) -> list[str]:
    """Returns the names of the results of `Staged`: `stem`, `stage 0`, ..., `output`."""
    return ["stem", *(f"stage {index}" for index in range(len(stage_ends(network)) - 1)), "output"]


class StoredConv(nn.Module):
    """A convolution whose weight Core AI decodes from its stored form, by its own operation."""

    def __init__(self, conv: nn.Conv2d, stored: StoredWeight) -> None:
        super().__init__()
        self.bias = conv.bias
        self.settings: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
        self.is_palette = isinstance(stored, PaletteWeight)
        # coreai-torch narrows integers to their bits only in buffers that are called `indices` and `lut`.
        if isinstance(stored, PaletteWeight):
            groups = stored.lut.size >> stored.bits
            lut = stored.lut.reshape(groups, *[1] * (stored.indices.ndim - 1), -1, 1)
            self.register_buffer("indices", torch.from_numpy(stored.indices.copy()))
            self.register_buffer("lut", torch.from_numpy(lut.copy()))
        else:
            self.register_buffer("data", torch.from_numpy(stored.data.copy()))
            self.register_buffer("scale", torch.from_numpy(stored.scale.copy()))

    def _apply(self, fn: Any, recurse: bool = True) -> StoredConv:
        """Converts the bias alone: a weight is decoded in float16 in any precision, as in a package."""
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.is_palette:
            weight = torch.ops.coreai.lut_to_dense(self.indices, self.lut, 0)
        else:
            weight = torch.ops.coreai.constexpr_blockwise_shift_scale(self.data, self.scale)
        return nn.functional.conv2d(x, weight.to(x.dtype), self.bias, **self.settings)


def with_stored_convolutions(network: nn.Sequential, stored: Mapping[str, StoredWeight]) -> None:
    """Replaces convolutions of `network` by those with the stored weights, in place."""
    convs = convolutions(network)
    for name, weight in stored.items():
        owner, _, own = name.rpartition(".")
        setattr(network.get_submodule(owner), own, StoredConv(convs[name], weight))


def has_coreai() -> bool:
    """Returns True if Apple's packages are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("coreai", "coreai_torch"))


def require_coreai(subject: str = "judge='coreai'", *arguments: str) -> None:
    """Raises MachineError if Apple's packages are missing. `arguments` occur in `subject`, which needs them."""
    if not has_coreai():
        raise MachineError(
            f"{subject} needs Apple's packages coreai-core and coreai-torch. Run `{INSTALL}` "
            "(Linux x86_64, or macOS 26 and later on Apple Silicon).",
            *(arguments or ("judge",)),
        )


def interpret(
    network: nn.Sequential,
    stored: Mapping[str, StoredWeight],
    image: np.ndarray,
    precisions: Sequence[str] = PRECISIONS,
) -> dict[str, Interpreted]:
    """Converts a rewritten network to Core AI and runs it in Apple's interpreter, in a process of its own.

    Args:
        network: it has the numbers of `stored` already, and is not changed.
        stored: the compressed weights by the names of their convolutions.
        image: what the network takes, (1, 3, S, S) float32.
        precisions: some of `PRECISIONS`, the keys of the result.

    Raises:
        MachineError: Apple's packages are missing.
        CrashError: the process ended early. The message has its last line, or its signal.
    """
    require_coreai()
    with tempfile.TemporaryDirectory(prefix="fastvlm-coreai-") as scratch:
        folder = Path(scratch)
        torch.save({"network": network, "stored": dict(stored)}, folder / "network.pt")
        np.save(folder / "image.npy", image)
        run_child("fastvlm.export.coreai", scratch, *precisions, failed="The package was not judged.")
        return {precision: read_results(folder / f"{precision}.npz", network) for precision in precisions}


def read_results(path: Path, network: nn.Sequential) -> Interpreted:
    """Reads what the child wrote about one precision."""
    with np.load(path) as found:
        results = {name: found[name] for name in stage_names(network)}
        return Interpreted(results, float(found["seconds"]), int(found["nbytes"]))


def run_child(module: str, *arguments: str, failed: str, scratch: str | None = None) -> None:
    """Runs a module in a process of its own.

    Args:
        failed: a sentence for the error.
        scratch: the folder of its temporary files. The default is the system's.

    Raises:
        CrashError: it ended early. The message has its last line, or its signal.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
        env=None if scratch is None else {**os.environ, "TMPDIR": scratch},
    )
    if done.returncode:
        raise CrashError(f"Core AI: {ending(done.returncode, done.stderr)}. {failed}")


def ending(code: int, stderr: bytes) -> str:
    """Returns how the child ended: its signal, or the last line that it wrote."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    lines = stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    return f"its process failed ({lines[-1].strip()[:LAST_WORDS].rstrip('.')})"


def save_asset(network: nn.Sequential, stored: Mapping[str, StoredWeight], size: int, dtype: str, path: Path) -> Any:
    """Writes a rewritten network as `path`, an `.aimodel` with the stages as outputs, and returns Apple's asset.

    `network` is changed: it computes in `dtype` with the stored weights afterwards.
    """
    with_stored_convolutions(network, stored)
    names = [name.replace(" ", "_") for name in stage_names(network)]
    staged = Staged(network, getattr(torch, dtype))
    return converted(staged, torch.zeros(1, 3, size, size), names).save_asset(path)


def converted(module: nn.Module, image: Tensor, output_names: Sequence[str]) -> Any:
    """Returns Apple's program of a module that takes images like `image`. Equal modules give equal programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's version
        import coreai.authoring  # before the runtime, which fails to load otherwise
        import coreai_torch._compression.custom_layers  # defines the operations of stored weights
        from coreai_torch import TorchConverter, get_decomp_table

        exported = torch.export.export(module.eval(), (image,)).run_decompositions(get_decomp_table())
        # Assets of the debug mode embed the paths of this machine's source files.
        converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
        converter.add_exported_program(exported, input_names=[INPUT_NAME], output_names=list(output_names))
        assert coreai.authoring and coreai_torch
        return converter.to_coreai()


async def run_asset(asset: Any, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Runs an asset's function once for each image, and returns the results by name."""
    from coreai.runtime import NDArray

    async with asset.executable() as model:
        function = model.load_function("main")
        found = [await function({INPUT_NAME: NDArray(image)}) for image in images]
    return [{name: np.array(value.numpy(), dtype=np.float32) for name, value in one.items()} for one in found]


def main(arguments: Sequence[str]) -> None:
    """Runs in the child: converts the network in the given folder, runs it, and saves its results there."""
    folder = Path(arguments[0])
    image = np.load(folder / "image.npy")
    for precision in arguments[1:]:
        # A file of the parent process, in a folder that only this user can write to.
        given = torch.load(folder / "network.pt", weights_only=False)
        path, names = folder / f"{precision}.aimodel", stage_names(given["network"])
        asset = save_asset(given["network"], given["stored"], image.shape[-1], precision, path)
        begin = time.perf_counter()
        (found,) = asyncio.run(run_asset(asset, [image]))
        seconds = time.perf_counter() - begin
        results: dict[str, Any] = {name: found[name.replace(" ", "_")] for name in names}
        nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        np.savez(folder / f"{precision}.npz", seconds=seconds, nbytes=nbytes, **results)


if __name__ == "__main__":
    main(sys.argv[1:])
