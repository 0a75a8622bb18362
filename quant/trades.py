"""Ways to store each weight, and which to take: the best trades of noise for bytes under a budget of either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to store one weight."""

    scheme: str
    nbytes: int
    noise: float
    """What it adds to the output's noise, relative to the output's own energy."""


Options = Mapping[str, Sequence[Option]]
"""The ways that are worth taking for each weight, from float16 to the fewest bytes."""


def best_trades(options: Iterable[Option]) -> list[Option]:
    """Those of `options` that no mixture of others beats, by falling bytes: noise per byte saved only grows."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (-option.nbytes, -option.noise)):
        while hull and option.noise <= hull[-1].noise:
            hull.pop()
        while len(hull) > 1 and price(hull[-2], option) <= price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def price(more: Option, fewer: Option) -> float:
    """Noise that is added for each byte that is saved."""
    return (fewer.noise - more.noise) / (more.nbytes - fewer.nbytes)


def trades(options: Options) -> list[tuple[float, str, int]]:
    """(price, name, step) of every step from an option to the next, the best first."""
    return sorted(
        (price(choices[step - 1], choices[step]), name, step)
        for name, choices in options.items()
        for step in range(1, len(choices))
    )


def within_noise(options: Options, budget: float) -> dict[str, str]:
    """The scheme of each weight so that noises add up to `budget` at most: the best trades that fit in."""
    level = dict.fromkeys(options, 0)
    spent = sum(choices[0].noise for choices in options.values())
    for _, name, step in trades(options):
        added = options[name][step].noise - options[name][step - 1].noise
        if level[name] == step - 1 and spent + added <= budget:
            level[name], spent = step, spent + added
    return {name: options[name][step].scheme for name, step in level.items()}


def within_bytes(options: Options, budget: int) -> dict[str, str] | None:
    """The scheme of each weight so that they take `budget` bytes at most, or None where nothing does."""
    level = dict.fromkeys(options, 0)
    size = sum(choices[0].nbytes for choices in options.values())
    for _, name, step in trades(options):
        if size <= budget:
            break
        size -= options[name][step - 1].nbytes - options[name][step].nbytes
        level[name] = step
    return {name: options[name][step].scheme for name, step in level.items()} if size <= budget else None


def plan_bytes(options: Options, plan: Mapping[str, str]) -> int:
    return sum(option.nbytes for name, choices in options.items() for option in choices if option.scheme == plan[name])
