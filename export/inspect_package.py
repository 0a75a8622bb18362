"""The description of a package from its files: inputs, operations, bytes, floating-point operations, lint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import PackageError
from ..models.folder_layout import ASSET_NAME, CONFIG_NAME, MANIFEST_NAME, PACKAGE_NAME, has_mlx_encoder
from ..models.mlprogram import (
    Program,
    TensorType,
    census,
    constexpr_census,
    max_rank,
    read_package,
    stored_bytes,
)
from ..models.mlprogram.cost import flops
from .lint import Finding, lint, results

LARGEST_OPERANDS = 5
"""The number of largest tensors in a report."""


@dataclass(frozen=True)
class PackageReport:
    """The description of a package."""

    path: Path
    inputs: tuple[TensorType, ...]
    image_inputs: dict[str, str]
    """The color layout of the inputs that are images, by name."""
    outputs: tuple[TensorType, ...]
    spec_version: int
    operations: dict[str, int]
    """The number of operations by kind, the most frequent first, without constants."""
    compressed_weights: int
    weight_bytes: dict[str, int]
    """The bytes of constants by their storage."""
    max_rank: int
    largest_operands: tuple[TensorType, ...]
    flops: int
    """The floating-point operations for one image. A multiplication and an addition count as two."""
    findings: tuple[Finding, ...]
    metadata: dict[str, str]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The broken rules that keep a program from the Neural Engine."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is printed with `--json`."""

        def tensors(found: tuple[TensorType, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for t in found]

        return {
            "path": str(self.path),
            "spec_version": self.spec_version,
            "inputs": tensors(self.inputs),
            "image_inputs": self.image_inputs,
            "outputs": tensors(self.outputs),
            "operations": self.operations,
            "operation_count": sum(self.operations.values()),
            "compressed_weights": self.compressed_weights,
            "weight_bytes": self.weight_bytes,
            "max_rank": self.max_rank,
            "largest_operands": tensors(self.largest_operands),
            "flops": self.flops,
            "findings": [finding.as_dict() for finding in self.findings],
            "metadata": self.metadata,
        }


def inspect(path: str | Path) -> PackageReport:
    """Describes a package, or the one in an exported folder.

    Raises:
        PackageError: the package is missing, or cannot be read.
    """
    path = Path(path).expanduser()
    package = path / PACKAGE_NAME if (path / PACKAGE_NAME).is_dir() else path
    if not package.exists():
        raise PackageError(f"{path} does not exist. Pass a .mlpackage, or a folder with {PACKAGE_NAME}.")
    if not package.is_dir():
        raise PackageError(f"{path} is neither a .mlpackage nor a folder with {PACKAGE_NAME}.")
    if (package / CONFIG_NAME).is_file():
        raise PackageError(f"{path} {without_package(package)}")
    return describe(read_package(package))


def without_package(folder: Path) -> str:
    """Returns the reason why a model folder has no package. Raises WeightsError if its weights are damaged."""
    if has_mlx_encoder(folder):
        return "has its encoder as MLX weights, for clients that run it in MLX, and no package to inspect."
    if (folder / ASSET_NAME).is_dir():
        return f"has its encoder as {ASSET_NAME}, for Core AI, and no package to inspect."
    if (folder / MANIFEST_NAME).is_file():
        return f"lacks {PACKAGE_NAME}. Export the model again."
    return f"is a checkpoint, which has no package yet. Export it first: `fastvlm export {folder}`."


def describe(program: Program) -> PackageReport:
    """Returns the report of a program."""
    operands = {tensor.name: tensor for tensor in results(program)}.values()
    return PackageReport(
        path=program.path,
        inputs=program.inputs,
        image_inputs=program.image_inputs,
        outputs=program.outputs,
        spec_version=program.spec_version,
        operations=dict(census(program).most_common()),
        compressed_weights=sum(constexpr_census(program).values()),
        weight_bytes=dict(stored_bytes(program).most_common()),
        max_rank=max_rank(program),
        largest_operands=tuple(sorted(operands, key=lambda tensor: -tensor.nbytes)[:LARGEST_OPERANDS]),
        flops=sum(flops(program, operation) for operation in program.operations),
        findings=tuple(lint(program)),
        metadata=program.metadata,
    )
