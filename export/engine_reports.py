"""The reports of users about each stored form of weights and inputs on the Neural Engine: one table.

The executor computes what a package says. In 2026 reports named forms that the engine, or its compiler, computes in
another way. None of it can be seen off a Mac, so exports in such a form have a note, and `docs/export.md` shows the
table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ..quant.schemes import BLOCKWISE, COARSE_PALETTE, PALETTE_BITS, W8A8

State = Literal["agrees", "wrong", "fails to load", "no report"]

EVERY_OS = ("ios17", "ios18")


@dataclass(frozen=True)
class EngineReport:
    """The published experience with one stored form. Nothing of it was measured here."""

    schemes: tuple[str, ...]
    form: str
    """The form in the package."""
    state: State
    seen: str
    """The observation, with its machine and tools."""
    source: str
    """The address of the report. Empty if there is none."""
    advice: str = ""
    """The alternative, or the check to make. Empty if the form is one to use."""
    min_os: tuple[str, ...] = EVERY_OS
    """The systems whose operations the form has."""

    @property
    def note(self) -> str:
        """The note of an export in this form: one line."""
        where = f" for {self.min_os[0]}" if len(self.min_os) == 1 else ""
        reason = f"{self.seen} ({self.source})" if self.source else self.seen
        return f"{'/'.join(self.schemes)}{where}: computed here, not seen on the engine. {reason}. {self.advice}."


ISSUES = "https://github.com/apple"

REPORTS = (
    EngineReport(
        ("fp16",), "float16", "agrees",
        "cosine 0.9999 for Qwen3-Embedding-0.6B, M4, macOS 26.6, coremltools 9.0", f"{ISSUES}/coremltools/issues/2716",
    ),
    EngineReport(
        ("int8",), "linear, symmetric, a scale per output channel", "agrees",
        "cosine 0.9992 for the same model and machine", f"{ISSUES}/coremltools/issues/2716",
    ),
    EngineReport(
        ("pal8", "pal6"), "a palette per weight", "agrees",
        "8 bits: cosine 0.9975 in a vision tower, iPhone 16 Pro Max, iOS 27, in Core AI with a palette per 32 "
        "channels; 6 bits: no report", f"{ISSUES}/coreai-models/issues/279", min_os=("ios17",),
    ),
    EngineReport(
        (COARSE_PALETTE,), "a palette of 16 values per weight", "wrong",
        "cosine 0.63 on the engine and 0.03 on the CPU for Qwen3-Embedding-0.6B, M4, macOS 26.6, coremltools 9.0",
        f"{ISSUES}/coremltools/issues/2716", "Use int8 or pal8, or compare on your Mac: verify --on-device",
        min_os=("ios17",),
    ),
    EngineReport(
        (COARSE_PALETTE,), "a palette of 16 values per 32 output channels", "no report",
        "The grouping has cosine 0.9975 with 8 bits in Core AI; palettes of iOS 18 under a scale, which packages "
        "written here do not have, end the process at load on macOS 26", f"{ISSUES}/coreai-models/issues/279",
        "Compare on your Mac: verify --on-device", min_os=("ios18",),
    ),
    EngineReport(
        tuple(scheme for scheme in PALETTE_BITS if scheme != COARSE_PALETTE), "a palette in iOS 18's operation",
        "fails to load",
        "MPSGraph ends the process when it loads palettes under a scale, which packages written here do not have; one "
        "report is of a palette that was written without, macOS 26", f"{ISSUES}/coremltools/pull/2688",
        "Export for iOS 17, or compare on your Mac: verify --on-device", min_os=("ios18",),
    ),
    EngineReport(
        (BLOCKWISE,), "linear, a scale per block of inputs", "wrong",
        "cosine 0.367 with 8 bits in blocks in a vision tower, iPhone 16 Pro Max, iOS 27, without an error",
        f"{ISSUES}/coreai-models/issues/279", "Use int8, or pal8", min_os=("ios18",),
    ),
    EngineReport(
        (W8A8,), "int8 weights, and inputs between quantize and dequantize", "no report",
        "A product of two tensors between quantize and dequantize gave 2 to 8 times its value, in Core AI; packages "
        "written here have convolutions there, and no product", f"{ISSUES}/coreai-torch/issues/112",
        "Compare on your Mac: verify --on-device",
    ),
)  # fmt: skip
"""The reports, one for each form that an export writes. An export in a form with `advice` has a note."""


def engine_notes(schemes: Collection[str], min_os: str) -> tuple[str, ...]:
    """Returns the notes for the weights' `schemes` in a package for `min_os`, in the order of `REPORTS`."""
    return tuple(
        report.note
        for report in REPORTS
        if report.advice and min_os in report.min_os and not set(schemes).isdisjoint(report.schemes)
    )


def report_of(scheme: str, min_os: str) -> EngineReport:
    """Returns the report of a scheme in packages for `min_os`."""
    return next(report for report in REPORTS if scheme in report.schemes and min_os in report.min_os)
