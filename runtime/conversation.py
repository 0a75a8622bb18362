"""Conversations: the history stays in the KV cache, so a question pays only for its own tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..models.errors import UsageError
from ..models.images import ImageSource
from .engine import Engine
from .generate import Generation, Stream
from .prompt import Message
from .prompt_cache import CachedPrompt, ImageItem
from .request import Request, as_list, opened, prepare
from .structured import Schema
from .tokenizer import check_unicode


class Conversation:
    """Questions to one model, each with the history before it. Use `FastVLM.chat` to get one. Not for two threads.

    An answer is kept in the history with the ids that were generated, because its text could encode to others. A
    question whose stream is closed before its end leaves the history as it was.

    Attributes:
        messages: the history, from the system prompt (if one was given) to the last answer.
    """

    def __init__(
        self,
        engine: Engine,
        image: ImageSource | Sequence[ImageSource] | None = None,
        system: str | None = None,
        background: str = "white",
    ) -> None:
        if not isinstance(system, str | None):
            raise UsageError(f"system must be a string (got {type(system).__name__})", "system")
        check_unicode("the system prompt", system)
        self._engine = engine
        self._system = () if system is None else (Message("system", system),)
        self._background = background
        self._next_images = opened(image, background)
        self._cached = CachedPrompt()
        self._images: tuple[ImageItem, ...] = ()
        self._open: Stream | None = None
        self.messages: tuple[Message, ...] = self._system

    def ask(
        self,
        prompt: str,
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fit: str | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        logprobs: int | None = None,
    ) -> Generation:
        """Returns the whole answer. See `stream`, and `FastVLM.generate` for beam search."""
        return self._stream(
            prompt,
            image,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fit=fit,
            schema=schema,
            regex=regex,
            choice=choice,
            grammar=grammar,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            logprobs=logprobs,
        ).read()

    def stream(
        self,
        prompt: str,
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fit: str | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        logprobs: int | None = None,
    ) -> Stream:
        """Returns the answer as a stream of text.

        `image` is added to the images of the conversation. The other options are those of `FastVLM.generate`. An
        earlier stream of this conversation that was not read to its end is closed.

        Raises:
            UsageError: an option is out of range, or a schema or its like cannot be followed.
            ImageError: an image cannot be opened.
            PromptError: (while reading) the conversation does not fit the context. It stays as it was.
        """
        return self._stream(
            prompt,
            image,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fit=fit,
            schema=schema,
            regex=regex,
            choice=choice,
            grammar=grammar,
            logprobs=logprobs,
        )

    def _stream(self, prompt: str, image: ImageSource | Sequence[ImageSource] | None, **options: Any) -> Stream:
        images = [*self._next_images, *as_list(image)]
        request = prepare(images, prompt, background=self._background, **options)
        if self._open is not None:
            self._open.close()
        self._open = Stream(self._answer(request))
        return self._open

    def add_image(self, image: ImageSource | Sequence[ImageSource]) -> None:
        """Opens an image, or several, for the next question. They replace images that were added and not used yet.

        Raises:
            ImageError: an image cannot be opened.
        """
        self._next_images = opened(image, self._background)

    def reset(self) -> None:
        """Clears the history and its images, but keeps the system prompt."""
        if self._open is not None:
            self._open.close()
        self._cached.clear()
        self._images, self._next_images, self.messages = (), (), self._system

    def _answer(self, request: Request) -> Generator[str, None, Generation]:
        question = request.messages[-1]
        asked = replace(request, messages=(*self.messages, question))
        next_images = self._next_images
        generation = yield from self._engine.answer(asked, self._cached, self._images)
        self._images = self._cached.images
        self._next_images = () if self._next_images is next_images else self._next_images
        self.messages = (*asked.messages, Message("assistant", generation.text, ids=generation.token_ids))
        return generation
