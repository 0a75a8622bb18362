"""`tiny` in torch for training: FastViT in training form, the projector, Hugging Face's Qwen2, and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..fastvit import FastViT
from ..fastvit_config import FastViTConfig
from ..random_checkpoint import apple_config
from ..tensor_names import rename
from ..tokenizer_files import CHAT_TEMPLATE, END
from .scenes import SCENE_SIZE

IMAGE_SIZE = SCENE_SIZE
"""The side of the encoder's input, in pixels."""
TOKENS_PER_IMAGE = 16
"""The number of image tokens of a scene, a grid of 4 x 4."""

ENCODER = FastViTConfig(
    depths=(1, 2, 3, 2, 1),
    embed_dims=(16, 32, 64, 128, 256),
    mlp_ratios=(3, 3, 3, 3, 3),
    out_channels=512,
    se_channels=32,
    reparameterized=False,
)
"""The architecture of the encoder."""

DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
"""The architecture of the decoder, in Hugging Face's names."""
ROPE_THETA = 10000.0
"""The base of the rotary embedding. The context is short, so that slower rotations would hardly turn."""
CONTEXT = 1024
"""The longest sequence, in tokens."""

INITIALIZER_RANGE = 0.08
"""The standard deviation of the decoder's initial weights, about 1 / sqrt(hidden size).

Hugging Face's 0.02 suits large models. With it, a network of this size takes twice as many steps until its heads
attend to the image."""

THIRD_STAGE = 4
"""The index of the third stage among the tower's modules, in which stages alternate with downsamplings."""

LAYER_SCALE = 0.1
"""The initial value of layer scales, with which blocks begin close to the identity."""

TOKENIZER_CONFIG = {
    "chat_template": CHAT_TEMPLATE,
    "eos_token": END,
    "pad_token": "<|endoftext|>",
    "model_max_length": CONTEXT,
    "tokenizer_class": "Qwen2Tokenizer",
}


class TinyFastVLM(nn.Module):
    """The trainable network. Its modules have Apple's names below `model.`, so that names only differ in a prefix."""

    def __init__(self) -> None:
        from transformers import Qwen2Config, Qwen2Model

        super().__init__()
        hidden_size = int(DECODER["hidden_size"])
        self.vision_tower = FastViT(ENCODER).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, parameter in self.vision_tower.named_parameters():
            if "layer_scale" in name:
                nn.init.constant_(parameter, LAYER_SCALE)
        self.mm_projector = nn.Sequential(
            nn.Linear(ENCODER.out_channels, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
        config = Qwen2Config(
            **DECODER, max_position_embeddings=CONTEXT, rope_parameters=rope, initializer_range=INITIALIZER_RANGE
        )
        config._attn_implementation = "sdpa"
        self.decoder = Qwen2Model(config)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Returns (B, 16, 512) for `pixel_values` (B, 3, 256, 256) in 0..1."""
        return self.features_and_third_stage(pixel_values)[0]

    def features_and_third_stage(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `image_features` (B, 16, 512) and the output of the third stage (B, 64, 16, 16)."""
        tower = self.vision_tower
        x = tower.patch_embed(pixel_values.contiguous(memory_format=torch.channels_last))
        for index, part in enumerate(tower.network):
            x = part(x)
            if index == THIRD_STAGE:
                middle = x
        return tower.features(x), middle

    def hidden_states(self, projected: Tensor, batch: Any) -> Tensor:
        """Returns the decoder's last hidden states (B, L, D) of packed questions (`data.Batch`).

        `projected` (B, 16, D) are the projected `image_features`.
        """
        embeds = self.decoder.embed_tokens(batch.token_ids)  # (B, L, D)
        first = batch.image_start
        embeds = torch.cat((embeds[:, :first], projected.to(embeds.dtype), embeds[:, first + TOKENS_PER_IMAGE :]), 1)
        mask = torch.zeros(batch.visible.shape, dtype=embeds.dtype).masked_fill(~batch.visible, -1e9)  # (B, L, L)
        return self.decoder(
            inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Returns logits (..., vocabulary) of hidden states (..., D)."""
        return hidden_states @ self.decoder.embed_tokens.weight.T.to(hidden_states.dtype)


def is_kernel(tensor: Tensor) -> bool:
    """Returns True for a matrix or a kernel, and False for a norm, bias or layer scale."""
    return tensor.ndim > 1 and tensor[0].numel() > 1


def write_checkpoint(network: TinyFastVLM, tokenizer_json: str, folder: Path) -> None:
    """Writes config, weights and tokenizer in Apple's LLaVA layout.

    Matrices and kernels are float16, norms, biases and layer scales float32.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    tensors = {}
    for name, apple_name in rename(state, "tiny", "apple").items():
        if not name.endswith("num_batches_tracked"):
            dtype = torch.float16 if is_kernel(state[name]) else torch.float32
            tensors[apple_name] = state[name].detach().to(dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eos_token_id = Tokenizer.from_str(tokenizer_json).token_to_id(END)
    assert eos_token_id is not None
    (folder / "config.json").write_text(json.dumps(checkpoint_config(eos_token_id), indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer_json + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def checkpoint_config(eos_token_id: int) -> dict[str, Any]:
    """Returns the content of `config.json`, in Apple's fields."""
    return {
        **apple_config(DECODER, ENCODER.out_channels, IMAGE_SIZE, eos_token_id),
        "max_position_embeddings": CONTEXT,
        "tokenizer_model_max_length": CONTEXT,
        "rope_theta": ROPE_THETA,
        "torch_dtype": "float16",
    }
