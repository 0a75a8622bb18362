"""The `fastvlm` command: its subcommands, the rendering of their `--help`, and the exit codes of errors."""

from __future__ import annotations

import inspect
import io
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from .._version import __version__
from ..models.errors import FastVLMError
from .arguments import in_options
from .bench import bench_command
from .bundle import bundle_command
from .caption import caption_command
from .chat import chat_command
from .doctor import doctor_command
from .download import download_command
from .eval import eval_command
from .export import export_command
from .generate import generate_command
from .inspect import inspect_command
from .interrupt import Interrupted, asked_to_stop, listen, stop_listening
from .progress import one_line
from .run import run_command
from .serve import serve_command
from .verify import verify_command


class Command(TyperCommand):
    """A command whose parameters are rendered by `rendered`, and whose help is filled to the width."""

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        super().__init__(*arguments, help="\n\n".join(" ".join(text.split()) for text in paragraphs), **options)

    def get_params(self, ctx: Any) -> list[Any]:
        return [rendered(parameter) for parameter in super().get_params(ctx)]


class Group(TyperGroup):
    """The group of all commands, rendered in the same way."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [rendered(parameter) for parameter in super().get_params(ctx)]


def rendered(parameter: Any) -> Any:
    """Returns the same parameter, with its default in the help text, and no type for a flag or an argument.

    typer shows `<bool>` for a flag and `<list[str]>` for an argument, and moves a default to a line of its own when the
    text is long.
    """
    argument = isinstance(parameter, TyperArgument)
    if argument:
        parameter.display_type_rich = lambda ctx: None
    elif parameter.metavar is None and getattr(parameter, "is_flag", False):
        parameter.metavar = ""
    default = default_text(parameter)
    if default:
        parameter.help = f"{parameter.help} \\[default: {default}]"
        parameter.show_default = False
    return parameter


def default_text(parameter: Any) -> str:
    """Returns `show_default` if it is a text, else the default value, else an empty string."""
    shown, value = getattr(parameter, "show_default", False), parameter.default
    if isinstance(shown, str):
        return shown
    if not shown or parameter.required or value is None or isinstance(value, bool | list | tuple):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


app = typer.Typer(
    name="fastvlm",
    cls=Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (
    export_command,
    generate_command,
    chat_command,
    serve_command,
    caption_command,
    eval_command,
    bench_command,
    inspect_command,
    run_command,
    verify_command,
    bundle_command,
    download_command,
    doctor_command,
):
    app.command(command.__name__.removesuffix("_command"), cls=Command)(command)

OUT_OF_MEMORY = "out of memory: close other programs, or use a smaller model or image size"
ALLOCATION_FAILED = ("not enough memory", "Unable to allocate", "can't allocate memory", "Insufficient Memory")
"""Parts of the messages that the allocators of torch, MLX and Metal raise in place of a MemoryError."""


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """FastVLM on Apple Silicon: export for the Neural Engine, ask about images, measure the time to first token."""


def main() -> NoReturn:
    """Runs the command line. Exit code 0 is success, 1 an error in one line, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character still gets the rest
    listen()
    try:
        _run()
    except Exception:
        if asked_to_stop() is None:
            raise
        _fail("")  # for example from an import that was interrupted
    finally:
        stop_listening()
    sys.exit(0)


def _run() -> None:
    """Runs the command, and turns known errors into one line and an exit code."""
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
    """Prints an error and exits. An interruption takes precedence, because it may have caused the error."""
    number = asked_to_stop()
    sys.stderr.write(f"error: {one_line(message) if number is None else 'interrupted'}\n")
    sys.exit(1 if number is None else 128 + number)


if __name__ == "__main__":
    main()
