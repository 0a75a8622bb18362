"""Python arguments in errors, as options of the command line."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from fastvlm.cli.arguments import in_options, option_of
from fastvlm.cli.main import app
from fastvlm.models.errors import FastVLMError, OutputError, UsageError

ROOT = Path(__file__).resolve().parents[2]

PYTHON_ONLY = {"cache_bytes", "logprobs", "prompts", "queue_timeout_s"}
"""The arguments that no command gives, such as the prompts of `FastVLM.generate_batch`."""


def named_arguments() -> Iterator[tuple[str, str]]:
    """Yields (place, argument) for every name that an error of the source lists."""
    for folder in ("cli", "export", "models", "quant", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                if not re.match(r"[A-Z]\w+Error$", ast.unparse(node.exc.func)):
                    continue  # a helper such as `_error(operation, message)`
                if ast.unparse(node.exc.func) == "ApiError":
                    continue  # (status, message): the server's, with fields of a request
                for argument in node.exc.args[1:]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield f"{path.relative_to(ROOT)}:{argument.lineno}", argument.value


@pytest.mark.slow
def test_every_listed_argument_has_an_option() -> None:
    known = set()
    for command in typer.main.get_command(app).commands.values():
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts, str(parameter.metavar)}
    found = list(named_arguments())
    assert len(found) > 5
    assert [place for place, name in found if name not in PYTHON_ONLY and option_of(name) not in known] == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("group_size must be 64 (got 7)", "group_size"), "--group-size must be 64 (got 7)"),
        (UsageError("min_snr needs quant='mixed'", "min_snr", "quant"), "--min-snr needs --quant mixed"),
        (UsageError('decoder_bits="mixed", please', "decoder_bits"), "--decoder-bits mixed, please"),
        (UsageError("ask for decoder_bits=4.", "decoder_bits"), "ask for --decoder-bits 4."),
        (UsageError("give min_snr=37.5 or less", "min_snr"), "give --min-snr 37.5 or less"),
        (OutputError("out exists. Pass force=True", "force"), "out exists. Pass --force"),
        (
            UsageError("needs quantize_embeddings=False", "quantize_embeddings"),
            "needs --no-quantize-embeddings",
        ),
        (UsageError("encoder='mlx' has no recipe", "encoder", "recipe"), "--encoder mlx has no --recipe"),
        (UsageError("export with_projector=False", "with_projector"), "export --no-projector"),
        (UsageError("folder is not a bundle for client", "client"), "folder is not a bundle for --for"),
        (UsageError("use backend='reference'", "backend"), "use --backend reference"),
    ],
)
def test_listed_arguments_become_options(error: FastVLMError, line: str) -> None:
    assert in_options(error) == line


@pytest.mark.parametrize("text", ["my-quant/quant.json: quantum, x.quant and quant_bits", "no argument at all"])
def test_other_words_stay_as_they_are(text: str) -> None:
    assert in_options(UsageError(text, "quant")) == text
    assert in_options(UsageError("the key 'quant' is missing")) == "the key 'quant' is missing"


def test_arguments_survive_pickling() -> None:
    copy = pickle.loads(pickle.dumps(UsageError("quant is missing", "quant")))
    assert (str(copy), copy.arguments) == ("quant is missing", ("quant",))
