"""`fastvlm bench --estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastvlm.cli.main import app


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_estimate_is_printed_and_reported(model: Path, tmp_path: Path) -> None:
    done = invoke(model, "--estimate", "m4,A18 Pro", "--report", tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("An estimate from peak rates")
    report = json.loads((tmp_path / "e.json").read_text())
    assert [one["chip"] for one in report["estimates"]] == ["M4", "A18 Pro"]
    assert all(one["estimate"] is True for one in report["estimates"])
    assert "M5 Max" in invoke("--estimate", "list").stdout


def test_package_and_architecture_give_the_same_work(model: Path) -> None:
    from fastvlm.models.random_checkpoint import TINY_ENCODER
    from fastvlm.runtime.estimate.work import encoder_cost, folder_work

    of_package, of_architecture = folder_work(model).encoder, encoder_cost(TINY_ENCODER, 256, bits=8)
    assert of_package.flops == of_architecture.flops
    assert of_package.moved_elements == of_architecture.moved_elements


def test_options_of_a_measurement_are_refused() -> None:
    options = ("--compare", "no.json", "--fail-above", 3, "--runs", 5, "--image", "x.png", "--kv-bits", 8)
    done = invoke("tiny", *options, "--estimate", "M4")
    assert done.exit_code == 2
    for option in options[::2]:
        assert str(option) in done.output
    assert "--prompt-tokens" not in done.output
    done = invoke("tiny", "--quant", "pal4", "--estimate", "list")
    assert done.exit_code == 2
    assert "FOLDER" in done.output and "--quant" in done.output
    assert invoke("--estimate", "list").exit_code == 0
    assert invoke("tiny", "--prompt-tokens", 64, "--estimate", "M4").exit_code == 0


def test_scheme_changes_the_estimate() -> None:
    """On an M4, whose engine is twice as fast in int8. Fewer bits help where memory is the bound."""
    found = {}
    for scheme in ("fp16", "int8", "pal4", "w8a8"):
        done = invoke("random:tiny", "--image-size", 256, "--quant", scheme, "--estimate", "M4", "--json")
        (found[scheme],) = json.loads(done.stdout)["estimates"]
        assert scheme in found[scheme]["label"]
    assert found["fp16"]["encode_ms"] > found["int8"]["encode_ms"] > found["pal4"]["encode_ms"]
    mixed = invoke("random:tiny", "--quant", "mixed", "--estimate", "M4")
    assert mixed.exit_code == 2
    assert "estimate the folder" in " ".join(mixed.output.replace("│", " ").split())


def test_published_is_refused_with_an_estimate() -> None:
    found = CliRunner().invoke(app, ["bench", "random:tiny", "--estimate", "M4", "--published"])
    assert found.exit_code == 2
    assert "leave out --published" in found.stderr


@pytest.mark.parametrize(("words", "tokens"), [((), 46), (("--prompt-tokens", "64"), 64)])
def test_assumed_prompt_length_is_printed(words: tuple[str, ...], tokens: int) -> None:
    found = CliRunner().invoke(app, ["bench", "random:tiny", "--estimate", "M4", *words])
    assert found.exit_code == 0, found.stderr
    assert "an image and 30 tokens of text, unless --prompt-tokens" in found.stdout
    assert f"{tokens} prompt tokens |" in found.stdout
