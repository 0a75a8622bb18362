"""The files of an exported model folder other than the package: weights, configs, tokenizer, manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.checkpoint import Checkpoint
from ..models.config import PATCH_SIZE
from ..models.files import sample_sha256, sha256
from ..models.folder_layout import LICENCE_FILES, MANIFEST_NAME
from ..models.tokenizer_files import IMAGE_TOKEN
from ..quant.decoder_scheme import DecoderScheme

if TYPE_CHECKING:
    pass


def exported_config(
    checkpoint: Checkpoint, image_token_index: int, image_size: int, scheme: DecoderScheme
) -> dict[str, Any]:
    """Apple's `config.json` with what export decided: the image token, the size, the dtype, the quantization."""
    decoder, table = checkpoint.config.decoder, checkpoint.tensors["model.embed_tokens.weight"]
    config = {
        **checkpoint.config_dict,
        "vocab_size": table.shape[0],  # clients size the table by it; source files sometimes name another number
        "rope_theta": decoder.rope_theta,  # newer files keep it under rope_parameters, where clients do not look
        "image_token_index": image_token_index,
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "torch_dtype": "float16",
    }
    if (quantization := scheme.quantization()) is not None:
        config["quantization"] = quantization.as_dict()
    return config


def preprocessor_config(image_size: int) -> dict[str, Any]:
    """CLIP's fields, as the iOS app and transformers read them: pixels in 0..1, bicubic, square of `image_size`."""
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


PROCESSOR_CONFIG = {
    "image_token": IMAGE_TOKEN,
    "num_additional_image_tokens": 0,
    "patch_size": PATCH_SIZE,
    "processor_class": "LlavaProcessor",
}


def copy_licences(checkpoint: Checkpoint, folder: Path) -> None:
    """Licence files beside a checkpoint go where its weights go."""
    source = getattr(checkpoint, "folder", None)
    if not isinstance(source, Path):
        return
    for pattern in LICENCE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, sha256 and sampled sha256 of every file under `folder`, by its path there, but for the manifest.

    Hidden files do not count: the Finder leaves its own in each folder that is looked at.
    """
    table = {}
    paths = (path for path in folder.rglob("[!.]*") if path.is_file() and path.name != MANIFEST_NAME)
    for path in sorted(paths):
        table[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "sample_sha256": sample_sha256(path),
        }
    return table
