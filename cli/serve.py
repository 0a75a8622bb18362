"""`fastvlm serve`"""

from __future__ import annotations

import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.errors import FastVLMError, MachineError
from . import options as given
from .arguments import in_options
from .progress import note, one_line

if TYPE_CHECKING:
    from ..runtime.server.run import Server

ACCESS, LIMITS = "Access", "Limits"
"""Panels of `--help`."""

EXTRA = ("starlette", "uvicorn", "pydantic", "prometheus_client")
"""The packages of the extra `serve`."""


def serve_command(
    folder: given.Folder,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Listen on this address. Others than loopback need --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Listen on this port. 0 takes a free one.")] = 8080,
    name: Annotated[
        str | None, typer.Option(metavar="ID", help="Set the model's id.", show_default="the folder's name")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only, not every request.")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Ask clients for this key. The environment variable FASTVLM_API_KEY sets it unseen.",
            envvar="FASTVLM_API_KEY",
            show_envvar=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Accept this name in Host headers. Repeat for several.", rich_help_panel=ACCESS
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Accept web pages of this origin. Repeat for several.", rich_help_panel=ACCESS
        ),
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images from this host. Repeat for several.", rich_help_panel=ACCESS),
    ] = None,
    allow_grammar: Annotated[
        bool,
        typer.Option(
            "--allow-grammar",
            help="Accept grammars, of which some never end, from clients that you trust.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Decode N answers at once.", rich_help_panel=LIMITS)] = 8,
    max_queue: Annotated[
        int, typer.Option(metavar="N", help="Let N further requests wait.", rich_help_panel=LIMITS)
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="End every answer after N tokens.", rich_help_panel=LIMITS)
    ] = 1024,
    max_images: Annotated[
        int, typer.Option(metavar="N", help="Accept N images per request.", rich_help_panel=LIMITS)
    ] = 16,
    max_body_mb: Annotated[int, typer.Option(metavar="N", help="Accept bodies of N MiB.", rich_help_panel=LIMITS)] = 32,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", help="Accept N pixels in all images of a request.", rich_help_panel=LIMITS)
    ] = 50_000_000,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", help="End an answer after S seconds.", rich_help_panel=LIMITS)
    ] = 300.0,
    stop_timeout_s: Annotated[
        float,
        typer.Option(
            "--stop-timeout", metavar="S", help="Wait S seconds for answers when stopped.", rich_help_panel=LIMITS
        ),
    ] = 30.0,
    backend: given.Backend = None,
    compute_units: given.ComputeUnits = None,
    encoder_process: given.EncoderProcess = False,
    kv_bits: given.KVBits = None,
    verify_hashes: given.VerifyHashes = False,
) -> None:
    """Serve a model to OpenAI's clients, several at once. Ctrl-C lets answers end, and a second one does not wait."""
    missing = [package for package in EXTRA if importlib.util.find_spec(package) is None]
    if missing:
        raise MachineError(
            f'the server needs {", ".join(EXTRA)} (missing: {", ".join(missing)}). Run `pip install "fastvlm[serve]"`.'
        )
    from ..runtime.server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        name=name,
        allow_host=tuple(allow_host or ()),
        allow_origin=tuple(allow_origin or ()),
        allow_url=tuple(allow_url or ()),
        allow_grammar=allow_grammar,
        batch_size=batch_size,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_images=max_images,
        max_body_mb=max_body_mb,
        max_pixels=max_pixels,
        timeout_s=timeout_s,
        stop_timeout_s=stop_timeout_s,
    )
    from ..runtime.server.run import bind, serve

    listener = bind(settings)
    model = given.loaded(folder, backend, compute_units, kv_bits, verify_hashes, encoder_process)
    for text in model.notes:
        note(text)
    _log_to_stderr(quiet)
    with model:
        serve(model, settings, listener, _say_ready)


def _say_ready(server: Server) -> None:
    sys.stderr.write(f"serving on {server.url}/v1 (Ctrl-C stops)\n")
    sys.stderr.flush()


class _Lines(logging.Formatter):
    """One line per record, without control characters. The traceback of a fault in the server follows it."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):  # an error of the library names Python arguments
            record.args = tuple(in_options(one) if isinstance(one, FastVLMError) else one for one in record.args)
        line = f"{self.formatTime(record, '%H:%M:%S')} {one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _log_to_stderr(quiet: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    log = logging.getLogger("fastvlm.server")
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False
