"""The tensors of a client's model, derived from `config.json`, compared with those in the weight files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models.config import FastVLMConfig, Qwen2Config
from ...models.errors import FastVLMError, ModelFolderError, listed
from ...models.fastvit_config import FastViTConfig
from ...models.folder_layout import weight_files
from ...models.quantization import Quantization
from ...models.safetensors_files import Shape, TensorInfo, read_header
from ...models.tensor_names import HEAD_PROJECTION, MLX_ENCODER_PREFIX, language_shapes, saved_name
from .contracts import Contract

FLOATS = ("BF16", "F16", "F32")
"""The types of tensors that are not quantized."""

PACKED = "U32"
"""The type of quantized weights."""

MAX_LISTED = 5
"""The most tensors in one fault."""


def saved_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Returns the shape and type of each tensor, from the headers. Raises ModelFolderError or WeightsError."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        header = read_header(file)
        twice = sorted(tensors.keys() & header.keys())
        if twice:
            raise ModelFolderError(f"tensor {twice[0]!r:.80} is in two weight files (the second is {file.name}).")
        tensors.update(header)
    return tensors


def tensor_faults(folder: Path, config: Mapping[str, Any], contract: Contract) -> Iterator[str]:
    """Yields the differences in names, shapes and types from the client's model, which loads weights strictly."""
    from ...models.language import quantized_shapes

    try:
        found = saved_tensors(folder)
        expected = expected_shapes(config, contract)
        quantization = quantization_of(config)
    except FastVLMError as reason:
        yield str(reason)
        return
    quantized = {name.removesuffix(".scales") for name in found if name.endswith(".scales")}
    if quantized and quantization is None:
        yield f"config.json: 'quantization' is missing, but {sorted(quantized)[0]} has .scales"
        return
    if quantization is not None:
        expected = quantized_shapes(expected, quantized, quantization)
    yield from named("missing", expected.keys() - found.keys())
    yield from named("unknown to the client", found.keys() - expected.keys())
    for name in sorted(expected.keys() & found.keys()):
        yield from _tensor_faults(name, found[name], expected[name], quantized)


def named(what: str, names: set[str]) -> Iterator[str]:
    """Yields one line about the tensors `names`, if there are any."""
    if names:
        yield f"{len(names)} tensors {what}: {listed(sorted(names), MAX_LISTED)}"


def _tensor_faults(name: str, info: TensorInfo, shape: Shape, quantized: set[str]) -> Iterator[str]:
    if tuple(info.shape) != shape:
        yield f"{name} must have the shape {list(shape)} (got {list(info.shape)})"
    layer = name.removesuffix(".weight")
    wanted = (PACKED,) if layer != name and layer in quantized else FLOATS
    if info.dtype not in wanted:
        yield f"{name} must have the type {' or '.join(wanted)} (got {info.dtype})"


def expected_shapes(config: Mapping[str, Any], contract: Contract) -> dict[str, Shape]:
    """Returns the shape of each tensor of the client's model, unquantized. Raises ConfigError or WeightsError."""
    language = {saved_name(name): shape for name, shape in language_shapes(language_config(config)).items()}
    own = "multi_modal_projector.linear_"
    shapes = {name.replace(own, contract.projector): shape for name, shape in language.items()}
    if contract.encoder == "mlx":
        encoder = contract.architecture or encoder_config(config["vision_config"])
        shapes.update(encoder_shapes(encoder, config["vision_config"]["projection_dim"]))
    return shapes


def language_config(config: Mapping[str, Any]) -> FastVLMConfig:
    """Returns the language side of `config.json` as the clients read it, with their defaults."""
    tied = config.get("tie_word_embeddings")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    decoder = Qwen2Config(**{name: config[name] for name in names}, tie_word_embeddings=tied is not False)
    return FastVLMConfig(
        decoder, config["mm_hidden_size"], image_size=1024, image_aspect_ratio="pad", eos_token_ids=(),
        image_token_index=None, tokenizer_model_max_length=1,
    )  # fmt: skip


def encoder_config(vision: Mapping[str, Any]) -> FastViTConfig:
    """Returns the encoder of `vision_config`. Raises WeightsError if it is invalid."""
    out_channels = int(vision["embed_dims"][-1] * vision["cls_ratio"])
    return FastViTConfig(
        depths=tuple(vision["layers"]),
        embed_dims=tuple(vision["embed_dims"]),
        mlp_ratios=tuple(vision["mlp_ratios"]),
        token_mixers=tuple(vision["token_mixers"]),
        pos_emb_kernels=tuple(None if shape is None else shape[0] for shape in vision["pos_embs_shapes"]),
        out_channels=out_channels,
        se_channels=out_channels // 16,  # as in the clients' code
    )


def encoder_shapes(config: FastViTConfig, projection_dim: int) -> dict[str, Shape]:
    """Returns the shape of each tensor of an encoder in MLX."""
    from ...models._mlx import nn
    from ...models.fastvit_mlx import FastViTMLX

    parameters = dict(nn.utils.tree_flatten(FastViTMLX(config).parameters()))
    shapes = {MLX_ENCODER_PREFIX + name: tuple(tensor.shape) for name, tensor in parameters.items()}
    return {**shapes, MLX_ENCODER_PREFIX + HEAD_PROJECTION: (config.out_channels, projection_dim)}


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Returns the quantization in `config.json`, or None."""
    quantization = config.get("quantization")
    return None if quantization is None else Quantization.from_dict(quantization)
