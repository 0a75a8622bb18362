"""The exported decoder and projector compared with the checkpoint's: logits, greedy answers, and weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models._mlx import mx
from ..models.checkpoint import Checkpoint
from ..models.config import FastVLMConfig
from ..models.errors import ModelFolderError, VerificationError
from ..models.files import read_json_object
from ..models.folder_layout import CONFIG_NAME, saved_weights
from ..models.kv_cache import KVCache
from ..models.language import load_language, quantized_layers, settled_config
from ..models.layerwise import (
    LayerwiseDecoder,
    LayerwiseRun,
    Probe,
    Prompt,
    checkpoint_reader,
    named_parameters,
    run_layerwise,
    saved_reader,
)
from ..quant.metrics import Agreement, WeightAudit, compare, kl_divergence
from ..quant.prompts import probe_prompt

CONTINUATION_TOKENS = 16
"""The most tokens of the greedy answer, which is compared token by token."""

MAX_RESIDENT_BYTES = 5e9
"""The most bytes of weights for a greedy answer, which keeps them in memory."""


@dataclass(frozen=True)
class DecoderVerification:
    """The agreement of an exported decoder with the checkpoint's."""

    logits: Agreement
    """The agreement at every position after the image: the rest of the prompt, and the greedy answer."""
    kl: float
    """The KL divergence between the distributions over the next token there, in nats."""
    greedy_tokens: int
    """The length of that answer."""
    greedy_same: float | None
    """The share of its ids that are also the checkpoint's likeliest, after the same answer so far."""
    greedy_prefix: int
    """The number of ids before the first difference."""
    largest: float
    """The largest magnitude inside. A GPU computes it in float16."""
    largest_layer: int
    fewest_bits: int
    weights: WeightAudit

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's figures of the logits."""
        return {
            **self.logits.as_dict(),
            "kl": round(self.kl, 6),
            "greedy_tokens": self.greedy_tokens,
            "greedy_same": None if self.greedy_same is None else round(self.greedy_same, 6),
            "greedy_prefix": self.greedy_prefix,
            "largest_activation": round(self.largest, 3),
        }


def verify_decoder(folder: Path, checkpoint: Checkpoint, image_features: np.ndarray) -> DecoderVerification:
    """Runs the exported and the checkpoint's decoder and projector, in float32, on a question about an image.

    Args:
        image_features: (1, N, C).

    Raises:
        VerificationError: weights or logits are not finite, or the folder has a decoder of other dimensions.
    """
    config = FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME, ModelFolderError))
    weights = saved_weights(folder)
    config = settled_config(weights, config, config.quantization)
    _check_dimensions(config, checkpoint.config)
    rows = min(config.decoder.vocab_size, checkpoint.config.decoder.vocab_size)
    prompt = probe_prompt((folder / "tokenizer.json").read_bytes(), image_features, rows)
    answer = greedy_answer(weights, config, prompt)
    asked, audit, bits = prompt.continued(answer[:-1]), WeightAudit(), layer_bits(weights, config)
    original, saved = run_both(
        LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config),
        LayerwiseDecoder(saved_reader(weights, config), config),
        asked,
        audit,
        bits,
    )
    agreement = compare(original.logits, saved.logits, "logits")
    same = original.logits[-len(answer) :].argmax(-1) == np.array(answer) if answer else np.empty(0, bool)
    return DecoderVerification(
        logits=agreement,
        kl=kl_divergence(original.logits, saved.logits),
        greedy_tokens=len(answer),
        greedy_same=float(same.mean()) if answer else None,
        greedy_prefix=len(answer) if same.all() else int(same.argmin()),
        largest=saved.largest,
        largest_layer=saved.largest_layer,
        fewest_bits=min(bits.values(), default=16),
        weights=audit,
    )


def greedy_answer(weights: Mapping[str, mx.array], config: FastVLMConfig, prompt: Prompt) -> list[int]:
    """Returns the ids of the exported decoder's greedy answer, up to its end or `CONTINUATION_TOKENS`.

    The prompt is computed layer by layer with weights expanded to float32, single tokens with the stored weights. The
    answer is empty if the weights have more than `MAX_RESIDENT_BYTES`.
    """
    if sum(array.nbytes for array in weights.values()) > MAX_RESIDENT_BYTES:
        return []
    caches = [KVCache() for _ in range(config.decoder.num_hidden_layers)]
    probe = run_layerwise(LayerwiseDecoder(saved_reader(dict(weights), config), config), prompt, caches)
    side = load_language(weights, config, quantization=config.quantization, expand=False)
    decoder, answer = side.language_model, [int(probe.logits[-1].argmax())]
    while len(answer) < CONTINUATION_TOKENS and answer[-1] not in config.eos_token_ids:
        logits = decoder(decoder.embed(mx.array([answer[-1:]])).astype(mx.float32), caches)  # (1, 1, vocabulary)
        answer.append(int(np.array(logits[0, -1]).argmax()))
    return answer


def run_both(
    original: LayerwiseDecoder, saved: LayerwiseDecoder, prompt: Prompt, audit: WeightAudit, bits: Mapping[str, int]
) -> tuple[Probe, Probe]:
    """Runs both, and compares each weight when it is read. `bits` is by saved layer name, and 16 for other layers."""
    runs = LayerwiseRun(original, prompt), LayerwiseRun(saved, prompt)
    for (name, expected), (_, found) in zip(*(run.parts() for run in runs), strict=True):
        if isinstance(expected, mx.array):
            _add(audit, name, expected, found, bits)
            continue
        tensors = named_parameters(found)
        for own, tensor in named_parameters(expected).items():
            _add(audit, f"{name}.{own}", tensor, tensors[own], bits)
    first, second = (run.probe for run in runs)
    assert first is not None and second is not None
    return first, second


def layer_bits(weights: Mapping[str, mx.array], config: FastVLMConfig) -> dict[str, int]:
    """Returns the bits of each quantized layer, by its saved name."""
    if config.quantization is None:
        return {}
    return {layer: config.quantization.of(layer).bits for layer in quantized_layers(weights)}


def _add(audit: WeightAudit, name: str, expected: mx.array, found: mx.array, bits: Mapping[str, int]) -> None:
    stored = bits.get(name.removesuffix(".weight"), 16)
    if stored == 16:
        expected = expected.astype(mx.float16)
    audit.add(name, np.array(expected, copy=False), np.array(found, copy=False), stored)


def _check_dimensions(saved: FastVLMConfig, expected: FastVLMConfig) -> None:
    """Raises VerificationError if the folder cannot come from the checkpoint."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    pairs = [(name, getattr(saved.decoder, name), getattr(expected.decoder, name)) for name in names]
    pairs += [(name, getattr(saved, name), getattr(expected, name)) for name in ("mm_hidden_size",)]
    pairs += [("tie_word_embeddings", saved.decoder.tie_word_embeddings, expected.decoder.tie_word_embeddings)]
    for name, found, wanted in pairs:
        if found != wanted:
            raise VerificationError(
                f"the folder is another model's export ({name} is {found}, but {wanted} in the checkpoint). Pass the "
                "checkpoint that it was exported from."
            )
