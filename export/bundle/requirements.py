"""What a model folder lacks for a client, and how to export it instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ModelFolderError, UsageError
from ...models.fastvit_config import FastViTConfig
from ...models.files import read_json_object
from ...models.folder_layout import CONFIG_NAME, EMBEDS_NAME, PACKAGE_NAME, has_mlx_encoder
from .contract import Contract

if TYPE_CHECKING:
    from ...models.mlprogram import Program


def check_requirements(folder: Path, contract: Contract) -> None:
    """Raises UsageError, saying how to export, when the client cannot run what is in `folder`.

    Raises:
        ModelFolderError: it is no model folder.
        PackageError: its package cannot be read.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder; bundle takes one that `fastvlm export` wrote")
    config = read_json_object(folder / CONFIG_NAME, ModelFolderError)
    if contract.channels and config.get("mm_hidden_size") != contract.channels:  # no other export helps
        lacks = [f"{contract.title} takes {contract.channels} channels, this encoder gives "
                 f"{config.get('mm_hidden_size')!r:.40}: only FastViTHD can be bundled"]  # fmt: skip
    else:
        lacks = list(_package_lacks(folder, contract) if contract.layout == "apple" else _mlx_lacks(folder, contract))
        lacks += [
            f"{contract.title} cannot load the decoder: {fault}; export again with --decoder-bits 4, 6 or 8"
            for fault in contract.decoder_faults(config)
        ]
    if lacks:
        raise UsageError(f"{folder} cannot be bundled for {contract.name}: {'; '.join(lacks)}")


def _package_lacks(folder: Path, contract: Contract) -> Iterator[str]:
    from ...models.mlprogram import read_package

    if not (folder / PACKAGE_NAME).is_dir():
        yield f"{contract.title} runs the encoder with Core ML; export again with --layout apple"
        return
    program = read_package(folder / PACKAGE_NAME)
    options = list(_border_options(program, contract))
    if options:
        found = ", ".join(f"{t.name} {t}" for t in (*program.inputs, *program.outputs))
        yield f"the package has {found}; export again with {' '.join(options)}"


def _border_options(program: Program, contract: Contract) -> Iterator[str]:
    """What to export with so that the package fits."""
    tensors = (*program.inputs, *program.outputs)
    if program.image_inputs or any(tensor.dtype != "fp32" for tensor in tensors):
        yield "--io float32"
    if any(tensor.name == EMBEDS_NAME for tensor in program.outputs):
        yield "--no-projector"
    if any(tensor.shape[-1] != contract.image_size for tensor in program.inputs):
        yield f"--image-size {contract.image_size}"


def _mlx_lacks(folder: Path, contract: Contract) -> Iterator[str]:
    if not has_mlx_encoder(folder):
        yield f"{contract.title} runs the encoder in MLX; export again with --layout mlx"
        return
    from .convert import encoder_config_of

    found = encoder_config_of(folder)
    if contract.encoder is not None and found != contract.encoder:
        yield (
            f"{contract.title} knows FastViTHD only, {_described(contract.encoder)}; this encoder has "
            f"{_described(found)}"
        )


def _described(config: FastViTConfig) -> str:
    return f"depths {'-'.join(map(str, config.depths))} and widths {'-'.join(map(str, config.embed_dims))}"
