"""What a benchmark asks: the same picture and prompt, time and again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ...models.images import open_image
from ..fastvlm import FastVLM
from ..prompt import Message, PromptEncoder
from ..request import Request, prepare

SAMPLE = Path(__file__).parents[1] / "samples" / "shapes.png"
PROMPT = "Describe the image."

FILLER = " and"
"""Makes a prompt longer: a word that takes a token or a few in every tokenizer."""

STAND_IN_ID = -200
"""For the picture where only positions are counted: no token has this id."""


@dataclass(frozen=True)
class Workload:
    """How a folder is asked.

    Raises:
        UsageError: a number is out of range.
    """

    image: Path = SAMPLE
    prompt: str = PROMPT
    max_tokens: int = 32
    runs: int = 5
    """Answers that count, per process."""
    warmup: int = 2
    """Answers after the first that do not."""

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("runs", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} should be a whole number from {least}; found {value!r:.60}")

    def as_dict(self) -> dict[str, Any]:
        """See `report.py`. Raises ImageError."""
        image = open_image(self.image)
        return {
            "image": {
                "name": self.image.name,
                "width": image.width,
                "height": image.height,
                "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
            },
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "warmup": self.warmup,
        }

    def request(self, prompt: str) -> Request:
        """Greedy, and past the end of the answer, so that every run does the same."""
        return prepare(self.image, prompt, max_tokens=self.max_tokens, ignore_eos=True)

    def lengthened(self, model: FastVLM, prompt_tokens: int) -> Request:
        """The request with filler behind its prompt, of the most positions that are no more than `prompt_tokens`.

        Raises:
            UsageError: the picture and the prompt alone take more.
        """

        encoder = PromptEncoder(model.folder.path, model.tokenizer, STAND_IN_ID)

        def size(fillers: int) -> int:
            messages = (Message("user", self.prompt + FILLER * fillers, image_count=1),)
            return encoder.encode(messages).token_count(model.config.tokens_per_image)

        if size(0) > prompt_tokens:
            raise UsageError(
                f"a prompt of {prompt_tokens} tokens is too short: the picture and {self.prompt!r:.60} take {size(0)} "
                f"with {model.folder.path.name}; ask for that many or more"
            )
        return self.request(self.prompt + FILLER * largest(lambda fillers: size(fillers) <= prompt_tokens))


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded: options of `fastvlm.load`."""

    vision: str | None = None
    compute_units: str | None = None
    kv_bits: int | None = None


def largest(holds: Callable[[int], bool]) -> int:
    """The largest number that `holds`, where 0 does and all above some number do not."""
    beyond = 1
    while holds(beyond):
        beyond *= 2
    low = beyond // 2
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if holds(middle) else (low, middle)
    return low
