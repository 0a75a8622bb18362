"""How far a quantized network's outputs are from the original's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..models.errors import VerificationError


@dataclass(frozen=True)
class Agreement:
    """Outputs compared row by row; a row is an image token's features or a position's logits."""

    snr_db: float
    """Signal-to-noise ratio over all rows: 10 log10(sum of squares of the original / of the difference)."""
    cosine: float
    worst_row_snr_db: float
    worst_row: int
    same_argmax: float
    """Share of rows whose largest entry is at the same place: for logits, greedy tokens that agree."""

    def as_dict(self) -> dict[str, Any]:
        """SNRs in tenths of a dB: sums in another order, as on other numbers of threads, move the next digits."""
        return {key: round(value, 1 if key.endswith("snr_db") else 6) for key, value in asdict(self).items()}


def compare(original: np.ndarray, other: np.ndarray, what: str) -> Agreement:
    """Compares two arrays (..., rows, channels) of one shape.

    Raises:
        VerificationError: the shapes differ, or either holds NaN or infinite values.
    """
    if original.shape != other.shape:
        raise VerificationError(f"{what}: expected shape {original.shape}, found {other.shape}")
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
        same_argmax=float((rows.argmax(1) == (rows + noise).argmax(1)).mean()),
    )


def kl_divergence(original: np.ndarray, other: np.ndarray) -> float:
    """How far the distributions over the next token are from the original's: KL in nats, the mean over rows."""
    first, second = (_log_softmax(logits.astype(np.float64)) for logits in (original, other))
    return float((np.exp(first) * (first - second)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


MAX_SNR_DB = 200.0
"""Reported for outputs that are equal to the bit; beyond what float32 can tell apart."""


def _snr_db(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10(signal / noise)
    return np.nan_to_num(np.minimum(ratio, MAX_SNR_DB), nan=MAX_SNR_DB)  # 0 / 0: a silent row kept silent


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norm) if norm else 1.0
