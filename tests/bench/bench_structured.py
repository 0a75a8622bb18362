"""The cost of a structured answer and of beam search per token, compared with a plain answer.

    python tests/bench/bench_structured.py FOLDER [--tokens N]

The sides alternate token by token in one run, since machines are shared and noisy. Only the ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 20},
        "tags": {"type": "array", "items": {"enum": ["person", "animal", "plant", "building"]}, "maxItems": 4},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "description": {"type": "string", "minLength": 100_000},  # as long as the answer
    },
    "required": ["title", "tags", "count", "description"],
}
BEAMS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    import fastvlm

    with fastvlm.load(arguments.folder) as vlm:
        print(json.dumps({"start": start_figures(vlm), **token_figures(vlm, arguments.tokens)}, indent=2))


def start_figures(vlm: Any) -> dict[str, float]:
    """The one-time cost of a vocabulary, and the cost of each request with a schema, in milliseconds."""
    from fastvlm.runtime.structured import constraint_from

    begin = time.perf_counter()
    vlm.engine.vocabulary.start(constraint_from(SCHEMA))
    first = time.perf_counter() - begin
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        vlm.engine.vocabulary.start(constraint_from(SCHEMA))
        times.append(time.perf_counter() - begin)
    return {"first_ms": 1000 * first, "later_ms": 1000 * statistics.median(times)}


def token_figures(vlm: Any, tokens: int) -> dict[str, Any]:
    """The median milliseconds per token of each side, and their ratios to a plain answer."""
    from fastvlm.runtime.structured import AllowedTokens

    masks: list[float] = []
    mask = AllowedTokens.mask

    def timed_mask(self: AllowedTokens) -> Any:
        begin = time.perf_counter()
        found = mask(self)
        masks.append(time.perf_counter() - begin)
        return found

    AllowedTokens.mask = timed_mask  # type: ignore[method-assign]
    plain = {"max_tokens": tokens, "ignore_eos": True}
    sampled = {**plain, "temperature": 1.0, "top_k": 50, "seed": 1}
    sides = {
        "plain": answer(vlm, **plain),
        "schema": answer(vlm, **plain, schema=SCHEMA),
        "sampled": answer(vlm, **sampled),
        "sampled_schema": answer(vlm, **sampled, schema=SCHEMA),
        "beams": answer(vlm, **plain, num_beams=BEAMS),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(tokens - 1):
        for side, ids in sides.items():
            begin = time.perf_counter()
            next(ids)
            times[side].append(time.perf_counter() - begin)
    medians = {side: 1000 * statistics.median(found) for side, found in times.items()}
    return {
        "ms_per_token": medians,
        "schema_ratio": medians["schema"] / medians["plain"],
        "sampled_schema_ratio": medians["sampled_schema"] / medians["sampled"],
        f"ratio_of_{BEAMS}_beams": medians["beams"] / medians["plain"],
        "mask_us": {"median": 1e6 * statistics.median(masks), "greatest": 1e6 * max(masks)},
    }


def answer(vlm: Any, **options: Any) -> Iterator[Any]:
    """Yields after each step of an answer whose prompt has been read."""
    from fastvlm.runtime.prompt_cache import CachedPrompt
    from fastvlm.runtime.request import prepare

    engine, request = vlm.engine, prepare(None, "Describe a picture with many details.", **options)
    ids = engine.decoded_ids(request, engine.prefill(request, CachedPrompt()))
    next(ids)
    return ids


if __name__ == "__main__":
    main()
