"""What is asked of the decoder's weights: bits, groups, and the way to round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..models.errors import UsageError
from ..models.quantization import GROUP_SIZES, Affine, Quantization

DECODER_BITS = (4, 5, 6, 8, 16)
MIXED = "mixed"
MIXED_BITS = (4, 5, 6, 8)
"""What a mixed decoder's matrices choose from. (3 and 2 bits: MLX has them, but rounded to the nearest they reach 15
and 9 dB, too little for any matrix.)"""

QUANTIZERS = ("rtn", "gptq")
DEFAULT_BITS = 8
DEFAULT_GROUP_SIZE = 64
DEFAULT_AVG_BITS = 5.0


@dataclass(frozen=True)
class DecoderScheme:
    """How the decoder's weights are stored. 16 bits: float16, nothing is grouped.

    Raises:
        UsageError: an option has an unknown value, or options contradict each other.
    """

    bits: int | str = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    quantize_embeddings: bool = True
    """As mlx-lm does; off, the embedding table (and with it a tied head) stays float16."""
    quantizer: str = "rtn"
    """`rtn`: each weight to the nearest level, as mlx-lm does; `gptq`: errors made up for, on calibration prompts."""
    avg_bits: float | None = None
    """Of a mixed decoder: bits per quantized weight, with scales and biases, as mlx-lm counts."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """Of a mixed decoder, once measured: bits by saved layer name."""

    def __post_init__(self) -> None:
        if self.bits not in (*DECODER_BITS, MIXED):
            known = ", ".join(map(str, (*DECODER_BITS, MIXED)))
            raise UsageError(f"--decoder-bits should be one of {known}; found {self.bits!r:.20}")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"--group-size should be one of {', '.join(map(str, GROUP_SIZES))}; found {self.group_size}"
            )
        if self.quantizer not in QUANTIZERS:
            raise UsageError(
                f"--decoder-quantizer should be one of {', '.join(QUANTIZERS)}; found {self.quantizer!r:.20}"
            )
        if (self.avg_bits is not None) != self.is_mixed:
            raise UsageError(f"--decoder-avg-bits goes with --decoder-bits {MIXED}, and only with it")
        if self.avg_bits is not None:
            self._check_avg_bits(self.avg_bits)
        odd = [name for name, bits in self.layers.items() if bits not in MIXED_BITS]
        if odd:
            raise UsageError(f"{odd[0]} should have bits of {MIXED_BITS}; found {self.layers[odd[0]]!r:.20}")

    def _check_avg_bits(self, avg_bits: float) -> None:
        least, most = (Affine(self.group_size, bits).bits_per_weight for bits in (MIXED_BITS[0], MIXED_BITS[-1]))
        if not least <= avg_bits <= most:
            raise UsageError(
                f"--decoder-avg-bits should be between {least:g} and {most:g} in groups of {self.group_size}, scales "
                f"and biases included; found {avg_bits:g}"
            )

    @property
    def is_mixed(self) -> bool:
        return self.bits == MIXED

    @property
    def is_quantized(self) -> bool:
        return self.is_mixed or int(self.bits) < 16

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration prompts are looked at."""
        return self.is_quantized and (self.is_unsettled or self.quantizer == "gptq")

    @property
    def is_unsettled(self) -> bool:
        """Whether bits are still to be chosen."""
        return self.is_mixed and not self.layers

    @property
    def bits_per_weight(self) -> float:
        """On average, scales and biases included."""
        if self.avg_bits is not None:
            return self.avg_bits
        return Affine(self.group_size, int(self.bits)).bits_per_weight if self.is_quantized else 16.0

    def with_layers(self, layers: Mapping[str, int]) -> DecoderScheme:
        """A mixed scheme with the bits that were chosen for each layer."""
        return replace(self, layers=dict(layers))

    def applies_to(self, saved: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor is quantized: the decoder's matrices whose rows divide into groups.

        The projector stays float16: it has 1 % of the weights and every image token goes through it.
        """
        if not self.is_quantized or len(shape) != 2 or not saved.startswith("language_model."):
            return False
        if "embed_tokens" in saved and not self.quantize_embeddings:
            return False
        return shape[1] % self.group_size == 0

    def affine(self, layer: str) -> Affine:
        """How the layer of that saved name is stored, if it is quantized at all."""
        if not self.is_mixed:
            return Affine(self.group_size, int(self.bits))
        if layer not in self.layers:
            raise UsageError(f"the recipe names no bits for {layer}: it is for another decoder")
        return Affine(self.group_size, self.layers[layer])

    def quantization(self) -> Quantization | None:
        """As `config.json` says it: for a mixed scheme the commonest bits hold but for the layers that are named."""
        if not self.is_quantized:
            return None
        if not self.is_mixed:
            return Quantization(Affine(self.group_size, int(self.bits)))
        commonest = Counter(self.layers.values()).most_common(1)[0][0] if self.layers else MIXED_BITS[0]
        odd = {name: Affine(self.group_size, bits) for name, bits in self.layers.items() if bits != commonest}
        return Quantization(Affine(self.group_size, commonest), odd)


def decoder_scheme(
    bits: int | str | None = None,
    quantizer: str | None = None,
    avg_bits: float | None = None,
    group_size: int | None = None,
    quantize_embeddings: bool | None = None,
) -> DecoderScheme:
    """The scheme for what was asked; `bits` may be digits, and what is None is as by default.

    Without a quantizer it is GPTQ where that is worth its minutes: below 8 bits. A mixed decoder has `DEFAULT_AVG_BITS`
    unless others are asked for.
    """
    bits = DEFAULT_BITS if bits is None else bits
    if isinstance(bits, str) and bits.isdecimal():
        bits = int(bits)
    return DecoderScheme(
        bits,
        DEFAULT_GROUP_SIZE if group_size is None else group_size,
        quantize_embeddings is not False,
        quantizer or ("rtn" if bits in (8, 16) else "gptq"),
        DEFAULT_AVG_BITS if avg_bits is None and bits == MIXED else avg_bits,
    )
