"""The published figures: peak rates of Apple's chips and times to first token, each with its source.

Neural Engine: operations per second as Apple states them. Up to the M3 and the A16 these are float16 (measured on an
M1: about 12 float16 TFLOPS). From the A17 Pro and the M4 on they are int8, twice the float16 rate (measured: 19 on an
M4, 18.2 on an M5). The gain of w8a8 is less certain: on an M4 int8 was no faster (m4-engine), on an M5 1.88 times as
fast (m5-engine). GPU: float32 TFLOPS of the largest configuration. Apple's GPUs have the same rate in float16, and
the matrix units of the M5 are not counted. Memory: bandwidth of the largest configuration.

The A19, A19 Pro and M3 Ultra are missing for lack of a source. Chips older than the A16 are left out, as Apple did not
test FastVLM on them. An Ultra has two Neural Engines, of which one is counted.

Times: the FastVLM paper (Vasu et al., CVPR 2025, arXiv 2412.13303) has a figure with the TTFT of the 0.5B on an "M1
MacBook Pro". The numbers here are read off that figure, so they have its precision. TTFT in the paper is the encoder
plus the decoder's prefill. The length of the prompt is unknown, and three chips were sold under that name.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...models.errors import UsageError

SOURCES = {
    "m1-m2": "spy.macrumors.com/threads/apple-silicon-mac-chips.2471322",
    "m1-family": "github.com/ggml-org/llama.cpp/pull/1642 (68.2, 204.8, 409.6 GB/s), 9to5mac.com/2021/10/18",
    "m1-engine": "spy.macrumors.com/threads/apple-silicon-mac-chips.2471322: the M1's, also in the M1 Pro and Max",
    "m1-ultra": "zdnet.com/article/apple-m1-ultra-blows-away-the-competition (22 TOPS by two engines)",
    "m2-family": "eenewseurope.com: Apple's M2 Ultra (15.8 TOPS); fonearena.com/blog/383284 (200, 400 GB/s)",
    "m2-ultra": "beebom.com/apple-m2-ultra (31.6 TOPS by two engines)",
    "m3-engine": "profilbaru.com/article/Apple_M3, a copy of Wikipedia's (18 TOPS)",
    "m3-memory": "hackintosh.org topic 220079 (100, 150 GB/s); macmegasite.com/2024/10/30 (400 GB/s)",
    "m4": "engadget.com/apples-m4-chip-arrives-with-a-big-focus-on-ai-142448428.html",
    "m4-engine": "maderix.substack.com/p/inside-the-m4-apple-neural-engine-615 (19 TFLOPS float16 measured)",
    "m4-family": "macrumors.com/2024/10/30/apple-announces-m4-max-chip; thedailyscout.com (38 TOPS, 273, 546 GB/s)",
    "m5": "the-decoder.com/apples-m5-chip-brings-faster-ai-to-macbook-ipad-and-vision-pro (153 GB/s)",
    "m5-engine": "Anemll's gist 49e219448ad350ef67ff4bfdcb9ebd8c (18.2 TFLOPS float16, 34.2 TOPS int8 measured)",
    "m5-family": "lowyat.net/2026/385170 (307, 614 GB/s); the engine as the M5's: 16 cores too",
    "hf-gpu": "huggingface.co, packages/tasks/src/hardware.ts in huggingface.js",
    "a16": "topcpu.net, A16 against A13 (1.79 TFLOPS, 51.2 GB/s)",
    "a16-engine": "review-phone.com/a16-bionic-chip (17 TOPS)",
    "a17-gpu": "hmc-tech.com, 6-core A17 Pro (2.15 TFLOPS)",
    "a17-memory": "notebookcheck.net 886423: the A18's is 17 % above it; as the A16's",
    "a17-engine": "grokipedia.com/page/Apple_A17 (35 TOPS)",
    "a18-gpu": "hmc-tech.com, 5-core A18 (1.86 TFLOPS); the A18 Pro by its sixth core",
    "a18": "notebookcheck.net 886423 (17 % above 51.2 GB/s); techmehr.com/2024/09/10 (35 TOPS)",
}
"""The source of each figure, by the name in `Chip.sources`."""


@dataclass(frozen=True)
class Chip:
    """The peak rates of one chip."""

    name: str
    engine_tflops: float
    """The Neural Engine's rate in float16."""
    engine_int8_tops: float
    """The Neural Engine's rate with int8 weights and activations, equal to float16 where it is not faster."""
    gpu_tflops: float
    memory_gbps: float
    sources: tuple[str, str, str]
    """The sources of the engine's, the GPU's and the memory's figures, by their names in `SOURCES`."""


