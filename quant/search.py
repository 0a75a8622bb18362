"""`mixed`: for each weight as few bits as the output can bear, measured.

What rounding one weight adds to the output's noise is, near enough, the weight's own rounding noise times a gain of
that weight alone; and the noises of different weights add up. (On small encoders: gains mostly within 3 dB from 4 bits
to 8, sums within 1.5 dB of whole plans.) So two runs of the network per weight tell every scheme's noise there, the
choice is a walk along the best trades of noise for bytes, and the whole plan is then run, and corrected until it holds.
Whole plans are run with every result rounded to float16: what that alone costs is measured first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..models.errors import UsageError
from .encoder import apply_weights, convolutions, input_means, stored_by_plan
from .float16 import float16_outputs
from .schemes import StoredWeight, is_candidate, store, stored_bytes
from .trades import Option, Options, best_trades, plan_bytes, within_bytes, within_noise

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBES = {"int8": "int8", "pal8": "pal6", "pal6": "pal6", "pal4": "pal6"}
"""The choices besides float16, and the scheme that each one's gain is measured with.

Palettes spread their noise evenly over a weight's channels, int8 by their scales: gains differ. Of pal8 and int8, which
take about the same bytes, either may be the better, by 8 dB on some weights.
"""

MARGIN_DB = 1.0
"""Plans are made to pass the floor by this on the images that they are tried on; other images differ by 0.5 dB."""

SLACK_DB = 0.4
"""A plan that passes its target by less than this is not improved further."""

LEAST_SHARE = 1e-3
"""Of float16's own noise: what weights add is taken to be this much at least, for it may even cancel some."""

MAX_TRIALS = 6

ON_IMAGES = "on the search's images"
"""In progress: an export is judged on others, which gives other figures."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A plan, and the SNR of `image_features` that it reached in torch, with results rounded to float16."""

    plan: Mapping[str, str]
    snr_db: float


@dataclass(frozen=True)
class Images:
    """What a search looks at: `probes` through a network that takes small images, the others at their full size."""

    calibration: Sequence[np.ndarray]
    trial: Sequence[np.ndarray]


def search(
    network: nn.Sequential, options: Options, images: Images, *, min_snr: float, others: int = 0, say: Say
) -> Found:
    """The smallest plan found that reaches `min_snr` (dB) by `MARGIN_DB` on the trial images.

    Where float16 itself passes by less than that, or no plan does, everything stays float16. `others` are the bytes of
    what no plan changes, which `say` counts too, as `search_bytes` does.

    Raises:
        UsageError: float16 itself does not reach `min_snr`.
    """
    trial = Trial(network, options, images)
    base = trial.noise({})
    best = Found(filled(network, {}), decibels(base))
    check_attainable(min_snr, best.snr_db)
    say(f"float16 itself keeps {best.snr_db:.1f} dB {ON_IMAGES}")
    room = 10 ** (-(min_snr + MARGIN_DB) / 10) - base  # for the noise of weights in fewer bits
    passed, failed, budget = 0.0, np.inf, room  # the largest budget that passed, the smallest that failed
    for turn in range(MAX_TRIALS if room > 0 else 0):
        plan = within_noise(options, budget)
        found = Found(filled(network, plan), decibels(trial.noise(plan)))
        size = (plan_bytes(options, plan) + others) / 1e6
        say(f"try plan {turn + 1}: encoder at most {size:.1f} MB, {found.snr_db:.1f} dB {ON_IMAGES}")
        noise = max(10 ** (-found.snr_db / 10) - base, base * LEAST_SHARE)
        if noise <= room:
            best, passed = found, budget
        else:
            failed = budget
        if 1 <= room / noise < 10 ** (SLACK_DB / 10):
            break
        budget = next_budget(passed, failed, budget * room / noise)
    return best


def check_attainable(min_snr: float, float16_db: float) -> None:
    """Raises UsageError when float16 itself, which reaches `float16_db`, does not reach `min_snr`."""
    if min_snr > float16_db:
        raise UsageError(
            f"--min-snr {min_snr:g} is more than float16 itself keeps of this encoder, {float16_db:.1f} dB: ask for "
            f"{np.floor(float16_db - MARGIN_DB):g} or less, or take --quant fp16"
        )


