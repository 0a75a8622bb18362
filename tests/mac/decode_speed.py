"""Decoding speed of one answer next to mlx-lm's, with the same quantized weights, in one run.

    python tests/mac/decode_speed.py FOLDER [--tokens 256] [--turns 3]

Each side has a process of its own, and they take turns, so that heat and other programs hit both alike. Both read the
same prompt of ids and decode greedily, past the end of the answer. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("ours", "mlx_lm")
PROMPT_TOKENS = 285
"""256 image tokens of 1024 px, and a short question."""

Answer = Callable[[int], tuple[float, float, list[int]]]
"""A number of tokens -> seconds of prefill, seconds of decoding, the ids."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="decoded in each turn")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="read in each turn")
    parser.add_argument("--turns", type=int, default=3, help="that count, after one to warm up")
    parser.add_argument("--side", choices=SIDES, help="be one of the two processes")
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments.side, arguments.folder, arguments.prompt_tokens, arguments.tokens)
    else:
        found = measured(arguments.folder, arguments.prompt_tokens, arguments.tokens, arguments.turns)
        print(json.dumps(found))


def measured(folder: Path, prompt_tokens: int, tokens: int, turns: int) -> dict[str, Any]:
    """Medians by side, the ratios of ours to mlx-lm's rates, and how far the ids agree."""
    processes = {side: started(side, folder, prompt_tokens, tokens) for side in SIDES}
    about = {side: spoken(process) for side, process in processes.items()}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(turns + 1):
        for side, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("answer\n")
            process.stdin.flush()
            answer = spoken(process)
            if turn:
                found[side].append(answer)
    for process in processes.values():
        process.communicate()
    sides = {
        side: {
            **about[side],
            "prefill_ms": statistics.median(one["prefill_ms"] for one in answers),
            "decode_tps": statistics.median(one["decode_tps"] for one in answers),
            "decode_tps_by_turn": [round(one["decode_tps"], 2) for one in answers],
        }
        for side, answers in found.items()
    }
    ours, theirs = (found[side][-1]["ids"] for side in SIDES)
    same = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return {
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "turns": turns,
        **sides,
        "decode_ratio": round(sides["ours"]["decode_tps"] / sides["mlx_lm"]["decode_tps"], 4),
        "prefill_ratio": round(sides["ours"]["prefill_ms"] / sides["mlx_lm"]["prefill_ms"], 4),
        "same_ids": same,
    }


def started(side: str, folder: Path, prompt_tokens: int, tokens: int) -> subprocess.Popen[str]:
    lengths = ["--prompt-tokens", str(prompt_tokens), "--tokens", str(tokens)]
    command = [sys.executable, __file__, str(folder), *lengths, "--side", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def spoken(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a side. Raises SystemExit when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with exit code {process.wait()}")
    return dict(json.loads(line))


def ours(folder: Path, prompt_tokens: int) -> tuple[Answer, dict[str, Any]]:
    from fastvlm.models._mlx import mx
    from fastvlm.models.language import load_language
    from fastvlm.runtime.folder import open_folder
    from fastvlm.runtime.generate import decode, prefill
    from fastvlm.runtime.sampling import Sampler, SamplingOptions

    opened = open_folder(folder)
    decoder = load_language(opened.weights(), opened.config, quantization=opened.config.quantization).language_model
    prompt = mx.array([prompt_ids(decoder.config.vocab_size, prompt_tokens)])

    def answer(count: int) -> tuple[float, float, list[int]]:
        cache = decoder.make_cache(prompt_tokens + count)
        begin = time.perf_counter()
        first = prefill(decoder, decoder.embed(prompt), cache).argmax(-1)
        mx.eval(first)
        middle = time.perf_counter()
        ids = [first.item(), *decode(decoder, first, cache, Sampler(SamplingOptions()), count - 1)]
        return middle - begin, time.perf_counter() - middle, ids

    return answer, {"dtype": str(decoder.model.norm.weight.dtype), "device": str(mx.default_device())}


def mlx_lm(folder: Path, prompt_tokens: int) -> tuple[Answer, dict[str, Any]]:
    """The same weights in mlx-lm's Qwen2, as they are stored."""
    from importlib.metadata import version

    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.generate import generate_step
    from mlx_lm.models.qwen2 import Model, ModelArgs

    from fastvlm.models.folder_layout import saved_weights

    config, prefix = json.loads((folder / "config.json").read_text()), "language_model."
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in saved_weights(folder).items() if name.startswith(prefix)
    }
    model = Model(ModelArgs.from_dict(config))
    if any(name.endswith(".scales") for name in weights):
        affine = {key: config["quantization"][key] for key in ("group_size", "bits")}
        nn.quantize(model, **affine, class_predicate=lambda path, _: f"{path}.scales" in weights)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    prompt = mx.array(prompt_ids(config["vocab_size"], prompt_tokens))

    def answer(count: int) -> tuple[float, float, list[int]]:
        begin = time.perf_counter()
        steps = generate_step(prompt, model, max_tokens=count)
        ids = [int(next(steps)[0])]
        middle = time.perf_counter()
        ids += [int(token) for token, _ in steps]
        return middle - begin, time.perf_counter() - middle, ids

    about = {"dtype": str(model.model.norm.weight.dtype), "device": str(mx.default_device())}
    return answer, {**about, "version": version("mlx-lm")}


def prompt_ids(vocabulary: int, count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, min(vocabulary, 1000), count).tolist()


def serve(side: str, folder: Path, prompt_tokens: int, tokens: int) -> None:
    """Answers each line on stdin with a line of JSON."""
    loaders: Mapping[str, Callable[[Path, int], tuple[Answer, dict[str, Any]]]] = {"ours": ours, "mlx_lm": mlx_lm}
    answer, about = loaders[side](folder, prompt_tokens)
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        prefill, decoding, ids = answer(tokens)
        found = {"prefill_ms": 1000 * prefill, "decode_tps": (len(ids) - 1) / decoding, "ids": ids}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