CHIPS = (
    Chip("M1", 11, 11, 2.6, 68.2, ("m1-m2", "m1-m2", "m1-family")),
    Chip("M1 Pro", 11, 11, 5.2, 204.8, ("m1-engine", "hf-gpu", "m1-family")),
    Chip("M1 Max", 11, 11, 10.4, 409.6, ("m1-engine", "hf-gpu", "m1-family")),
    Chip("M1 Ultra", 11, 11, 21, 800, ("m1-ultra", "hf-gpu", "m1-ultra")),
    Chip("M2", 15.8, 15.8, 3.6, 100, ("m1-m2", "hf-gpu", "m1-m2")),
    Chip("M2 Pro", 15.8, 15.8, 6.8, 200, ("m2-family", "hf-gpu", "m2-family")),
    Chip("M2 Max", 15.8, 15.8, 13.49, 400, ("m2-family", "hf-gpu", "m2-family")),
    Chip("M2 Ultra", 15.8, 15.8, 27.2, 800, ("m2-ultra", "hf-gpu", "m2-ultra")),
    Chip("M3", 18, 18, 4.1, 100, ("m3-engine", "hf-gpu", "m3-memory")),
    Chip("M3 Pro", 18, 18, 7.4, 150, ("m3-engine", "hf-gpu", "m3-memory")),
    Chip("M3 Max", 18, 18, 14.2, 400, ("m3-engine", "hf-gpu", "m3-memory")),
    Chip("M4", 19, 38, 4.6, 120, ("m4-engine", "hf-gpu", "m4")),
    Chip("M4 Pro", 19, 38, 9.2, 273, ("m4-family", "hf-gpu", "m4-family")),
    Chip("M4 Max", 19, 38, 18.4, 546, ("m4-family", "hf-gpu", "m4-family")),
    Chip("M5", 18.2, 34.2, 5.7, 153, ("m5-engine", "hf-gpu", "m5")),
    Chip("M5 Pro", 18.2, 34.2, 11.4, 307, ("m5-family", "hf-gpu", "m5-family")),
    Chip("M5 Max", 18.2, 34.2, 22.8, 614, ("m5-family", "hf-gpu", "m5-family")),
    Chip("A16", 17, 17, 1.79, 51.2, ("a16-engine", "a16", "a16")),
    Chip("A17 Pro", 17.5, 35, 2.15, 51.2, ("a17-engine", "a17-gpu", "a17-memory")),
    Chip("A18", 17.5, 35, 1.86, 60, ("a18", "a18-gpu", "a18")),
    Chip("A18 Pro", 17.5, 35, 2.23, 60, ("a18", "a18-gpu", "a18")),
)

PAPER = "FastVLM paper (arXiv 2412.13303), read off its figure"
MACHINE = "M1 MacBook Pro"
CANDIDATES = ("M1", "M1 Pro", "M1 Max")
"""The chips of an M1 MacBook Pro. They have equal Neural Engines and different GPUs."""


@dataclass(frozen=True)
class Point:
    """A published time to first token."""

    image_size: int
    ttft_ms: float
    model: str = "FastVLM 0.5B"
    machine: str = MACHINE
    source: str = PAPER

    @property
    def label(self) -> str:
        """The model, the image size and the machine."""
        return f"{self.model}, {self.image_size} px, {self.machine}"


POINTS = (Point(256, 32.0), Point(512, 51.0), Point(768, 96.0), Point(1024, 167.0))


def chip_named(name: str) -> Chip:
    """Returns the chip, whose name may be written `M4 Pro`, `m4pro` or `Apple M4 Pro`. Raises UsageError."""
    wanted = _letters(name).removeprefix("apple")
    for chip in CHIPS:
        if _letters(chip.name) == wanted:
            return chip
    raise UsageError(f"unknown chip {name!r:.40}. Available: {', '.join(chip.name for chip in CHIPS)}.")


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
