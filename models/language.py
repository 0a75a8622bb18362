"""The language side of FastVLM in MLX: projector and decoder, with the tensor names of an exported folder."""

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
"""The most threads that expand weights, one per stream."""

_expanding = threading.Lock()
"""The lock of the streams below, which serve any thread, one at a time."""

MEMORY_SHARE = 0.8
"""The share of available memory for expanded weights. Caches, activations and the vision encoder need the rest."""


class Projector(nn.Module):
    """The projector from `image_features` to embeddings: two linear layers around an exact GELU."""

    def __init__(self, config: FastVLMConfig) -> None:
        super().__init__()
        self.linear_0 = nn.Linear(config.mm_hidden_size, config.decoder.hidden_size)
        self.linear_2 = nn.Linear(config.decoder.hidden_size, config.decoder.hidden_size)

    def __call__(self, image_features: mx.array) -> mx.array:
        """Returns (B, N, hidden_size) of (B, N, mm_hidden_size), in the dtype of the weights.

        It computes in float32: single features of fine-tuned towers exceed float16, which ends at 65,504.
        """
        x = self.linear_0(image_features.astype(mx.float32))
        x = 0.5 * x * (1.0 + mx.erf(x * 0.5**0.5))  # not nn.gelu: see mlx_layers.swiglu
        return self.linear_2(x).astype(self.linear_2.bias.dtype)


class LanguageSide(nn.Module):
    """The projector and the decoder."""

    def __init__(self, config: FastVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = Qwen2(config.decoder)
        self.multi_modal_projector = Projector(config)

    @property
    def vocabulary_rows(self) -> int:
        """The number of ids with an embedding: the rows of `embed_tokens`, which may differ from `vocab_size`."""
        return self.language_model.model.embed_tokens.weight.shape[0]


def expected_shapes(config: FastVLMConfig) -> dict[str, Shape]:
    """Returns the shape of every unquantized tensor of the language side by its saved name."""
    return {saved_name(name): shape for name, shape in language_shapes(config).items()}


def load_language(
    weights: Mapping[str, mx.array],
    config: FastVLMConfig,
    *,
    quantization: Quantization | None = None,
    expand: bool | None = None,
) -> LanguageSide:
    """Returns the language side with `weights` by saved name, ready to run.

    A layer with `.scales` is affine-quantized with the parameters in `quantization`. `expand` converts every weight to
    float32. None does so if MLX computes on the CPU, whose quantized and 16-bit kernels are naive, and memory suffices.
    Pass `mx.load(...)` without another reference: each tensor is then read, expanded and freed in turn.

    Raises:
        WeightsError: tensors are missing, unexpected or of a wrong shape. All are listed.
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
    side.load_weights(loaded, strict=False)  # `settled_config` has checked the names
    if not on_cpu():
        weights.clear()
        loaded.clear()  # each block's tensors are freed as soon as they are joined
        join_projections(side.language_model)
    mx.eval(side.parameters())
    return side


def settled_config(
    weights: dict[str, mx.array], config: FastVLMConfig, quantization: Quantization | None
) -> FastVLMConfig:
    """Returns `config` with the fields that the weights determine: a tied head, and the rows of the embeddings.

    Removes a head that only repeats the embeddings from `weights`.

    Raises:
        WeightsError: tensors are missing, unexpected, of a wrong shape or dtype. All are listed.
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
    """Returns the names of the layers in affine groups: those with `.scales`."""
    return {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}


def available_memory_bytes() -> int:
    """Returns the memory that is available without swapping, of the machine or its container, whichever is less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux: the installed memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (ceiling := limit.read_text().strip()) != "max":
        available = min(available, int(ceiling) - int(used.read_text()))
    return available


def _settle_head(weights: dict[str, mx.array], config: FastVLMConfig) -> FastVLMConfig:
    """Corrects `tie_word_embeddings` by the weights. Removes a head that only repeats the embeddings."""
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
                f"config.json: 'quantization' is missing, but {len(quantized)} layers are quantized (they have .scales)"
            )
        return
    unknown = sorted(quantization.layers.keys() - quantized)
    if unknown:
        raise WeightsError(
            f"config.json: 'quantization' lists {unknown[0]} and {len(unknown) - 1} more layers without .scales"
        )


def _check_dtypes(weights: Mapping[str, mx.array], quantized: set[str]) -> None:
    for name, weight in weights.items():
        packed = name.endswith(".weight") and name.removesuffix(".weight") in quantized
        if weight.dtype not in ((mx.uint32,) if packed else FLOAT_DTYPES):
            wanted = "packed uint32" if packed else "bfloat16, float16 or float32"
            raise WeightsError(f"{name} must be {wanted}, got {str(weight.dtype).removeprefix('mlx.core.')}")


def _with_rows_found(expected: dict[str, Shape], weights: Mapping[str, mx.array]) -> dict[str, Shape]:
    """Takes the rows of embeddings and head from the weights, since vocabularies are often padded or cut."""
    for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
        if name in expected and name in weights and weights[name].ndim == 2:
            expected[name] = (weights[name].shape[0], expected[name][1])
    return expected


def quantized_shapes(
    expected: Mapping[str, Shape], quantized: set[str], quantization: Quantization
) -> dict[str, Shape]:
    """Returns `expected` with the packed weight, scales and biases of each quantized layer."""
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
    """Yields (name, float32 tensor). Removes a few at a time from `weights`, which frees their sources at once.

    Tensors of similar sizes are expanded together, the largest first.
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
    """Returns the CPU streams for every load. MLX never ends the thread of a stream.

    In older versions of MLX all streams serve any thread.
    """
    new_stream = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
    return tuple(new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, MAX_STREAMS)))


def dequantized(
    weights: dict[str, mx.array], name: str, quantization: Quantization | None, stream: Any = None
) -> mx.array:
    """Returns the tensor `name` in float32. Removes it from `weights`, with its scales and biases."""
    weight, layer = weights.pop(name), name.removesuffix(".weight")
    scales, biases = (weights.pop(f"{layer}.{part}", None) for part in ("scales", "biases"))
    if scales is None or biases is None or quantization is None:
        return weight.astype(mx.float32, stream=stream)
    scales, biases = (part.astype(mx.float32, stream=stream) for part in (scales, biases))
    return dequantize(weight, scales, biases, quantization.of(layer), stream)
