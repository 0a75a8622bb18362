"""Prefill and decoding of one decoder in a separate process, timed on demand, to alternate between two decoders.

    python tests/bench/decoders.py ours|transformers FOLDER

Reads `prefill` or `decode` line by line and prints the seconds of each. In one process the two thread pools would
slow each other down, by half on few cores.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS = 285
"""256 image tokens of 1024 px, and a short question."""

DECODED_TOKENS = 8
STAGES = ("prefill", "decode")
SIDES = ("ours", "transformers")


def in_turns(folder: Path, runs: int) -> dict[str, dict[str, float]]:
    """Returns the median seconds of each stage by side, after one warm-up. A side that is not installed is left out."""
    processes = {side: started(side, folder) for side in SIDES}
    present = {side: process for side, process in processes.items() if ready(process)}
    times: dict[str, dict[str, list[float]]] = {side: {stage: [] for stage in STAGES} for side in present}
    for turn in range(runs + 1):
        for side, process in present.items():
            for stage in STAGES:
                seconds = asked(process, stage)
                if turn:
                    times[side][stage].append(seconds)
    for process in processes.values():
        process.communicate()
    return {side: {stage: statistics.median(found) for stage, found in of.items()} for side, of in times.items()}


def started(side: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, side, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> bool:
    """Returns False if the library is not installed. Raises RuntimeError if the process fails otherwise."""
    state = answer(process)
    if state not in ("ready", "missing"):
        raise RuntimeError(f"{process.args} ended with {process.wait()}")
    return state == "ready"


def asked(process: subprocess.Popen[str], stage: str) -> float:
    assert process.stdin is not None
    process.stdin.write(stage + "\n")
    process.stdin.flush()
    return float(answer(process))


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ours(folder: Path) -> Mapping[str, Callable[[], Any]]:
    import fastvlm
    from fastvlm.models._mlx import mx
    from fastvlm.runtime.generate import decode, prefill
    from fastvlm.runtime.sampling import Sampler, SamplingOptions

    decoder = fastvlm.load(folder).engine.language.language_model
    embeds = mx.array(prompt(decoder.config.hidden_size))
    state: dict[str, Any] = {}

    def read() -> None:
        state["cache"] = decoder.make_cache(PROMPT_TOKENS + DECODED_TOKENS)
        mx.eval(prefill(decoder, embeds, state["cache"]))

    def answer_on() -> None:
        list(decode(decoder, mx.array([1]), state["cache"], Sampler(SamplingOptions()), DECODED_TOKENS))

    return {"prefill": read, "decode": answer_on}


def transformers(folder: Path) -> Mapping[str, Callable[[], Any]]:
    """A Qwen2 of the same size in torch, float32, random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from fastvlm.runtime.folder import open_folder

    torch.set_grad_enabled(False)
    config = open_folder(folder).config.decoder
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "tie_word_embeddings")  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**{field: getattr(config, field) for field in fields})).eval()
    embeds = torch.from_numpy(prompt(config.hidden_size))
    state: dict[str, Any] = {}

    def read() -> None:
        state["cache"] = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values

    def answer_on() -> None:
        token = torch.tensor([[1]])
        for _ in range(DECODED_TOKENS):
            token = model(input_ids=token, past_key_values=state["cache"], use_cache=True).logits[:, -1:].argmax(-1)

    return {"prefill": read, "decode": answer_on}


def prompt(hidden_size: int) -> np.ndarray:
    """Returns a prompt (1, 285, D), float32, of about the magnitude of embeddings."""
    drawn = np.random.default_rng(0).standard_normal((1, PROMPT_TOKENS, hidden_size))
    return (0.05 * drawn).astype(np.float32)


def serve(side: str, folder: Path) -> None:
    try:
        stages = {"ours": ours, "transformers": transformers}[side](folder)
    except ImportError as missing:
        print(missing, file=sys.stderr)
        print("missing", flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        stages[line.strip()]()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
