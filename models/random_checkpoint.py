"""Checkpoints of true size with seeded random weights, such as `random:0.5b`, and a tokenizer for them.

They serve measurements before a download. The encoders have the ranges of the published ones (`random_encoder`), so
that float16 and few bits meet the same difficulties. Decoders and `tiny` have Gaussian weights with non-trivial norms
and biases. Their answers have no meaning. Each tensor is made when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from typing import Any

import numpy as np

from .config import FastVLMConfig
from .errors import ModelReferenceError
from .fastvit_config import FastViTConfig
from .random_encoder import PUBLISHED_RANGES, RandomEncoder
from .safetensors_files import Shape, TensorInfo
from .source_layouts import Framework
from .tensor_names import APPLE_ENCODER_PREFIX, language_shapes
from .tokenizer_files import CHAT_TEMPLATE, END, SPECIAL_TOKENS, added_token, byte_level_bpe, byte_symbols

GENERATOR_VERSION = 2
"""The version in the digest. It changes whenever the same name and seed give other weights."""

FOLDED_SKIP = re.compile(r"(token_mixer|network\.\d+)\.reparam_conv\.weight$")

"""The convolutions that contain a skip connection: a strong centre tap, weak others."""

NOTE = "random weights: the text means nothing"

IMAGE_TOKEN_ROOM = 1
"""The number of ids that are free behind the special tokens. An export adds `<image>` there."""

WORDS = """
    system user assistant You Describe What How Where Is Are The There image picture
    a are assistant at circle colour describe do does has have helpful how image in is it many of on photo picture
    say see shown square text that the there this to user what where which with word written you
""".split()

TINY_ENCODER = FastViTConfig(
    depths=(1, 2, 2, 1, 1),
    embed_dims=(16, 32, 64, 128, 256),
    out_channels=512,
    se_channels=32,
    reparameterized=False,
)
SMALL_ENCODER = replace(TINY_ENCODER, reparameterized=True)

DECODERS = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""The dimensions of the decoders, from the published `config.json` files. `tiny` has no published counterpart."""

SMALL = "small-"
"""The prefix of a size whose encoder has few channels and the published ranges, with the decoder of `tiny`. They serve
tests."""

TRAINED_IMAGE_SIZE, SMALL_IMAGE_SIZE = 1024, 256
"""The sides of the input image in pixels."""


class RandomCheckpoint:
    """A checkpoint whose tensors are drawn from a generator. Implements `Checkpoint`."""

    def __init__(self, size: str, seed: int = 0) -> None:
        if size not in DECODERS and size not in PUBLISHED_RANGES:
            raise ModelReferenceError(
                f"random:{size} is unknown. Available: {', '.join(f'random:{s}' for s in DECODERS)}."
            )
        self.name = f"random:{size}"
        self.seed = seed
        is_small = size == "tiny" or size.startswith(SMALL)
        decoder = DECODERS["tiny" if is_small else size]
        self.encoder = TINY_ENCODER if size == "tiny" else SMALL_ENCODER if is_small else FastViTConfig()
        ranges = PUBLISHED_RANGES.get(size)
        self._random_encoder = RandomEncoder(self.encoder, ranges, self._draw) if ranges else None
        self._tokenizer = synthetic_tokenizer(decoder["vocab_size"])
        image_size = SMALL_IMAGE_SIZE if is_small else TRAINED_IMAGE_SIZE
        self.config_dict: Mapping[str, Any] = apple_config(
            decoder, self.encoder.out_channels, image_size, self._tokenizer.eos_token_id
        )
        self.config = FastVLMConfig.from_dict(self.config_dict)
        self.notes: tuple[str, ...] = (NOTE,)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The shape and dtype of every tensor, by Apple's name."""
        encoder = {APPLE_ENCODER_PREFIX + name: shape for name, shape in encoder_shapes(self.encoder).items()}
        return {name: TensorInfo(shape, "F32") for name, shape in {**encoder, **language_shapes(self.config)}.items()}

    def read(self, name: str, framework: Framework) -> np.ndarray:
        """Returns the tensor as float32. The same name and seed give the same tensor on every machine."""
        shape = self.tensors[name].shape
        if self._random_encoder and name.startswith(APPLE_ENCODER_PREFIX):
            return self._random_encoder.tensor(name.removeprefix(APPLE_ENCODER_PREFIX), shape)
        return random_tensor(name, shape, self._draw(name))

    def _draw(self, key: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.name}/{self.seed}/{key}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def digest(self) -> str:
        """Returns a sha256 of name, seed, version and config, in hex."""
        recipe = f"{self.name}/{self.seed}/{GENERATOR_VERSION}/{json.dumps(self.config_dict, sort_keys=True)}"
        return hashlib.sha256(recipe.encode()).hexdigest()

    def tokenizer_files(self) -> dict[str, bytes]:
        """Returns the files of a tokenizer for the decoder's vocabulary."""
        config = {
            "chat_template": CHAT_TEMPLATE,
            "eos_token": END,
            "pad_token": SPECIAL_TOKENS[0],
            "model_max_length": self.config.tokenizer_model_max_length,
            "tokenizer_class": "Qwen2Tokenizer",
        }
        return {
            "tokenizer.json": self._tokenizer.json.encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        }


