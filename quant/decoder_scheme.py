"""The scheme of the decoder's weights: bits, groups, and rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..models.errors import UsageError
from ..models.quantization import GROUP_SIZES, Affine, Quantization

DECODER_BITS = (4, 5, 6, 8, 16)
"""The uniform widths of a decoder's weights. 16 is float16."""
MIXED = "mixed"
"""The value of `bits` for a width per matrix."""
MIXED_BITS = (4, 5, 6, 8)
"""The bits that matrices of a mixed decoder may have. With MLX's 3 and 2 bits they would keep only 15 and 9 dB."""

QUANTIZERS = ("rtn", "gptq")
DEFAULT_BITS = 8
DEFAULT_GROUP_SIZE = 64
DEFAULT_AVG_BITS = 5.0


@dataclass(frozen=True)
class DecoderScheme:
    """The storage of the decoder's weights. 16 bits are float16 without groups.

    Raises:
        UsageError: an argument has an unknown value, or arguments exclude each other.
    """

    bits: int | str = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    quantize_embeddings: bool = True
    """True to quantize the embedding table, and a tied head with it, as mlx-lm does."""
    quantizer: str = "rtn"
    """`rtn` rounds to the nearest level, as mlx-lm does. `gptq` compensates errors, on calibration prompts."""
    avg_bits: float | None = None
    """The average bits per quantized weight of a mixed decoder, with scales and biases as in mlx-lm."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """The measured bits of a mixed decoder, by saved layer name."""

    def __post_init__(self) -> None:
        if self.bits not in (*DECODER_BITS, MIXED):
            known = ", ".join(map(str, (*DECODER_BITS, MIXED)))
            raise UsageError(f"decoder_bits must be one of {known} (got {self.bits!r:.20}).", "decoder_bits")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"group_size must be one of {', '.join(map(str, GROUP_SIZES))} (got {self.group_size}).", "group_size"
            )
        if self.quantizer not in QUANTIZERS:
            raise UsageError(
                f"decoder_quantizer must be one of {', '.join(QUANTIZERS)} (got {self.quantizer!r:.20}).",
                "decoder_quantizer",
            )
        if (self.avg_bits is not None) != self.is_mixed:
            raise UsageError(
                f"decoder_avg_bits and decoder_bits={MIXED!r} need each other.", "decoder_avg_bits", "decoder_bits"
            )
        if self.avg_bits is not None:
            self._check_avg_bits(self.avg_bits)
        odd = [name for name, bits in self.layers.items() if bits not in MIXED_BITS]
        if odd:
            raise UsageError(f"{odd[0]} must have bits of {MIXED_BITS} (got {self.layers[odd[0]]!r:.20}).")

    def _check_avg_bits(self, avg_bits: float) -> None:
        least, most = (Affine(self.group_size, bits).bits_per_weight for bits in (MIXED_BITS[0], MIXED_BITS[-1]))
        if not least <= avg_bits <= most:
            raise UsageError(
                f"decoder_avg_bits must be between {least:g} and {most:g} in groups of {self.group_size}, with scales "
                f"and biases (got {avg_bits:g}).",
                "decoder_avg_bits",
            )

    @property
    def is_mixed(self) -> bool:
        """True if each matrix has its own bits."""
        return self.bits == MIXED

    @property
    def is_quantized(self) -> bool:
        """True if weights have fewer than 16 bits."""
        return self.is_mixed or int(self.bits) < 16

    @property
    def needs_calibration(self) -> bool:
        """True if the scheme uses calibration prompts."""
        return self.is_quantized and (self.is_unsettled or self.quantizer == "gptq")

    @property
    def is_unsettled(self) -> bool:
        """True if the bits of a mixed decoder are not chosen yet."""
        return self.is_mixed and not self.layers

    @property
    def bits_per_weight(self) -> float:
        """The average bits per weight, with scales and biases."""
        if self.avg_bits is not None:
            return self.avg_bits
        return Affine(self.group_size, int(self.bits)).bits_per_weight if self.is_quantized else 16.0

    def with_layers(self, layers: Mapping[str, int]) -> DecoderScheme:
        """Returns the mixed scheme with the chosen bits of each layer."""
        return replace(self, layers=dict(layers))

    def applies_to(self, saved: str, shape: tuple[int, ...]) -> bool:
        """Returns True if the tensor is quantized: a decoder matrix whose rows divide into groups.

        The projector stays float16, as it has 1 % of the weights and every image token passes through it.
        """
        if not self.is_quantized or len(shape) != 2 or not saved.startswith("language_model."):
            return False
        if "embed_tokens" in saved and not self.quantize_embeddings:
            return False
        return shape[1] % self.group_size == 0

    def affine(self, layer: str) -> Affine:
        """Returns the storage of a quantized layer by its saved name. Raises UsageError if its bits are unknown."""
        if not self.is_mixed:
            return Affine(self.group_size, int(self.bits))
        if layer not in self.layers:
            raise UsageError(f"recipe: the bits of {layer} are missing. Pass a recipe for this decoder.")
        return Affine(self.group_size, self.layers[layer])

    def quantization(self) -> Quantization | None:
        """Returns the entry of `config.json`. A mixed scheme has the most common bits, and lists the other layers."""
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
    """Returns the scheme for the arguments of an export, where None is the default. `bits` may be a string of digits.

    The default quantizer is GPTQ below 8 bits, where its gain is worth its minutes. A mixed decoder has
    `DEFAULT_AVG_BITS` by default.
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
