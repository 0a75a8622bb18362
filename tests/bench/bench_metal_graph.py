"""A decode step in the form for a GPU, measured without one: the operations of its graph, and the host's time.

    python tests/bench/bench_metal_graph.py [--layers N] [--runs N]

Both sides have the same Qwen2 (the 0.5B's dimensions, 8 bits, random weights) and their own decoding loops: `decode`,
and mlx-lm's `generate_step` as the baseline. Their arguments of `mx.async_eval` are counted and never computed. MLX's
CPU device builds RMS norm, rotary positions and attention from small operations. In "fused" each is one operation, as
on Metal. In "written_out" they are those of the CPU. Times are the CPU time of the thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.nn as nn

from fastvlm.models import _mlx
from fastvlm.models.config import Qwen2Config
from fastvlm.models.mlx_layers import join_projections
from fastvlm.models.qwen2 import Qwen2
from fastvlm.runtime.generate import decode
from fastvlm.runtime.sampling import Sampler, SamplingOptions

mx = _mlx.mx

POSITIONS = 285
"""The positions in the cache before the step: 256 image tokens of 1024 px, and a short question."""

CAPACITY = 512
"""The positions that the caches have space for."""

Steps = Callable[[], Iterator[Any]]
"""A function that begins an answer. Every `next` launches at least one more step."""


class LaunchedError(Exception):
    """An exception that ends a loop at its `mx.async_eval`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=100)
    arguments = parser.parse_args()
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=arguments.layers, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=2048, rope_theta=1e6, tie_word_embeddings=True,
    )  # fmt: skip
    sys.setrecursionlimit(10_000)
    _mlx._cpu = False  # the branches of a GPU
    sides = {"ours": our_steps(config), "mlx_lm": their_steps(config)}
    figures = {}
    for form, patched in (("fused", fused_functions), ("written_out", contextlib.nullcontext)):
        with patched():
            figures[form] = compared(sides, arguments.runs)
    print(json.dumps(figures, indent=2))


def compared(sides: dict[str, Steps], runs: int) -> dict[str, Any]:
    """Returns operations and host milliseconds by side, and their ratios to mlx-lm's."""
    counts = {side: Counter(operations(begin)) for side, begin in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, begin in sides.items():
            times[side].append(1000 * second_launch_s(begin))
    found: dict[str, Any] = {
        side: {
            "operations": counts[side].total(),
            "quantized_products": counts[side]["QuantizedMatmul"],
            "host_ms": statistics.median(times[side]),
            "host_ms_least": min(times[side]),
        }
        for side in sides
    }
    found["ours_of_mlx_lm"] = {name: found["ours"][name] / found["mlx_lm"][name] for name in found["ours"]}
    return found


def our_steps(config: Qwen2Config) -> Steps:
    decoder = Qwen2(config)
    quantized(decoder)
    join_projections(decoder)
    held = keys_and_values(config)

    def begin() -> Iterator[Any]:
        cache = decoder.make_cache(CAPACITY)
        for layer in cache:
            layer.buffers, layer.offset = [held[:], held[:]], POSITIONS
        return decode(decoder, mx.array([1]), cache, Sampler(SamplingOptions()), 9, lookahead=1)

    return begin


def their_steps(config: Qwen2Config) -> Steps:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.qwen2 import Model, ModelArgs

    model = Model(ModelArgs(model_type="qwen2", **vars(config)))
    quantized(model)
    held = keys_and_values(config)

    def begin() -> Iterator[Any]:
        cache = make_prompt_cache(model)
        for layer in cache:
            layer.keys, layer.values, layer.offset = held[:], held[:], POSITIONS
        return generate_step(mx.array([1]), model, max_tokens=9, prompt_cache=cache)

    return begin


def quantized(model: nn.Module) -> None:
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=64, bits=8)
    mx.eval(model.parameters())


def keys_and_values(config: Qwen2Config) -> Any:
    held = mx.zeros((1, config.num_key_value_heads, CAPACITY, config.head_dim), mx.float16)
    mx.eval(held)
    return held


def operations(begin: Steps) -> Iterator[str]:
    """Yields the name of every operation that the first launch of an answer would compute."""
    outputs: list[Any] = []

    def launch(*arrays: Any) -> None:
        outputs.extend(arrays)
        raise LaunchedError

    with mock.patch.object(mx, "async_eval", launch), contextlib.suppress(LaunchedError):
        next(begin())
    text = io.StringIO()
    mx.export_to_dot(text, *(array for array in outputs if isinstance(array, mx.array)))
    yield from re.findall(r'label ?="([^"]*)"', text.getvalue())


def second_launch_s(begin: Steps) -> float:
    """Returns the host's CPU seconds between the first and the second launch of an answer, without computation."""
    times: list[float] = []

    def launch(*_: Any) -> None:
        times.append(time.thread_time())
        if len(times) == 2:
            raise LaunchedError

    with mock.patch.object(mx, "async_eval", launch), contextlib.suppress(LaunchedError):
        next(begin())
    return times[1] - times[0]


@contextlib.contextmanager
def fused_functions() -> Iterator[None]:
    """Replaces each function that is one kernel on Metal by one operation, whose result is meaningless."""

    def attention(queries: Any, keys: Any, values: Any, *, scale: float, mask: Any = None, sinks: Any = None) -> Any:
        return mx.depends([queries], [keys, values])[0]

    stand_ins = {
        "rms_norm": lambda x, weight, eps: mx.stop_gradient(x),
        "rope": lambda x, *_, **__: mx.stop_gradient(x),
        "scaled_dot_product_attention": attention,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(mx.fast, name, stand_in))
        yield


if __name__ == "__main__":
    main()
