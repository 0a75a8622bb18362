"""Questions with history: what has been read and answered is not read again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..models.errors import UsageError
from ..models.images import ImageSource
from .generate import Generation, Stream
from .prompt import Message
from .request import Request, as_list, opened, prepare
from .reuse import Memory, Picture
from .tokenizer import check_unicode

if TYPE_CHECKING:
    from .fastvlm import FastVLM


class Conversation:
    """Questions to one model, each with the history of those before. Made by `FastVLM.chat`; not for two threads.

    The keys and values of the history are kept, and an answer stands in it with the ids that were generated, not with
    those that its text would be encoded to. A question whose stream is closed before its end has not been asked.

    Attributes:
        messages: what was said, from the system prompt (if one was given) to the last answer.
    """

    def __init__(
        self, model: FastVLM, image: ImageSource | Sequence[ImageSource] | None = None, system: str | None = None
    ) -> None:
        if not isinstance(system, str | None):
            raise UsageError("system should be a text")
        check_unicode("the system prompt", system)
        self._model = model
        self._system = () if system is None else (Message("system", system),)
        self._waiting = opened(image)
        self._memory = Memory()
        self._pictures: tuple[Picture, ...] = ()
        self._open: Stream | None = None
        self.messages: tuple[Message, ...] = self._system

    def ask(self, prompt: str, image: ImageSource | Sequence[ImageSource] | None = None, **options: Any) -> Generation:
        """The whole answer; see `stream`."""
        return self.stream(prompt, image, **options).read()

    def stream(self, prompt: str, image: ImageSource | Sequence[ImageSource] | None = None, **options: Any) -> Stream:
        """The answer in pieces. `image` is what the question adds to the images before; `options` as in `generate`.

        A stream of this conversation that was not read to its end is closed.

        Raises:
            UsageError: an option is out of range, or `system` is among them: it belongs to `FastVLM.chat`.
            ImageError: an image cannot be opened.
            PromptError: (while reading) the conversation does not fit the context; it stays as it was.
        """
        if "system" in options:
            raise UsageError("the system prompt belongs to the whole conversation: give it to chat()")
        request = prepare([*self._waiting, *as_list(image)], prompt, **options)
        if self._open is not None:
            self._open.close()
        self._open = Stream(self._answer(request))
        return self._open

    def show(self, image: ImageSource | Sequence[ImageSource]) -> None:
        """The next question is about `image`. Raises ImageError."""
        self._waiting = opened(image)

    def reset(self) -> None:
        """Forgets what was said and shown, but for the system prompt."""
        if self._open is not None:
            self._open.close()
        self._memory.clear()
        self._pictures, self._waiting, self.messages = (), (), self._system

    def _answer(self, request: Request) -> Generator[str, None, Generation]:
        question = request.messages[-1]
        asked = replace(request, messages=(*self.messages, question))
        waiting, pictures = self._waiting, self._pictures
        generation = yield from self._model.pieces(asked, self._memory, pictures)
        self._pictures = self._memory.pictures
        self._waiting = () if self._waiting is waiting else self._waiting
        self.messages = (*asked.messages, Message("assistant", generation.text, ids=generation.token_ids))
        return generation
