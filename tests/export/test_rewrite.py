"""The network that is traced: equal to the encoder, and of the shape that the engine wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.export.rewrite import (
    STREAM_LIMIT,
    EngineAttentionBlock,
    EngineRepMixerBlock,
    ScaledGELU,
    exact_scale,
    path_convolutions,
    recorded_values,
    rewrite,
    round_means,
    stream_maxima,
    stream_scales,
)
from fastvlm.export.write_encoder import convert_encoder
from fastvlm.models.errors import WeightsError
from fastvlm.models.fastvit import AttentionBlock, FastViT
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.mlprogram import census, max_rank, read_package
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def encoder() -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint("tiny"))


def images(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(size))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    assert torch.isfinite(expected).all()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [128, 256, 320])
def test_rewritten_network_equals_the_encoder(tolerance: Callable[[str], float], size: int) -> None:
    x = images(size)
    expected = encoder()(x)
    found = rewrite(encoder(), size)(x)
    assert found.shape == (1, (size // 64) ** 2, 512)
    assert relative_error(found, expected) < tolerance("rewrite_float32")


@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
def test_rewritten_network_matches_the_reference(golden: Path, tolerance: Callable[[str], float], name: str) -> None:
    numbers = np.load(golden / name / "expected.npz")
    network = rewrite(FastViT.from_checkpoint(open_checkpoint(golden / name)), 256)
    for case in range(3):
        found = network(torch.from_numpy(numbers[f"{case}.pixel_values"]))
        expected = torch.from_numpy(numbers[f"{case}.image_features"])
        assert relative_error(found, expected) < tolerance("rewrite_float32")


@pytest.mark.parametrize("tiles", [2, 4])
def test_attention_in_tiles_gives_equal_results(
    monkeypatch: pytest.MonkeyPatch, tolerance: Callable[[str], float], tiles: int
) -> None:
    monkeypatch.setattr("fastvlm.export.rewrite.MIN_TILED_BYTES", 1)
    x = images(256)
    network = rewrite(encoder(), 256, attention_tiles=tiles)
    assert {part.tiles for part in network.modules() if isinstance(part, EngineAttentionBlock)} == {tiles}
    assert relative_error(network(x), rewrite(encoder(), 256)(x)) < tolerance("rewrite_float32")


def test_tiles_are_for_the_large_scores_of_stage_3() -> None:
    with torch.device("meta"):
        network = rewrite(FastViT(FastViTConfig()).eval(), 1024, attention_tiles=2)
    assert [part.tiles for part in network.modules() if isinstance(part, EngineAttentionBlock)] == [2, 2, 2, 2, 1, 1]


def test_swapped_channels_would_be_seen(tolerance: Callable[[str], float]) -> None:
    x = images(256)
    expected = encoder()(x)
    network = rewrite(encoder(), 256)
    weight = network[-3].qkv.weight
    weight[[0, 1]] = weight[[1, 0]]
    assert relative_error(network(x), expected) > tolerance("rewrite_float32")


def test_layer_norm_keeps_large_streams_in_float16() -> None:
    """FastViTHD's last stage reaches 11,000 after scaling, where the squares of float16 numbers are infinite."""
    block = rewrite(encoder(), 128)[-3]
    x = 11_000 * torch.randn(1, block.channels, 2, 2, generator=torch.Generator().manual_seed(0))
    found = block.normalize(x.half())
    assert found.dtype == torch.float16
    assert relative_error(found.float(), block.normalize(x)) < 1e-3


def test_values_without_their_mean_change_nothing(tolerance: Callable[[str], float]) -> None:
    network, x = encoder(), images(256)
    for part in network.modules():
        if isinstance(part, AttentionBlock):
            part.norm.bias.normal_(generator=torch.Generator().manual_seed(0))  # the values get a mean
    with recorded_values(network) as recorded:
        expected = network(x)
        network(x)
    assert all(torch.equal(*found) for found in recorded), "one mean for each image"
    means = [found[0] for found in recorded]
    assert not network.network[7][0].norm._forward_hooks
    plain, centred = rewrite(network, 256), rewrite(network, 256, value_means=means)
    assert relative_error(centred(x), expected) < tolerance("rewrite_float32")
    largest = [value_mean(found, x) for found in (plain, centred)]
    assert largest[0] > 0.1 and largest[1] < 1e-4 * largest[0]


def value_mean(network: torch.nn.Sequential, x: torch.Tensor) -> float:
    """Returns the largest mean of a value over the positions of the first attention block."""
    for part in network:
        if isinstance(part, EngineAttentionBlock):
            return float(part.qkv(part.normalize(x))[:, -part.channels :].mean((2, 3)).abs().max())
        x = part(x)
    raise AssertionError("no attention block")


def test_rescaling_the_stream_changes_nothing_in_float32(tolerance: Callable[[str], float]) -> None:
    x = images(256)
    plain = rewrite(encoder(), 256)(x)
    scaled = rewrite(encoder(), 256, [0.5, 0.25, 0.125, 2**-6, 2**-7])(x)
    assert relative_error(scaled, plain) < tolerance("rescaled_float32")


def test_rescaling_brings_a_stream_beyond_float16_into_range() -> None:
    network = encoder().reparameterize()
    for block in network.network[4]:  # stage 2 writes its stream with fc2: make it huge
        block.layer_scale *= 40_000
    expected = network(images(256))
    maxima = stream_maxima(network, [images(256)])
    assert maxima[2] > 65504
    scales = stream_scales(maxima)
    assert scales[0] == scales[1] == 1
    assert maxima[2] * scales[2] <= STREAM_LIMIT < 2 * maxima[2] * scales[2]
    rewritten = rewrite(network, 256, scales)
    seen: list[float] = []
    for module in rewritten:
        if isinstance(module, EngineRepMixerBlock):
            module.register_forward_hook(lambda _, inputs, output: seen.append(float(output.abs().max())))
    assert relative_error(rewritten(images(256)), expected) < 1e-5
    assert max(seen) <= STREAM_LIMIT  # and it is the network that runs, not only the arithmetic of scales


