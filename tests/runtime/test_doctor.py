"""`fastvlm doctor`: each fault that a user may have is found, with its remedy."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from fastvlm.models.errors import MachineError
from fastvlm.models.versions import import_coremltools, is_tested, release
from fastvlm.runtime import doctor


def pretend_installed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    """Writes the metadata that pip installs, in front of the real package's."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("name", "version"), [("numpy", "2.4.0"), ("numpy", "1.20"), ("coremltools", "8.3.0"), ("torch", "2.99")]
)
def test_untested_version_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    pretend_installed(tmp_path, monkeypatch, name, version)
    (finding,) = [finding for finding in doctor.packages() if finding.subject == name]
    assert finding.state == "limited" and finding.detail.startswith(f"{version}, tested with >=")
    assert finding.advice.startswith(f'pip install "{name}>=')


def test_installed_versions_are_tested_ones() -> None:
    assert {finding.state for finding in doctor.packages()} == {"ok"}
    assert doctor.python().state == "ok"


@pytest.mark.parametrize("version", ["3.10.14", "3.14.0"])
def test_untested_python_is_found(version: str) -> None:
    assert doctor.python(version).state == "limited"


def test_conversion_is_refused_with_a_version_known_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(tmp_path, monkeypatch, "numpy", "2.4.1")
    with pytest.raises(MachineError, match=r'numpy 2\.4\.1 does not work.*pip install "numpy>=1\.26,<2\.4"'):
        import_coremltools()


def test_missing_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert {finding.state for finding in doctor.packages()} == {"missing"}


def test_hub_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert doctor.hub(address).state == "ok"
    closed = doctor.hub(address)
    assert closed.state == "limited" and "cannot be reached" in closed.detail
    assert doctor.hub("http://[").state == "limited"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.hub(address).detail == "HF_HUB_OFFLINE is set"


def test_folder_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GB free" in doctor.disk(tmp_path).detail
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # root may write anywhere
    assert doctor.disk(tmp_path).advice.startswith("change to a folder that you own")


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("9.0b1", (9,)), ("dev", ()), ("2.4.0rc1", (2, 4))]
)
def test_release_is_the_leading_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


def test_range_ends_before_the_second_version() -> None:
    assert is_tested("numpy", "2.3.99") and not is_tested("numpy", "2.4") and not is_tested("numpy", "2.4.0rc1")


ENGINE, GPU, CPU = "MLNeuralEngineComputeDevice", "MLGPUComputeDevice", "MLCPUComputeDevice"


@pytest.mark.parametrize(
    ("devices", "state", "detail"),
    [
        ([ENGINE, GPU, CPU], "ok", "Core ML on CPU_AND_NE"),
        ([GPU, CPU], "limited", "Core ML without a Neural Engine (it has GPU, CPU)"),
        ([], "limited", "Core ML without a Neural Engine (it has nothing)"),
    ],
)
def test_mac_without_an_engine_is_found(
    devices: list[str], state: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    found = doctor.vision(lambda: devices)
    assert found.state == state and found.detail.startswith(detail)
    assert ("FASTVLM_COMPUTE_UNITS=CPU_ONLY" in found.advice) is (state == "limited")


def test_devices_that_cannot_be_listed_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[str]:
        return doctor.core_ml_devices((sys.executable, "-c", "import sys; sys.exit('needs macOS 14')"))

    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    found = doctor.vision(refuse)
    assert found.state == "limited" and "needs macOS 14" in found.detail and "--deep" in found.advice


def test_devices_are_listed_by_a_process_of_their_own() -> None:
    command = (sys.executable, "-c", f"import json; print(json.dumps([{ENGINE!r}]))")
    assert doctor.core_ml_devices(command) == [ENGINE]
    with pytest.raises(MachineError, match="cannot be listed"):
        doctor.core_ml_devices((sys.executable, "-c", "import os; os.abort()"))


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has devices")
@pytest.mark.slow
def test_devices_are_asked_of_coremltools() -> None:
    with pytest.raises(MachineError, match="cannot be listed"):
        doctor.core_ml_devices()
