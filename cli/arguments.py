"""Errors of the library name Python arguments. The command line names its options instead."""

from __future__ import annotations

import re

from ..models.errors import FastVLMError

OPTIONS = {
    "as_json": "--json",
    "client": "--for",
    "folder": "FOLDER",
    "model": "MODEL",
    "model_id": "ID",
    "schema": "--json-schema",
    "stop_timeout_s": "--stop-timeout",
    "timeout_s": "--timeout",
    "zipped": "--zip",
}
"""The option of an argument, where it is not the argument's name with dashes."""

OFF = {"with_projector": "--no-projector"}
"""The option that sets an argument to False, where it is not `--no-` and the option."""

VALUE = r"""=('[^']*'|"[^"]*"|[\w.+-]*\w)"""
"""A value after an argument's name, as Python writes it."""


def option_of(argument: str) -> str:
    """Returns the option, or the positional argument, that sets a Python argument."""
    return OPTIONS.get(argument, f"--{argument.replace('_', '-')}")


def in_options(error: FastVLMError) -> str:
    """Returns an error's message with the options of the command line in place of Python arguments.

    `quant='mixed'` becomes `--quant mixed`, `force=True` `--force`, and `quantize_embeddings=False`
    `--no-quantize-embeddings`.
    """
    if not error.arguments:
        return str(error)
    names = "|".join(re.escape(name) for name in sorted(error.arguments, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({names})(?:{VALUE})?(?![\w/-]|\.\w)", _option, str(error))


def _option(found: re.Match[str]) -> str:
    argument, value = found[1], found[2]
    option = option_of(argument)
    if value is None or value == "True":
        return option
    if value == "False":
        return OFF.get(argument, f"--no-{option.removeprefix('--')}")
    word = value.strip("'\"")
    return f"{option} {word}"
