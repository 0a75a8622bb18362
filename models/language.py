"""The language side of FastVLM in MLX: projector and decoder, under the names that an exported folder saves them by."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ._mlx import mx, nn, on_cpu
from .checkpoint import check_tensors
from .config import FastVLMConfig
from .errors import WeightsError
from .mlx_cpu import dequantize
from .mlx_layers import join_projections
from .quantization import Quantization
from .qwen2 import Qwen2
from .safetensors_files import Shape
from .tensor_names import language_shapes, saved_name

EMBEDDING = "language_model.model.embed_tokens"
HEAD = "language_model.lm_head"

FLOAT_DTYPES = (mx.bfloat16, mx.float16, mx.float32)

MAX_STREAMS = 8

_expanding = threading.Lock()
"""The streams below serve any thread, but one at a time."""

MEMORY_SHARE = 0.8
"""Of the available memory that expanded weights may take: caches, activations and the vision encoder need the rest."""


class Projector(nn.Module):
    """`image_features` (B, N, mm_hidden_size) -> (B, N, hidden_size): two linear layers around an exact GELU."""

    def __init__(self, config: FastVLMConfig) -> None:
        super().__init__()
        self.linear_0 = nn.Linear(config.mm_hidden_size, config.decoder.hidden_size)
        self.linear_2 = nn.Linear(config.decoder.hidden_size, config.decoder.hidden_size)

    def __call__(self, image_features: mx.array) -> mx.array:
        x = self.linear_0(image_features.astype(self.linear_0.bias.dtype))
        x = 0.5 * x * (1.0 + mx.erf(x * 0.5**0.5))  # not nn.gelu: see mlx_layers.swiglu
        return self.linear_2(x)


class LanguageSide(nn.Module):
    """Projector and decoder."""

    def __init__(self, config: FastVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = Qwen2(config.decoder)
        self.multi_modal_projector = Projector(config)

    @property
    def vocabulary_rows(self) -> int:
        """Ids that can be embedded: the rows of `embed_tokens`, which need not be `vocab_size`."""
        return self.language_model.model.embed_tokens.weight.shape[0]


def expected_shapes(config: FastVLMConfig) -> dict[str, Shape]:
    """Shape by saved name of every tensor on the language side, unquantized."""
    return {saved_name(name): shape for name, shape in language_shapes(config).items()}


def load_language(
    weights: Mapping[str, mx.array],
    config: FastVLMConfig,
    *,
    quantization: Quantization | None = None,
    expand: bool | None = None,
) -> LanguageSide:
    """The language side with `weights` (saved names), ready to run.

    A layer with `.scales` is affine-quantized as `quantization` says. `expand` turns every weight into
    float32; None does so where MLX computes on the CPU, whose quantized and 16-bit kernels are naive, if there is
    memory for it. Pass `mx.load(...)` without keeping it: each tensor is then read, expanded and freed in turn.

    Raises:
        WeightsError: tensors are missing, unexpected or misshapen, all of them named.
    """
    weights = dict(weights)
    config = settled_config(weights, config, quantization)
    if expand is None:
        float32_bytes = 4 * sum(math.prod(shape) for shape in expected_shapes(config).values())
        expand = on_cpu() and float32_bytes < MEMORY_SHARE * available_memory_bytes()
    side = LanguageSide(config)
    if expand:
        with _expanding:
            loaded = list(_expanded(weights, quantization))
    else:
        if quantization is not None:
            quantized = {name: quantization.of(name).as_dict() for name in quantized_layers(weights)}
            nn.quantize(side, class_predicate=lambda path, _: quantized.get(path, False))
        loaded = list(weights.items())
    side.load_weights(loaded, strict=False)  # strictness was above, in our words
    if not on_cpu():
        weights.clear()
        loaded.clear()  # each block's tensors are freed as soon as they are joined
        join_projections(side.language_model)
    mx.eval(side.parameters())
    return side


def settled_config(
    weights: dict[str, mx.array], config: FastVLMConfig, quantization: Quantization | None
) -> FastVLMConfig:
    """`config` with what the weights decide: whether the head is tied, how many rows the embeddings have.

    A head that only repeats the embeddings is taken out of `weights`.

    Raises:
        WeightsError: tensors are missing, unexpected, misshapen or of a wrong dtype, all of them named.
    """
    config = _settle_head(weights, config)
    quantized = quantized_layers(weights)
    _check_quantization(quantized, quantization)
    expected = _with_rows_found(expected_shapes(config), weights)
    rows = expected[f"{EMBEDDING}.weight"][0]
    if quantization is not None:
        expected = quantized_shapes(expected, quantized, quantization)
    check_tensors(expected, {name: weight.shape for name, weight in weights.items()}, "language side")
    _check_dtypes(weights, quantized)
    return replace(config, decoder=replace(config.decoder, vocab_size=rows))


def quantized_layers(weights: Mapping[str, mx.array]) -> set[str]:
    """Names of the layers that are stored in affine groups: those with `.scales`."""
    return {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}


def available_memory_bytes() -> int:
    """Memory that can be had without swapping: the machine's or the container's, whichever is less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux: all that is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (ceiling := limit.read_text().strip()) != "max":
        available = min(available, int(ceiling) - int(used.read_text()))
    return available


