"""The machine and the versions of a measurement."""

from __future__ import annotations

from fastvlm.runtime.benchmark.machine import environment, mac_power, peak_memory_bytes


def test_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["cores"] >= 1
    assert all(found[name] for name in ("chip", "os", "python", "fastvlm", "mlx", "torch", "coremltools", "blas"))
    peak = peak_memory_bytes()
    assert peak is None or peak > 20e6


def test_power_of_a_mac_is_read_from_pmset() -> None:
    """Both outputs are shortened. They were not printed by a Mac."""
    source = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1234)\t85%; discharging; 5:12 remaining"
    settings = (
        "System-wide power settings:\nCurrently in use:\n standby              1\n lowpowermode         1\n sleep 1"
    )
    assert mac_power(source, settings) == "Battery power, low power mode on"
    assert mac_power("Now drawing from 'AC Power'", settings.replace("mode         1", "mode         0")) == (
        "AC power, low power mode off"
    )
    assert mac_power("", "") == ""
