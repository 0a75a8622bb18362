"""The second judge of an export: what it reads from a package, what it compares, and what it finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.export.judge import ACCUMULATE, FLOAT16_BOUND_DB, Judgement, check_recipe, estimate, judge, take_numbers
from fastvlm.export.options import silent
from fastvlm.export.recipe import PackageInterface
from fastvlm.export.rewrite import rewrite
from fastvlm.export.write_encoder import convert_encoder
from fastvlm.models.errors import UsageError, VerificationError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import PACKAGE_NAME
from fastvlm.models.mlprogram import read_package
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.encoder import apply_weights, convolutions, stored_by_plan
from fastvlm.quant.schemes import PaletteWeight, is_candidate, with_groups

needs_coreai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None,
    reason="the extra coreai is not installed (Apple's wheels: Linux x86_64, macOS 26 and later)",
)

STAGES = ("stem", "stage 0", "stage 1", "output")
ROWS = dict.fromkeys(STAGES, 128.0), dict.fromkeys(STAGES, 58.0)
GOOD = Judgement(
    image_size=256,
    saved_size=1024,
    executor={
        "float32": ROWS[0],
        "float16": {stage: value + 9 for stage, value in ROWS[1].items()},
        ACCUMULATE: ROWS[1],
    },
    executor_floors_db={"stem": 65.0, "stage 0": 65.0, "stage 1": 65.0, "output": 100.0},
    judge={"float32": ROWS[0], "float16": ROWS[1]},
    seconds={"float32": 1.0, "float16": 2.0},
)


def with_rows(side: str, precision: str, changes: dict[str, float]) -> Judgement:
    rows = getattr(GOOD, side)
    return replace(GOOD, **{side: {**rows, precision: {**rows[precision], **changes}}})


@pytest.mark.parametrize("side", ["executor", "judge"])
def test_first_stage_below_the_floor_is_named(side: str) -> None:
    (failure,) = with_rows(side, "float32", {"stage 0": 41.0, "stage 1": 30.0}).failures
    assert "41.0 dB at stage 0" in failure and "stage 1" not in failure


@pytest.mark.parametrize("side", ["executor", "judge"])
def test_first_disagreement_in_float16_is_named(side: str) -> None:
    beyond, within = 58.0 - FLOAT16_BOUND_DB - 0.1, 58.0 - FLOAT16_BOUND_DB + 0.1
    precision = ACCUMULATE if side == "executor" else "float16"
    (failure,) = with_rows(side, precision, {"stem": within, "stage 1": beyond, "output": 20.0}).failures
    assert "first at stage 1" in failure


def test_agreement_passes_and_says_what_was_not_judged() -> None:
    assert GOOD.passed and GOOD.failures == []
    assert "a package of that size" in GOOD.scope and "Neural Engine" in GOOD.scope
    assert "the saved package" in replace(GOOD, saved_size=256).scope


@pytest.mark.slow
@pytest.mark.parametrize(("min_os", "schemes"), [("ios17", ("int8", "pal6")), ("ios18", ("int8", "int4", "pal4"))])
def test_weights_are_read_as_they_are_stored(tmp_path: Path, min_os: str, schemes: tuple[str, ...]) -> None:
    network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 128)
    chosen = [one for one, conv in convolutions(network).items() if is_candidate(conv.weight.numpy())]
    stored = stored_by_plan(network, {one: schemes[i % len(schemes)] for i, one in enumerate(chosen)})
    if min_os == "ios18":
        convs = convolutions(network)
        stored = {one: with_groups(convs[one].weight.numpy(), weight) for one, weight in stored.items()}
        assert any(isinstance(weight, PaletteWeight) and weight.lut.ndim == 2 for weight in stored.values())
    apply_weights(network, stored, {})
    package, interface = tmp_path / "encoder.mlpackage", PackageInterface(min_os=min_os)
    convert_encoder(network, 128, stored, package, metadata={}, on_stage=silent, interface=interface)
    other = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 128)
    found = take_numbers(other, read_package(package))
    assert {one: weight.scheme for one, weight in found.items()} == {one: w.scheme for one, w in stored.items()}
    for one, weight in stored.items():
        parts = ("indices", "lut") if isinstance(weight, PaletteWeight) else ("data", "scale")
        for part in parts:
            assert np.array_equal(getattr(found[one], part), getattr(weight, part)), (one, part)
    for (one, conv), taken in zip(convolutions(network).items(), convolutions(other).values(), strict=True):
        assert torch.equal(conv.weight.half(), taken.weight.half()), one
        assert torch.equal(conv.bias.half(), taken.bias.half()), one


def test_folder_without_a_package_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no Core ML package to judge.*fastvithd\.aimodel is run without it"):
        check_recipe(Path("model"), {"format": "coreai", "quant": "int8"})


@needs_coreai
def test_judge_agrees_with_the_executor_on_tiny(shipped_tiny: Path, tolerance: Callable[[str], float]) -> None:
    found = judge(shipped_tiny, "tiny")
    assert found.passed, found.failures
    assert min(found.judge["float32"].values()) > tolerance("coreai_float32_snr_db")
    assert found.executor["float32"]["output"] > tolerance("coreai_float32_snr_db")
    for stage, ours in found.executor[ACCUMULATE].items():
        assert abs(ours - found.judge["float16"][stage]) < tolerance("coreai_float16_difference_db"), stage
        assert ours <= found.executor["float16"][stage] + 0.5
    assert found.image_size == found.saved_size == 256


@pytest.mark.slow
def test_estimate_grows_with_the_arithmetic(shipped_tiny: Path) -> None:
    program = read_package(shipped_tiny / PACKAGE_NAME)
    executor, coreai = estimate(program)
    fewer = replace(program, operations=program.operations[: len(program.operations) // 2])
    assert 0 < estimate(fewer)[0] < executor < 60 and estimate(fewer)[1] < coreai < 60


@needs_coreai
def test_another_checkpoint_or_size_is_refused(shipped_tiny: Path) -> None:
    with pytest.raises(VerificationError, match="Pass the checkpoint that it was exported from|Export the model again"):
        judge(shipped_tiny, "random:tiny")
    with pytest.raises(UsageError, match="judge_size must be a multiple of 64"):
        judge(shipped_tiny, "tiny", judge_size=100)
