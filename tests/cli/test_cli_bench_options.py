"""What `fastvlm bench` refuses before it exports or measures anything."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fastvlm.cli.main import app
from fastvlm.export import exporter


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("random:tiny", "nope"), "nope is neither a folder nor one of"),
        (("random:tiny", "--image-size", "128,100"), "100"),
    ],
)
def test_nothing_is_exported_before_all_is_resolved(
    words: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    monkeypatch.setattr(exporter, "export", lambda *words, **options: exported.append(words))
    found = CliRunner().invoke(app, ["bench", *words])
    assert problem in str(found.exception)
    assert exported == []


def test_published_times_are_not_asked_for_beside_an_estimate() -> None:
    found = CliRunner().invoke(app, ["bench", "random:tiny", "--estimate", "M4", "--published"])
    assert found.exit_code == 2
    assert "leave out --published" in found.stderr


@pytest.mark.parametrize(("words", "tokens"), [((), 46), (("--prompt-tokens", "64"), 64)])
def test_estimate_tells_the_text_that_it_assumes(words: tuple[str, ...], tokens: int) -> None:
    found = CliRunner().invoke(app, ["bench", "random:tiny", "--estimate", "M4", *words])
    assert found.exit_code == 0, found.stderr
    assert "an image and 30 tokens of text, unless --prompt-tokens" in found.stdout
    assert f"{tokens} prompt tokens |" in found.stdout
