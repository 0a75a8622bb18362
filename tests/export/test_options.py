"""The options of an export: one list for the library, the command line and the documentation."""

from __future__ import annotations

import inspect
import re
from dataclasses import FrozenInstanceError, fields

import pytest

import fastvlm
from fastvlm.cli.export import export_command
from fastvlm.export.exporter import export
from fastvlm.export.options import ExportOptions

NAMES = [field.name for field in fields(ExportOptions)]


def test_signature_of_export_has_every_option() -> None:
    parameters = inspect.signature(export).parameters
    assert list(parameters) == ["model", "out", *NAMES]
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in NAMES)
    assert inspect.signature(fastvlm.export) == inspect.signature(export)


def test_docstring_of_export_describes_every_option() -> None:
    described = re.findall(r"^    (\w+): ", inspect.getdoc(export) or "", re.MULTILINE)
    assert [name for name in described if name in parameters_of_export()] == parameters_of_export()
    assert "quant: str | None = None," in (fastvlm.export.__doc__ or "")


def parameters_of_export() -> list[str]:
    return ["model", "out", *NAMES]


def test_command_line_declares_every_option() -> None:
    declared = set(inspect.signature(export_command).parameters)
    assert set(NAMES) - declared == {"quantize_embeddings", "on_stage"}
    assert declared - set(NAMES) == {"model", "out", "no_quantize_embeddings", "as_json"}


def test_options_are_frozen_and_refuse_unknown_names() -> None:
    with pytest.raises(FrozenInstanceError):
        ExportOptions().quant = "int8"
    with pytest.raises(TypeError, match="layout"):
        export("random:tiny", layout="mlx")


def test_chosen_options_ignore_other_arguments() -> None:
    options = ExportOptions.chosen({"quant": "pal6", "as_json": True, "model": "tiny"})
    assert options == ExportOptions(quant="pal6")
    assert options.given("quant", "io", "force") == {"quant": "pal6", "force": False}
