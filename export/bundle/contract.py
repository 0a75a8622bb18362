"""What a client demands of a bundle, as data, and how its JSON is read: as Swift's `JSONDecoder` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...models.fastvit_config import FastViTConfig

STAGES = 5
MAX_SIZE = 2**14
"""No real depth or width comes near; beyond it a file is damaged or hostile."""

ANY = object()
ABSENT = object()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 < value <= MAX_SIZE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": _is_int,
    "a positive integer": lambda value: _is_int(value) and value > 0,
    "a number": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "a string": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "a list of five sizes": lambda value: _list_of(_is_size)(value) and len(value) == STAGES,
    "a list of three numbers": lambda value: _list_of(_is_number)(value) and len(value) == 3,
    "a list of true or false": _list_of(lambda value: isinstance(value, bool)),
    "a list of strings": _list_of(lambda value: isinstance(value, str)),
    "a list of [height, width] or null": _list_of(
        lambda value: value is None or (_list_of(_is_int)(value) and len(value) == 2)
    ),
}
"""What a value can be asked to be. Swift decodes no integer from 2.5, no number from a string or a bool."""


@dataclass(frozen=True)
class Rule:
    """One key of a JSON file."""

    key: str
    """Its path, as `size.shortest_edge`."""
    kind: str
    """One of `KINDS`."""
    value: Any = ANY
    """The only value that works; `ABSENT`: the key must not be there."""
    required: bool = True
    """Swift takes null for an optional that is absent."""

    def faults(self, values: Mapping[str, Any], file: str) -> Iterator[str]:
        found = _at(values, self.key)
        if found is ABSENT or found is None:
            if self.required:
                yield f"{file} lacks {self.key!r}, {self.kind}"
            return
        if self.value is ABSENT:
            yield f"{file}: {self.key!r} should not be there; found {found!r:.60}"
        elif not KINDS[self.kind](found):
            yield f"{file}: {self.key!r} should be {self.kind}; found {found!r:.60}"
        elif self.value is not ANY and found != self.value:
            yield f"{file}: {self.key!r} should be {self.value!r:.80}; found {found!r:.60}"


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return ABSENT
        values = values[name]
    return values


@dataclass(frozen=True)
class Contract:
    """What one client demands."""

    name: str
    title: str
    source: str
    """Where its demands are read."""
    rules: Mapping[str, tuple[Rule, ...]]
    """By JSON file, which has to be there."""
    layout: str
    """Of the encoder: `apple`, a package; `mlx`, tensors beside the decoder."""
    projector: str
    """Prefix of the projector's two layers, whose numbers follow."""
    image_size: int | None = None
    """The one size that it takes; None: any."""
    channels: int | None = None
    """The one width of `image_features` that it takes; None: what config.json says."""
    encoder: FastViTConfig | None = None
    """The one encoder that it knows; None: the one that config.json describes."""
    bits: tuple[int, ...] | None = None
    """Bits of a decoder that it loads, the same in every layer; None: any that MLX has, also mixed."""
    cache_bytes: int = 2
    """Of one number of the key-value cache and of prefill: 4 where float32 features widen what follows."""
    templated: bool = False
    """Whether it hands the chat template messages in parts, with images among them."""

    def decoder_faults(self, config: Mapping[str, Any]) -> Iterator[str]:
        """What keeps the client from loading a decoder that is quantized as `config` says."""
        quantization = config.get("quantization")
        if self.bits is None or not isinstance(quantization, Mapping):
            return
        if any(isinstance(value, Mapping | bool) for value in quantization.values()):
            yield "its layers differ in bits"
        elif quantization.get("bits") not in self.bits:
            yield f"it has {quantization.get('bits')!r:.40} bits"
