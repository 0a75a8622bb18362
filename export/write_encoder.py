"""The vision encoder of a checkpoint as the package of an export: run, calibrated, rewritten, compressed, converted.

coremltools runs silently and writes its temporary files into the output folder. The user sees this project's progress.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._version import __version__
from ..models.checkpoint import Checkpoint
from ..models.errors import PackageError
from ..models.fastvit import FastViT
from ..models.folder_layout import ASSET_NAME, INPUT_NAME, PACKAGE_NAME
from ..models.versions import import_coremltools
from ..quant.calibration import CALIBRATION_NOISE_SEED, ImageSet, calibration_images, trial_images, verification_images
from ..quant.constexprs import with_stored_weights
from ..quant.encoder import (
    COMPENSATED,
    Rounding,
    compensated,
    convolutions,
    input_means,
    plan_of,
    quantize,
    stored_by_plan,
    stored_uniformly,
)
from ..quant.encoder_scheme import MIXED, EncoderScheme
from ..quant.input_ranges import InputRange, input_ranges
from ..quant.int8_inputs import MAX_NOISE, chosen_inputs, input_costs, with_int8_inputs
from ..quant.range_images import range_images
from ..quant.schemes import COARSE_PALETTE, W8A8, StoredWeight, with_groups
from ..quant.search import (
    Images,
    applied,
    candidates,
    float16_outputs,
    measured_options,
    noises_of,
    outputs,
    search,
    search_bytes,
)
from .coreai_asset import write_asset
from .evening import as_digits, even_channels
from .lint import COMPRESSED_WEIGHTS_KEY
from .options import OnStage
from .recipe import DEFAULT_INTERFACE, DEPLOYMENT_TARGETS, PackageInterface, Recipe
from .rewrite import (
    EngineAttentionBlock,
    ProjectorConvs,
    TokensLast,
    branch_convolutions,
    follow_gelu,
    path_convolutions,
    recorded_values,
    rewrite,
    round_means,
    stream_maxima,
    stream_scales,
)
from .verify_asset import judged_places
from .verify_encoder import EncoderReference, encoder_reference, reference_features

if TYPE_CHECKING:
    from coremltools.models import MLModel
    from torch import nn

    from ..models._mlx import mx


PROBE_SIZE = 256
"""The side in pixels of the images that `mixed` and w8a8 measure on. FastViTHD runs hundreds of times, and 1024 px
would take 16 times as long."""

BYTES_PER_CONVOLUTION = 2048
"""The bytes of a package per convolution besides its weight: program text and gaps. The tiny encoder has 1844."""

PACKAGE_NAMESPACE = uuid.UUID("5b0ce0a7-3d0b-4f53-8a51-5f6d4a3c9d10")
"""The namespace of item identifiers. coremltools draws them at random, and derived ones make the bytes repeatable."""


@dataclass(frozen=True)
class WrittenEncoder:
    """The results of writing the encoder that later steps of an export read."""

    images: ImageSet
    """The images for verification."""
    reference: EncoderReference
    """The results of the checkpoint's own encoder for `images`."""
    calibration: ImageSet
    calibration_features: list[np.ndarray]
    """`image_features` of the calibration images. Empty unless the decoder's scheme needs them."""
    plan: Mapping[str, str] = field(default_factory=dict)
    """The scheme of each convolution's weight."""
    stream_scales: Sequence[float] = ()
    """The power of two by which each stage's residual stream was scaled. It is 1 if float16 holds the stream."""
    int8_inputs: Mapping[str, InputRange] = field(default_factory=dict)
    """The range of each convolution's int8 input with w8a8."""
    tensors: Iterable[tuple[str, mx.array]] = ()
    """The encoder's tensors for `model.safetensors`, with `encoder="mlx"`."""
    stored_features: Sequence[np.ndarray] = ()
    """The output of torch, float32, with the stored weights for the images that judge an asset. Empty without one."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user, one line each."""
        scaled = [f"stage {i} by {scale:g}" for i, scale in enumerate(self.stream_scales) if scale != 1]
        rescaled = f"the residual stream was rescaled, exactly, to fit float16: {', '.join(scaled)}"
        return (*self.calibration.notes, *([rescaled] if scaled else []))

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries about the choices that were made."""
        found: dict[str, Any] = {
            "stream_scales": list(self.stream_scales),
            "calibration": self.calibration.as_dict(),
        }
        if self.int8_inputs:
            ranges = self.int8_inputs.items()
            found["int8_inputs"] = {name: float(used.scale) for name, used in ranges}
            found["zero_points"] = {name: used.zero_point for name, used in ranges if used.zero_point}
            found["evened"] = {name: as_digits(used.exponents) for name, used in ranges if used.exponents}
        return found


def write_encoder(
    folder: Path, checkpoint: Checkpoint, recipe: Recipe, calibration: ImageSet, on_stage: OnStage
) -> WrittenEncoder:
    """Reparameterizes, folds, compresses and converts the vision encoder into the package and the asset in `folder`."""
    on_stage("load the encoder")
    encoder = FastViT.from_checkpoint(checkpoint)
    on_stage("run the checkpoint's encoder")
    images = verification_images(recipe.image_size)
    reference = encoder_reference(encoder, images)
    on_stage("calibrate")
    with torch.inference_mode():
        with recorded_values(encoder) as values:
            maxima = stream_maxima(encoder, map(torch.from_numpy, calibration))
        noise = calibration.with_noise(CALIBRATION_NOISE_SEED)[-1:]
        scales = stream_scales(maxima, stream_maxima(encoder, map(torch.from_numpy, noise)))
    means = [round_means(torch.stack(found).mean(0)) for found in values]
    network = rewritten(encoder, checkpoint, recipe.image_size, recipe.interface, scales, means)
    calibration_features = reference_features(encoder, calibration) if recipe.decoder.needs_calibration else []
    del encoder
    pixel_scale = recipe.interface.pixel_scale
    fed = calibration.scaled(pixel_scale)
    on_stage("compress the encoder's weights")
    stored = encoder_weights(network, recipe.encoder, fed, pixel_scale=pixel_scale, on_stage=on_stage)
    if recipe.quant == COARSE_PALETTE and (recipe.interface.min_os == "ios18" or not recipe.has_package):
        convs = convolutions(network)
        stored = {name: with_groups(convs[name].weight.numpy(), weight) for name, weight in stored.items()}
    int8_inputs: dict[str, InputRange] = {}
    if recipe.quant == W8A8:
        int8_inputs = evened_inputs(network, stored, fed, on_stage)
        evened = stored_by_plan(network, plan_of(network, stored))
        stored = compensated_weights(network, evened, fed, on_stage)
    quantize(network, stored, fed)
    metadata = {"fastvlm.version": __version__, "fastvlm.quant": recipe.quant}
    if recipe.has_package:
        convert_encoder(
            network,
            recipe.image_size,
            stored,
            folder / PACKAGE_NAME,
            metadata=metadata,
            on_stage=on_stage,
            interface=recipe.interface,
            int8_inputs=int8_inputs,
        )
    stored_features: list[np.ndarray] = []
    if recipe.has_asset:
        on_stage("convert to Core AI")
        write_asset(network, stored, recipe.image_size, folder / ASSET_NAME, recipe.interface, metadata)
        with torch.inference_mode():
            stored_features = [network(torch.from_numpy(images[place])).numpy() for place in judged_places(images)]
    return WrittenEncoder(
        images,
        reference,
        calibration,
        calibration_features,
        plan=plan_of(network, stored),
        stream_scales=scales,
        int8_inputs=int8_inputs,
        stored_features=stored_features,
    )


def rewritten(
    encoder: FastViT,
    checkpoint: Checkpoint,
    image_size: int,
    interface: PackageInterface,
    scales: Sequence[float],
    value_means: Sequence[torch.Tensor] | None = None,
) -> nn.Sequential:
    """Returns the network that the package is made from, with its weights uncompressed.

    Only biases depend on `value_means`, which a manifest does not have.
    """
    projector = ProjectorConvs.from_checkpoint(checkpoint) if interface.with_projector else None
    with torch.no_grad():  # inference mode's tensors could be neither changed nor traced
        return rewrite(
            encoder,
            image_size,
            scales,
            pixel_scale=interface.pixel_scale,
            projector=projector,
            attention_tiles=interface.attention_tiles,
            value_means=value_means,
        )


def encoder_weights(
    network: nn.Sequential,
    scheme: EncoderScheme,
    calibration: ImageSet,
    *,
    pixel_scale: float = 1.0,
    on_stage: OnStage,
) -> dict[str, StoredWeight]:
    """Returns the compressed weights by the names of their convolutions in `network`, which is not changed.

    GPTQ rounds them for the inputs that `calibration` gives. With w8a8 they are rounded to nearest, because their
    channels are evened out first.

    Raises:
        UsageError: a recipe is for another encoder, or `max_bytes` is less than the fewest bits need.
    """
    if scheme.weights:
        scheme.check_names(convolutions(network))
        stored = stored_by_plan(network, scheme.weights)
    elif scheme.quant == MIXED:
        return searched(network, scheme, calibration, pixel_scale, on_stage)
    elif scheme.quant == W8A8:
        return stored_uniformly(network, "int8", path_convolutions(network))
    else:
        stored = stored_uniformly(network, scheme.quant, path_convolutions(network))
    return compensated_weights(network, stored, calibration, on_stage)


def compensated_weights(
    network: nn.Sequential, stored: Mapping[str, StoredWeight], calibration: ImageSet, on_stage: OnStage
) -> dict[str, StoredWeight]:
    """Returns `stored` with weights that are rounded for the inputs that images of `PROBE_SIZE` at most give."""
    if not any(weight.scheme in COMPENSATED for weight in stored.values()):
        return dict(stored)
    image_size = calibration[0].shape[-1]
    probe_size = min(PROBE_SIZE, image_size)
    on_stage("round the weights with GPTQ")
    with resized_inputs(network, image_size, probe_size):
        return compensated(network, stored, range_images(calibration, probe_size))


def evened_inputs(
    network: nn.Sequential, stored: Mapping[str, StoredWeight], calibration: ImageSet, on_stage: OnStage
) -> dict[str, InputRange]:
    """Returns the ranges of the inputs that become int8, chosen by measurement, and evens their channels in place.

    `stored` are the weights before that. Ranges and noises are measured on images of `PROBE_SIZE` at most.
    """
    image_size = calibration[0].shape[-1]
    probe_size = min(PROBE_SIZE, image_size)
    names = branch_convolutions(network)
    probes = [calibration.scale * image for image in noise_images(probe_size)]
    with resized_inputs(network, image_size, probe_size):
        on_stage("measure the ranges of int8 inputs")
        images = range_images(calibration, probe_size)
        ranges = input_ranges(network, names, follow_gelu(names), images)
        on_stage("measure what each int8 input costs")
        noises = rounding_noises(network, compensated(network, stored, images), images[: len(calibration)], probes)
        exponents = {name: found.exponents for name, found in ranges.items() if found.exponents}
        even_channels(network, exponents)
        costs = input_costs(network, ranges, probes)
    chosen = chosen_inputs(costs, MAX_NOISE * noises)
    on_stage(f"take {len(chosen)} of {len(costs)} inputs in int8")
    spared = {name: [-power for power in powers] for name, powers in exponents.items() if name not in chosen}
    even_channels(network, spared)
    return {name: ranges[name] for name in chosen}


def noise_images(image_size: int) -> list[np.ndarray]:
    """Returns the images that noises are measured on: those of trials, and the calibration photographs."""
    calibration = calibration_images(image_size)
    kinds = zip(calibration, calibration.kinds, strict=True)
    return [*trial_images(image_size), *(image for image, kind in kinds if kind == "photographs")]


def rounding_noises(
    network: nn.Sequential,
    stored: Mapping[str, StoredWeight],
    calibration: Sequence[np.ndarray],
    images: Sequence[np.ndarray],
) -> np.ndarray:
    """Returns the noise of the output of each image with stored weights and float16 results.

    `network` is not changed.
    """
    expected = [outputs(network, image) for image in images]
    with applied(network, stored, input_means(network, list(stored), calibration)):
        return noises_of(expected, [float16_outputs(network, image) for image in images])


def searched(
    network: nn.Sequential,
    scheme: EncoderScheme,
    calibration: ImageSet,
    pixel_scale: float,
    on_stage: OnStage,
) -> dict[str, StoredWeight]:
    """Searches the plan of a `mixed` export, and returns its weights."""
    image_size = calibration[0].shape[-1]
    probe_size = min(PROBE_SIZE, image_size)
    on_stage("measure what each weight's rounding costs")
    with resized_inputs(network, image_size, probe_size):
        rounding = Rounding(network, candidates(network), range_images(calibration, probe_size))
        probes = trial_images(probe_size)[::2]  # a drawing and a photograph
        options = measured_options(network, rounding, [pixel_scale * image for image in probes])
    images = Images(calibration, [pixel_scale * image for image in trial_images(image_size)])
    fixed = fixed_bytes(network, options)
    if scheme.max_bytes is None:
        assert scheme.min_snr is not None
        found = search(network, options, rounding, images, min_snr=scheme.min_snr, fixed_bytes=fixed, on_stage=on_stage)
    else:
        found = search_bytes(network, options, rounding, images, max_bytes=scheme.max_bytes, fixed_bytes=fixed)
    return rounding.by_plan(found.plan)


@contextlib.contextmanager
def resized_inputs(network: nn.Module, image_size: int, other_size: int) -> Iterator[None]:
    """Lets a network that was written for images of `image_size` take images of `other_size` inside the block."""
    attention = [module for module in network.modules() if isinstance(module, EngineAttentionBlock)]
    last = [module for module in network.modules() if isinstance(module, TokensLast)]
    grids, positions = [block.grid for block in attention], [module.positions for module in last]
    for block, grid in zip(attention, grids, strict=True):
        block.grid = grid * other_size // image_size
    for module, count in zip(last, positions, strict=True):
        module.positions = count * other_size**2 // image_size**2
    try:
        yield
    finally:
        for block, grid in zip(attention, grids, strict=True):
            block.grid = grid
        for module, count in zip(last, positions, strict=True):
            module.positions = count


def fixed_bytes(network: nn.Module, options: Mapping[str, object]) -> int:
    """Returns the bytes of a package besides the weights that a plan chooses for."""
    chosen = {f"{name}.weight" for name in options}
    rest = sum(2 * tensor.numel() for name, tensor in network.named_parameters() if name not in chosen)
    return rest + BYTES_PER_CONVOLUTION * len(convolutions(network))


def convert_encoder(
    network: nn.Sequential,
    image_size: int,
    stored: Mapping[str, StoredWeight],
    package: Path,
    *,
    metadata: Mapping[str, str],
    on_stage: OnStage,
    interface: PackageInterface = DEFAULT_INTERFACE,
    int8_inputs: Mapping[str, InputRange] | None = None,
) -> None:
    """Writes `network` (from `rewrite`) to `package`: an ML Program with fixed shapes that computes in float16.

    `images` (1, 3, S, S) -> `image_features` (1, N, C), of the types of `interface`. Equal inputs give equal bytes.

    Args:
        stored: the compressed weights by the names of their convolutions. `network` already has their values.
        int8_inputs: the ranges of the convolutions whose input is int8.

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
