"""The architecture of a FastViT encoder, derived from the names and shapes of its tensors.

Apple's `config.json` only names the tower (`mobileclip_l_1024`). Depths, widths, token mixers and the form (training,
with branches and batch norms, or reparameterized) are only evident from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import WeightsError
from .safetensors_files import Shape

TokenMixer = Literal["repmixer", "attention"]

HEAD_DIM = 32
"""The width of an attention head."""
LAYER_NORM_EPS = 1e-5
BATCH_NORM_EPS = 1e-5
STRIDES_BEFORE_STAGES = 4
"""The downsampling of the stem, which halves the resolution twice."""


@dataclass(frozen=True)
class FastViTConfig:
    """A FastViT encoder. The defaults are FastViTHD's: 125 M parameters, 64x downsampling, 3072 channels out."""

    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4, 4)
    token_mixers: tuple[TokenMixer, ...] = ("repmixer", "repmixer", "repmixer", "attention", "attention")
    pos_emb_kernels: tuple[int | None, ...] = (None, None, None, 7, 7)
    """The kernel size of the position convolution in front of each stage."""
    out_channels: int = 3072
    se_channels: int = 192
    """The width of the squeeze-and-excitation bottleneck in `conv_exp`."""
    reparameterized: bool = True
    stem_scale_branch: bool = False
    conv_branches: int = 1
    """The number of convolution branches of each MobileOne block in training form."""

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name in ("embed_dims", "mlp_ratios", "token_mixers", "pos_emb_kernels"):
            if len(getattr(self, name)) != stages:
                raise WeightsError(
                    f"the encoder has {stages} stages, but {name} has {len(getattr(self, name))} entries"
                )
        if self.patch_size != 64:
            raise WeightsError(
                f"the encoder must have 5 stages and reduce 64x, got {stages} stages, which reduce {self.patch_size}x"
            )
        for width, mixer in zip(self.embed_dims, self.token_mixers, strict=True):
            if mixer == "attention" and width % HEAD_DIM:
                raise WeightsError(f"an attention stage of {width} channels does not divide into heads of {HEAD_DIM}")

    @property
    def patch_size(self) -> int:
        """The pixels per output position along each side."""
        return STRIDES_BEFORE_STAGES * 2 ** (len(self.depths) - 1)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> FastViTConfig:
        """Derives the architecture from tensor names (without the tower's prefix) and shapes.

        Raises:
            WeightsError: the names are not those of a FastViT encoder, or mix both forms.
        """
        try:
            return _read(shapes)
        except (KeyError, IndexError) as reason:
            raise WeightsError(
                f"the vision encoder is not a whole FastViT: {reason.args[0]!s:.80} is missing"
            ) from None


def _read(shapes: Mapping[str, Shape]) -> FastViTConfig:
    depths, embed_dims, mlp_ratios = [], [], []
    token_mixers: list[TokenMixer] = []
    kernels: list[int | None] = []
    pending_kernel: int | None = None
    for i in range(1 + max(_indices(shapes, "network."), default=-1)):
        part = f"network.{i}."
        blocks = _indices(shapes, part)
        position_conv = shapes.get(f"{part}reparam_conv.weight") or shapes.get(f"{part}pe.weight")
        if position_conv:
            pending_kernel = position_conv[-1]
        elif blocks:
            depths.append(1 + max(blocks))
            fc1 = shapes[f"{part}0.convffn.fc1.weight"]
            embed_dims.append(fc1[1])
            mlp_ratios.append(fc1[0] // max(fc1[1], 1))
            token_mixers.append("attention" if f"{part}0.token_mixer.qkv.weight" in shapes else "repmixer")
            kernels.append(pending_kernel)
            pending_kernel = None
    return FastViTConfig(
        depths=tuple(depths),
        embed_dims=tuple(embed_dims),
        mlp_ratios=tuple(mlp_ratios),
        token_mixers=tuple(token_mixers),
        pos_emb_kernels=tuple(kernels),
        out_channels=shapes["conv_exp.se.expand.weight"][0],
        se_channels=shapes["conv_exp.se.reduce.weight"][0],
        reparameterized=_is_reparameterized(shapes),
        stem_scale_branch="patch_embed.0.rbr_scale.conv.weight" in shapes,
        conv_branches=max(1, len(_indices(shapes, "patch_embed.0.rbr_conv."))),
    )


def _is_reparameterized(shapes: Mapping[str, Shape]) -> bool:
    folded = sorted(name for name in shapes if "reparam" in name)
    branched = sorted(name for name in shapes if ".rbr_" in name or ".lkb_origin." in name)
    if folded and branched:
        raise WeightsError(
            f"the vision encoder mixes reparameterized tensors ({folded[0]}, ...) with training branches "
            f"({branched[0]}, ...). It must have one form."
        )
    return not branched


def _indices(shapes: Mapping[str, Shape], prefix: str) -> set[int]:
    """Returns the integers that follow `prefix` in the tensors' names."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    return {int(match[1]) for name in shapes if (match := pattern.match(name))}
