"""Options that several commands share, and what they read from stdin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest


@pytest.mark.slow
def test_closed_stdout_ends_generation_quietly(model: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m fastvlm.cli.main generate {model} -p hi --ignore-eos | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0
    assert b"Error" not in done.stderr
    assert b"Traceback" not in done.stderr


def run(*words: object, stdin: bytes, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastvlm.cli.main", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, input=stdin, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stdin", "problem"),
    [(b"a" * (2**20 + 2), "on stdin is longer than 1,048,576 bytes"), (b"\xff\xfe", "is not UTF-8")],
)
def test_stdin_that_is_not_a_prompt_is_one_line(
    here: Callable, model: Path, tmp_path: Path, stdin: bytes, problem: str
) -> None:
    done = run("generate", model, "-p", "-", stdin=stdin, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: the prompt on stdin")
    assert problem in done.stderr.decode()
    done = here("chat", model, stdin=stdin, cwd=tmp_path)
    assert done.returncode == 1
    assert problem in done.stderr.splitlines()[-1]


def choices(command: str, option: str) -> tuple[str, ...]:
    """The choices of an option, from the rendered command."""
    from fastvlm.cli import bundle, caption, eval, export, generate

    modules = {"export": export, "generate": generate, "caption": caption, "eval": eval, "bundle": bundle}
    function = getattr(modules[command], f"{command}_command")
    import typing

    hint = typing.get_type_hints(function, include_extras=False)[option]
    literal = next((one for one in get_args(hint) if get_args(one)), hint)
    return get_args(literal)


def test_choices_are_those_of_the_library() -> None:
    from fastvlm.export.bundle.contracts import CONTRACTS
    from fastvlm.export.recipe import ATTENTION_TILES, DEPLOYMENT_TARGETS, ENCODERS, IO_KINDS, MLX_DTYPES
    from fastvlm.quant.decoder_scheme import DECODER_BITS, GROUP_SIZES, MIXED, QUANTIZERS
    from fastvlm.quant.schemes import ENCODER_SCHEMES
    from fastvlm.runtime.coreml import COMPUTE_UNITS
    from fastvlm.runtime.evaluation.datasets import LAYOUTS
    from fastvlm.runtime.fastvlm import BACKENDS

    assert set(choices("export", "quant")) == {*ENCODER_SCHEMES, *MLX_DTYPES}
    assert set(choices("export", "encoder")) == set(ENCODERS)
    assert set(choices("export", "decoder_bits")) == {*map(str, DECODER_BITS), MIXED}
    assert set(choices("export", "decoder_quantizer")) == set(QUANTIZERS)
    assert set(choices("export", "group_size")) == set(map(str, GROUP_SIZES))
    assert set(choices("export", "attention_tiles")) == set(map(str, ATTENTION_TILES))
    assert set(choices("export", "io")) == set(IO_KINDS)
    assert set(choices("export", "min_os")) == set(DEPLOYMENT_TARGETS)
    assert set(choices("generate", "backend")) == set(BACKENDS)
    assert set(choices("caption", "compute_units")) == set(COMPUTE_UNITS)
    assert set(choices("eval", "task")) == set(LAYOUTS)
    assert set(choices("bundle", "client")) == set(CONTRACTS)
