"""The search of `mixed`: for each weight the fewest bits that the output can bear, by measurement.

Rounding one weight adds noise to the output. This noise is close to the weight's own rounding noise times a gain of
that weight, and the noises of different weights add up. So three runs of the network per weight predict the noise of
every scheme, and the choice follows the best trades of noise for bytes. The whole plan is then run, and corrected until
it passes.

Whole plans run with results, weights and biases rounded to float16, as in the package, and the noise of that rounding
alone is measured first. Sums inside an operation stay float32, as in the executor's float16 mode. Unlike the executor
this simulation needs no package, so plans are tried before conversion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.errors import UsageError
from .encoder import Rounding, apply_weights, convolutions, input_means
from .schemes import StoredWeight, is_candidate, store, stored_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBES = {"int8": "int8", "pal8": "pal6", "pal6": "pal6", "pal4": "pal4"}
"""The schemes to choose from besides float16, each with the scheme that its gain is measured with.

GPTQ rounds all but pal4, which is measured for itself. Palettes spread their noise evenly over a weight's channels, and
int8 by their scales, so gains differ. pal8 and int8 take about the same bytes. Either can be better than the other, by
8 dB on some weights.
"""

MARGIN_DB = 2.0
"""The margin above the floor, in dB, that plans reach on the trial image with the lowest SNR. On the verification
images of an encoder with the published ranges, drawings were 1.3 dB below that image."""

SLACK_DB = 0.4
"""The excess over the target, in dB, below which a plan is not improved further."""

LEAST_SHARE = 1e-3
"""The smallest noise that weights are taken to add, as a share of float16's noise. Noises may cancel each other."""

MAX_TRIALS = 6
"""The number of whole plans that are run at most. Each run costs a forward pass per trial image."""

ON_IMAGES = "on the search's images"
"""The end of progress lines, whose SNR is the lowest. The export is verified on other images."""

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Option:
    """One way to store one weight."""

    scheme: str
    nbytes: int
    noise: float
    """The noise that it adds to the output, relative to the output's energy."""


Options = Mapping[str, Sequence[Option]]
"""The useful options of each weight, from float16 to the fewest bytes."""


@dataclass(frozen=True)
class SearchResult:
    """A plan, with the lowest SNR of an image's `image_features` in torch, where results are rounded to float16."""

    plan: Mapping[str, str]
    snr_db: float


@dataclass(frozen=True)
class Images:
    """The images of a search, at the size of the encoder's input."""

    calibration: Sequence[np.ndarray]
    trial: Sequence[np.ndarray]


def search(
    network: nn.Sequential,
    options: Options,
    rounding: Rounding,
    images: Images,
    *,
    min_snr: float,
    fixed_bytes: int = 0,
    on_stage: OnStage,
) -> SearchResult:
    """Searches the smallest plan that exceeds `min_snr` (dB) by `MARGIN_DB` on each trial image.

    If neither float16 nor any plan has that margin, everything stays float16. `fixed_bytes` is the size of all
    weights that no plan changes. It is included in the sizes that `on_stage` reports.

    Raises:
        UsageError: float16 does not reach `min_snr`.
    """
    runner = TrialRunner(network, rounding, images)
    base = runner.noises({})  # of each image
    best = SearchResult(filled(network, {}), decibels(base.max()))
    check_attainable(min_snr, best.snr_db)
    on_stage(f"float16 alone keeps {best.snr_db:.1f} dB {ON_IMAGES}")
    rooms = 10 ** (-(min_snr + MARGIN_DB) / 10) - base  # for the noise of weights in fewer bits
    passed, failed, budget = 0.0, np.inf, float(rooms.min())  # the largest that passed, the smallest that failed
    for turn in range(MAX_TRIALS if budget > 0 else 0):
        plan = within_noise(options, budget)
        noises = runner.noises(plan)
        found = SearchResult(filled(network, plan), decibels(noises.max()))
        size = (plan_bytes(options, plan) + fixed_bytes) / 1e6
        on_stage(f"try plan {turn + 1}: encoder at most {size:.1f} MB, {found.snr_db:.1f} dB {ON_IMAGES}")
        left = float((rooms / np.maximum(noises - base, base * LEAST_SHARE)).min())  # below 1 an image has too much
        if left >= 1:
            best, passed = found, budget
        else:
            failed = budget
        if 1 <= left < 10 ** (SLACK_DB / 10):
            break
        budget = next_budget(passed, failed, budget * left)
    return best


