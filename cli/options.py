"""Options that several commands share, each with one name and one help text."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeAlias, get_args

import typer

from ..models.errors import PromptError, UsageError
from .progress import LoadProgress

if TYPE_CHECKING:
    from ..runtime.fastvlm import FastVLM

MODEL, SAMPLING, STRUCTURE, OUTPUT = "Model", "Sampling", "Structure of the answer", "Output"
"""Panels of `--help`."""

DESCRIBE = "Describe the image."
"""The default prompt of `caption` and `bench`."""

MAX_STDIN_BYTES = 2**20
"""The most bytes of a prompt that are read from stdin: far more than any context holds."""

EncoderQuant: TypeAlias = Literal["fp16", "int8", "pal8", "pal6", "pal4", "int4", "w8a8", "mixed", "bf16", "fp32"]
BackendName: TypeAlias = Literal["coreml", "reference", "mlx"]
UnitsName: TypeAlias = Literal["CPU_AND_NE", "CPU_ONLY", "CPU_AND_GPU", "ALL"]
Client: TypeAlias = Literal["apple-app", "mlx-swift-lm", "mlx-vlm"]

QUANT_CHOICES, UNITS_CHOICES, CLIENT_CHOICES = (
    " | ".join(get_args(choices)) for choices in (EncoderQuant, UnitsName, Client)
)
"""The choices as a metavar that breaks between words, for options with long lists."""

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder, or its hub id.")]
Images = Annotated[
    list[Path] | None, typer.Option("--image", "-i", metavar="FILE", help="Ask about this image. Repeat for several.")
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Set the system prompt.", show_default="the chat template's")
]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Stop after N tokens.", rich_help_panel=SAMPLING)]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="Set the sampling temperature. 0 is greedy.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P", help="Sample from the likeliest tokens of total probability P.", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int, typer.Option(metavar="K", help="Sample from the K likeliest tokens. 0 means all.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="P", help="Drop tokens below P times the likeliest token's probability.", rich_help_panel=SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="X", help="Penalize repeated tokens by a factor above 1.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Make sampling reproducible.", rich_help_panel=SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Stop before this string. Repeat for several.", rich_help_panel=SAMPLING),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", help="Continue past the end token, to measure a fixed length.", rich_help_panel=SAMPLING
    ),
]
NumBeams = Annotated[
    int,
    typer.Option(metavar="N", help="Search for the likeliest answer with N beams.", rich_help_panel=SAMPLING),
]
LengthPenalty = Annotated[
    float,
    typer.Option(
        metavar="X", help="Favor long answers among the beams above 0, short ones below.", rich_help_panel=SAMPLING
    ),
]
EarlyStopping = Annotated[
    Literal["true", "false", "never"],
    typer.Option(help="Choose when a beam search ends, as in transformers.", rich_help_panel=SAMPLING),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Answer with JSON that satisfies this JSON schema.", rich_help_panel=STRUCTURE),
]
Choice = Annotated[
    str | None,
    typer.Option(metavar="A,B,C", help="Answer with one of these, separated by commas.", rich_help_panel=STRUCTURE),
]
Regex = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Answer with a match of this regular expression.", rich_help_panel=STRUCTURE),
]
Grammar = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Answer as this grammar in Lark's syntax says.", rich_help_panel=STRUCTURE),
]
Fit = Annotated[
    Literal["pad", "crop"] | None,
    typer.Option(
        help="Pad or crop images to a square.", show_default="as the model was trained", rich_help_panel=MODEL
    ),
]
Background = Annotated[
    Literal["white", "black", "none"],
    typer.Option(
        help="Draw transparent images on this color. none drops the alpha channel, as LLaVA does.",
        rich_help_panel=MODEL,
    ),
]
Backend = Annotated[
    BackendName | None,
    typer.Option(
        help="Choose the vision backend.",
        show_default="coreml on macOS, reference elsewhere, mlx for MLX folders",
        rich_help_panel=MODEL,
    ),
]
ComputeUnits = Annotated[
    UnitsName | None,
    typer.Option(
        metavar=UNITS_CHOICES,
        help="Choose Core ML's compute units.",
        show_default="FASTVLM_COMPUTE_UNITS, else CPU_AND_NE",
        rich_help_panel=MODEL,
    ),
]
EncoderProcess = Annotated[
    bool,
    typer.Option(
        "--encoder-process",
        help="Run the reference executor in its own process too, as Core ML always is.",
        rich_help_panel=MODEL,
    ),
]
KVBits = Annotated[
    Literal["8"] | None,
    typer.Option(
        help="Quantize the KV cache: 0.53 of its float16 memory, logits that differ by about 0.2 %.",
        show_default="off",
        rich_help_panel=MODEL,
    ),
]
VerifyHashes = Annotated[
    bool,
    typer.Option("--verify-hashes", help="Compare every byte with the manifest before loading.", rich_help_panel=MODEL),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)]

Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Write the report to a file, for --compare.", rich_help_panel=OUTPUT),
]


def structure(json_schema: Path | None, choice: str | None, regex: str | None, grammar: Path | None) -> dict[str, Any]:
    """Returns the arguments of `prepare` for the structure of an answer.

    Raises:
        UsageError: a file cannot be read, or is not UTF-8.
    """
    return {
        "schema": None if json_schema is None else _text_of(json_schema, "--json-schema"),
        "choice": None if choice is None else choice.split(","),
        "regex": regex,
        "grammar": None if grammar is None else _text_of(grammar, "--grammar"),
    }


def _text_of(path: Path, option: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_STDIN_BYTES + 1).decode()  # the library refuses longer ones
    except OSError as reason:
        raise UsageError(f"{option}: {path} cannot be read ({reason.strerror}). Name a file.") from None
    except UnicodeDecodeError as reason:
        raise UsageError(f"{option}: {path} is not UTF-8 at byte {reason.start:,}. Convert it.") from None


def beams(num_beams: int, length_penalty: float, early_stopping: str) -> dict[str, Any]:
    """Returns the arguments of `prepare` for beam search."""
    ends: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    return {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": ends[early_stopping]}


def loaded(
    folder: Path,
    backend: str | None,
    compute_units: str | None,
    kv_bits: str | None,
    verify_hashes: bool,
    encoder_process: bool = False,
) -> FastVLM:
    """Loads a model by these options, and shows what loading waits for. See `FastVLM.load`."""
    from ..runtime.fastvlm import load

    with LoadProgress() as progress:
        return load(
            folder,
            backend,
            compute_units=compute_units,
            kv_bits=as_int(kv_bits),
            verify_hashes=verify_hashes,
            encoder_process=encoder_process,
            on_wait=progress,
        )


def as_int(bits: str | None) -> int | None:
    """Returns the number that a choice such as `--kv-bits 8` names."""
    return None if bits is None else int(bits)


def text_from(stream: TextIO) -> str:
    """Returns the whole of a stream, such as stdin, as a prompt.

    Raises:
        PromptError: the stream is longer than a mebibyte, or not UTF-8.
    """
    return _decoded(stream.buffer.read(MAX_STDIN_BYTES + 1), "the prompt")


def _decoded(content: bytes, subject: str) -> str:
    if len(content) > MAX_STDIN_BYTES:
        raise PromptError(f"{subject} on stdin is longer than {MAX_STDIN_BYTES:,} bytes. Shorten it")
    try:
        return content.decode()
    except UnicodeDecodeError as reason:
        raise PromptError(f"{subject} on stdin is not UTF-8 at byte {reason.start:,}. Convert it") from None


def line_from(stream: TextIO) -> str:
    """Returns the next line of a stream with its newline, or an empty string at the end.

    Raises:
        PromptError: the line is longer than a mebibyte, or not UTF-8.
    """
    content = stream.buffer.readline(MAX_STDIN_BYTES + 1)
    return _decoded(content, "the question")


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends the command quietly when the reader of stdout closes it, as `| head` does."""
    try:
        yield
    except BrokenPipeError:  # nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def write_piece(piece: str) -> None:
    """Writes a piece of an answer without waiting for a full buffer."""
    sys.stdout.write(piece)
    sys.stdout.flush()
