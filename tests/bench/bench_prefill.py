"""The peak memory of prefill by the length of the prompt, each in a new process.

    python tests/bench/bench_prefill.py random:0.5b [--lengths 1024 8192] [--chunk N]

Prints one JSON object per length, and the ratio of the longest to the first, both without their caches. The decoder
has the size of the model and random weights. `process_s` is the processor's time, since machines are shared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

LENGTHS = (1024, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model reference, of which only the decoder's config is used")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--chunk", type=int, default=None, help="positions per pass, instead of the default")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.model, arguments.lengths[0], arguments.chunk)))
        return
    figures = [in_a_process(arguments.model, length, arguments.chunk) for length in arguments.lengths]
    for figure in figures:
        print(json.dumps(figure))
    print(json.dumps(ratios(figures[0], figures[-1])))


def in_a_process(model: str, length: int, chunk: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, model, "--one", "--lengths", str(length)]
    command += [] if chunk is None else ["--chunk", str(chunk)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(model: str, length: int, chunk: int | None) -> dict[str, Any]:
    from fastvlm.models._mlx import mx
    from fastvlm.models.qwen2 import Qwen2
    from fastvlm.models.references import open_checkpoint
    from fastvlm.runtime import generate

    generate.PREFILL_CHUNK = chunk or generate.PREFILL_CHUNK
    mx.random.seed(0)
    decoder = Qwen2(open_checkpoint(model).config.decoder)
    embeds = 0.05 * mx.random.normal((1, length, decoder.config.hidden_size))
    mx.eval(decoder.parameters(), embeds)
    cache = decoder.make_cache(length)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    begin = time.process_time()
    logits = generate.prefill(decoder, embeds, cache)
    mx.eval(logits)
    seconds = time.process_time() - begin
    cache_bytes = sum(layer.nbytes for layer in cache)
    return {
        "tokens": length,
        "chunk": generate.PREFILL_CHUNK,
        "peak_bytes": mx.get_peak_memory(),
        "weights_and_prompt_bytes": before,
        "cache_bytes": cache_bytes,
        "working_bytes": mx.get_peak_memory() - before - cache_bytes,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "process_s": round(seconds, 1),
        "first_id": int(logits.argmax().item()),
    }


def ratios(short: dict[str, Any], long: dict[str, Any]) -> dict[str, float]:
    """Returns the ratios of peaks without caches: of the whole, and without weights and prompt too."""
    return {
        "peak_ratio": round(
            (long["peak_bytes"] - long["cache_bytes"]) / (short["peak_bytes"] - short["cache_bytes"]), 3
        ),
        "working_ratio": round(long["working_bytes"] / short["working_bytes"], 3),
    }


if __name__ == "__main__":
    main()