def _settle_head(weights: dict[str, mx.array], config: FastVLMConfig) -> FastVLMConfig:
    """`tie_word_embeddings` is sometimes wrong: the weights decide. Drops a head that only repeats the embeddings."""
    head = [name for name in weights if name.startswith(f"{HEAD}.")]
    if not config.decoder.tie_word_embeddings:
        return config
    repeats = all(_equal(weights[name], weights.get(name.replace(HEAD, EMBEDDING))) for name in head)
    for name in head if repeats else ():
        del weights[name]
    return config.with_tied_embeddings(repeats)


def _equal(left: mx.array, right: mx.array | None) -> bool:
    return right is not None and left.dtype == right.dtype and bool(mx.array_equal(left, right))


def _check_quantization(quantized: set[str], quantization: Quantization | None) -> None:
    if quantization is None:
        if quantized:
            raise WeightsError(
                f"{len(quantized)} layers are quantized (they have .scales), but config.json names no 'quantization'"
            )
        return
    unknown = sorted(quantization.layers.keys() - quantized)
    if unknown:
        raise WeightsError(
            f"config.json names a quantization for {unknown[0]} and {len(unknown) - 1} more layers without .scales"
        )


def _check_dtypes(weights: Mapping[str, mx.array], quantized: set[str]) -> None:
    for name, weight in weights.items():
        packed = name.endswith(".weight") and name.removesuffix(".weight") in quantized
        if weight.dtype not in ((mx.uint32,) if packed else FLOAT_DTYPES):
            wanted = "packed uint32" if packed else "bfloat16, float16 or float32"
            raise WeightsError(f"{name} holds {str(weight.dtype).removeprefix('mlx.core.')}; it should hold {wanted}")


def _with_rows_found(expected: dict[str, Shape], weights: Mapping[str, mx.array]) -> dict[str, Shape]:
    """Vocabularies are padded and cut at will: embeddings and head may have other rows than `vocab_size`."""
    for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
        if name in expected and name in weights and weights[name].ndim == 2:
            expected[name] = (weights[name].shape[0], expected[name][1])
    return expected


def quantized_shapes(
    expected: Mapping[str, Shape], quantized: set[str], quantization: Quantization
) -> dict[str, Shape]:
    """`expected` with each quantized layer's weight packed into 32-bit words, and its scales and biases."""
    shapes: dict[str, Shape] = {}
    for name, shape in expected.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in quantized:
            shapes[name] = shape
            continue
        (rows, columns), affine = shape, quantization.of(layer)
        shapes[name] = (rows, columns * affine.bits // 32)
        shapes[f"{layer}.scales"] = shapes[f"{layer}.biases"] = (rows, columns // affine.group_size)
    return shapes


def _expanded(weights: dict[str, mx.array], quantization: Quantization | None) -> Iterator[tuple[str, mx.array]]:
    """(name, float32 tensor), taken out of `weights` a few at a time, so that their sources are freed at once.

    Tensors of like sizes share a turn, the largest first.
    """
    streams = _cpu_streams()
    names = [name for name in weights if not name.endswith((".scales", ".biases"))]
    names.sort(key=lambda name: -weights[name].size)
    for start in range(0, len(names), len(streams)):
        turn = names[start : start + len(streams)]
        tensors = [
            dequantized(weights, name, quantization, stream) for name, stream in zip(turn, streams, strict=False)
        ]
        mx.eval(tensors)
        yield from zip(turn, tensors, strict=True)


@functools.cache
def _cpu_streams() -> tuple[Any, ...]:
    """Streams, behind each of which is a thread on the CPU that MLX never ends: they serve every load.

    Where MLX is older, all streams serve any thread.
    """
    new_stream = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
    return tuple(new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, MAX_STREAMS)))


def dequantized(
    weights: dict[str, mx.array], name: str, quantization: Quantization | None, stream: Any = None
) -> mx.array:
    """The tensor `name` in float32, taken out of `weights` with the scales and biases that belong to it."""
    weight, layer = weights.pop(name), name.removesuffix(".weight")
    scales, biases = (weights.pop(f"{layer}.{part}", None) for part in ("scales", "biases"))
    if scales is None or biases is None or quantization is None:
        return weight.astype(mx.float32, stream=stream)
    scales, biases = (part.astype(mx.float32, stream=stream) for part in (scales, biases))
    return dequantize(weight, scales, biases, quantization.of(layer), stream)
