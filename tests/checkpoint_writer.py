"""A writer of checkpoints in each layout that is read. It only renames and transposes, without folding or rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastvlm.models.checkpoint import Checkpoint, shapes, tensors_under
from fastvlm.models.config import PATCH_SIZE
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.files import write_json
from fastvlm.models.safetensors_files import write_shards
from fastvlm.models.source_layouts import TEXT_FIELDS
from fastvlm.models.tensor_names import APPLE_ENCODER_PREFIX, MLX_ENCODER_PREFIX, rename, to_mlx_axes

if TYPE_CHECKING:
    from torch import Tensor

LayoutName = Literal["apple", "hf", "mlx"]

ABSENT = {"apple": (), "hf": (f"{APPLE_ENCODER_PREFIX}head.",), "mlx": ("num_batches_tracked",)}
"""The tensors without a place in each layout: the unused CLIP head, or the step counters of batch norms."""


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: LayoutName) -> None:
    """Writes config, weights and tokenizer to `folder`, which is created.

    Raises:
        WeightsError: the encoder is not a whole FastViT.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, _tensors(checkpoint, layout), _writer("mlx" if layout == "mlx" else "pt"))
    write_json(folder / "config.json", target_config(checkpoint, layout))
    if layout == "hf":
        write_json(folder / "preprocessor_config.json", _preprocessor(checkpoint.config.image_size))
    for name, content in checkpoint.tokenizer_files().items():
        (folder / name).write_bytes(content)


def target_config(checkpoint: Checkpoint, layout: LayoutName) -> dict[str, Any]:
    """Returns `config.json` in the layout's fields, corrected by the weights."""
    config = checkpoint.config
    apple = {**checkpoint.config_dict, "tie_word_embeddings": config.decoder.tie_word_embeddings}
    if layout == "apple":
        return apple
    encoder = FastViTConfig.from_shapes(shapes(tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX)))
    if layout == "hf":
        return hf_config(apple, encoder.depths, encoder.embed_dims)
    vision = {"image_size": config.image_size, "layers": list(encoder.depths), "embed_dims": list(encoder.embed_dims)}
    return {**apple, "image_token_index": -200, "vision_config": {"model_type": "llava_qwen2", **vision}}


def hf_config(apple: Mapping[str, Any], depths: tuple[int, ...], embed_dims: tuple[int, ...]) -> dict[str, Any]:
    """Returns `config.json` of the Hugging Face layout. `image_aspect_ratio` is a field that only fastvlm reads."""
    image_size = int(apple["mm_vision_tower"].rpartition("_")[2])
    tied = apple.get("tie_word_embeddings", True)
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "image_aspect_ratio": apple.get("image_aspect_ratio", "pad"),
        "image_seq_length": (image_size // PATCH_SIZE) ** 2,
        **({"image_token_index": apple["image_token_index"]} if "image_token_index" in apple else {}),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "qwen2",
            **{key: apple[key] for key in TEXT_FIELDS if key in apple},
            "tie_word_embeddings": tied,
        },
        "tie_word_embeddings": tied,
        "vision_config": {
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": apple["mm_hidden_size"],
            "model_args": {"embed_dims": list(embed_dims), "inference_mode": True, "layers": list(depths)},
            "model_type": "timm_wrapper",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _tensors(checkpoint: Checkpoint, layout: LayoutName) -> Iterator[tuple[str, Tensor]]:
    import torch

    absent = ABSENT[layout]
    kept = [name for name in checkpoint.tensors if not name.startswith(absent) and not name.endswith(absent)]
    for apple, name in rename(kept, "apple", layout).items():
        tensor = torch.as_tensor(checkpoint.read(apple, "pt"))
        if layout == "mlx" and name.startswith(MLX_ENCODER_PREFIX):
            tensor = tensor.permute(to_mlx_axes(tuple(tensor.shape)))
        yield name, tensor.contiguous()


def _writer(form: str) -> Any:
    from safetensors.torch import save_file

    return lambda path, tensors: save_file(dict(tensors), path, metadata={"format": form})


def _preprocessor(image_size: int) -> dict[str, Any]:
    square = {"height": image_size, "width": image_size}
    return {"image_processor_type": "CLIPImageProcessor", "crop_size": square, "size": {"shortest_edge": image_size}}