def check_attainable(min_snr: float, float16_db: float) -> None:
    """Raises UsageError if the SNR of float16, `float16_db`, is below `min_snr`."""
    if min_snr > float16_db:
        raise UsageError(
            f"min_snr must be below the {float16_db:.1f} dB that float16 keeps of this encoder (got {min_snr:g}). "
            f"Pass {np.floor(float16_db - MARGIN_DB):g} or less, or quant='fp16'.",
            "min_snr",
            "quant",
        )


def next_budget(passed: float, failed: float, proposed: float) -> float:
    """Returns `proposed` if it is between the budgets that passed and failed, else their geometric mean."""
    return proposed if passed < proposed < failed else float(np.sqrt(passed * failed))


def search_bytes(
    network: nn.Sequential,
    options: Options,
    rounding: Rounding,
    images: Images,
    *,
    max_bytes: int,
    fixed_bytes: int,
) -> SearchResult:
    """Returns the best plan of at most `max_bytes`, with `fixed_bytes` for weights that no plan changes.

    Raises:
        UsageError: the plan with the fewest bits takes more.
    """
    plan = within_bytes(options, max_bytes - fixed_bytes)
    if plan is None:
        least = fixed_bytes + sum(choices[-1].nbytes for choices in options.values())
        raise UsageError(f"max_bytes must be at least {least} for this encoder (got {max_bytes}).", "max_bytes")
    return SearchResult(filled(network, plan), decibels(TrialRunner(network, rounding, images).noises(plan).max()))


class TrialRunner:
    """A runner of whole plans, in float16 and at full size. It restores the network after each run."""

    def __init__(self, network: nn.Sequential, rounding: Rounding, images: Images) -> None:
        self.network, self.rounding, self.images = network, rounding, images.trial
        self.means = input_means(network, rounding.names, images.calibration)
        self.expected = [outputs(network, image) for image in images.trial]

    def noises(self, plan: Mapping[str, str]) -> np.ndarray:
        """Returns the noise of each image's output under `plan`, relative to the output's energy, (images,).

        Images are apart because the verification is by kind: a noisy kind would hide behind the energy of another.
        """
        with applied(self.network, self.rounding.by_plan(plan), self.means):
            found = [float16_outputs(self.network, image) for image in self.images]
        return noises_of(self.expected, found)


def candidates(network: nn.Module) -> list[str]:
    """Returns the names of the convolutions that can take fewer bits."""
    return [name for name, conv in convolutions(network).items() if is_candidate(conv.weight.numpy())]


def measured_options(
    network: nn.Sequential, rounding: Rounding, images: Sequence[np.ndarray]
) -> dict[str, list[Option]]:
    """Measures the options of each convolution of `rounding`.

    Each takes three runs per image of the layers from the convolution on. `images` may be smaller than the encoder's
    input, as gains hardly depend on the size, but should not be those of `rounding`, on which GPTQ has less noise.
    """
    means = input_means(network, rounding.names, images)
    prefixes = [list(partial_outputs(network, image)) for image in images]
    expected = [found[-1].numpy() for found in prefixes]
    options = {}
    for name in rounding.names:
        weight, part = rounding.convs[name].weight.numpy(), int(name.split(".")[0])
        nearest = {scheme: store(weight, scheme) for scheme in PROBES}
        noises = {scheme: float(np.square(kept.dense() - weight).sum()) for scheme, kept in nearest.items()}
        gains = {}
        for probe in set(PROBES.values()):
            with applied(network, {name: rounding.stored(name, probe)}, means):
                found = [outputs(network[part:], prefix[part]) for prefix in prefixes]
            gains[probe] = noise_of(expected, found) / noises[probe] if noises[probe] else 0.0
        choices = [
            Option(scheme, stored_bytes(weight.shape, scheme), gains[PROBES[scheme]] * noise)
            for scheme, noise in noises.items()
        ]
        options[name] = best_trades([Option("fp16", stored_bytes(weight.shape, "fp16"), 0.0), *choices])
    return options


