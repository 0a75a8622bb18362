"""The contents of an exported folder's configs, its licences, and the table of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.checkpoint import Checkpoint
from ..models.config import PATCH_SIZE
from ..models.files import sample_sha256, sha256
from ..models.folder_layout import LICENCE_FILES, MANIFEST_NAME
from ..models.tokenizer_files import IMAGE_TOKEN
from ..quant.decoder_scheme import DecoderScheme


def exported_config(
    checkpoint: Checkpoint, image_token_index: int, image_size: int, scheme: DecoderScheme
) -> dict[str, Any]:
    """Returns Apple's `config.json` with the export's image token, image size, dtype and quantization."""
    decoder, table = checkpoint.config.decoder, checkpoint.tensors["model.embed_tokens.weight"]
    config = {
        **checkpoint.config_dict,
        "vocab_size": table.shape[0],  # clients size the table by it, and source files sometimes have another number
        "rope_theta": decoder.rope_theta,  # newer files have it in rope_parameters, which clients do not read
        "image_token_index": image_token_index,
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "torch_dtype": "float16",
    }
    if (quantization := scheme.quantization()) is not None:
        config["quantization"] = quantization.as_dict()
    return config


def preprocessor_config(image_size: int) -> dict[str, Any]:
    """Returns CLIP's fields for the iOS app and transformers: pixels in 0..1, bicubic, a square of `image_size`."""
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
    """Copies the licence files of a checkpoint's folder."""
    source = getattr(checkpoint, "folder", None)
    if not isinstance(source, Path):
        return
    for pattern in LICENCE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the size, sha256 and sampled sha256 of every file under `folder` but the manifest, by its path.

    Hidden files are skipped, because the Finder writes its own into each folder that is opened.
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