def next_budget(passed: float, failed: float, proposed: float) -> float:
    """`proposed` if it lies between the budgets that are known to pass and to fail, else their geometric mean."""
    return proposed if passed < proposed < failed else float(np.sqrt(passed * failed))


def search_bytes(network: nn.Sequential, options: Options, images: Images, *, max_bytes: int, others: int) -> Found:
    """The best plan whose weights take `max_bytes` at most, of which `others` bytes are for what no plan changes.

    Raises:
        UsageError: even the fewest bits take more.
    """
    plan = within_bytes(options, max_bytes - others)
    if plan is None:
        least = others + sum(choices[-1].nbytes for choices in options.values())
        raise UsageError(f"--max-bytes {max_bytes} is too few: the encoder takes {least} bytes at least")
    return Found(filled(network, plan), decibels(Trial(network, options, images).noise(plan)))


class Trial:
    """Runs whole plans as the engine would, at full size; the network is left as it was."""

    def __init__(self, network: nn.Sequential, options: Options, images: Images) -> None:
        self.network, self.images = network, images.trial
        self.means = input_means(network, list(options), images.calibration)
        self.expected = [outputs(network, image) for image in images.trial]

    def noise(self, plan: Mapping[str, str]) -> float:
        """Of the output, relative to its energy."""
        with applied(self.network, stored_by_plan(self.network, plan), self.means):
            return noise_of(self.expected, [float16_outputs(self.network, image) for image in self.images])


def measured_options(network: nn.Sequential, images: Sequence[np.ndarray]) -> dict[str, list[Option]]:
    """For each convolution that can take fewer bits its options, from two runs of what follows it per image.

    `images` may be smaller than those that the encoder is for: gains hardly depend on the size.
    """
    candidates = {name: conv for name, conv in convolutions(network).items() if is_candidate(conv.weight.numpy())}
    means = input_means(network, list(candidates), images)
    prefixes = [list(partial_outputs(network, image)) for image in images]
    expected = [found[-1].numpy() for found in prefixes]
    options = {}
    for name, conv in candidates.items():
        weight, part = conv.weight.numpy(), int(name.split(".")[0])
        stored = {scheme: store(weight, scheme) for scheme in PROBES}
        noises = {scheme: float(np.square(kept.dense() - weight).sum()) for scheme, kept in stored.items()}
        gains = {}
        for probe in set(PROBES.values()):
            with applied(network, {name: stored[probe]}, means):
                found = [outputs(network[part:], prefix[part]) for prefix in prefixes]
            gains[probe] = noise_of(expected, found) / noises[probe] if noises[probe] else 0.0
        choices = [
            Option(scheme, stored_bytes(weight.shape, scheme), gains[PROBES[scheme]] * noise)
            for scheme, noise in noises.items()
        ]
        options[name] = best_trades([Option("fp16", stored_bytes(weight.shape, "fp16"), 0.0), *choices])
    return options


def partial_outputs(network: nn.Sequential, image: np.ndarray) -> Iterator[Tensor]:
    """The input of each part of the network, and last its output."""
    import torch

    with torch.inference_mode():
        x = torch.from_numpy(image)
        for part in network:
            yield x
            x = part(x)
        yield x


def outputs(network: nn.Module, image: np.ndarray | Tensor) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return network(torch.as_tensor(image)).numpy()


def noise_of(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Energy of the differences relative to that of `expected`."""
    noise = sum(float(np.square(b.astype(np.float64) - a).sum()) for a, b in zip(expected, found, strict=True))
    return noise / sum(float(np.square(a.astype(np.float64)).sum()) for a in expected)


def decibels(noise: float) -> float:
    """The SNR of a noise that is relative to the signal."""
    return float(-10 * np.log10(noise))


@contextlib.contextmanager
def applied(network: nn.Module, stored: Mapping[str, StoredWeight], means: Mapping[str, Tensor]) -> Iterator[None]:
    """`apply_weights`, taken back at the end."""
    from ..models.fastvit import bias_of

    convs = convolutions(network)
    kept = {name: (convs[name].weight.data, bias_of(convs[name]).data.clone()) for name in stored}
    apply_weights(network, stored, means)
    try:
        yield
    finally:
        for name, (weight, bias) in kept.items():
            convs[name].weight.data = weight
            bias_of(convs[name]).data = bias


def filled(network: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """`plan` with float16 for the convolutions that it leaves out."""
    return {name: plan.get(name, "fp16") for name in convolutions(network)}
