"""The gain of reuse: a batch compared with single answers, and a second question compared with the first.

    python tests/bench/bench_reuse.py FOLDER [--runs N] [--tokens N]

All figures are ratios of times within one run, in which the two sides alternate, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--kv-bits", type=int, default=None)
    arguments = parser.parse_args()
    import fastvlm

    vlm = fastvlm.load(arguments.folder, kv_bits=arguments.kv_bits)
    figures = {
        "batch": batch_figures(vlm, arguments.runs, arguments.tokens),
        "conversation": conversation_figures(vlm, arguments.runs),
    }
    print(json.dumps(figures, indent=2))


def batch_figures(vlm: Any, runs: int, tokens: int) -> dict[str, Any]:
    """Decoding alone: the steps of eight answers whose prompts, of mixed lengths, have been read."""
    from fastvlm.models._mlx import mx
    from fastvlm.models.kv_cache import stacked
    from fastvlm.runtime.generate import decode_one_token
    from fastvlm.runtime.prompt_cache import CachedPrompt
    from fastvlm.runtime.request import prepare

    questions = ["What is it? " * (n + 1) for n in range(BATCH)]
    starts = [
        vlm.engine.prefill(prepare(picture(0), question, max_tokens=1000), CachedPrompt()) for question in questions
    ]
    decoder = vlm.engine.language.language_model
    seconds: dict[str, list[float]] = {"one_by_one": [], "batch": []}
    ids: dict[str, Any] = {}
    for turn in range(runs + 1):
        begin = time.perf_counter()
        alone = []
        for start in starts:
            cache, token, own = (
                [layer.fork(start.prompt_tokens + tokens) for layer in start.cache],
                start.first_token,
                [],
            )
            for layer in cache:
                layer.trim(layer.offset - start.prompt_tokens)
            for _ in range(tokens):
                token = mx.argmax(decode_one_token(decoder, token, cache)[0], keepdims=True)
                own.append(token.item())
            alone.append(own)
        middle = time.perf_counter()
        caches = [[layer.fork() for layer in start.cache] for start in starts]
        cache = [stacked(layer, tokens) for layer in zip(*caches, strict=True)]
        token, together = mx.concatenate([start.first_token for start in starts]), []
        for _ in range(tokens):
            token = mx.argmax(decode_one_token(decoder, token, cache), axis=-1)
            together.append(token.tolist())
        if turn:
            seconds["one_by_one"].append(middle - begin)
            seconds["batch"].append(time.perf_counter() - middle)
        ids = {"alone": alone, "together": np.array(together).T.tolist()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    count = BATCH * tokens
    return {
        "tokens_per_s": {name: count / median for name, median in medians.items()},
        "rate": medians["one_by_one"] / medians["batch"],
        "same_ids": ids["alone"] == ids["together"],
    }


def conversation_figures(vlm: Any, runs: int) -> dict[str, Any]:
    """A second question about the same image: nothing to encode, its own tokens to read."""
    first, second = [], []
    for n in range(runs + 1):
        chat = vlm.chat(picture(n + 1))
        first.append(chat.ask("Describe the image.", max_tokens=8, ignore_eos=True).timings)
        second.append(chat.ask("What colour is it?", max_tokens=8, ignore_eos=True).timings)
    return {name: told(timings[1:]) for name, timings in (("first", first), ("second", second))}


def told(timings: list[Any]) -> dict[str, float]:
    return {
        "tokens_read": timings[0].prompt_tokens - timings[0].reused_tokens,
        **{
            stage: statistics.median(getattr(one, stage) for one in timings)
            for stage in ("ttft_ms", "encode_ms", "prefill_ms")
        },
    }


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (200, 300, 3), dtype=np.uint8)


if __name__ == "__main__":
    main()
