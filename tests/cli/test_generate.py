"""`fastvlm generate` as a user types it, and how it prints an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm.cli.generate import show
from fastvlm.cli.interrupt import Interrupted
from fastvlm.models.errors import FastVLMError, PackageError, PromptError
from fastvlm.runtime.encoders import ReferenceEncoder

SAMPLE = Path(__file__).resolve().parents[2] / "runtime" / "samples" / "shapes.png"


def test_text_goes_to_stdout_and_timings_to_stderr(fastvlm: Callable, model: Path, tmp_path: Path) -> None:
    done = fastvlm("generate", model, "-i", SAMPLE, "-p", "Describe the image.", "--max-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "TTFT" in done.stderr
    assert "cold: first call of this process" in done.stderr
    assert "note: random weights: the text means nothing" in done.stderr
    assert all(stage in done.stderr for stage in ("preprocess", "encode", "project", "prefill", "sample"))


def test_json_has_stages_that_add_up_to_ttft(here: Callable, model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "-i", SAMPLE, "--max-tokens", 6, "--ignore-eos", "--json")
    result = json.loads(here(*words, "-p", "Describe.", cwd=tmp_path).stdout)
    assert len(result["token_ids"]) == 6
    assert result["finish_reason"] == "length"
    timings = result["timings"]
    stages = sum(timings[f"{stage}_ms"] for stage in ("preprocess", "encode", "project", "prefill", "sample"))
    assert stages == pytest.approx(timings["ttft_ms"], abs=0.01)  # each is rounded to a microsecond
    assert "random weights: the text means nothing" in result["notes"]
    piped = json.loads(here(*words, "-p", "-", cwd=tmp_path, stdin="Describe.").stdout)
    assert piped["token_ids"] == result["token_ids"]
    assert piped["text"] == result["text"]


def test_structure_of_the_answer_is_an_option(
    here: Callable, one_line_error: Callable, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    (tmp_path / "bad.json").write_text('{"type": "objekt"}')
    (tmp_path / "latin.txt").write_bytes(b"start: \xff")
    (tmp_path / "grammar.txt").write_text('start: "a" "b"')
    words = ("generate", model, "-p", "Describe.")
    answer = json.loads(here(*words, "--json-schema", "schema.json", cwd=tmp_path).stdout)
    assert set(answer) <= {True, False}
    assert here(*words, "--choice", "red,dark blue", cwd=tmp_path).stdout in ("red\n", "dark blue\n")
    assert here(*words, "--grammar", "grammar.txt", cwd=tmp_path).stdout == "ab\n"
    one_line_error(here(*words, "--json-schema", "bad.json", cwd=tmp_path), "--json-schema: ", "objekt")
    one_line_error(here(*words, "--json-schema", "gone.json", cwd=tmp_path), "--json-schema: gone.json cannot be")
    one_line_error(here(*words, "--grammar", "latin.txt", cwd=tmp_path), "--grammar: latin.txt is not UTF-8")
    one_line_error(here(*words, "--regex", "a", "--choice", "a", cwd=tmp_path), "--regex and --choice")


def test_beam_search_is_an_option(here: Callable, one_line_error: Callable, model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "-p", "Describe.", "--max-tokens", 5, "--ignore-eos", "--num-beams", 2)
    done = here(*words, "--length-penalty", 0.5, "--early-stopping", "never", "--json", cwd=tmp_path)
    assert len(json.loads(done.stdout)["token_ids"]) == 5
    one_line_error(here(*words, "--temperature", 1, cwd=tmp_path), "--num-beams above 1", "with --temperature")


def test_prompt_without_an_image_encodes_nothing(
    here: Callable, one_line_error: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: object, pixel_values: object) -> None:
        raise PackageError("an image is encoded")

    monkeypatch.setattr(ReferenceEncoder, "encode", encode)
    words = (model, "--backend", "reference", "-p", "Hello", "--max-tokens", 2, "--ignore-eos", "--json")
    done = here("generate", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    one_line_error(here("generate", *words, "-i", SAMPLE, cwd=tmp_path), "an image is encoded")


@pytest.mark.parametrize(
    ("content", "name"), [(b"", "empty.png"), (b"just words", "text.jpg"), (SAMPLE.read_bytes()[:900], "cut.png")]
)
def test_file_that_is_not_an_image_is_one_line(
    here: Callable, one_line_error: Callable, model: Path, tmp_path: Path, content: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    done = here("generate", model, "--image", name, "--prompt", "x", cwd=tmp_path)
    one_line_error(done, name)


def test_missing_inputs_are_one_line(
    fastvlm: Callable, here: Callable, one_line_error: Callable, model: Path, tmp_path: Path
) -> None:
    one_line_error(fastvlm("generate", model, "-i", "gone.png", "-p", "x", cwd=tmp_path), "gone.png")
    one_line_error(here("generate", "gone", "-p", "x", cwd=tmp_path), "gone")
    one_line_error(here("generate", model, "-p", "x", "--top-p", "7", cwd=tmp_path), "--top-p")
    assert here("generate", model, "-p", "x", "--fit", "squash", "-i", SAMPLE, cwd=tmp_path).returncode == 2


def test_bad_requests_are_reported_before_loading(
    here: Callable, one_line_error: Callable, model: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()  # loading would fail on this
    one_line_error(here("generate", copy, "-i", "gone.png", "-p", "x", cwd=tmp_path), "gone.png")
    one_line_error(here("generate", copy, "-p", "x", "--temperature", "-1", cwd=tmp_path), "--temperature")
    one_line_error(here("generate", copy, "-p", "x", cwd=tmp_path), "model.safetensors is missing")


def interrupted(pieces: str, reason: BaseException) -> Iterator[str]:
    yield from pieces
    raise reason


@pytest.mark.parametrize(("pieces", "printed"), [("ab", "ab\n"), ("", "")])
@pytest.mark.parametrize("reason", [Interrupted(2), PromptError("too long")])
def test_interruption_of_an_answer_starts_a_new_line(
    pieces: str, printed: str, reason: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((Interrupted, FastVLMError)):
        show(interrupted(pieces, reason))
    assert capsys.readouterr().out == printed


def test_answer_ends_with_a_newline(capsys: pytest.CaptureFixture[str]) -> None:
    show(iter(("It is ", "red.")))
    assert capsys.readouterr().out == "It is red.\n"
