"""Every way to run a package, in processes that crash, hang, fail and disagree as Core ML does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.errors import MachineError, UsageError
from fastvlm.runtime import on_device
from fastvlm.runtime.coreml import COMPUTE_UNITS
from fastvlm.runtime.encoder_process import EncoderProcess, Limits
from fastvlm.runtime.encoders import Shapes
from fastvlm.runtime.folder import open_folder
from fastvlm.runtime.on_device import FLOOR_DB, DeviceRun, DeviceVerification, Way, agreement, verify_on_device

pytestmark = pytest.mark.slow

CHILD = str(Path(__file__).with_name("device_child.py"))

Verify = Callable[..., DeviceVerification]


@pytest.fixture
def verify(write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Verify:
    """`verify_on_device` on a Mac whose units behave as the arguments name, such as `verify(CPU_ONLY="NaN")`."""

    def open_child(package: Path, shapes: Shapes, way: Way) -> EncoderProcess:
        return EncoderProcess(
            package,
            shapes,
            backend=way.backend,
            compute_units=way.compute_units,
            precision=way.precision,
            program=(CHILD,),
            limits=Limits(load=60.0, predict=2.0),
        )

    def run(share: Callable[[Path, str], float | None] = lambda *_: 0.99, **behaviours: str) -> DeviceVerification:
        monkeypatch.delenv("FASTVLM_COMPUTE_UNITS", raising=False)
        monkeypatch.setenv("DEVICE_CHILD", json.dumps(behaviours))
        return verify_on_device(
            write_folder(), compute_units=COMPUTE_UNITS, warm_runs=2, opener=open_child, engine_share=share
        )

    return run


def by_label(found: DeviceVerification) -> dict[str, DeviceRun]:
    return {run.way.label: run for run in found.runs}


def test_correct_units_agree_and_are_timed(verify: Verify) -> None:
    found = verify()
    runs = by_label(found)
    assert list(runs) == ["executor, float16", "executor, float32", *COMPUTE_UNITS]
    assert found.passed and found.default.way.compute_units == "CPU_AND_NE"
    assert runs["executor, float32"].snr_db > 50
    for units in COMPUTE_UNITS:
        run = runs[units]
        assert (run.verdict, run.finite, run.signal, run.error) == ("agrees", True, None, None)
        assert run.cosine == pytest.approx(1) and run.snr_db == on_device.MAX_SNR_DB
        assert (run.load_ms, run.compile_ms, run.first_ms) == (800.0, 700.0, 9.0) and run.warm_ms > 0
    assert [runs[units].engine_share for units in COMPUTE_UNITS] == [0.99, None, None, 0.99]
    assert found.missing == ()


@pytest.mark.parametrize(
    ("behaviour", "verdict", "signal", "finite"),
    [
        ("SIGABRT at load", "crashed with SIGABRT", "SIGABRT", None),
        ("SIGKILL at predict", "crashed with SIGKILL", "SIGKILL", None),
        ("SIGSEGV when warm", "crashed with SIGSEGV", "SIGSEGV", None),
        ("NSError", "failed", None, None),
        ("NaN", "not finite", None, False),
        ("scaled channels", "wrong features", None, True),
    ],
)
def test_faulty_default_fails_and_the_rest_is_still_run(
    verify: Verify, behaviour: str, verdict: str, signal: str | None, finite: bool | None
) -> None:
    found = verify(CPU_AND_NE=behaviour)
    run = found.default
    assert (run.verdict, run.signal, run.finite) == (verdict, signal, finite)
    assert not found.passed
    (failure,) = found.failures
    assert failure.startswith(f"CPU_AND_NE: {verdict}") and "\n" not in failure
    assert [one.verdict for one in found.runs[1:] if one is not run] == ["agrees"] * 4
    assert run.engine_share is None or run.error is None


def test_reason_of_core_ml_is_in_the_row(verify: Verify) -> None:
    assert "error code: -14" in verify(CPU_ONLY="NSError").runs[3].error
    assert "MLIR pass manager failed" in verify(CPU_ONLY="SIGABRT at load").runs[3].error


def test_faulty_unit_that_is_not_the_default_is_a_note(verify: Verify) -> None:
    found = verify(ALL="SIGABRT at load", CPU_AND_GPU="scaled channels")
    assert found.passed
    assert [note for note in found.notes if "Do not choose it" in note] == [
        "CPU_AND_GPU does not work here (wrong features). Do not choose it",
        "ALL does not work here (crashed with SIGABRT). Do not choose it. Apple's app loads packages with ALL",
    ]


def test_units_that_generate_uses_follow_the_environment(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "default_compute_units", lambda: "CPU_ONLY")
    assert verify(CPU_AND_NE="NaN").passed
    assert not verify(CPU_ONLY="NaN").passed


def test_executor_that_fails_leaves_nothing_to_compare_with(verify: Verify) -> None:
    found = verify(float16="NSError")
    assert not found.passed
    assert found.failures[0].startswith("executor, float16: failed")
    assert {run.snr_db for run in found.runs} == {None}


def test_unit_that_hangs_is_ended(verify: Verify) -> None:
    run = by_label(verify(ALL="hangs"))["ALL"]
    assert run.verdict == "failed" and "did not answer within 2 s" in run.error


def test_features_that_vary_are_noted(verify: Verify) -> None:
    assert "CPU_ONLY: another run on the same image gave other features" in verify(CPU_ONLY="varies").notes


def test_low_share_of_the_engine_is_noted(verify: Verify) -> None:
    found = verify(share=lambda package, units: 0.12 if units == "CPU_AND_NE" else 0.97)
    assert [note for note in found.notes if "Neural Engine" in note] == [
        "CPU_AND_NE: only 12% of the estimated cost is on the Neural Engine"
    ]
    assert found.passed


def test_plan_that_cannot_be_had_is_noted(verify: Verify) -> None:
    def refuse(package: Path, units: str) -> float:
        raise MachineError("compute plans need macOS 14.4")

    found = verify(share=refuse)
    assert "CPU_AND_NE: Core ML's compute plan is not available: compute plans need macOS 14.4" in found.notes
    assert found.default.engine_share is None and found.passed
    assert "CPU_AND_NE: Core ML's compute plan is not available: a plan needs macOS 14.4" in " ".join(
        verify(share=lambda *_: None).notes
    )


def test_small_package_is_said_to_prove_nothing(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("do not predict those of FastViTHD" in note for note in verify().notes)
    monkeypatch.setattr(on_device, "SMALL_PACKAGE_BYTES", 1)
    assert not any("FastViTHD" in note for note in verify().notes)


def test_json_holds_every_figure(verify: Verify) -> None:
    found = json.loads(json.dumps(verify(ALL="SIGKILL at predict").as_dict()))
    assert found["default"] == "CPU_AND_NE" and found["passed"] and found["baseline"] == "executor, float16"
    row = found["runs"][-1]
    assert (row["compute_units"], row["verdict"], row["signal"]) == ("ALL", "crashed with SIGKILL", "SIGKILL")
    assert set(row) >= {"snr_db", "cosine", "finite", "load_ms", "first_ms", "warm_ms", "engine_share", "default"}


def test_folder_with_its_encoder_in_mlx_is_refused(
    write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder()
    opened = open_folder(folder)
    monkeypatch.setattr(on_device, "open_folder", lambda _: opened)
    shutil.rmtree(opened.package)
    with pytest.raises(UsageError, match=r"no fastvithd\.mlpackage to run"):
        verify_on_device(folder)


def test_what_is_missing_off_a_mac_is_reported() -> None:
    (text,) = on_device.missing(())
    assert "a Mac only" in text and "not measured here" in text
    assert list(on_device.missing(COMPUTE_UNITS)) == []


def test_agreement_is_signal_over_noise() -> None:
    features = np.ones((1, 4, 8), np.float32)
    assert agreement(features, features * 1.1) == (pytest.approx(20, abs=1e-3), pytest.approx(1))
    assert agreement(features, features) == (on_device.MAX_SNR_DB, pytest.approx(1))
    snr_db, cosine = agreement(features, -features)
    assert cosine == pytest.approx(-1) and snr_db < FLOOR_DB
    assert agreement(np.zeros((1, 4, 8), np.float32), features) == (-on_device.MAX_SNR_DB, 0)
