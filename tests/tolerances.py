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
    "package_fp16_snr_db": Tolerance(55.0, "dB at least, every result rounded to float16", "58.7 dB"),
    "package_int8_snr_db": Tolerance(35.0, "dB at least, every result rounded to float16", "41.6 dB"),
    "package_pal8_snr_db": Tolerance(45.0, "dB at least, every result rounded to float16", "50.8 dB"),
    "package_pal6_snr_db": Tolerance(35.0, "dB at least, every result rounded to float16", "39.0 dB"),
    "package_pal4_snr_db": Tolerance(22.0, "dB at least, every result rounded to float16", "26.6 dB"),
    "palette_error": Tolerance(1.05, "squared error over scikit-learn's; both end in local optima", "0.90 to 1.03"),
    "package_w8a8_snr_db": Tolerance(35.0, "dB at least, every result rounded to float16", "41.7 dB"),
    "package_border_snr_db": Tolerance(50.0, "dB at least; random:tiny at 128 px, whatever goes in and out", "53.9 dB"),
    "rescaled_stream_float32": Tolerance(1e-5, "relative; a stream of 143,345 scaled by a power of two", "0"),
    "rescaled_package_snr_db": Tolerance(50.0, "dB at least, every result rounded to float16", "59.2 dB"),
    "decoder_16_snr_db": Tolerance(50.0, "dB at least; weights rounded to float16", "58.7 dB"),
    "decoder_8_snr_db": Tolerance(30.0, "dB at least; affine, groups of 64", "33.4 dB"),
    "decoder_4_snr_db": Tolerance(8.0, "dB at least; affine, groups of 64, random weights", "9.1 dB"),
    "client_logits_float32": Tolerance(1e-4, "relative; clients' own networks on our weights, float32", "not recorded"),
    "encoder_mlx_float32": Tolerance(
        1e-4, "relative to the largest of each stage; MLX and torch sum in another order", "1.4e-6"
    ),
    "encoder_mlx_bf16_snr_db": Tolerance(38.0, "dB at least; weights in bfloat16, run in float32", "42.4 dB"),
    "encoder_mlx_bf16_results_snr_db": Tolerance(30.0, "dB at least; every result rounded to bfloat16 too", "37.8 dB"),
    "encoder_float32": Tolerance(1e-5, "relative to the largest feature; float32 over some 50 layers", "4.3e-7"),
    "decoder_logits_float32": Tolerance(
        1e-4, "absolute; float32 sums in another order", "2.5e-6 golden, 2.2e-5 at most"
    ),
    "kv_8_bits": Tolerance(5e-3, "relative to the largest logit; keys and values in 8 bits, groups of 64", "1.8e-3"),
    "quantized_attention_float32": Tolerance(1e-5, "absolute; sums in another order, the same 8 bits", "1.9e-6"),
    "quantized_attention_float16": Tolerance(
        2e-2, "absolute; results of up to 6.7, keys rounded to float16 in one form only", "8.1e-3"
    ),
    "projected_float32": Tolerance(1e-4, "absolute; two float32 matrix products", "5.8e-7"),
    "op_float32": Tolerance(2e-6, "relative to the largest; float32 sums in another order than numpy's", "2.4e-7"),
    "encoder_float16_weights": Tolerance(1e-3, "relative to the largest; weights rounded to float16", "2.7e-4"),
    "encoder_float16_results": Tolerance(4e-3, "relative to the largest; every result rounded too", "1.3e-3"),
    "fitted_groups_noise": Tolerance(0.97, "of MLX's own noise, at most; Gaussian weights", "0.86 to 0.94"),
    "gptq_products_gain_db": Tolerance(5.0, "dB less noise than the nearest levels; inputs of a few directions", "8.4"),
    "gptq_logits_gain_db": Tolerance(4.5, "dB less noise at 4 bits; on an image and a text not calibrated on", "5.4"),
    "gptq_importance_gain_db": Tolerance(1.5, "dB less noise than with equal columns; energies of e^2 to 1", "2.7"),
    "tied_head_gain_db": Tolerance(1.5, "dB less noise of logits than the nearest levels; random weights", "2.9"),
    "mixed_divergence": Tolerance(0.95, "of the KL at uniform bits of the same bytes, at most", "0.89 and 0.75"),
    "estimate_fitted": Tolerance(0.12, "share of a published time; two fitted numbers for four points", "0.09"),
    "estimate_left_out": Tolerance(0.35, "the same without the point; 256 px is far from the others", "0.29"),
    "coreai_float32_snr_db": Tolerance(120.0, "dB at least, any stage; float32 sums in another order", "127.3 dB"),
    "coreai_asset_snr_db": Tolerance(
        50.0, "dB at least, an asset's float16 against torch with the same weights", "55.7 dB"
    ),
    "coreai_float16_difference_db": Tolerance(
        1.0,
        "dB between the SNRs of float16-accumulate and Core AI, any stage; convolutions sum in another order",
        "0.7 dB",
    ),
}
