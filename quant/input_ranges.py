"""The ranges of int8 inputs: each channel's share of them, and the range of least squared error.

An int8 input has one scale for all channels. Channels of unequal size waste it: the largest decides over the scale, and
small ones get few levels. Where the operation before and the convolution are both linear in a channel, a factor can
move from one to the other without a change of results, as in SmoothQuant (arXiv 2211.10438). Factors are powers of two,
so weights only change their exponents. Larger columns make the int8 rounding of the weight coarser, so the factors
follow the channels' ranges only as far as the sum of both noises falls.

A range that reaches the largest value gives all other values a coarse step. A smaller one clips a few. The noise of
both is computed for each channel from the sums of the values beyond each possible end of the range.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .encoder import convolutions

if TYPE_CHECKING:
    from torch import nn

INT8_MIN, INT8_MAX = -128, 127
"""The least and the largest int8 level."""

MIN_SCALE = 2.0**-14
"""The smallest normal float16 number. Inputs that need a smaller scale stay float16."""

GELU_LEAST = 0.17
"""The magnitude of GELU's least value, at which ranges of its results begin."""

PER_OCTAVE = 4
"""The possible ends of a range per factor of two. Steps of 19 % are within 0.1 dB of the best end."""

OCTAVES = range(-14, 18)
"""The powers of two among which ranges end: from float16's least normal number past its largest."""

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The exponents of a channel's own range in its factor. At 0 channels stay, at 1 each uses all levels."""

LEAST_EXPONENT = -12
"""The least exponent that the refinement of factors tries, which allows factors of 4096 between channels."""

REFINEMENTS = 4
"""The most times that all factors are chosen again, each time for the weight's scales that the last factors gave."""


@dataclass(frozen=True)
class InputRange:
    """The int8 form of one convolution's input."""

    scale: np.float16
    zero_point: int = 0
    """The level of zero: 0 unless the input comes from a GELU, whose results are hardly negative."""
    exponents: tuple[int, ...] = ()
    """The powers of two, 0 or negative, that the channels are divided by. Empty if they stay."""


class InputStatistics:
    """The sums over a convolution's inputs and outputs that its range is chosen from."""

    def __init__(self, channels: int, outputs: int, after_gelu: bool) -> None:
        self.after_gelu = after_gelu
        self.bins = len(OCTAVES) * PER_OCTAVE
        self.count = 0
        self.inputs = np.zeros((2, channels))
        self.outputs = np.zeros((2, outputs))
        self.powers = np.zeros((3, channels, self.bins))
        """The sums of the magnitudes' powers 0, 1 and 2, by channel and the range that they are in."""

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adds inputs (C, P) and outputs (D, P) of P positions."""
        self.count += x.shape[1]
        for sums, values in ((self.inputs, x), (self.outputs, y)):
            sums += [values.sum(1, dtype=np.float64), np.einsum("ij,ij->i", values, values, dtype=np.float64)]
        sizes = np.maximum(x, 0) if self.after_gelu else np.abs(x)
        with np.errstate(divide="ignore"):
            places = PER_OCTAVE * (np.log2(sizes) - OCTAVES[0])  # the end of the range just below
        places = places.clip(0, self.bins - 1).astype(np.intp) + self.bins * np.arange(len(x))[:, None]
        for power, sums in enumerate(self.powers):
            found = np.bincount(places.ravel(), sizes.ravel() ** power, minlength=sums.size)
            sums += found.reshape(sums.shape)

    @property
    def variances(self) -> tuple[np.ndarray, np.ndarray]:
        """The variances of inputs (C,) and outputs (D,)."""
        inputs, outputs = (sums / self.count for sums in (self.inputs, self.outputs))
        return np.maximum(inputs[1] - inputs[0] ** 2, 0), np.maximum(outputs[1] - outputs[0] ** 2, 0)

    def noises(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scale (bins,) of each possible range, and the noise (C, bins) of a channel in it."""
        ends = 2.0 ** (OCTAVES[0] + np.arange(self.bins) / PER_OCTAVE)
        scales = (ends + GELU_LEAST) / (INT8_MAX - INT8_MIN) if self.after_gelu else ends / INT8_MAX
        number, total, squares = self.powers[:, :, ::-1].cumsum(2)[:, :, ::-1] / self.count  # beyond each end
        clipped = squares - 2 * ends * total + ends**2 * number
        rounded = np.minimum(scales**2 / 12, self.inputs[1][:, None] / self.count)  # small values become zero
        return scales, rounded + np.maximum(clipped, 0)


