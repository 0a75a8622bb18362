"""The clients' contracts: what each client requires of a bundle, as data.

They are read off the clients' sources, and no file is copied. JSON is checked as Swift's `JSONDecoder` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...models.errors import UsageError
from ...models.fastvit_config import FastViTConfig

STAGES = 5

MAX_SIZE = 2**14
"""The largest depth or width. Real ones are far smaller, so a file with a larger one is damaged or hostile."""

ANY = object()
"""A rule's value for keys whose value is free."""

ABSENT = object()
"""A rule's value for keys that must be absent."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 < value <= MAX_SIZE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": _is_int,
    "a positive integer": lambda value: _is_int(value) and value > 0,
    "a number": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "a string": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "a list of five sizes": lambda value: _list_of(_is_size)(value) and len(value) == STAGES,
    "a list of three numbers": lambda value: _list_of(_is_number)(value) and len(value) == 3,
    "a list of true or false": _list_of(lambda value: isinstance(value, bool)),
    "a list of strings": _list_of(lambda value: isinstance(value, str)),
    "a list of [height, width] or null": _list_of(
        lambda value: value is None or (_list_of(_is_int)(value) and len(value) == 2)
    ),
}
"""The kinds of a value. Swift decodes 2.5 to none of its integers, and a string or a bool to none of its numbers."""


@dataclass(frozen=True)
class Rule:
    """A requirement for one key of a JSON file."""

    key: str
    """The path of the key, such as `size.shortest_edge`."""
    kind: str
    """One of `KINDS`."""
    value: Any = ANY
    """The only value that works. With `ABSENT` the key must be absent."""
    required: bool = True
    """False for optional keys, which may also be null."""

    def faults(self, values: Mapping[str, Any], file: str) -> Iterator[str]:
        """Yields the fault of `values`, the content of `file`, if they break the rule."""
        found = _at(values, self.key)
        if found is ABSENT or found is None:
            if self.required:
                yield f"{file}: {self.key!r} is missing (must be {self.kind})"
            return
        if self.value is ABSENT:
            yield f"{file}: {self.key!r} must be absent (got {found!r:.60})"
        elif not KINDS[self.kind](found):
            yield f"{file}: {self.key!r} must be {self.kind} (got {found!r:.60})"
        elif self.value is not ANY and found != self.value:
            yield f"{file}: {self.key!r} must be {self.value!r:.80} (got {found!r:.60})"


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return ABSENT
        values = values[name]
    return values


@dataclass(frozen=True)
class Contract:
    """The requirements of one client."""

    name: str
    title: str
    source: str
    """The address of the code that they are read from."""
    rules: Mapping[str, tuple[Rule, ...]]
    """The rules by JSON file. The file must exist, unless it is one of `OPTIONAL_FILES`."""
    encoder: str
    """The encoder that the client runs: `coreml`, a package, or `mlx`, tensors in the decoder's file."""
    projector: str
    """The prefix of the projector's two layers, before their numbers."""
    image_size: int | None = None
    """The only image size, or None for any."""
    channels: int | None = None
    """The only width of `image_features`, or None for that of config.json."""
    architecture: FastViTConfig | None = None
    """The only encoder, or None for that of config.json."""
    bits: tuple[int, ...] | None = None
    """The bits of a decoder that it loads, equal in every layer, or None for any that MLX has, also mixed."""
    cache_bytes: int = 2
    """The bytes of a number in the key-value cache and in prefill: 4 if float32 features make the rest float32."""
    templated: bool = False
    """True if the client passes messages in parts, with images among them, to the chat template."""

    def decoder_faults(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yields the reason why the client cannot load a decoder with the quantization in `config`."""
        quantization = config.get("quantization")
        if self.bits is None or not isinstance(quantization, Mapping):
            return
        if any(isinstance(value, Mapping | bool) for value in quantization.values()):
            yield "its layers differ in bits"
        elif quantization.get("bits") not in self.bits:
            yield f"it has {quantization.get('bits')!r:.40} bits"


SIZE = "a positive integer"

OPTIONAL_FILES = ("processor_config.json",)
"""The files that clients read only instead of preprocessor_config.json, or never. Existing ones must be right."""

MODEL_TYPE = Rule("model_type", "a string", "llava_qwen2")

DECODER = (
    Rule("hidden_size", SIZE),
    Rule("num_hidden_layers", SIZE),
    Rule("intermediate_size", SIZE),
    Rule("num_attention_heads", SIZE),
    Rule("num_key_value_heads", SIZE),
    Rule("vocab_size", SIZE),
    Rule("rms_norm_eps", "a number", required=False),
    Rule("rope_theta", "a number", required=False),
    Rule("rope_traditional", "true or false", False, required=False),
    Rule("max_position_embeddings", SIZE, required=False),
    Rule("tie_word_embeddings", "true or false", required=False),
    Rule("rope_scaling", "an object", ABSENT, required=False),  # the app would require Qwen2-VL's `mrope_section`
    Rule("quantization", "an object", required=False),
    Rule("quantization.group_size", SIZE, required=False),
    Rule("quantization.bits", SIZE, required=False),
)

PIXELS = (
    Rule("image_mean", "a list of three numbers", [0, 0, 0]),
    Rule("image_std", "a list of three numbers", [1, 1, 1]),
    Rule("crop_size.width", SIZE),
    Rule("crop_size.height", SIZE),
    Rule("size.shortest_edge", SIZE),
)

TOKENIZER = (Rule("tokenizer_class", "a string", "Qwen2Tokenizer"),)

APPLE_APP = Contract(
    name="apple-app",
    title="the iOS and macOS app of ml-fastvlm",
    source="https://github.com/apple/ml-fastvlm/blob/main/app/FastVLM/FastVLM.swift",
    rules={
        "config.json": (
            MODEL_TYPE,
            *DECODER,
            Rule("image_token_index", SIZE),
            Rule("mm_hidden_size", SIZE),
        ),
        "preprocessor_config.json": (*PIXELS, Rule("processor_class", "a string", "LlavaProcessor")),
        "processor_config.json": (
            Rule("processor_class", "a string", "LlavaProcessor"),
            Rule("patch_size", SIZE, 64),
            Rule("num_additional_image_tokens", "an integer", 0),
            Rule("image_token", "a string", "<image>"),
        ),
        "tokenizer_config.json": TOKENIZER,
    },
    encoder="coreml",
    projector="multi_modal_projector.linear_",
    image_size=1024,
    channels=3072,
    bits=(2, 3, 4, 6, 8),  # MLX 0.21, which builds the app, has these and no bits of single layers
)

VISION = (
    Rule("cls_ratio", "a number", 2.0),
    Rule("down_patch_size", SIZE, 7),
    Rule("down_stride", SIZE, 2),
    Rule("downsamples", "a list of true or false", [True] * STAGES),
    Rule("embed_dims", "a list of five sizes"),
    Rule("hidden_size", SIZE),
    Rule("image_size", SIZE),
    Rule("intermediate_size", SIZE),
    Rule("layer_scale_init_value", "a number"),
    Rule("layers", "a list of five sizes"),
    Rule("mlp_ratios", "a list of five sizes"),
    Rule("num_classes", SIZE),
    Rule("patch_size", SIZE, 64),
    Rule("pos_embs_shapes", "a list of [height, width] or null", [None, None, None, [7, 7], [7, 7]]),
    Rule("projection_dim", SIZE),
    Rule("repmixer_kernel_size", SIZE, 3),
    Rule("token_mixers", "a list of strings", ["repmixer"] * 3 + ["attention"] * 2),
)

MLX_SWIFT_LM = Contract(
    name="mlx-swift-lm",
    title="mlx-swift-lm (MLXVLM)",
    source="https://github.com/ml-explore/mlx-swift-lm/blob/main/Libraries/MLXVLM/Models/FastVLM.swift",
    rules={
        "config.json": (
            MODEL_TYPE,
            *DECODER,
            Rule("vision_config", "an object"),
            *(replace(rule, key=f"vision_config.{rule.key}") for rule in VISION),
            Rule("image_token_index", "an integer", -200, required=False),  # its processor writes -200
            Rule("eos_token_id", "an integer"),  # one, not a list
            Rule("mm_projector_type", "a string", "mlp2x_gelu"),
            Rule("mm_hidden_size", SIZE),
            Rule("tokenizer_model_max_length", SIZE),
            Rule("tokenizer_padding_side", "a string"),
        ),
        "preprocessor_config.json": (*PIXELS, Rule("processor_class", "a string", "FastVLMProcessor")),
        "processor_config.json": (Rule("processor_class", "a string", "FastVLMProcessor"),),
        "tokenizer_config.json": (*TOKENIZER, Rule("chat_template", "a string")),
    },
    encoder="mlx",
    projector="mm_projector.",
    cache_bytes=4,  # its pixels are float32, and so are the features that it puts into the embeddings
    templated=True,
)

MLX_VLM = replace(
    MLX_SWIFT_LM,
    name="mlx-vlm",
    title="mlx-vlm",
    source="https://github.com/Blaizzy/mlx-vlm/tree/main/mlx_vlm/models/fastvlm",
    cache_bytes=2,
    architecture=FastViTConfig(),  # the code of its VisionConfig has FastViTHD's numbers
    templated=False,
)

CONTRACTS = {contract.name: contract for contract in (APPLE_APP, MLX_SWIFT_LM, MLX_VLM)}
"""The contracts by client."""


def contract_for(client: str) -> Contract:
    """Returns the contract of a client. Raises UsageError if it is unknown."""
    if client not in CONTRACTS:
        raise UsageError(f"client must be one of {', '.join(CONTRACTS)} (got {client!r:.40}).", "client")
    return CONTRACTS[client]
