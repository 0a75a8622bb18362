"""The workload of a benchmark: its cases (folders, each with a prompt length), and the question that they answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ...models.folder_layout import MANIFEST_NAME, PACKAGE_NAME
from ...models.hub_cache import cached_folder
from ...models.images import open_image
from ..fastvlm import FastVLM
from ..folder import open_folder
from ..prompt import Message, PromptEncoder
from ..request import Request, prepare


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: a folder, and the length of its prompt (None: without filler)."""

    label: str
    folder: Path
    prompt_tokens: int | None = None


def cases_of(folders: Sequence[str | Path | Case], prompt_tokens: Sequence[int] = ()) -> list[Case]:
    """Returns a case per folder and prompt length, with unique labels. Raises UsageError without folders."""
    if not folders:
        raise UsageError("folders must have at least one exported folder.")
    given = [one if isinstance(one, Case) else case_of(Path(one).expanduser()) for one in folders]
    names = [case.label for case in given]
    given = [case if names.count(case.label) == 1 else replace(case, label=str(case.folder)) for case in given]
    if not prompt_tokens:
        return given
    return [
        replace(case, label=f"{case.label}, {length} tokens", prompt_tokens=length)
        for case in given
        for length in prompt_tokens
    ]


def case_of(folder: Path) -> Case:
    """Returns the case of a folder, labelled with its name."""
    return Case(folder.resolve().name, folder)


def exported_folder(model: str) -> Path | None:
    """Returns the exported folder that `model` names, in the hub's cache too, or None for anything else."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = cached_folder(model) or folder
    return folder if (folder / MANIFEST_NAME).is_file() or (folder / PACKAGE_NAME).is_dir() else None


def folder_case(folder: Path, sizes: Sequence[int], quant: str | None) -> Case:
    """Returns the case of an exported folder.

    Raises:
        UsageError: another image size or a scheme is asked for, which only an export can change.
    """
    found = open_folder(folder).config.image_size
    for argument, other in (("quant", quant is not None), ("image_size", any(size != found for size in sizes))):
        if other:
            raise UsageError(
                f"{argument} cannot change an exported folder ({folder} is for {found} pixels). "
                "Pass a checkpoint instead, or export one folder per setting.",
                argument,
            )
    return case_of(folder)


SAMPLE = Path(__file__).parents[1] / "samples" / "shapes.png"
PROMPT = "Describe the image."

FILLER = " and"
"""The word that makes a prompt longer. It is one or a few tokens in every tokenizer."""

STAND_IN_ID = -200
"""The id in place of the image where positions are counted. Tokenizers have no negative ids."""


@dataclass(frozen=True)
class Workload:
    """The question that a folder answers repeatedly.

    Raises:
        UsageError: a number is out of range.
    """

    image: Path = SAMPLE
    prompt: str = PROMPT
    max_tokens: int = 32
    runs: int = 5
    """The number of measured answers per process."""
    warmup: int = 2
    """The number of answers between the cold one and the measured ones."""

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("runs", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least} (got {value!r:.60}).", name)

    def as_dict(self) -> dict[str, Any]:
        """Returns the `workload` of a report, as defined in `report.py`. Raises ImageError."""
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
        """Returns the request: greedy decoding past the end token, so that every run does the same work."""
        return prepare(self.image, prompt, max_tokens=self.max_tokens, ignore_eos=True)

    def lengthened(self, model: FastVLM, prompt_tokens: int) -> Request:
        """Returns the request with filler after its prompt, of at most `prompt_tokens` positions and close to it.

        Raises:
            UsageError: the image and the prompt alone need more.
        """

        encoder = PromptEncoder(model.folder.path, model.engine.tokenizer, STAND_IN_ID)

        def size(fillers: int) -> int:
            messages = (Message("user", self.prompt + FILLER * fillers, image_count=1),)
            return encoder.encode(messages).token_count(model.config.tokens_per_image)

        if size(0) > prompt_tokens:
            raise UsageError(
                f"prompt_tokens must be at least {size(0)} for {model.folder.path.name}, "
                f"the length of the image and {self.prompt!r:.60} (got {prompt_tokens}).",
                "prompt_tokens",
            )
        return self.request(self.prompt + FILLER * largest(lambda fillers: size(fillers) <= prompt_tokens))


@dataclass(frozen=True)
class Loading:
    """The arguments of `fastvlm.load` for a measurement."""

    backend: str | None = None
    compute_units: str | None = None
    kv_bits: int | None = None


def largest(holds: Callable[[int], bool]) -> int:
    """Returns the largest number for which `holds` is true, if it is true for 0 and false above some number."""
    beyond = 1
    while holds(beyond):
        beyond *= 2
    low = beyond // 2
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if holds(middle) else (low, middle)
    return low
