"""`tiny` in torch, to be trained: our FastViT in training form, the projector, and Hugging Face's Qwen2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..fastvit import FastViT
from ..fastvit_config import FastViTConfig
from .scenes import SCENE_SIZE

IMAGE_SIZE = SCENE_SIZE
TOKENS_PER_IMAGE = 16

ENCODER = FastViTConfig(
    depths=(1, 2, 3, 2, 1),
    embed_dims=(16, 32, 64, 128, 256),
    mlp_ratios=(3, 3, 3, 3, 3),
    out_channels=512,
    se_channels=32,
    reparameterized=False,
)

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
ROPE_THETA = 10000.0
"""Positions are few: slower rotations would hardly turn."""
CONTEXT = 1024

INITIALIZER_RANGE = 0.08
"""Deviation of the decoder's first weights: about 1 / sqrt(hidden size). Hugging Face's 0.02 suits large models; from
it a network of this size takes twice as many steps until its heads look things up."""

THIRD_STAGE = 4
"""Its index among the tower's parts: stages alternate with downsamplings."""

LAYER_SCALE = 0.1
"""Where layer scales start: blocks begin close to the identity."""


class TinyFastVLM(nn.Module):
    """Names of the parts are Apple's below `model.`, so that `state_dict()` keys need one prefix each."""

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
        """`pixel_values` (B, 3, 256, 256) in 0..1 -> (B, 16, 512)."""
        return self.observed_features(pixel_values)[0]

    def observed_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """`image_features` (B, 16, 512), and what the third stage gives on the way: (B, 64, 16, 16)."""
        tower = self.vision_tower
        x = tower.patch_embed(pixel_values.contiguous(memory_format=torch.channels_last))
        for index, part in enumerate(tower.network):
            x = part(x)
            if index == THIRD_STAGE:
                middle = x
        return tower.features(x), middle

    def hidden_states(self, projected: Tensor, batch: Any) -> Tensor:
        """The decoder's last hidden states (B, L, D) of packed questions (`data.Batch`).

        `projected` (B, 16, D) is what the projector makes of `image_features`.
        """
        embeds = self.decoder.embed_tokens(batch.token_ids)  # (B, L, D)
        first = batch.image_start
        embeds = torch.cat((embeds[:, :first], projected.to(embeds.dtype), embeds[:, first + TOKENS_PER_IMAGE :]), 1)
        mask = torch.zeros(batch.visible.shape, dtype=embeds.dtype).masked_fill(~batch.visible, -1e9)  # (B, L, L)
        return self.decoder(
            inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.decoder.embed_tokens.weight.T.to(hidden_states.dtype)


def is_kernel(tensor: Tensor) -> bool:
    """Whether this is a matrix or a kernel: no norm, bias or layer scale."""
    return tensor.ndim > 1 and tensor[0].numel() > 1
