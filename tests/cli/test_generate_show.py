"""How `fastvlm generate` prints an answer while it comes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastvlm.cli.generate import show
from fastvlm.cli.interrupt import Interrupted
from fastvlm.models.errors import FastVLMError, PromptError


def broken_off(pieces: str, reason: BaseException) -> Iterator[str]:
    yield from pieces
    raise reason


@pytest.mark.parametrize(("pieces", "printed"), [("ab", "ab\n"), ("", "")])
@pytest.mark.parametrize("reason", [Interrupted(2), PromptError("too long")])
def test_what_breaks_an_answer_off_begins_a_new_line(
    pieces: str, printed: str, reason: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((Interrupted, FastVLMError)):
        show(broken_off(pieces, reason))
    assert capsys.readouterr().out == printed


def test_answer_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(iter(("It is ", "red.")))
    assert capsys.readouterr().out == "It is red.\n"
