"""The files of a bundle, made from those of a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...models.config import FastVLMConfig
from ...models.fastvit_config import FastViTConfig
from ...models.files import read_json_object, write_json
from ...models.folder_layout import CONFIG_NAME, GENERATION_CONFIG_NAME, LICENCE_FILES, PACKAGE_NAME, weight_files
from ...models.safetensors_files import INDEX_NAME
from ...models.tensor_names import HEAD_PROJECTION, MLX_ENCODER_PREFIX, apple_encoder_shapes
from ...models.tokenizer_files import PARTS_CHAT_TEMPLATE
from ..model_folder import PROCESSOR_CONFIG, preprocessor_config
from ..tokenizer import KEEP_SPACES
from .check import added_ids, template_faults
from .contracts import Contract
from .tensors import saved_tensors

COPIED = ("tokenizer.json", "special_tokens_map.json", GENERATION_CONFIG_NAME)
TEMPLATE_FILE = "chat_template.jinja"

LEFT_OUT = ("rope_scaling", "rope_parameters", "auto_map", "transformers_version")
"""The keys of config.json that bundles lack. In a folder that was read, the first two are null or repeat rope_theta."""


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
        shutil.copytree(source / PACKAGE_NAME, folder / PACKAGE_NAME)
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
