"""The clients' contracts. Read off their sources; no file of theirs is copied."""

from __future__ import annotations

from dataclasses import replace

from ...models.errors import UsageError
from ...models.fastvit_config import FastViTConfig
from .contract import ABSENT, STAGES, Contract, Rule

SIZE = "a positive integer"

OPTIONAL_FILES = ("processor_config.json",)
"""Clients read it where there is no preprocessor_config.json, or not at all; one that is there should not mislead."""

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
    Rule("rope_scaling", "an object", ABSENT, required=False),  # the app's demands `mrope_section`, Qwen2-VL's
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
    layout="apple",
    projector="multi_modal_projector.linear_",
    image_size=1024,
    channels=3072,
    bits=(2, 3, 4, 6, 8),  # of MLX 0.21, the one that builds the app; it reads no bits of single layers
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
    layout="mlx",
    projector="mm_projector.",
    cache_bytes=4,  # its pixels are float32, and so are the features that it writes among the embeddings
    templated=True,
)

MLX_VLM = replace(
    MLX_SWIFT_LM,
    name="mlx-vlm",
    title="mlx-vlm",
    source="https://github.com/Blaizzy/mlx-vlm/tree/main/mlx_vlm/models/fastvlm",
    cache_bytes=2,
    encoder=FastViTConfig(),  # its VisionConfig has FastViTHD's numbers in its code
    templated=False,
)

TARGETS = {contract.name: contract for contract in (APPLE_APP, MLX_SWIFT_LM, MLX_VLM)}


def contract_for(target: str) -> Contract:
    """Raises UsageError for a target that is not known."""
    if target not in TARGETS:
        raise UsageError(f"--target should be one of {', '.join(TARGETS)}; found {target!r:.40}")
    return TARGETS[target]
