"""The cache of the Hugging Face hub's client on this machine."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""The pattern of an id with owner and name, such as `apple/FastVLM-0.5B`."""


def cached_folder(hub_id: str) -> Path | None:
    """Returns the folder of `hub_id` in the hub's cache, perhaps incomplete, or None if it is absent.

    The folder has the main branch, or the only revision in the cache.
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
