"""Writes a checkpoint in each layout that is read: nothing is folded or rounded, only renamed and turned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .checkpoint import APPLE_ENCODER_PREFIX, Checkpoint, shapes, tensors_under
from .fastvit_config import FastViTConfig
from .hf_config import hf_config
from .hf_layout import hf_names
from .mlx_layout import ENCODER_PREFIX as MLX_ENCODER_PREFIX
from .mlx_layout import mlx_name, to_mlx_axes
from .safetensors_header import BITS

if TYPE_CHECKING:
    from torch import Tensor

LayoutName = Literal["apple", "hf", "mlx"]

MAX_SHARD_BYTES = 2 * 2**30
"""A shard is in memory while it is written."""
STEP_COUNTER = "num_batches_tracked"


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: LayoutName) -> None:
    """Writes config, weights and tokenizer to `folder`, which is made if need be.

    Left out is what the layout has no place for: the unused CLIP head in `hf`, batch norms' step counters in `mlx`.

    Raises:
        WeightsError: the encoder is no whole FastViT.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = target_names(checkpoint, layout)
    _write_weights(checkpoint, folder, names, channels_last=layout == "mlx")
    _write_json(folder / "config.json", target_config(checkpoint, layout))
    if layout == "hf":
        _write_json(folder / "preprocessor_config.json", _preprocessor(checkpoint.config.image_size))
    for name, content in checkpoint.tokenizer_files().items():
        (folder / name).write_bytes(content)


def target_names(checkpoint: Checkpoint, layout: LayoutName) -> dict[str, str]:
    """Apple's name -> the layout's, of every tensor that it keeps."""
    if layout == "hf":
        return hf_names(checkpoint.tensors)
    if layout == "mlx":
        return {name: mlx_name(name) for name in checkpoint.tensors if not name.endswith(STEP_COUNTER)}
    return {name: name for name in checkpoint.tensors}


def target_config(checkpoint: Checkpoint, layout: LayoutName) -> dict[str, Any]:
    """`config.json` in the layout's fields, with what the weights decide."""
    config = checkpoint.config
    apple = {**checkpoint.config_dict, "tie_word_embeddings": config.decoder.tie_word_embeddings}
    if layout == "apple":
        return apple
    encoder = FastViTConfig.from_shapes(shapes(tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX)))
    if layout == "hf":
        return hf_config(apple, encoder.depths, encoder.embed_dims)
    vision = {"image_size": config.image_size, "layers": list(encoder.depths), "embed_dims": list(encoder.embed_dims)}
    return {**apple, "image_token_index": -200, "vision_config": {"model_type": "llava_qwen2", **vision}}


def _write_weights(checkpoint: Checkpoint, folder: Path, names: Mapping[str, str], *, channels_last: bool) -> None:
    from safetensors.torch import save_file

    parts = _shards(checkpoint, names)
    weight_map: dict[str, str] = {}
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {names[name]: _tensor(checkpoint, name, names[name], channels_last) for name in part}
        save_file(tensors, folder / file, metadata={"format": "mlx" if channels_last else "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(parts) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(checkpoint: Checkpoint, names: Mapping[str, str]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        info = checkpoint.tensors[name]
        count = prod(info.shape) * BITS[info.dtype] // 8
        if shards[-1] and size + count > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _tensor(checkpoint: Checkpoint, name: str, target: str, channels_last: bool) -> Tensor:
    import torch

    tensor = torch.as_tensor(checkpoint.read(name, "pt"))
    if channels_last and target.startswith(MLX_ENCODER_PREFIX):
        tensor = tensor.permute(to_mlx_axes(tuple(tensor.shape)))
    return tensor.contiguous()


def _preprocessor(image_size: int) -> dict[str, Any]:
    square = {"height": image_size, "width": image_size}
    return {"image_processor_type": "CLIPImageProcessor", "crop_size": square, "size": {"shortest_edge": image_size}}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