def test_largest_weights_of_token_mixers_are_exact_in_float16() -> None:
    network = FastViT.from_checkpoint(RandomCheckpoint("small-0.5b"))
    depths = network.config.depths
    last = [sum(depths[: stage + 1]) - 1 for stage in range(3)]  # they restore the stage's scale
    scales = [0.5, 2**-6, 1.0, 1.0, 1.0]
    blocks = [block for block in rewrite(network, 256, scales) if isinstance(block, EngineRepMixerBlock)]
    assert len(blocks) == last[-1] + 1
    for place, block in enumerate(blocks):
        weight = block.token_mixer.weight.flatten(1)  # (C, 9)
        largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
        exact = torch.equal(largest, largest.half().float())
        assert exact == (place not in last)


def test_channels_keep_their_scale_where_no_weight_can_be_exact() -> None:
    weight = torch.full((3, 1, 3, 3), 1e-7)
    weight[0] = 1.0001
    weight[2] = 0.0
    found = exact_scale(weight, 1.0, 0.25)
    assert found[0] == pytest.approx(0.25, rel=1e-3) and found[0] != 0.25
    assert found[1] == found[2] == 0.25


def test_streams_that_are_not_finite_are_refused() -> None:
    network = encoder()
    network.network[4][0].layer_scale[0] = float("inf")
    with pytest.raises(WeightsError, match="NaN or infinite values"):
        stream_maxima(network, [images(256)])


def test_every_write_into_the_stream_is_seen() -> None:
    """A token mixer's output passes only half a block further on: it counts all the same."""
    network = encoder()
    block = network.network[7][0]
    block.convffn.fc2.weight.zero_()
    block.convffn.fc2.bias.zero_()
    whole = stream_maxima(network, [images(256)])[3]
    block.layer_scale_2.fill_(1)
    block.convffn.fc2.bias.fill_(-1e6)  # the block's end is now of another size than its middle
    assert stream_maxima(network, [images(256)])[3] > 1e5 > whole


def test_stream_scales_are_powers_of_two_at_most_one() -> None:
    assert stream_scales([0, 3, STREAM_LIMIT, STREAM_LIMIT * 1.01, 1e9]) == [1, 1, 1, 0.5, 2**-16]


@pytest.fixture(scope="module")
def fastvithd_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FastViTHD, at the smallest size: the operations are the same at every size."""
    with torch.device("meta"):
        network = FastViT(FastViTConfig())
    state = {
        name: torch.full(tensor.shape, 0.01) for name, tensor in network.state_dict().items() if "tracked" not in name
    }
    network.load_state_dict(state, strict=False, assign=True)
    package = tmp_path_factory.mktemp("fastvithd") / "fastvithd.mlpackage"
    network = rewrite(network.requires_grad_(False).eval(), 128)
    convert_encoder(network, 128, {}, package, metadata={}, on_stage=lambda _: None)
    return package


def test_program_of_fastvithd_has_the_target_operations(fastvithd_package: Path) -> None:
    program = read_package(fastvithd_package)
    assert dict(census(program)) == {
        "conv": 198, "gelu": 56, "add": 50, "reshape": 13, "matmul": 12, "layer_norm": 6, "split": 6, "softmax": 6,
        "cast": 2, "reduce_mean": 1, "relu": 1, "sigmoid": 1, "mul": 1, "transpose": 1,
    }  # fmt: skip
    assert sum(census(program).values()) - census(program)["cast"] == 352
    assert max_rank(program) == 4


@given(
    values=st.lists(st.floats(-60_000, 60_000, width=32), min_size=1, max_size=50),
    near=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50),
    exponent=st.integers(-10, 0),
)
def test_scaled_gelu_is_gelu_at_another_scale(values: list[float], near: list[float], exponent: int) -> None:
    scale, x = 2.0**exponent, torch.tensor(values + near)
    found, expected = ScaledGELU(scale)(x * scale) / scale, torch.nn.functional.gelu(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert ((found * scale).abs() <= (x * scale).abs()).all()


def test_downsampling_with_a_huge_output_is_scaled_with_its_stage() -> None:
    encoder = FastViT.from_checkpoint(RandomCheckpoint("small-0.5b"))
    noise = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    expected, scales = encoder(noise), stream_scales(stream_maxima(encoder, [noise]))
    assert scales[:4] == [1.0] * 4
    assert scales[4] <= 1 / 8
    network, x, largest = rewrite(encoder, 256, scales), noise, 0.0
    for part in network:
        x = part(x)
        largest = max(largest, float(x.abs().max()))
    assert relative_error(x, expected) <= 1e-5
    assert largest <= STREAM_LIMIT


def test_path_convolutions_are_those_between_stages() -> None:
    with torch.device("meta"):
        network = rewrite(FastViT(FastViTConfig()).eval(), 1024)
    assert [network.get_submodule(name).out_channels for name in path_convolutions(network)] == [
        96, 96, 192, 384, 768, 1536,
    ]  # fmt: skip


def test_round_means_are_close_and_equal_after_rounding_errors() -> None:
    means = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = round_means(means)
    assert ((rounded - means).abs() <= means.abs() / 16).all()
    assert (round_means(means * (1 + 1e-7)) == rounded).all()
    assert round_means(torch.zeros(1)) == 0
