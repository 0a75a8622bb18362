"""The rendering of parameters in `--help`: flags without a type, defaults after the text."""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup


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
