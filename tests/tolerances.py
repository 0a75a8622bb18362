"""Every tolerance of the tests, by stage and dtype, with its reason and the margin that was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    value: float
    reason: str
    measured: str


TOLERANCES = {
    "rewrite_float32": Tolerance(1e-5, "relative to the largest feature; folds in float64, run in float32", "1.4e-6"),
    "rescaled_float32": Tolerance(1e-6, "relative; powers of two are exact but for denormals", "0"),
    "package_fp16_snr_db": Tolerance(55.0, "dB at least, every result rounded to float16", "59.5 dB"),
    "package_int8_snr_db": Tolerance(35.0, "dB at least, every result rounded to float16", "41.7 dB"),
    "decoder_16_snr_db": Tolerance(50.0, "dB at least; weights rounded to float16", "58.7 dB"),
    "decoder_8_snr_db": Tolerance(30.0, "dB at least; affine, groups of 64", "33.4 dB"),
    "decoder_4_snr_db": Tolerance(8.0, "dB at least; affine, groups of 64, random weights", "9.1 dB"),
    "encoder_float32": Tolerance(1e-5, "relative to the largest feature; float32 over some 50 layers", "4.3e-7"),
    "decoder_logits_float32": Tolerance(1e-4, "absolute; float32 sums in another order over 3 layers", "see tests"),
    "projected_float32": Tolerance(1e-4, "absolute; two float32 matrix products", "see tests"),
}
