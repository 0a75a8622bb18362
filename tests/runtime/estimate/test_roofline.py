"""The estimate: operations counted two ways, and its error on what was published."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.runtime.estimate.chips import CHIPS, SOURCES, chip_named
from fastvlm.runtime.estimate.published import CANDIDATES, POINTS
from fastvlm.runtime.estimate.report import chip_lines, estimate_lines
from fastvlm.runtime.estimate.roofline import (
    Calibration,
    checks,
    estimate,
    parts,
    point_work,
    published_config,
    roofline,
)
from fastvlm.runtime.estimate.work import body_weights, decoder_weights, encoder_cost, encoder_layers, prefill_flops


def test_the_encoder_costs_what_its_census_says() -> None:
    """FastViTHD at 1024 px: 487 GFLOP; 122.5 M of its 125 M parameters are weights of convolutions."""
    cost = encoder_cost(FastViTConfig(), 1024, bits=16)
    assert cost.flops == 486_707_822_592
    assert cost.weight_bytes == pytest.approx(245e6, rel=1e-3)
    small = encoder_cost(FastViTConfig(), 256, bits=16)
    assert 16 < cost.flops / small.flops < 16.5  # attention grows faster than the rest


def test_the_encoder_has_its_convolutions_and_products() -> None:
    """198 convolutions and 12 matrix products: the census of the exported program at any size."""
    layers = list(encoder_layers(FastViTConfig(), 512))
    assert len(layers) == 198 + 12
    assert sum(layer.weights == 0 for layer in layers) == 12


def test_the_decoder_has_the_weights_of_the_half_billion() -> None:
    """Qwen2-0.5B: 494 M parameters, of which biases and norms are 0.06 M."""
    decoder = published_config().decoder
    assert decoder_weights(decoder) == pytest.approx(493.96e6, rel=1e-3)
    assert prefill_flops(decoder, 1) == pytest.approx(2 * decoder_weights(decoder), rel=1e-4)
    more = prefill_flops(decoder, 201) - prefill_flops(decoder, 200)
    assert more < 1.6 * body_weights(decoder) * 2  # attention grows, but logits are of the last position alone


def test_error_on_every_published_point(tolerance: Callable[[str], float]) -> None:
    found = checks()
    assert len(found) == len(CANDIDATES) * len(POINTS)
    for one in found:
        assert abs(one.fitted) < tolerance("estimate_fitted"), one
        assert abs(one.left_out) < tolerance("estimate_left_out"), one


def test_larger_chips_are_faster_and_the_range_holds_the_estimate() -> None:
    work = point_work(POINTS[-1])
    found = {chip.name: estimate(work, chip) for chip in CHIPS}
    for one in found.values():
        assert one.low_ms <= one.ttft_ms <= one.high_ms
        assert one.encode_ms > 0 and one.prefill_ms > 0
    for family in ("M1", "M2", "M3", "M4", "M5"):
        assert found[f"{family} Max"].ttft_ms < found[f"{family} Pro"].ttft_ms < found[family].ttft_ms
    # the published machine, by the fit that took it for this chip
    assert found["M1 Pro"].ttft_ms == pytest.approx(POINTS[-1].ttft_ms, rel=0.1)


def test_memory_bounds_what_arithmetic_does_not() -> None:
    work, chip = point_work(POINTS[0]), chip_named("M1")
    _, prefill = roofline(work, chip, 1000.0)
    assert prefill == pytest.approx(work.decoder_bytes / 68.2e6)
    encode, _, overhead = parts(work, chip, Calibration("M1", 0.5, 7.0))
    assert encode == pytest.approx(work.encoder.moved_bytes / 68.2e6)
    work = point_work(POINTS[-1])
    encode, _, overhead = parts(work, chip, Calibration("M1", 0.5, 7.0))
    assert encode == pytest.approx(work.encoder.flops / (0.5 * 11e9))
    assert overhead == 7.0


def test_chips_are_named_as_people_do() -> None:
    assert chip_named("Apple M4 Pro") is chip_named("m4pro") is chip_named("M4-Pro")
    with pytest.raises(UsageError, match="no figures of a chip 'M9'; there are M1, M1 Pro"):
        chip_named("M9")


def test_every_figure_of_a_chip_has_its_source() -> None:
    for chip in CHIPS:
        assert all(source in SOURCES for source in chip.sources)
        assert chip.engine_int8_tops >= chip.engine_tflops > 0
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert {source for chip in CHIPS for source in chip.sources} == set(SOURCES)


def test_estimates_say_that_they_are() -> None:
    text = "\n".join(estimate_lines([estimate(point_work(POINTS[1]), chip_named("M4"))]))
    assert text.startswith("An estimate")
    assert "not a measurement" in text
    assert "if M1 Pro" in text and "M1 Pro, left out" in text
    assert "A18 Pro" in "\n".join(chip_lines())
