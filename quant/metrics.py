"""The error of a quantized network, in its outputs and in its weights.

The SNR of an output is too coarse for some faults. A layer that is off by 2 %, or two swapped channels, hardly shows
behind the noise of few bits. `WeightAudit` finds them weight by weight. There, rounding errors are small, without
direction, and alike in all rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..models.errors import VerificationError

MAX_SNR_DB = 200.0
"""The SNR reported for equal outputs. It is above the resolution of float32."""

LEAST_SNR_DB = {16: 60.0, 8: 28.0, 6: 18.0, 5: 14.0, 4: 8.0}
"""The least SNR of a weight, by bits. Gaussian weights reach 73, 45, 33, 27 and 21 dB, with GPTQ 3 to 4 dB less."""

LEAST_GAIN = {16: 0.999, 8: 0.995, 6: 0.995, 5: 0.99, 4: 0.98}
MOST_GAIN = 1.005
"""The bounds of the gain <w, q> / <w, w>, the factor with which a saved weight q fits the original w best.

Fitted levels shrink weights by the noise's share of power. That is 0.7 % for Gaussian weights at 4 bits, and less at
more bits.
"""

SHIFTED_ROW = 0.5
"""The error of a row, as a share of its power, above which the row is damaged or another row..."""
SHIFTED_ROW_NOISE = 20.0
"""... if the error is also this many times the median row's. Very small rows may vanish between a palette's values."""

ROWS_AT_ONCE = 1024
"""The rows whose sums are computed together, which bounds memory."""
TINY = float(np.finfo(np.float64).tiny)
"""The smallest divisor."""


@dataclass(frozen=True)
class Agreement:
    """The agreement of two outputs. A row is an image token's features or a position's logits."""

    snr_db: float
    """The signal-to-noise ratio over all rows: 10 log10(sum of squares of the original / of the difference)."""
    cosine: float
    worst_row_snr_db: float
    worst_row: int
    psnr_db: float
    """The peak SNR, 20 log10(the original's largest magnitude / root mean square of the difference)."""
    same_argmax: float
    """The share of rows whose largest entry is at the same index. For logits, these are equal greedy tokens."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, with SNRs in tenths of a dB, as further digits depend on the number of threads."""
        return {key: round(value, 1 if key.endswith("snr_db") else 6) for key, value in asdict(self).items()}


def compare(original: np.ndarray, other: np.ndarray, what: str) -> Agreement:
    """Compares two arrays (..., rows, channels) of one shape.

    Raises:
        VerificationError: the shapes differ, or either holds NaN or infinite values.
    """
    if original.shape != other.shape:
        raise VerificationError(f"{what}: the shape must be {original.shape}, got {other.shape}")
    for name, values in (("the checkpoint's", original), ("the export's", other)):
        if not np.isfinite(values).all():
            raise VerificationError(
                f"{what}: {name} output holds {np.sum(~np.isfinite(values))} NaN or infinite values"
            )
    rows = original.reshape(-1, original.shape[-1]).astype(np.float64)  # (rows, channels)
    noise = other.reshape(rows.shape).astype(np.float64) - rows
    per_row = _snr_db((rows**2).sum(1), (noise**2).sum(1))
    return Agreement(
        snr_db=float(_snr_db((rows**2).sum(), (noise**2).sum())),
        cosine=_cosine(rows, rows + noise),
        worst_row_snr_db=float(per_row.min()),
        worst_row=int(per_row.argmin()),
        psnr_db=float(_snr_db(np.square(rows).max(), np.square(noise).mean())),
        same_argmax=float((rows.argmax(1) == (rows + noise).argmax(1)).mean()),
    )


def kl_divergence(original: np.ndarray, other: np.ndarray) -> float:
    """Returns the KL divergence from the original's next-token distributions, in nats, as the mean over rows."""
    first, second = (_log_softmax(logits.astype(np.float64)) for logits in (original, other))
    return float((np.exp(first) * (first - second)).sum(-1).mean())


@dataclass
class WeightAudit:
    """The audit of saved weights against the originals. It collects failures and the least SNR."""

    count: int = 0
    least_snr_db: float = float("inf")
    least_snr_name: str = ""
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, original: np.ndarray, saved: np.ndarray, bits: int, *, fitted: bool = False) -> None:
        """Compares one weight (rows, ...), stored in `bits`.

        `fitted` is for levels chosen for the least squared error, as in a palette. Their gain is taken as
        <w, q> / <q, q>, which is 1 at any number of bits.

        Raises:
            VerificationError: the saved weight is not finite.
        """
        self.count += 1
        if original.shape != saved.shape:
            self.failures.append(f"{name} must be of shape {list(original.shape)}, got {list(saved.shape)}")
            return
        if not np.isfinite(saved).all():
            raise VerificationError(f"{name} holds {np.sum(~np.isfinite(saved))} NaN or infinite values")
        power, product, saved_power, noise = _row_sums(original, saved)
        if not noise.any():
            return
        snr_db = _decibels(power.sum(), noise.sum())
        if snr_db < self.least_snr_db:
            self.least_snr_db, self.least_snr_name = snr_db, name
        gain = float(product.sum()) / max(float((saved_power if fitted else power).sum()), TINY)
        least_gain = 2 - MOST_GAIN if fitted else LEAST_GAIN[bits]
        odd = np.flatnonzero((noise > SHIFTED_ROW * power) & (noise > SHIFTED_ROW_NOISE * np.median(noise)))
        if len(odd):
            self.failures.append(f"{name} differs in {len(odd)} of {len(noise)} rows (the first: {odd[0]})")
        elif snr_db < LEAST_SNR_DB[bits]:
            self.failures.append(f"{name} must keep {LEAST_SNR_DB[bits]:.0f} dB of the checkpoint's, got {snr_db:.0f}")
        elif not least_gain <= gain <= MOST_GAIN:
            self.failures.append(f"{name} is {abs(gain - 1):.1%} too {'large' if (gain > 1) != fitted else 'small'}")

    def as_dict(self) -> dict[str, Any]:
        """Returns the number of weights, and the least SNR with its weight's name."""
        least = None if self.count == 0 or not self.least_snr_name else round(self.least_snr_db, 3)
        return {"count": self.count, "least_snr_db": least, "least_snr_name": self.least_snr_name or None}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _snr_db(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10(signal / noise)
    return np.nan_to_num(np.minimum(ratio, MAX_SNR_DB), nan=MAX_SNR_DB)  # 0 / 0 is a row of zeros that stays zero


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norm) if norm else 1.0


def _row_sums(original: np.ndarray, saved: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns <w, w>, <w, q>, <q, q> and |q - w|^2 per row, float64 (rows,) each."""
    rows = len(original) if original.ndim > 1 else 1
    sums = np.empty((4, rows))
    first, second = (values.reshape(rows, -1) for values in (original, saved))
    for start in range(0, rows, ROWS_AT_ONCE):
        w, q = (values[start : start + ROWS_AT_ONCE].astype(np.float32) for values in (first, second))
        noise = q - w
        for index, (left, right) in enumerate(((w, w), (w, q), (q, q), (noise, noise))):
            sums[index, start : start + ROWS_AT_ONCE] = np.einsum("ij,ij->i", left, right)
    return tuple(sums)  # type: ignore[return-value]


def _decibels(signal: float, noise: float) -> float:
    return 10 * float(np.log10(max(signal, TINY) / noise))
