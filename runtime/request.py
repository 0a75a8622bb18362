"""Requests: images, messages and options, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from ..models.errors import UsageError
from ..models.images import Fit, ImageSource, background_color, open_images
from .beam_search import BeamOptions
from .generate import GenerationOptions, options_from
from .prompt import Message
from .sampling import SamplingOptions
from .structured import Schema, constraint_from
from .timings import LapClock
from .tokenizer import check_unicode

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Request:
    """The input of one answer."""

    images: tuple[Image.Image, ...]
    """The decoded images, upright and in RGB."""
    messages: tuple[Message, ...]
    fit: Fit | None
    """The fit of images into the encoder's square. None takes the one that the model was trained with."""
    options: GenerationOptions
    image_open_ms: float
    """The time that decoding the images took, in milliseconds."""


def prepare(
    image: ImageSource | Sequence[ImageSource] | None,
    prompt: str,
    *,
    system: str | None = None,
    fit: str | None = None,
    background: str = "white",
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    schema: Schema | None = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    grammar: str | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    logprobs: int | None = None,
) -> Request:
    """Returns a request with checked options and open images, so that bad input fails before a model is loaded.

    `image` is a path, bytes, a PIL image, a uint8 array (H, W, 3), several of these, or None. `<image>` in `prompt`
    marks the place of an image. Without a mark the images precede the text. `fit` (`pad` or `crop`) and `system`
    default to what the model was trained with. `background` is drawn under transparent pixels. `schema`, `regex`,
    `choice` or `grammar` constrains the answer, see `constraint_from`. `num_beams` above 1 searches for the likeliest
    answer, see `BeamOptions`. `logprobs` is a number of alternatives, see `Generation.logprobs`.

    Raises:
        UsageError: an option is out of range.
        PromptError: a string is not valid Unicode.
        ImageError: an image cannot be opened.
    """
    sampling = SamplingOptions(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    constraint = constraint_from(schema, regex, choice, grammar)
    beams = BeamOptions(num_beams, length_penalty, early_stopping)
    options = options_from(stop, max_tokens, ignore_eos, sampling, constraint, beams, logprobs)
    for name, text in (("prompt", prompt), ("system prompt", system), *(("stop string", s) for s in options.stop)):
        check_unicode(f"the {name}", text)
    if fit not in (None, "pad", "crop"):
        raise UsageError(f"fit must be 'pad' or 'crop', got {fit!r:.40}", "fit")
    background_color(background)
    clock = LapClock()
    images = opened(image, background)
    messages = _messages(prompt, system, len(images))
    return Request(images, messages, cast("Fit | None", fit), options, image_open_ms=clock.lap_ms())


def opened(image: ImageSource | Sequence[ImageSource] | None, background: str = "white") -> tuple[Image.Image, ...]:
    """Returns the decoded images. Raises ImageError."""
    return open_images(as_list(image), background=background)


def as_list(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """Returns the images as a list, which is empty for None."""
    if image is None:
        return []
    if isinstance(image, list | tuple):
        return list(image)
    return [image]  # type: ignore[list-item]


def _messages(prompt: str, system: str | None, image_count: int) -> tuple[Message, ...]:
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        name, value = ("prompt", prompt) if not isinstance(prompt, str) else ("system", system)
        raise UsageError(f"{name} must be a string, got {type(value).__name__}", name)
    before = () if system is None else (Message("system", system),)
    return (*before, Message("user", prompt, image_count))