def best_trades(options: Iterable[Option]) -> list[Option]:
    """Returns the options on the convex hull, by falling bytes, so that noise per saved byte only grows."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (-option.nbytes, -option.noise)):
        while hull and option.noise <= hull[-1].noise:
            hull.pop()
        while len(hull) > 1 and price(hull[-2], option) <= price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def price(more: Option, fewer: Option) -> float:
    """Returns the added noise per saved byte."""
    return (fewer.noise - more.noise) / (more.nbytes - fewer.nbytes)


def trades(options: Options) -> list[tuple[float, str, int]]:
    """Returns (price, name, step) of every step from an option to the next, the best first."""
    return sorted(
        (price(choices[step - 1], choices[step]), name, step)
        for name, choices in options.items()
        for step in range(1, len(choices))
    )


def within_noise(options: Options, budget: float) -> dict[str, str]:
    """Returns a scheme per weight, by the best trades whose noises add up to at most `budget`."""
    level = dict.fromkeys(options, 0)
    spent = sum(choices[0].noise for choices in options.values())
    for _, name, step in trades(options):
        added = options[name][step].noise - options[name][step - 1].noise
        if level[name] == step - 1 and spent + added <= budget:
            level[name], spent = step, spent + added
    return {name: options[name][step].scheme for name, step in level.items()}


def within_bytes(options: Options, budget: int) -> dict[str, str] | None:
    """Returns a scheme per weight, by the best trades into at most `budget` bytes, or None if none fits."""
    level = dict.fromkeys(options, 0)
    size = sum(choices[0].nbytes for choices in options.values())
    for _, name, step in trades(options):
        if size <= budget:
            break
        size -= options[name][step - 1].nbytes - options[name][step].nbytes
        level[name] = step
    return {name: options[name][step].scheme for name, step in level.items()} if size <= budget else None


def plan_bytes(options: Options, plan: Mapping[str, str]) -> int:
    """Returns the size of the weights that `plan` covers."""
    return sum(option.nbytes for name, choices in options.items() for option in choices if option.scheme == plan[name])


def partial_outputs(network: nn.Sequential, image: np.ndarray) -> Iterator[Tensor]:
    """Yields the input of each part of the network, and last its output."""
    import torch

    with torch.inference_mode():
        x = torch.from_numpy(image)
        for part in network:
            yield x
            x = part(x)
        yield x


def outputs(network: nn.Module, image: np.ndarray | Tensor) -> np.ndarray:
    """Returns the network's output in float32."""
    import torch

    with torch.inference_mode():
        return network(torch.as_tensor(image)).numpy()


def noise_of(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Returns the energy of the differences relative to that of `expected`."""
    noise = sum(float(np.square(b.astype(np.float64) - a).sum()) for a, b in zip(expected, found, strict=True))
    return noise / sum(float(np.square(a.astype(np.float64)).sum()) for a in expected)


def noises_of(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the energy of the difference of each pair, relative to that of the expected one."""
    return np.array([noise_of([a], [b]) for a, b in zip(expected, found, strict=True)])


def decibels(noise: float) -> float:
    """Returns the SNR of a noise that is relative to the signal."""
    return float(-10 * np.log10(noise))


@contextlib.contextmanager
def applied(network: nn.Module, stored: Mapping[str, StoredWeight], means: Mapping[str, Tensor]) -> Iterator[None]:
    """Applies weights as `apply_weights` does, and restores the network at the end."""
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
    """Returns `plan` with float16 for the convolutions that it omits."""
    return {name: plan.get(name, "fp16") for name in convolutions(network)}


ATEN = torch.ops.aten
CONVOLUTIONS = frozenset((ATEN.conv2d, ATEN.convolution))
ROUNDED = CONVOLUTIONS | {ATEN.gelu, ATEN.matmul, ATEN.bmm, ATEN.softmax, ATEN._softmax, ATEN.relu, ATEN.sigmoid}
"""The operations whose results are rounded. Where torch has two names, the one used depends on gradient recording."""

ROUNDED_OF_TWO = frozenset((ATEN.add, ATEN.mul))
"""The operations that are rounded if their two inputs are different tensors.

A square, or an added epsilon, is inside a layer norm, which is one operation of the package.
"""


class Float16Results(TorchDispatchMode):
    """The mode in which float32 networks compute like their float16 packages."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kind: Callable[..., Any] = func.overloadpacket
        if kind in CONVOLUTIONS:
            x, weight, bias, *rest = args
            args = (x, rounded(weight), None if bias is None else rounded(bias), *rest)
        result = func(*args, **(kwargs or {}))
        two = kind in ROUNDED_OF_TWO and isinstance(args[1], Tensor) and args[0] is not args[1]
        return rounded(result) if two or kind in ROUNDED else result


def rounded(tensor: Tensor) -> Tensor:
    """Returns float32 values rounded to float16, in the same layout."""
    return tensor.to(torch.float16).to(torch.float32)


def float16_outputs(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Computes `image`, (1, 3, S, S) float32, approximately as the network's package does."""
    with torch.inference_mode(), Float16Results():
        return network(rounded(torch.from_numpy(image))).numpy()
