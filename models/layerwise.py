"""The layer-by-layer run of the language side, which reads the weights of one layer at a time.

It takes the memory of one layer and the embedding table. Exports of any size can thus be quantized, and compared with
their checkpoint, on any machine. `load_language` takes the memory of the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ._mlx import mx, nn
from .checkpoint import Checkpoint
from .config import FastVLMConfig
from .kv_cache import KVCache
from .language import EMBEDDING, HEAD, Projector, dequantized
from .qwen2 import Block
from .tensor_names import language_shapes, saved_name

M = TypeVar("M", bound=nn.Module)

ReadTensor = Callable[[str], mx.array]
"""A function from a tensor's saved name to its values, float32, not quantized."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with one image: its features, and the token ids before and after them."""

    before: Sequence[int]
    image_features: np.ndarray
    """(1, N, C), float32."""
    after: Sequence[int]

    def continued(self, token_ids: Sequence[int]) -> Prompt:
        """Returns the prompt with more token ids at its end."""
        return Prompt(self.before, self.image_features, [*self.after, *token_ids])


def checkpoint_reader(checkpoint: Checkpoint) -> ReadTensor:
    """Returns the reader of a source checkpoint."""
    apple_names = {saved_name(name): name for name in language_shapes(checkpoint.config)}
    return lambda name: mx.array(checkpoint.read(apple_names[name], "mlx")).astype(mx.float32)


def saved_reader(weights: dict[str, mx.array], config: FastVLMConfig) -> ReadTensor:
    """Returns the reader of an exported folder's weights. It removes each tensor from `weights`, to free it early."""
    return lambda name: dequantized(weights, name, config.quantization)


class LayerwiseDecoder:
    """A projector and decoder that read their parts on demand. Use each part once, in the order of the methods."""

    def __init__(self, read: ReadTensor, config: FastVLMConfig) -> None:
        self.read = read
        self.config = config
        self._table: mx.array | None = None

    def projector(self) -> Projector:
        """Reads the projector."""
        return self._loaded(Projector(self.config), "multi_modal_projector.")

    def table(self) -> mx.array:
        """Reads the embedding table (rows, D), and keeps it for a tied head."""
        table = self.read(f"{EMBEDDING}.weight")
        if self.config.decoder.tie_word_embeddings:
            self._table = table
        return table

    def blocks(self) -> Iterator[Block]:
        """Reads and yields the blocks in turn."""
        decoder = self.config.decoder
        for index in range(decoder.num_hidden_layers):
            yield self._loaded(Block(decoder), f"{layer_prefix(index)}.")

    def norm(self) -> nn.RMSNorm:
        """Reads the final norm."""
        decoder = self.config.decoder
        return self._loaded(nn.RMSNorm(decoder.hidden_size, decoder.rms_norm_eps), "language_model.model.norm.")

    def head(self) -> mx.array:
        """Reads the matrix (rows, D) of the head."""
        return self._table if self._table is not None else self.read(f"{HEAD}.weight")

    def _loaded(self, module: M, prefix: str) -> M:
        """Returns `module` with its weights, whose saved names begin with `prefix`."""
        module.load_weights([(name, self.read(prefix + name)) for name in named_parameters(module)])
        return module


def named_parameters(module: nn.Module) -> dict[str, mx.array]:
    """Returns every tensor of a module by its name in the module."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(module.parameters()))


def layer_prefix(index: int) -> str:
    """Returns the prefix of a block's saved names."""
    return f"language_model.model.layers.{index}"


class _Recorder(nn.Module):
    """A wrapper around a layer that keeps its last input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.inputs = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs = x
        return self.layer(x)


@contextlib.contextmanager
def recorded_inputs(block: Block, names: Sequence[str]) -> Iterator[dict[str, mx.array]]:
    """Records the inputs (B, L, width) of the block's layers `names`, such as `mlp.down_proj`.

    Call the block once inside the `with`. The dictionary has the inputs afterwards.
    """
    inputs: dict[str, mx.array] = {}
    places = [(getattr(block, name.split(".")[0]), name.split(".")[1]) for name in names]
    recorders = [_Recorder(getattr(module, own)) for module, own in places]
    for (module, own), recorder in zip(places, recorders, strict=True):
        setattr(module, own, recorder)
    try:
        yield inputs
    finally:
        for (module, own), recorder in zip(places, recorders, strict=True):
            setattr(module, own, recorder.layer)
    inputs.update((name, recorder.inputs) for name, recorder in zip(names, recorders, strict=True))


def embedded(prompt: Prompt, projector: Projector, table: mx.array) -> mx.array:
    """Returns the decoder's input (1, L, D) for the prompt."""
    image = projector(mx.array(prompt.image_features))  # (1, N, D)
    texts = (table[mx.array([list(ids)], mx.int32)] for ids in (prompt.before, prompt.after))  # (1, L, D) each
    before, after = texts
    x = mx.concatenate([before, image, after], axis=1)  # (1, L, D)
    mx.eval(x)
    return x


@dataclass(frozen=True)
class Probe:
    """The logits and magnitudes of a decoder for a prompt."""

    logits: np.ndarray
    """The logits at the positions after the image, (positions, vocabulary), float32."""
    largest: float
    """The largest magnitude in the residual stream or in the input of a down projection."""
    largest_layer: int
    """The index of the layer with the largest magnitude."""


class LayerwiseRun:
    """A run of a prompt through a decoder, one part after the other."""

    def __init__(self, decoder: LayerwiseDecoder, prompt: Prompt, caches: Sequence[KVCache] | None = None) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._caches = caches or [KVCache() for _ in range(decoder.config.decoder.num_hidden_layers)]
        self.probe: Probe | None = None
        """The result after the last part."""

    def parts(self) -> Iterator[tuple[str, nn.Module | mx.array]]:
        """Runs the prompt, and yields each part with the prefix of its saved names as soon as it is read.

        Two runs in lockstep can be compared part by part in the memory of two parts.
        """
        projector = self._decoder.projector()
        yield "multi_modal_projector", projector
        table = self._decoder.table()
        yield f"{EMBEDDING}.weight", table
        x = embedded(self._prompt, projector, table)  # (1, L, D)
        del projector, table
        magnitudes: list[float] = []
        for index, block in enumerate(self._decoder.blocks()):
            yield layer_prefix(index), block
            with recorded_inputs(block, ["mlp.down_proj"]) as inputs:
                x = block(x, "causal", self._caches[index])
            hidden = inputs["mlp.down_proj"]
            magnitudes.append(float(np.array(mx.maximum(mx.abs(hidden).max(), mx.abs(x).max()))))
        norm = self._decoder.norm()
        yield "language_model.model.norm", norm
        head = self._decoder.head()
        if not self._decoder.config.decoder.tie_word_embeddings:
            yield f"{HEAD}.weight", head
        logits = norm(x[0, -len(self._prompt.after) :]) @ head.T
        largest = int(np.argmax(magnitudes))
        self.probe = Probe(np.array(logits), magnitudes[largest], largest)


def run_layerwise(decoder: LayerwiseDecoder, prompt: Prompt, caches: Sequence[KVCache] | None = None) -> Probe:
    """Returns the decoder's result in float32. `caches`, one per layer, keep keys and values for a continuation."""
    run = LayerwiseRun(decoder, prompt, caches)
    for _ in run.parts():
        pass
    assert run.probe is not None
    return run.probe
