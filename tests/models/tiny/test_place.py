"""The place of a trained checkpoint: whole or absent, and other people's files stay. Training needs transformers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="training needs the dev extra's transformers")

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import UsageError
from fastvlm.models.tiny.place import free_place, in_place_of
from fastvlm.models.tiny.train import Trainer, TrainingRecipe, main, publish


def test_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, checkpoint = Trainer(TrainingRecipe(steps=2), tmp_path), tmp_path / "checkpoint"
    (tmp_path / "log.jsonl").write_text("")

    def stop(_: object) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fastvlm.models.tiny.train.report", stop)
        publish(trainer, checkpoint)
    assert not checkpoint.exists()
    for _ in range(2):  # in place of an earlier one, too
        publish(trainer, checkpoint)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "log.jsonl"]
        assert FolderCheckpoint(checkpoint).layout == "Apple LLaVA"


def test_run_killed_while_it_writes_the_checkpoint_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, checkpoint = Trainer(TrainingRecipe(steps=2), tmp_path), tmp_path / "checkpoint"
    (tmp_path / "log.jsonl").write_text("")

    def killed(network: object, tokenizer_json: str, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fastvlm.models.tiny.train.write_checkpoint", killed)
        publish(trainer, checkpoint)
    assert (tmp_path / "checkpoint.partial" / "model.safetensors").exists()
    publish(trainer, checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "log.jsonl"]


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.partial", "checkpoint.replaced"])
def test_files_of_others_are_refused_before_training_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("training has started"))
    with pytest.raises(UsageError, match=rf"{name} was not written by training .*move it away, or choose another"):
        main()
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_links_and_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "link", tmp_path / "training.json"):
        with pytest.raises(UsageError, match="was not written by training"):
            free_place(path)


def test_checkpoint_that_a_killed_run_had_moved_away_comes_back(tmp_path: Path) -> None:
    checkpoint, replaced = tmp_path / "checkpoint", tmp_path / "checkpoint.replaced"
    for folder in (replaced, tmp_path / "checkpoint.partial"):
        folder.mkdir()
        (folder / "training.json").write_text(folder.name)

    def killed_again() -> None:
        with in_place_of(checkpoint):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_again()
    assert (checkpoint / "training.json").read_text() == replaced.name
    assert not replaced.exists()


def test_checkpoint_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, rename = tmp_path / "checkpoint", Path.rename
    for content in ("old", "new"):
        if content == "new":
            monkeypatch.setattr(Path, "rename", lambda self, to: stop() if "partial" in self.name else rename(self, to))
        with contextlib.suppress(KeyboardInterrupt), in_place_of(checkpoint) as partial:
            (partial / "training.json").write_text(content)
    assert (checkpoint / "training.json").read_text() == "old"


def stop() -> None:
    raise KeyboardInterrupt