def apple_config(decoder: Mapping[str, Any], mm_hidden_size: int, image_size: int, eos_token_id: int) -> dict[str, Any]:
    """Returns `config.json` in Apple's fields."""
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **decoder,
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "max_position_embeddings": 32768,
        "mm_hidden_size": mm_hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "use_sliding_window": False,
    }


def encoder_shapes(config: FastViTConfig) -> dict[str, Shape]:
    """Returns the shape of every encoder tensor, by Apple's name without the prefix."""
    import torch

    from .fastvit import FastViT

    with torch.device("meta"):
        state = FastViT(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def random_tensor(name: str, shape: Shape, draw: np.random.Generator) -> np.ndarray:
    """Returns float32 values on the scale of a trained tensor with this name."""
    noise = draw.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return np.exp(0.3 * noise)
    if name.endswith("running_mean") or name.endswith("bias"):
        noise *= 0.1
        return noise
    if "layer_scale" in name:
        return 0.25 + 0.05 * noise
    if len(shape) == 1:  # gains of norms
        return 1 + 0.1 * noise
    if name.endswith("embed_tokens.weight"):
        noise *= 0.05
        return noise
    fan_in = math.prod(shape[1:])
    noise *= np.float32(1 / math.sqrt(fan_in))
    if FOLDED_SKIP.search(name):
        noise *= np.float32(0.2)
        noise[:, :, shape[2] // 2, shape[3] // 2] += 1
    return noise


@dataclass(frozen=True)
class SyntheticTokenizer:
    """A `tokenizer.json` and the id that ends an answer."""

    json: str
    eos_token_id: int


def synthetic_tokenizer(vocab_size: int) -> SyntheticTokenizer:
    """Returns a byte-level BPE tokenizer in Qwen2's format, which fills `vocab_size` ids but for one for `<image>`.

    It encodes any text (every byte has a token), common English words in one or two tokens. Every id decodes to
    something readable.
    """
    first_special = vocab_size - len(SPECIAL_TOKENS) - IMAGE_TOKEN_ROOM
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
    merges: dict[tuple[str, str], None] = {}
    for word in [*("Ġ" + word for word in WORDS), *WORDS]:
        for end in range(1, len(word)):
            if len(vocab) < first_special:
                merges[word[:end], word[end]] = None
                vocab.setdefault(word[: end + 1], len(vocab))
    for syllables in islice(_pseudo_words(), 2 * vocab_size):
        if len(vocab) == first_special:
            break
        vocab.setdefault(syllables, len(vocab))
    special = [added_token(first_special + i, content) for i, content in enumerate(SPECIAL_TOKENS)]
    return SyntheticTokenizer(json.dumps(byte_level_bpe(vocab, list(merges), special)), first_special + 2)


def _pseudo_words() -> Iterator[str]:
    syllables = [a + b for a, b in product("bdfghjklmnprstvwz", "aeiou")]
    for count in (1, 2, 3):
        for parts in product(syllables, repeat=count):
            yield "Ġ" + "".join(parts)
