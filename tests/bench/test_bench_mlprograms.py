"""A few of the small encoders, converted and compared with torch, and a folder of packages, run one by one."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fastvlm.models.versions import import_coremltools

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "target", "precision", "limit"),
    [
        ("mobilenet_v3", "iOS15", "float16", 5e-3),
        ("pyramid", "iOS17", "float32", 1e-5),
        ("queries", "iOS17", "float32", 1e-5),
        ("vit_grouped", "iOS18", "float32", 1e-5),
        ("lstm_both_ways", "iOS16", "float32", 1e-5),
        ("text_conv", "iOS18", "float16", 5e-3),
    ],
)
def test_converted_encoder_agrees_with_torch(
    bench: Callable[[str], ModuleType], name: str, target: str, precision: str, limit: float
) -> None:
    (row,) = bench("bench_mlprograms").measure(import_coremltools(), name, [target], [precision])
    assert row["result"] == "runs"
    assert row["error"] <= limit


def test_missing_weights_are_written_and_packages_run(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ct = import_coremltools()
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 8, 6, 6))])
    def network(x):
        return mb.conv(x=x, weight=np.ones((8, 8, 3, 3), np.float32))

    model = ct.convert(network, minimum_deployment_target=ct.target.iOS17, skip_model_load=True)
    model.save(str(tmp_path / "packages" / "conv.mlpackage"))
    next((tmp_path / "packages").rglob("weight.bin")).unlink()
    report = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["bench_packages.py", str(tmp_path / "packages"), "--random-weights", "--out", str(report)]
    )
    bench("bench_packages").main()
    (row,) = map(json.loads, report.read_text().splitlines())
    assert (row["result"], row["weights"], row["kinds"]["conv"]) == ("runs", "random", 1)
    assert "1 of 1 without loops or branches run" in capsys.readouterr().out
