"""The search of mixed bits: trades against all plans, and plans against a network that runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.models.errors import UsageError
from fastvlm.quant.encoder import Rounding, convolutions, input_means
from fastvlm.quant.schemes import stored_bytes
from fastvlm.quant.search import (
    MARGIN_DB,
    PROBES,
    Float16Results,
    Images,
    Option,
    applied,
    best_trades,
    candidates,
    decibels,
    float16_outputs,
    measured_options,
    next_budget,
    noise_of,
    outputs,
    plan_bytes,
    rounded,
    search,
    search_bytes,
    within_bytes,
    within_noise,
)

DRAW = np.random.default_rng(2)
OPTIONS = {
    str(i): best_trades(
        [
            Option("fp16", 160, 0.0),
            *(Option(f"pal{b}", 10 * b, float(DRAW.random() * 2.0 ** (-2 * b))) for b in (8, 6, 4)),
        ]
    )
    for i in range(5)
}


def all_plans() -> list[tuple[int, float]]:
    return [(sum(o.nbytes for o in plan), sum(o.noise for o in plan)) for plan in product(*OPTIONS.values())]


def cost(plan: dict[str, str]) -> tuple[int, float]:
    chosen = [next(o for o in OPTIONS[name] if o.scheme == scheme) for name, scheme in plan.items()]
    return sum(o.nbytes for o in chosen), sum(o.noise for o in chosen)


@pytest.mark.parametrize("budget", [1e-5, 1e-4, 1e-3, 3e-3, 1.0])
def test_noise_budget_is_kept_with_bytes_near_the_least(budget: float) -> None:
    size, noise = cost(within_noise(OPTIONS, budget))
    assert noise <= budget
    least = min(size for size, noise in all_plans() if noise <= budget)
    assert least <= size <= least + 160 - 40  # one weight's worth


@pytest.mark.parametrize("budget", [200, 260, 333, 500, 800])
def test_byte_budget_is_kept_with_noise_near_the_least(budget: int) -> None:
    plan = within_bytes(OPTIONS, budget)
    assert plan is not None
    size, noise = cost(plan)
    assert size <= budget
    least = min(noise for size, noise in all_plans() if size <= budget)
    assert noise <= 4 * least + 1e-6
    assert within_bytes(OPTIONS, 199) is None


def test_options_off_the_convex_hull_are_left_out() -> None:
    options = [Option("fp16", 160, 0.0), Option("pal8", 80, 0.9), Option("pal6", 60, 0.95), Option("pal4", 40, 1.0)]
    assert [option.scheme for option in best_trades(options)] == ["fp16", "pal4"]
    options[2] = Option("pal6", 60, 0.1)
    assert [option.scheme for option in best_trades(options)] == ["fp16", "pal6", "pal4"]


def test_next_budget_is_between_passed_and_failed() -> None:
    assert next_budget(0.0, np.inf, 0.3) == 0.3
    assert next_budget(0.1, 0.4, 0.3) == 0.3
    assert next_budget(0.1, 0.4, 0.5) == pytest.approx(0.2)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 64, 3, 2, 1)]
    for _ in range(4):
        parts += [nn.Sequential(nn.Conv2d(64, 96, 1), nn.GELU()), nn.Conv2d(96, 64, 1)]
    network = nn.Sequential(*parts).requires_grad_(False).eval()
    for conv in convolutions(network).values():
        conv.weight.mul_(2.5)  # as drawn, biases would be larger than the effect of the image
    return network


@pytest.fixture
def images() -> Images:
    made = [DRAW.random((1, 3, 32, 32), dtype=np.float32) for _ in range(4)]
    return Images(made[:2], made[2:])


def measured(network: nn.Sequential, images: Images) -> tuple[Rounding, dict[str, list[Option]]]:
    rounding = Rounding(network, candidates(network), images.calibration)
    return rounding, measured_options(network, rounding, images.trial)


def snr_db(network: nn.Sequential, plan: Mapping[str, str], images: Images) -> float:
    expected = [outputs(network, image) for image in images.trial]
    stored = Rounding(network, list(plan), images.calibration).by_plan(plan)
    with applied(network, stored, input_means(network, stored, images.calibration)):
        found = [float16_outputs(network, image) for image in images.trial]
        return min(decibels(noise_of([a], [b])) for a, b in zip(expected, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("above_pal4_db", [-3.0, 3.0, 10.0, 18.0, 26.0])
def test_plan_keeps_the_floor_in_fewer_bytes_than_one_scheme(
    network: nn.Sequential, images: Images, above_pal4_db: float
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rounding, options = measured(network, images)
    assert options.keys() == {name for name in convolutions(network) if name != "0"}
    floor = snr_db(network, dict.fromkeys(options, "pal4"), images) + above_pal4_db
    found = search(network, options, rounding, images, min_snr=floor, on_stage=lambda _: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert found.plan.keys() == convolutions(network).keys()
    assert found.plan["0"] == "fp16"
    assert snr_db(network, found.plan, images) == pytest.approx(found.snr_db, abs=1e-6)
    assert found.snr_db >= floor + MARGIN_DB
    fewer = (
        {**found.plan, name: choices[step + 1].scheme}
        for name, choices in options.items()
        for step in range(len(choices) - 1)
        if choices[step].scheme == found.plan[name]
    )
    enough = found.snr_db < floor + MARGIN_DB + 3 or all(
        snr_db(network, plan, images) < floor + MARGIN_DB for plan in fewer
    )
    assert enough, "not more bits than needed"
    for scheme in PROBES:
        uniform = dict.fromkeys(options, scheme)
        if snr_db(network, uniform, images) >= floor + MARGIN_DB:
            convs = convolutions(network)
            size = sum(stored_bytes(convs[name].weight.shape, scheme) for name in options)
            assert plan_bytes(options, found.plan) <= size


def test_plan_is_judged_by_the_image_with_the_most_noise(network: nn.Sequential, images: Images) -> None:
    """A dim image has little energy, and its noise would not be seen in the noise of both."""
    rounding, options = measured(network, images)
    dim = Images(images.calibration, [*images.trial, images.trial[0] * np.float32(0.05)])
    floor = snr_db(network, dict.fromkeys(options, "pal6"), images)
    plans = [
        search(network, options, rounding, chosen, min_snr=floor, on_stage=lambda _: None).plan
        for chosen in (images, dim)
    ]
    loss = [snr_db(network, plan, dim) for plan in plans]
    assert loss[0] < floor + MARGIN_DB <= loss[1]


@pytest.mark.slow
def test_gains_predict_the_noise_of_whole_plans(network: nn.Sequential, images: Images) -> None:
    _, options = measured(network, images)
    float16 = 10 ** (-snr_db(network, {}, images) / 10)
    for step in (1, 2, 3):  # each weight's best scheme of 8 bits, then 6, then 4
        plan = {name: choices[step] for name, choices in options.items()}
        predicted = float16 + sum(option.noise for option in plan.values())
        found = snr_db(network, {name: option.scheme for name, option in plan.items()}, images)
        assert decibels(predicted) == pytest.approx(found, abs=2.0)


def test_channel_scales_choose_int8_and_long_tails_a_palette(network: nn.Sequential, images: Images) -> None:
    convs = convolutions(network)
    convs["2"].weight.mul_(2.0 ** -torch.linspace(0, 4, 64)[:, None, None, None])
    convs["4"].weight.copy_(convs["4"].weight ** 5)
    _, options = measured(network, images)
    assert {name: options[name][1].scheme for name in ("2", "4")} == {"2": "int8", "4": "pal8"}


def test_size_is_kept_and_a_smaller_one_refused(network: nn.Sequential, images: Images) -> None:
    rounding, options = measured(network, images)
    found = search_bytes(network, options, rounding, images, max_bytes=40_000, fixed_bytes=5_000)
    assert plan_bytes(options, found.plan) <= 35_000
    with pytest.raises(UsageError, match=r"max_bytes must be at least \d+ for this encoder \(got 20000\)"):
        search_bytes(network, options, rounding, images, max_bytes=20_000, fixed_bytes=5_000)


def test_progress_counts_fixed_bytes_and_names_the_images(network: nn.Sequential, images: Images) -> None:
    lines: list[str] = []
    (rounding, options), fixed_bytes = measured(network, images), 3_000_000
    found = search(network, options, rounding, images, min_snr=30.0, fixed_bytes=fixed_bytes, on_stage=lines.append)
    assert search_bytes(
        network,
        options,
        rounding,
        images,
        max_bytes=fixed_bytes + plan_bytes(options, found.plan),
        fixed_bytes=fixed_bytes,
    )
    assert f"encoder at most {(fixed_bytes + plan_bytes(options, found.plan)) / 1e6:.1f} MB, " in lines[-1]
    assert all(line.endswith(" dB on the search's images") for line in lines)


def test_floor_that_no_plan_reaches_leaves_float16(network: nn.Sequential, images: Images) -> None:
    rounding = Rounding(network, ["1.0"], images.calibration)
    options = {"1.0": [Option("fp16", 100, 0.0), Option("pal4", 10, 0.0)]}  # a measurement that is too good
    float16 = snr_db(network, {}, images)
    found = search(network, options, rounding, images, min_snr=float16 - MARGIN_DB - 0.1, on_stage=lambda _: None)
    assert set(found.plan.values()) == {"fp16"}
    found = search(
        network, options, rounding, images, min_snr=float16 - 0.1, on_stage=lambda _: None
    )  # no plan is tried
    assert set(found.plan.values()) == {"fp16"}


def test_floor_above_float16_is_refused_with_a_lower_one(network: nn.Sequential, images: Images) -> None:
    float16 = snr_db(network, {}, images)
    wanted = rf"min_snr must be below the {float16:.1f} dB .* \(got 99\)\. Pass {int(float16 - MARGIN_DB)} or less"
    with pytest.raises(UsageError, match=wanted):
        search(network, {}, Rounding(network, [], []), images, min_snr=99.0, on_stage=lambda _: None)


IMAGE = np.random.default_rng(1).random((1, 3, 8, 8), dtype=np.float32)


def test_convolution_rounds_input_weight_bias_and_result() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3).requires_grad_(False)
    found = float16_outputs(nn.Sequential(conv), IMAGE)
    wide = nn.functional.conv2d(rounded(torch.from_numpy(IMAGE)), rounded(conv.weight), rounded(conv.bias))
    np.testing.assert_array_equal(found, rounded(wide).numpy())
    assert not np.array_equal(found, wide.numpy())


def test_sum_of_two_tensors_is_rounded_and_a_square_is_not() -> None:
    x, y = torch.tensor([1.0001, 3.0003]), torch.tensor([0.5001, 0.25])
    with torch.inference_mode(), Float16Results():
        total, square = x + y, x * x
    assert torch.equal(total, rounded(x + y)) and not torch.equal(total, x + y)
    assert torch.equal(square, x * x) and not torch.equal(square, rounded(x * x))
