"""The rewritten encoder as a Core ML package: trace, convert, compress, save.

coremltools runs silently and writes its temporary files into the output folder. The user sees this project's progress.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.errors import PackageError
from ..models.folder_layout import INPUT_NAME
from ..models.versions import import_coremltools
from ..quant.activations import with_int8_inputs
from ..quant.constexprs import with_stored_weights
from ..quant.schemes import StoredWeight
from .lint import COMPRESSED_WEIGHTS_KEY
from .options import OnStage
from .recipe import DEFAULT_INTERFACE, DEPLOYMENT_TARGETS, PackageInterface

if TYPE_CHECKING:
    from coremltools.models import MLModel
    from torch import nn

PACKAGE_NAMESPACE = uuid.UUID("5b0ce0a7-3d0b-4f53-8a51-5f6d4a3c9d10")
"""The namespace of item identifiers. coremltools draws them at random, and derived ones make the bytes repeatable."""


def convert_encoder(
    network: nn.Sequential,
    image_size: int,
    stored: Mapping[str, StoredWeight],
    package: Path,
    *,
    metadata: Mapping[str, str],
    on_stage: OnStage,
    interface: PackageInterface = DEFAULT_INTERFACE,
    int8_inputs: Mapping[str, np.float16] | None = None,
) -> None:
    """Writes `network` (from `rewrite`) to `package`: an ML Program with fixed shapes that computes in float16.

    `images` (1, 3, S, S) -> `image_features` (1, N, C), of the types of `interface`. Equal inputs give equal bytes.

    Args:
        stored: the compressed weights by the names of their convolutions. `network` already has their values.
        int8_inputs: the scales of the convolutions whose input is int8.

    Raises:
        PackageError: coremltools cannot convert the network, or changed a weight that should be compressed.
    """
    scratch = package.with_name("scratch")
    scratch.mkdir(parents=True)
    with quiet_coremltools(scratch) as ct:
        passes = with_int8_inputs(ct.PassPipeline.DEFAULT, int8_inputs or {})  # before the pass that renames
        model = _convert(ct, network, image_size, with_stored_weights(passes, stored), interface, on_stage)
        on_stage("save the package")
        _describe(model, interface, {**metadata, COMPRESSED_WEIGHTS_KEY: str(len(stored))})
        try:
            model.save(str(package))
        except RuntimeError as reason:
            raise PackageError(
                f"{package.name}: coremltools cannot write it ({str(reason).splitlines()[0]})."
            ) from reason
    make_reproducible(package)
    shutil.rmtree(scratch)


def _convert(
    ct: Any,
    network: nn.Sequential,
    image_size: int,
    pass_pipeline: Any,
    interface: PackageInterface,
    on_stage: OnStage,
) -> MLModel:
    import torch

    shape = (1, 3, image_size, image_size)
    on_stage("trace the encoder")
    with torch.inference_mode():
        traced = torch.jit.trace(network, torch.zeros(shape), check_trace=False)
    on_stage("convert to Core ML")
    try:
        return ct.convert(
            traced,
            inputs=[_input_type(ct, interface, shape)],
            outputs=[ct.TensorType(interface.output_name, dtype=np.dtype(interface.output_dtype).type)],
            minimum_deployment_target=ct.target[DEPLOYMENT_TARGETS[interface.min_os]],
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
            pass_pipeline=pass_pipeline,
        )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as reason:
        raise PackageError(f"the encoder: coremltools cannot convert it ({str(reason).splitlines()[0]}).") from reason


def _input_type(ct: Any, interface: PackageInterface, shape: tuple[int, ...]) -> Any:
    if interface.takes_image:  # with a scale or bias here coremltools would add a float32 multiplication
        return ct.ImageType(INPUT_NAME, shape=shape, color_layout=ct.colorlayout.RGB)
    return ct.TensorType(INPUT_NAME, shape=shape, dtype=np.dtype(interface.io).type)


def _describe(model: MLModel, interface: PackageInterface, metadata: Mapping[str, str]) -> None:
    model.author = "fastvlm"
    model.short_description = "FastViTHD vision encoder of FastVLM, reparameterized, for the Neural Engine"
    model.input_description[INPUT_NAME] = (
        "An RGB image" if interface.takes_image else "RGB pixels in 0..1, (1, 3, S, S)"
    )
    model.output_description[interface.output_name] = (
        "The image as the decoder takes it in, one row per 64x64 patch, (1, N, D)"
        if interface.with_projector
        else "One row of features per 64x64 patch, (1, N, C)"
    )
    for key in list(model.user_defined_metadata):  # versions and dates of the conversion
        del model.user_defined_metadata[key]
    model.user_defined_metadata.update(metadata)


def make_reproducible(package: Path) -> None:
    """Replaces what coremltools draws at random: the order of the program's maps and the items' identifiers."""
    from coremltools.proto import Model_pb2

    manifest = json.loads((package / "Manifest.json").read_text())
    entries, renamed = {}, {}
    for old, entry in sorted(manifest["itemInfoEntries"].items(), key=lambda item: item[1]["path"]):
        renamed[old] = str(uuid.uuid5(PACKAGE_NAMESPACE, entry["path"])).upper()
        entries[renamed[old]] = entry
    root = manifest["rootModelIdentifier"]
    program = package / "Data" / manifest["itemInfoEntries"][root]["path"]
    spec = Model_pb2.Model.FromString(program.read_bytes())
    program.write_bytes(spec.SerializeToString(deterministic=True))
    manifest |= {"itemInfoEntries": entries, "rootModelIdentifier": renamed[root]}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


@contextlib.contextmanager
def quiet_coremltools(scratch: Path) -> Iterator[Any]:
    """Yields coremltools, without its version warnings, failed-import lines and progress bars.

    Its temporary files go to `scratch`, inside the partial output, so that a killed process leaves nothing in /tmp.
    """
    directory, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ct = import_coremltools()
            from tqdm import tqdm

            loud = tqdm.__init__
            tqdm.__init__ = lambda self, *args, **options: loud(self, *args, **{**options, "disable": True})
            try:
                yield ct
            finally:
                tqdm.__init__ = loud
    finally:
        tempfile.tempdir = directory