def chosen_range(weight: np.ndarray, statistics: InputStatistics, can_even: bool) -> InputRange | None:
    """Returns the range of least noise in the outputs of `weight` (D, C), or None if it needs too small a scale.

    The noise of an output counts relative to its variance. `can_even` is false if the channels have to stay.
    """
    weight = weight.astype(np.float64)
    inputs, outputs = statistics.variances
    importance = 1 / np.maximum(outputs, 1e-12 * max(float(outputs.max()), 1e-30))
    gains = np.einsum("ij,ij,i->j", weight, weight, importance)
    scales, noises = statistics.noises()
    least, scale, places = np.inf, np.float16(0), np.zeros(len(inputs), int)
    for offset in range(PER_OCTAVE):
        noise = noises[:, offset::PER_OCTAVE]
        trade = Trade(weight, inputs, importance, gains[:, None] * noise)
        found = trade.evened(noise.argmin(1)) if can_even else trade.shifted(np.zeros(len(inputs), int))
        if found[0] < least:
            least, places = found
            scale = np.float16(scales[offset + PER_OCTAVE * places.max()])
    if scale < MIN_SCALE:
        return None
    zero_point = INT8_MIN + round(GELU_LEAST / float(scale)) if statistics.after_gelu else 0
    exponents = places - places.max()
    return InputRange(scale, min(zero_point, 0), tuple(map(int, exponents)) if exponents.any() else ())


class Trade(NamedTuple):
    """The noises of one convolution's weight and input, between which factors of channels choose."""

    weight: np.ndarray
    """(D, C) float64."""
    inputs: np.ndarray
    """The variances of the inputs (C,)."""
    importance: np.ndarray
    """The factor by which the noise of each output (D,) counts."""
    noise: np.ndarray
    """The noise (C, octaves) in the outputs of each channel's input, by the octave in which its range ends."""

    def evened(self, own: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the least noise, and the octave of each channel's range (C,). `own` are the best for the input."""
        proposed = (self.shifted(np.rint(strength * own).astype(int)) for strength in STRENGTHS)
        least, places = min(proposed, key=lambda found: found[0])
        for _ in range(REFINEMENTS):
            found = self.shifted(self.refined(places))
            if found[0] >= least:
                break
            least, places = found
        return least, places

    def shifted(self, octaves: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the least noise with ranges that are as far apart as `octaves` (C,), and the octaves then."""
        exponents = octaves - octaves.max()
        rounding = weight_noise(self.weight * 2.0**exponents, self.inputs * 4.0**-exponents, self.importance)
        shifts = range(-octaves.min(), len(OCTAVES) - octaves.max())
        channels = np.arange(len(octaves))
        noises = [self.noise[channels, octaves + shift].sum() for shift in shifts]
        best = int(np.argmin(noises))
        return rounding + float(noises[best]), octaves + shifts[best]

    def refined(self, places: np.ndarray) -> np.ndarray:
        """Returns the octave of each channel (C,) with the least noise while the weight's scales stay.

        A channel with a smaller range has less noise of its own, but its larger factor makes the weight's count more.
        """
        last = places.max()
        steps = np.abs(self.weight * 2.0 ** (places - last)).max(1) / INT8_MAX
        choices = np.arange(max(last + LEAST_EXPONENT, 0), last + 1)
        rounding = steps**2 / 12 @ self.importance * self.inputs[:, None] * 4.0 ** (last - choices)  # (C, choices)
        return choices[(rounding + self.noise[:, choices]).argmin(1)]


def weight_noise(weight: np.ndarray, inputs: np.ndarray, importance: np.ndarray) -> float:
    """Returns the noise in the outputs of an int8 `weight` (D, C), for inputs of the given variances (C,)."""
    scales = np.abs(weight).max(1) / INT8_MAX
    return float((scales**2 / 12 * importance).sum() * inputs.sum())


def input_ranges(
    network: nn.Module, names: Collection[str], after_gelu: Collection[str], images: Sequence[np.ndarray]
) -> dict[str, InputRange]:
    """Returns the range of each convolution's input, by the convolution's name. They have kernels of 1 x 1.

    `images` are inputs of `network`, (1, 3, S, S) float32. The channels of inputs in `after_gelu` stay, and their
    ranges have a zero point. Inputs with only tiny values are left out.
    """
    convs = convolutions(network)
    statistics = {
        name: InputStatistics(convs[name].in_channels, convs[name].out_channels, name in after_gelu) for name in names
    }
    with collected(convs, statistics):
        import torch

        with torch.inference_mode():
            for image in images:
                network(torch.from_numpy(image))
    ranges = {
        name: chosen_range(convs[name].weight.numpy()[:, :, 0, 0], found, name not in after_gelu)
        for name, found in statistics.items()
    }
    return {name: found for name, found in ranges.items() if found is not None}


@contextlib.contextmanager
def collected(convs: Mapping[str, nn.Conv2d], statistics: Mapping[str, InputStatistics]) -> Iterator[None]:
    """Adds the inputs and outputs of convolutions to `statistics` inside the block."""

    def adding(found: InputStatistics) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any], output: Any) -> None:
            found.add(*(tensor[0].flatten(1).numpy() for tensor in (inputs[0], output)))  # (C, HW)

        return hook

    hooks = [convs[name].register_forward_hook(adding(found)) for name, found in statistics.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
