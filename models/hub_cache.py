"""Checkpoints that the Hugging Face hub's client keeps on this machine."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""`apple/FastVLM-0.5B`: an owner and a name."""


def cached_folder(hub_id: str) -> Path | None:
    """The folder in which the hub's cache holds `hub_id`, perhaps not all of it; None where it is not there.

    That is its main branch, or the only revision that is there.
    """
    if not HUB_ID.fullmatch(hub_id):
        return None
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json", cache_dir=constants.HF_HUB_CACHE)
    except (HFValidationError, OSError):
        return None
    if isinstance(found, str):
        return Path(found).parent
    revisions = list(Path(constants.HF_HUB_CACHE).glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/config.json"))
    return revisions[0].parent if len(revisions) == 1 else None
