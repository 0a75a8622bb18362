"""What an answer is asked with: images, messages and options, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..models.errors import UsageError
from ..models.images import Fit, ImageSource, open_images
from .generate import GenerationOptions, options_from
from .prompt import Message
from .sampling import SamplingOptions
from .timings import LapClock
from .tokenizer import check_unicode

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Request:
    """What one answer is made from."""

    images: tuple[Image.Image, ...]
    """Decoded, upright, RGB."""
    messages: tuple[Message, ...]
    fit: Fit | None
    """None: as the model was trained."""
    options: GenerationOptions
    image_open_ms: float


def prepare(
    image: ImageSource | Sequence[ImageSource] | None,
    prompt: str,
    *,
    system: str | None = None,
    fit: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
) -> Request:
    """A request, with its options checked and its images opened: what can go wrong before a model is loaded.

    `image` is a path, bytes, a PIL image, a uint8 array (H, W, 3), several of these, or None. `<image>` in `prompt`
    marks an image's place; without a mark the images stand before the text. `fit` (`pad` or `crop`) and `system`
    default to what the model was trained with.

    Raises:
        UsageError: an option is out of range.
        PromptError: a text has no UTF-8 form.
        ImageError: an image cannot be opened.
    """
    sampling = SamplingOptions(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    options = options_from(stop, max_tokens, ignore_eos, sampling)
    for what, text in (("prompt", prompt), ("system prompt", system), *(("stop text", text) for text in options.stop)):
        check_unicode(f"the {what}", text)
    if fit not in (None, "pad", "crop"):
        raise UsageError(f"fit should be 'pad' or 'crop'; found {fit!r:.40}")
    clock = LapClock()
    images = opened(image)
    messages = _messages(prompt, system, len(images))
    return Request(images, messages, cast("Fit | None", fit), options, image_open_ms=clock.lap_ms())


def opened(image: ImageSource | Sequence[ImageSource] | None) -> tuple[Image.Image, ...]:
    """The images, decoded. Raises ImageError."""
    return open_images(as_list(image))


def as_list(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """None, one image or several as several."""
    if image is None:
        return []
    if isinstance(image, list | tuple):
        return list(image)
    return [image]  # type: ignore[list-item]


def _messages(prompt: str, system: str | None, image_count: int) -> tuple[Message, ...]:
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise UsageError("prompt and system should be texts")
    before = () if system is None else (Message("system", system),)
    return (*before, Message("user", prompt, image_count))
