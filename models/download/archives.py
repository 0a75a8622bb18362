"""A catalog of Apple's archives: their names and URLs, and the files of a checkpoint that are needed."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath

BASE_URL = "https://ml-site.cdn-apple.com/datasets/fastvlm"

FOLDERS: Mapping[str, str] = {
    **{
        f"{size}-stage{stage}": f"llava-fastvithd_{size}_stage{stage}"
        for size in ("0.5b", "1.5b", "7b")
        for stage in (2, 3)
    },
    **{
        f"{size}-stage3-{kind}": f"llava-fastvithd_{size}_stage3_llm.{kind}"
        for size, kind in (("0.5b", "fp16"), ("1.5b", "int8"), ("7b", "int4"))
    },
}
"""Apple's name of each archive and of the folder in it, by the name that `fastvlm download` takes.

Sources: `get_models.sh` (checkpoints) and `app/get_pretrained_mlx_model.sh` (exported for Apple Silicon) of
https://github.com/apple/ml-fastvlm."""

LICENCE_NOTE = (
    "FastVLM's weights are under Apple's model licence, for research only: "
    "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL"
)

NEEDED = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "fastvlm.json", "fastvithd.mlpackage/*",
    "LICENSE*", "LICENCE*", "ACKNOWLEDGEMENTS*",
)  # fmt: skip
"""Patterns of the files of a checkpoint or exported folder that are kept: no code, pickles or training state."""


def archive_url(name: str) -> str:
    """Returns the URL of one of `FOLDERS`."""
    return f"{BASE_URL}/{FOLDERS[name]}.zip"


def is_needed(path: str) -> bool:
    """Returns True if fastvlm reads the file at `path`, relative to the checkpoint's folder, or if it is a licence."""
    parts = PurePosixPath(path).parts
    if ".." in parts or (len(parts) > 1 and parts[0] != "fastvithd.mlpackage"):
        return False
    return any(fnmatch(path, pattern) for pattern in NEEDED) and PurePosixPath(path).name[0] != "."
