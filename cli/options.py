"""Options that several commands share, under one name and with one explanation."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TextIO

import typer

from ..models.errors import PromptError

MAX_STDIN_BYTES = 2**20
"""Of a prompt or question from stdin: far more than any context holds."""

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder, or the hub id of one.")]
Images = Annotated[list[Path] | None, typer.Option("--image", "-i", metavar="F", help="An image; repeat for several.")]
System = Annotated[str | None, typer.Option(help="The system prompt. Default: the chat template's.")]
MaxTokens = Annotated[int, typer.Option(help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option(help="0: the likeliest token each time; above: sampled.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from this many tokens at most; 0: all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: repeat less.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop at this text; repeat for several.")]
Fit = Annotated[str | None, typer.Option(help="pad or crop to a square. Default: as the model was trained.")]
Vision = Annotated[
    str | None,
    typer.Option(help="coreml, reference or mlx. Default: coreml on a Mac, else reference; mlx by its folder."),
]
ComputeUnits = Annotated[
    str | None, typer.Option(help="For coreml: CPU_AND_NE (default), CPU_ONLY, CPU_AND_GPU or ALL.")
]
VerifyHashes = Annotated[
    bool, typer.Option("--verify-hashes", help="Compare every byte of the folder with its manifest first.")
]
KVBits = Annotated[int | None, typer.Option(help="8: keep keys and values in 8 bits, to save memory.")]


def text_from(stream: TextIO) -> str:
    """All of a stream, such as stdin, as a prompt.

    Raises:
        PromptError: it is longer than a mebibyte, or not UTF-8.
    """
    return _decoded(stream.buffer.read(MAX_STDIN_BYTES + 1), "the prompt")


def _decoded(content: bytes, what: str) -> str:
    if len(content) > MAX_STDIN_BYTES:
        raise PromptError(f"{what} on stdin is longer than {MAX_STDIN_BYTES:,} bytes: no context holds it")
    try:
        return content.decode()
    except UnicodeDecodeError as reason:
        raise PromptError(f"{what} on stdin is not UTF-8 at byte {reason.start:,}: convert it") from None


def line_from(stream: TextIO) -> str:
    """The next line of a stream, with its end; nothing when there are no more.

    Raises:
        PromptError: see `text_from`.
    """
    content = stream.buffer.readline(MAX_STDIN_BYTES + 1)
    return _decoded(content, "the question")


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends the command without a complaint when whoever reads stdout has enough (`| head`)."""
    try:
        yield
    except BrokenPipeError:  # nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def write_piece(piece: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()
