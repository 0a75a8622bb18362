"""`fastvlm chat`"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..models.errors import FastVLMError, UsageError
from . import options as given
from .arguments import in_options
from .interrupt import Interrupted, resumed
from .progress import note, one_line

if TYPE_CHECKING:
    from ..runtime.conversation import Conversation
    from ..runtime.generate import Generation

HELP = """  /image FILE   ask the next question about this image
  /reset        clear the conversation
  /help         show this help
  /quit         leave, as the end of the input does. Ctrl-C stops an answer.
"""


def chat_command(
    folder: given.Folder,
    image: given.Images = None,
    system: given.System = None,
    max_tokens: given.MaxTokens = 256,
    temperature: given.Temperature = 0.0,
    top_p: given.TopP = 1.0,
    top_k: given.TopK = 0,
    min_p: given.MinP = 0.0,
    repetition_penalty: given.RepetitionPenalty = 1.0,
    seed: given.Seed = None,
    stop: given.Stop = None,
    json_schema: given.JsonSchema = None,
    choice: given.Choice = None,
    regex: given.Regex = None,
    grammar: given.Grammar = None,
    fit: given.Fit = None,
    background: given.Background = "white",
    backend: given.Backend = None,
    compute_units: given.ComputeUnits = None,
    encoder_process: given.EncoderProcess = False,
    kv_bits: given.KVBits = None,
    verify_hashes: given.VerifyHashes = False,
) -> None:
    """Chat about images, a question per line. Prints answers to stdout, and timings to stderr."""
    from ..runtime.request import opened, prepare

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "fit": fit,
        **given.structure(json_schema, choice, regex, grammar),
    }
    prepare(None, "", **options)  # wrong options are reported before the model is loaded
    images = opened(image, background)
    model = given.loaded(folder, backend, compute_units, kv_bits, verify_hashes, encoder_process)
    for text in model.notes:
        note(text)
    session = Session(model.chat(images, system, background), options, model.config.max_context)
    with given.quiet_pipe():
        for line in lines():
            if not session.take(line):
                break
    if session.failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def lines() -> Iterator[str]:
    """Yields the lines that are typed or piped in."""
    if not sys.stdin.isatty():
        while text := given.line_from(sys.stdin):
            yield text
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing keys
    sys.stderr.write("Ask, or /help.\n")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


class Session:
    """A conversation that takes lines, each a question or a command.

    Attributes:
        failed: true once a line ended in an error.
    """

    def __init__(self, conversation: Conversation, options: dict[str, Any], max_context: int) -> None:
        self._conversation = conversation
        self._options = options
        self._max_context = max_context
        self.failed = False

    def take(self, line: str) -> bool:
        """Runs one line. Returns False when it is `/quit`."""
        text = line.strip()
        try:
            if text.startswith("/"):
                return self._command(*text.split(maxsplit=1))
            if text:
                self._ask(text)
        except FastVLMError as error:
            self.failed = True
            sys.stderr.write(f"error: {one_line(in_options(error))}\n")
        return True

    def _command(self, name: str, argument: str = "") -> bool:
        if name == "/quit":
            return False
        if name == "/help":
            sys.stderr.write(HELP)
        elif name == "/reset":
            self._conversation.reset()
        elif name == "/image" and argument:
            self._conversation.add_image(Path(argument.strip("\"'")).expanduser())
        else:
            what = "/image needs a file" if name == "/image" else f"{name:.40} is not a command"
            raise UsageError(f"{what}. See /help")
        return True

    def _ask(self, question: str) -> None:
        """Prints the answer as it is generated. Ctrl-C stops it and drops the question from the history."""
        stream = self._conversation.stream(question, **self._options)
        try:
            for piece in stream:
                given.write_piece(piece)
        except Interrupted as reason:
            if reason.signal_number != signal.SIGINT:
                raise
            resumed()
            stream.close()
            sys.stderr.write("\n(stopped: this question is not in the history)\n")
            return
        given.write_piece("\n")
        self._report(stream.generation)

    def _report(self, generation: Generation) -> None:
        timings = generation.timings
        rate = f", {timings.decode_tps:.1f} tokens/s" if timings.decode_tps else ""
        sys.stderr.write(
            f"  TTFT {timings.ttft_ms:.0f} ms; {timings.prompt_tokens - timings.reused_tokens} prompt tokens read, "
            f"{timings.reused_tokens} cached; {timings.generated_tokens} generated{rate}\n"
        )
        if generation.finish_reason == "context":
            note(f"the context of {self._max_context:,} tokens is full. /reset starts a new conversation")
