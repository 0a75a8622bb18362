"""`fastvlm.bundle`: a model folder becomes the assets of a client, checked against its contract before they appear."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...models.config import FastVLMConfig
from ...models.errors import ModelFolderError, UsageError, VerificationError
from ...models.fastvit_config import FastViTConfig
from ...models.files import check_space, read_json_object, write_json
from ...models.folder_layout import (
    ASSET_NAME,
    CONFIG_NAME,
    EMBEDS_NAME,
    GENERATION_CONFIG_NAME,
    LICENCE_FILES,
    MANIFEST_NAME,
    PACKAGE_NAME,
    has_mlx_encoder,
    weight_files,
)
from ...models.foreign_files import SYSTEM_FILES
from ...models.safetensors_files import INDEX_NAME
from ...models.tensor_names import HEAD_PROJECTION, MLX_ENCODER_PREFIX, apple_encoder_shapes
from ...models.tokenizer_files import PARTS_CHAT_TEMPLATE
from ..atomic_folder import new_folder
from ..model_folder import PROCESSOR_CONFIG, file_table, preprocessor_config
from ..options import OnStage, silent
from ..tokenizer import KEEP_SPACES
from ..verify import check_hashes
from .check import added_ids, bundle_faults, template_faults
from .contracts import Contract, contract_for
from .memory import Estimate, estimate
from .place import (
    BUNDLE_MANIFEST,
    MANIFEST_FORMAT,
    VERSIONS_NOTE,
    app_folder,
    bundle_folder,
    check_place,
    check_zip,
    pin_packages,
    publish_with_others,
    publish_zip,
)
from .tensors import saved_tensors

if TYPE_CHECKING:
    from ...models.mlprogram import Program

LICENCE_NOTE = "FastVLM's weights have Apple's research-only model licence: check that you may ship them"

MAX_LISTED = 4
"""The most faults in an error."""

EXPORT_ARGUMENTS = ("encoder", "format", "decoder_bits", "io", "with_projector", "image_size")
"""The arguments of an export that an error of `check_requirements` may name."""

COPIED = ("tokenizer.json", "special_tokens_map.json", GENERATION_CONFIG_NAME)
TEMPLATE_FILE = "chat_template.jinja"

LEFT_OUT = ("rope_scaling", "rope_parameters", "auto_map", "transformers_version")
"""The keys of config.json that bundles lack. In a folder that was read, the first two are null or repeat rope_theta."""


@dataclass(frozen=True)
class Bundle:
    """A finished bundle."""

    path: Path
    """The folder or zip file."""
    client: str
    files: Mapping[str, Mapping[str, Any]]
    """The size (`bytes`) and `sha256` of each file, by its path in the bundle."""
    estimate: Estimate
    notes: tuple[str, ...]
    """Remarks for the user, one line each."""

    @property
    def total_bytes(self) -> int:
        """The bytes of all files but the bundle's manifest."""
        return sum(entry["bytes"] for entry in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is printed with `--json`."""
        return {
            "path": str(self.path),
            "target": self.client,
            "total_bytes": self.total_bytes,
            "file_bytes": {name: entry["bytes"] for name, entry in self.files.items()},
            "memory": self.estimate.as_dict(),
            "notes": list(self.notes),
        }


def bundle(
    folder: str | Path,
    client: str,
    out: str | Path,
    *,
    zipped: bool = False,
    context: int | None = None,
    on_stage: OnStage = silent,
) -> Bundle:
    """Packages a model folder for a client, and validates the result against the client's loader.

    Args:
        folder: an exported model folder.
        client: `apple-app`, `mlx-swift-lm` or `mlx-vlm`.
        out: a new folder, one with an earlier bundle, or a checkout of Apple's app. With `zipped` it is a zip file.
            Only files of an earlier bundle are overwritten.
        zipped: True writes one zip file instead of a folder.
        context: the tokens of context for the memory estimate. The default is 2048, or the model's limit if that is
            less.
        on_stage: a function that is called with a short description of each stage before it begins.

    Returns:
        The path of the bundle, its files, the memory estimate, and remarks.

    Raises:
        UsageError: the client is unknown, or cannot run this model. The message has the arguments of an export that
            it can run.
        FastVLMError: the folder is damaged, or the bundle cannot be written. Nothing is left behind.
    """
    source, contract = Path(folder).expanduser(), contract_for(client)
    destination = zip_path(out) if zipped else bundle_folder(Path(out).expanduser(), contract)
    check_requirements(source, contract)
    memory = estimate(source, contract, context)
    manifest = source_manifest(source)
    if manifest:
        on_stage("compare files with the manifest")
        check_hashes(source)
    check: Callable[[Path], None] = check_zip if zipped else partial(check_place, contract=contract)
    check(destination)
    check_space(destination, (2 if zipped else 1) * sum(file.stat().st_size for file in all_files(source)))
    finish: Callable[[Path, Path], None] = publish_zip if zipped else publish_with_others
    # An unfinished model in the app's own folder would become a part of the Xcode project.
    app = None if zipped or contract.encoder != "coreml" else app_folder(destination)
    with new_folder(destination, force=True, check=check, finish=finish, workplace=app) as written:
        on_stage("write the bundle")
        write_files(source, written, contract)
        on_stage("check it against the contract")
        check_faults(written, contract)
        files = file_table(written)
        notes = bundle_notes(manifest)
        write_json(written / BUNDLE_MANIFEST, bundle_manifest(contract, manifest, files, notes))
    if contract.encoder == "coreml":
        notes = (*notes, pin_packages(app) if app else VERSIONS_NOTE)
    return Bundle(destination, client, files, memory, notes)


def check_requirements(folder: Path, contract: Contract) -> None:
    """Checks that the client can run the model in `folder`.

    Raises:
        UsageError: it cannot. The message has the arguments of an export that it can run.
        ModelFolderError: `folder` is not a model folder.
        PackageError: its package cannot be read.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder. Pass one that `fastvlm export` wrote.")
    config = read_json_object(folder / CONFIG_NAME, ModelFolderError)
    if contract.channels and config.get("mm_hidden_size") != contract.channels:  # no other export helps
        lacks = [
            f"{contract.title} needs the {contract.channels} channels of FastViTHD (got "
            f"{config.get('mm_hidden_size')!r:.40})"
        ]
    else:
        lacks = list(_package_lacks(folder, contract) if contract.encoder == "coreml" else _mlx_lacks(folder, contract))
        lacks += [
            f"{contract.title} cannot load the decoder, because {fault}. Export again with decoder_bits 4, 6 or 8"
            for fault in contract.decoder_faults(config)
        ]
    if lacks:
        raise UsageError(f"{folder} cannot be bundled for {contract.name}: {'; '.join(lacks)}.", *EXPORT_ARGUMENTS)


def _package_lacks(folder: Path, contract: Contract) -> Iterator[str]:
    from ...models.mlprogram import read_package

    if not (folder / PACKAGE_NAME).is_dir():
        wanted = "format='coreml' or 'both'" if (folder / ASSET_NAME).is_dir() else "encoder='coreml'"
        yield f"{contract.title} runs a Core ML package. Export again with {wanted}"
        return
    program = read_package(folder / PACKAGE_NAME)
    options = list(_interface_options(program, contract))
    if options:
        found = ", ".join(f"{t.name} {t}" for t in (*program.inputs, *program.outputs))
        yield f"the package has {found}. Export again with {', '.join(options)}"


def _interface_options(program: Program, contract: Contract) -> Iterator[str]:
    """Yields the arguments of an export whose package fits."""
    tensors = (*program.inputs, *program.outputs)
    if program.image_inputs or any(tensor.dtype != "fp32" for tensor in tensors):
        yield "io='float32'"
    if any(tensor.name == EMBEDS_NAME for tensor in program.outputs):
        yield "with_projector=False"
    if any(tensor.shape[-1] != contract.image_size for tensor in program.inputs):
        yield f"image_size={contract.image_size}"


def _mlx_lacks(folder: Path, contract: Contract) -> Iterator[str]:
    if not has_mlx_encoder(folder):
        yield f"{contract.title} runs MLX weights. Export again with encoder='mlx'"
        return
    found = encoder_config_of(folder)
    if contract.architecture is not None and found != contract.architecture:
        yield (
            f"{contract.title} runs only FastViTHD, with {_described(contract.architecture)} (got {_described(found)})"
        )


def _described(config: FastViTConfig) -> str:
    return f"depths {'-'.join(map(str, config.depths))} and widths {'-'.join(map(str, config.embed_dims))}"


def zip_path(out: str | Path) -> Path:
    """Returns the path of the zip file, with its suffix."""
    path = Path(out).expanduser()
    return path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")


def all_files(folder: Path) -> list[Path]:
    """Returns every file under `folder`."""
    return [path for path in folder.rglob("*") if path.is_file()]


def source_manifest(source: Path) -> Mapping[str, Any]:
    """Returns the export's manifest. It is empty for a folder without one."""
    file = source / MANIFEST_NAME
    return read_json_object(file) if file.is_file() else {}


def check_faults(written: Path, contract: Contract) -> None:
    """Raises VerificationError if the client could not load the bundle. The cause is in the model folder."""
    faults = list(bundle_faults(written, contract))
    if faults:
        raise VerificationError(f"no bundle for {contract.name} was written: {'; '.join(faults[:MAX_LISTED])}.")


def bundle_notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the notes of the export, with one about the licence of Apple's weights.

    No client loads a Core AI asset, so bundles have neither the asset nor the note about it.
    """
    found = manifest.get("notes")
    notes = [note for note in found if isinstance(note, str)] if isinstance(found, list) else []
    notes = [note for note in notes if not note.startswith(ASSET_NAME)]
    name = manifest.get("source", {}).get("name") if isinstance(manifest.get("source"), Mapping) else None
    if manifest.get("trained") is not False and name != "tiny":
        notes.append(LICENCE_NOTE)
    return tuple(notes)


def bundle_manifest(
    contract: Contract, manifest: Mapping[str, Any], files: Mapping[str, Any], notes: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the content of `fastvlm-bundle.json`, without dates and paths: equal folders give equal bundles."""
    return {
        "format": MANIFEST_FORMAT,
        "fastvlm": __version__,
        "target": contract.name,
        "contract": contract.source,
        "source": manifest.get("source"),
        "notes": list(notes),
        "files": files,
    }


def write_files(source: Path, folder: Path, contract: Contract) -> None:
    """Writes the client's files into `folder`, which must be empty."""
    for file in weight_files(source):
        shutil.copyfile(file, folder / file.name)
    if (source / INDEX_NAME).is_file():
        shutil.copyfile(source / INDEX_NAME, folder / INDEX_NAME)
    for name in (*COPIED, *(path.name for pattern in LICENCE_FILES for path in source.glob(pattern) if path.is_file())):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = read_json_object(source / CONFIG_NAME)
    settings = tokenizer_settings(source, templated=contract.encoder == "mlx")
    size = FastVLMConfig.from_dict(config).image_size
    if contract.encoder == "coreml":
        shutil.copytree(source / PACKAGE_NAME, folder / PACKAGE_NAME, ignore=shutil.ignore_patterns(*SYSTEM_FILES))
        processor = PROCESSOR_CONFIG
        config = {key: value for key, value in config.items() if key not in LEFT_OUT}
    else:
        processor = {**PROCESSOR_CONFIG, "processor_class": "FastVLMProcessor"}
        config = mlx_config(source, config, settings, size)
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "processor_config.json", processor)
    write_json(
        folder / "preprocessor_config.json",
        {**preprocessor_config(size), "processor_class": processor["processor_class"]},
    )


