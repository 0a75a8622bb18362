"""The results of `verify --on-device` and `doctor --deep` as a table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.on_device import DeviceRun, DeviceVerification

NARROW = 100
"""Columns that the table takes where stdout is not a terminal."""


def print_table(found: DeviceVerification) -> None:
    """Prints the table, what is wrong, what is missing, and what to know."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else NARROW)
    table = Table(title=f"{found.image}, compared with the executor in float16", title_justify="left", box=None)
    table.add_column("runs on")
    table.add_column("verdict")
    for name in ("SNR", "cosine", "load", "first", "warm", "engine"):
        table.add_column(name, justify="right")
    for run in found.runs:
        style = "red" if run.fault else None
        table.add_row(*row(run), style=style)
    console.print(table)
    for run in found.runs:
        if run.error:
            write(f"{run.way.label}: {run.error}")
    for text in found.missing:
        write(f"not checked: {text}")
    for text in found.notes:
        write(f"note: {text}")
    if found.passed:
        write(f"passed: {found.default.way.label}, which `generate` uses here, computes what it should")
    else:
        write(f"failed: {'; '.join(found.failures)}")


def row(run: DeviceRun) -> tuple[str, ...]:
    return (
        f"{run.way.label}{' (default)' if run.default else ''}",
        run.verdict,
        "-" if run.snr_db is None else f"{run.snr_db:.1f} dB",
        "-" if run.cosine is None else f"{run.cosine:.6f}",
        milliseconds(run.load_ms),
        milliseconds(run.first_ms),
        milliseconds(run.warm_ms),
        "-" if run.engine_share is None else f"{run.engine_share:.1%}",
    )


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def write(text: str) -> None:
    sys.stdout.write(f"{' '.join(text.split())}\n")
