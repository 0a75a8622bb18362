"""The machine and the versions of a measurement."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

import pytest

from fastvlm.runtime.benchmark import machine
from fastvlm.runtime.benchmark.machine import environment, mac_power, peak_footprint_bytes, peak_memory_bytes

RUSAGE_INFO_V4 = """
    user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size resident_size phys_footprint
    proc_start_abstime proc_exit_abstime child_user_time child_system_time child_pkg_idle_wkups child_interrupt_wkups
    child_pageins child_elapsed_abstime diskio_bytesread diskio_byteswritten cpu_time_qos_default
    cpu_time_qos_maintenance cpu_time_qos_background cpu_time_qos_utility cpu_time_qos_legacy
    cpu_time_qos_user_initiated cpu_time_qos_user_interactive billed_system_time serviced_system_time logical_writes
    lifetime_max_phys_footprint instructions cycles billed_energy serviced_energy interval_max_phys_footprint
    runnable_time
""".split()
"""The 64-bit fields of Apple's `struct rusage_info_v4`, behind 16 bytes of a UUID."""


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


def rusage(values: dict[str, int]) -> Any:
    """`proc_pid_rusage` of a Mac, as it fills its buffer."""

    def call(pid: int, flavor: int, buffer: Any) -> int:
        assert (pid, flavor) == (os.getpid(), 4)
        content = bytes(16) + struct.pack(f"<{len(RUSAGE_INFO_V4)}Q", *(values.get(name, 7) for name in RUSAGE_INFO_V4))
        assert len(buffer) == len(content)
        ctypes.memmove(buffer, content, len(content))
        return 0

    return call


def test_peak_on_a_mac_is_the_physical_footprint() -> None:
    assert peak_footprint_bytes(rusage({"lifetime_max_phys_footprint": 3 << 32})) == 3 << 32
    assert peak_footprint_bytes(rusage({"lifetime_max_phys_footprint": 0})) is None
    assert peak_footprint_bytes(lambda *_: -1) is None


def test_peak_on_a_mac_without_a_footprint_is_the_resident_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "darwin")  # and this system's library has no proc_pid_rusage
    assert peak_memory_bytes() > 20e3  # Linux counts kilobytes
    monkeypatch.setattr(machine, "peak_footprint_bytes", lambda: 123)
    assert peak_memory_bytes() == 123