def tokenizer_settings(source: Path, *, templated: bool) -> dict[str, Any]:
    """Returns `tokenizer_config.json`. With `templated` its chat template takes messages in parts."""
    settings = read_json_object(source / "tokenizer_config.json")
    settings.setdefault("tokenizer_class", "Qwen2Tokenizer")
    settings.setdefault(*KEEP_SPACES)
    if (source / TEMPLATE_FILE).is_file():
        settings["chat_template"] = (source / TEMPLATE_FILE).read_text(encoding="utf-8")
    tokenizer = read_json_object(source / "tokenizer.json")
    added_ids(tokenizer)  # raises if they are malformed
    # transformers prefers this list to tokenizer.json's
    listed = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer["added_tokens"]
    }
    own = settings.get("added_tokens_decoder")
    settings["added_tokens_decoder"] = {**listed, **(own if isinstance(own, dict) else {})}
    template = settings.get("chat_template")
    if templated and (not isinstance(template, str) or list(template_faults(template))):
        settings["chat_template"] = PARTS_CHAT_TEMPLATE
    return settings


def mlx_config(source: Path, config: Mapping[str, Any], settings: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Returns `config.json` for clients that run the encoder in MLX: with `vision_config`, without an image token."""
    kept = {key: value for key, value in config.items() if key not in (*LEFT_OUT, "image_token_index")}
    longest = config.get("tokenizer_model_max_length", config.get("max_position_embeddings", 32768))
    return {
        **kept,
        "mm_projector_type": "mlp2x_gelu",
        "tokenizer_model_max_length": longest,
        "tokenizer_padding_side": config.get("tokenizer_padding_side", "right"),
        "eos_token_id": end_id(source, config, settings),
        "vision_config": vision_config(source, image_size),
    }


def end_id(source: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    """Returns the id that ends an answer: that of the tokenizer's `eos_token`, or the config's first."""
    ends = FastVLMConfig.from_dict(config).eos_token_ids
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    own = added_ids(read_json_object(source / "tokenizer.json")).get(str(token))
    return own if own is not None else ends[0] if ends else None


def encoder_config_of(source: Path) -> FastViTConfig:
    """Returns the architecture of a folder's encoder in MLX, from its tensors. Raises WeightsError."""
    return FastViTConfig.from_shapes(
        apple_encoder_shapes(
            {
                name.removeprefix(MLX_ENCODER_PREFIX): info.shape
                for name, info in saved_tensors(source).items()
                if name.startswith(MLX_ENCODER_PREFIX) and name != MLX_ENCODER_PREFIX + HEAD_PROJECTION
            }
        )
    )


def vision_config(source: Path, image_size: int) -> dict[str, Any]:
    """Returns the clients' description of the encoder. Numbers that no tensor shows are FastViTHD's."""
    config = encoder_config_of(source)
    projection_dim = saved_tensors(source)[MLX_ENCODER_PREFIX + HEAD_PROJECTION].shape[1]
    return {
        "cls_ratio": config.out_channels / config.embed_dims[-1],
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * len(config.depths),
        "embed_dims": list(config.embed_dims),
        "hidden_size": 1024,
        "image_size": image_size,
        "intermediate_size": 3072,
        "layer_scale_init_value": 1e-5,
        "layers": list(config.depths),
        "mlp_ratios": list(config.mlp_ratios),
        "model_type": "llava_qwen2",
        "num_classes": 1000,
        "patch_size": config.patch_size,
        "pos_embs_shapes": [None if kernel is None else [kernel, kernel] for kernel in config.pos_emb_kernels],
        "projection_dim": projection_dim,
        "repmixer_kernel_size": 3,
        "token_mixers": list(config.token_mixers),
    }
