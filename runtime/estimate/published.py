"""What others measured: shown beside our figures under their name, and what the roofline is fitted on.

The FastVLM paper (Vasu et al., CVPR 2025, arXiv 2412.13303) shows the time to first token of the 0.5B on an "M1
MacBook Pro" in a figure; the numbers here are read off it, so they are as good as reading a figure is. Its time to
first token is the encoder's plus the decoder's prefill. How long its prompt was is not known here, and three chips went
by that name.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "FastVLM paper (arXiv 2412.13303), read off its figure"
MACHINE = "M1 MacBook Pro"
CANDIDATES = ("M1", "M1 Pro", "M1 Max")
"""The chips that an M1 MacBook Pro can have: one Neural Engine, three GPUs."""


@dataclass(frozen=True)
class Point:
    image_size: int
    ttft_ms: float
    model: str = "FastVLM 0.5B"
    machine: str = MACHINE
    source: str = PAPER

    @property
    def label(self) -> str:
        return f"{self.model}, {self.image_size} px, {self.machine}"


POINTS = (Point(256, 32.0), Point(512, 51.0), Point(768, 96.0), Point(1024, 167.0))
