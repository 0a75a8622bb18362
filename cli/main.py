"""`fastvlm`: the commands, and how errors leave them."""

from __future__ import annotations

import io
import sys
from typing import Annotated, NoReturn

import typer

from .._version import __version__
from ..models.errors import FastVLMError
from .arguments import in_options
from .bench import bench_command
from .bundle import bundle_command
from .chat import chat_command
from .doctor import doctor_command
from .download import download_command
from .eval import eval_command
from .export import export_command
from .generate import generate_command
from .inspect import inspect_command
from .interrupt import Interrupted, asked_to_stop, listen, stop_listening
from .progress import one_line
from .verify import verify_command

app = typer.Typer(
    name="fastvlm",
    help="FastVLM on Apple Silicon: export for the Neural Engine, ask about images, measure the time to first token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("export")(export_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("bundle")(bundle_command)
app.command("download")(download_command)
app.command("doctor")(doctor_command)

OUT_OF_MEMORY = "out of memory: close other programs, or use a smaller model or image size"
ALLOCATION_FAILED = ("not enough memory", "Unable to allocate", "can't allocate memory", "Insufficient Memory")
"""How torch's, MLX's and Metal's allocators say it, which raise no MemoryError."""


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """FastVLM on Apple Silicon: export for the Neural Engine, ask about images, measure the time to first token."""


def main() -> NoReturn:
    """Runs the command line. Exit code 0: success; 1: an error, told in one line; 2: wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character still gets the rest
    listen()
    try:
        _run()
    except Exception:
        if asked_to_stop() is None:
            raise
        _fail("")  # of an import that was interrupted, say
    finally:
        stop_listening()
    sys.exit(0)


def _run() -> None:
    """The command; what goes wrong on purpose becomes a line and an exit code."""
    try:
        app()
    except FastVLMError as error:
        _fail(in_options(error))
    except Interrupted:
        _fail("")
    except MemoryError:
        _fail(OUT_OF_MEMORY)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ALLOCATION_FAILED):
            raise
        _fail(OUT_OF_MEMORY)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _fail(message: str) -> NoReturn:
    """Says what is wrong; an interruption comes first, for it may have led to whatever else is said."""
    number = asked_to_stop()
    sys.stderr.write(f"error: {one_line(message) if number is None else 'interrupted'}\n")
    sys.exit(1 if number is None else 128 + number)


if __name__ == "__main__":
    main()
