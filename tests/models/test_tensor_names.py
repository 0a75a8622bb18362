"""Tensor names and shapes in every layout."""

from __future__ import annotations

import pytest

from fastvlm.models.random_checkpoint import TINY_ENCODER, RandomCheckpoint, encoder_shapes
from fastvlm.models.tensor_names import (
    APPLE_ENCODER_PREFIX,
    MLX_ENCODER_PREFIX,
    Layout,
    apple_encoder_shapes,
    is_known,
    language_shapes,
    rename,
    renamed,
    saved_name,
    to_apple_axes,
    to_mlx_axes,
    unwrapped,
)

ENCODER = APPLE_ENCODER_PREFIX
NAMES = (
    # Apple, Hugging Face, mlx-vlm, exported folder
    ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight",
     "language_model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "lm_head.weight", "language_model.lm_head.weight", "language_model.lm_head.weight"),
    ("model.mm_projector.0.bias", "model.multi_modal_projector.linear_1.bias",
     "mm_projector.0.bias", "multi_modal_projector.linear_0.bias"),
    ("model.mm_projector.2.weight", "model.multi_modal_projector.linear_2.weight",
     "mm_projector.2.weight", "multi_modal_projector.linear_2.weight"),
)  # fmt: skip


@pytest.mark.parametrize("row", NAMES)
def test_each_layout_renames_to_each_other(row: tuple[str, ...]) -> None:
    columns: tuple[Layout, ...] = ("apple", "hf", "mlx", "saved")
    for source, name in zip(columns, row, strict=True):
        for target, expected in zip(columns, row, strict=True):
            assert renamed(name, source, target) == expected
            assert rename([name], source, target) == {name: expected}


def test_encoder_names_of_timm_number_stages_not_parts() -> None:
    apple = [
        f"{ENCODER}patch_embed.0.reparam_conv.weight",
        f"{ENCODER}network.0.0.convffn.fc1.weight",
        f"{ENCODER}network.1.proj.0.lkb_reparam.weight",
        f"{ENCODER}network.2.1.layer_scale",
        f"{ENCODER}network.3.reparam_conv.weight",
        f"{ENCODER}network.4.0.layer_scale_2",
        f"{ENCODER}conv_exp.se.reduce.bias",
    ]
    prefix = "model.vision_tower.timm_model."
    expected = [
        f"{prefix}stem.0.reparam_conv.weight",
        f"{prefix}stages.0.blocks.0.mlp.fc1.weight",
        f"{prefix}stages.1.downsample.proj.0.reparam_conv.weight",
        f"{prefix}stages.1.blocks.1.layer_scale.gamma",
        f"{prefix}stages.1.pos_emb.reparam_conv.weight",
        f"{prefix}stages.1.blocks.0.layer_scale_2.gamma",
        f"{prefix}final_conv.se.fc1.bias",
    ]
    # Without a downsampling in front, the position convolution and the blocks behind it belong to stage 1.
    assert list(rename(apple, "apple", "hf").values()) == expected


@pytest.mark.parametrize("layout", ["hf", "mlx"])
def test_names_survive_a_round_trip(layout: Layout) -> None:
    names = rename(RandomCheckpoint("tiny").tensors, "apple", layout)
    assert len(set(names.values())) == len(names)
    assert rename(names.values(), layout, "apple") == {new: old for old, new in names.items()}


def test_unknown_names_stay_unchanged() -> None:
    assert renamed("something.weight", "hf", "apple") == "something.weight"
    assert not is_known("something.weight", "mlx")
    assert is_known("mm_projector.0.weight", "mlx")
    for name in ("something.weight", f"{ENCODER}conv_exp.se.reduce.bias"):
        with pytest.raises(KeyError):
            saved_name(name)


def test_axes_are_inverse_of_each_other() -> None:
    for shape in ((5, 2, 3, 3), (5, 1, 1), (5, 4), (5,)):
        there = tuple(shape[axis] for axis in to_mlx_axes(shape))
        assert tuple(there[axis] for axis in to_apple_axes(there)) == shape


def test_encoder_shapes_of_mlx_give_apples() -> None:
    apple = encoder_shapes(TINY_ENCODER)
    names = rename((ENCODER + name for name in apple), "apple", "mlx")
    mlx = {
        names[ENCODER + name].removeprefix(MLX_ENCODER_PREFIX): tuple(shape[axis] for axis in to_mlx_axes(shape))
        for name, shape in apple.items()
    }
    assert apple_encoder_shapes(mlx) == apple


def test_language_shapes_follow_the_table_of_embeddings() -> None:
    config = RandomCheckpoint("tiny").config
    shapes = language_shapes(config, embedding_rows=1000)
    assert shapes["model.embed_tokens.weight"] == (1000, 128)
    assert "lm_head.weight" not in shapes
    assert language_shapes(config.with_tied_embeddings(False))["lm_head.weight"] == (1024, 128)


@pytest.mark.parametrize("layout", ["apple", "hf", "mlx"])
@pytest.mark.parametrize("wrapper", ["module.", "base_model.model.", "_orig_mod.module."])
def test_uniform_wrappers_are_removed_in_every_layout(layout: Layout, wrapper: str) -> None:
    names = list(rename(RandomCheckpoint("tiny").tensors, "apple", layout).values())
    assert list(unwrapped(wrapper + name for name in names).values()) == names
    assert unwrapped(names) == {name: name for name in names}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.", "model.model."),
        ("self_attn.", "_fsdp_wrapped_module.self_attn."),
        ("mlp.", "_orig_mod.mlp."),
        ("_proj.weight", "_proj.base_layer.weight"),
        ("model.layers.", "model.base_model.model.layers."),
    ],
)
def test_wrappers_inside_names_are_removed(before: str, after: str) -> None:
    names = [name for name in RandomCheckpoint("tiny").tensors if name != "lm_head.weight"]
    assert list(unwrapped(name.replace(before, after, 1) for name in names).values()) == names


def test_names_that_would_collide_stay_as_they_are() -> None:
    names = [f"{ENCODER}a.weight", f"{ENCODER}a.base_layer.weight"]
    assert unwrapped(names) == {name: name for name in names}
    assert unwrapped(["x.a", "y.a"]) == {"x.a": "x.a", "y.a": "y.a"}
    assert unwrapped([]) == {}
