"""Training on a few steps: resuming, learning rate, losses, and the checkpoint that is complete or absent."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvlm.models.tiny.data import (
    Batches,
)
from fastvlm.models.tiny.train import TOKEN_GROUPS, Teacher, imitation_loss

pytest.importorskip("transformers", reason="training needs the dev extra's transformers")

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import UsageError
from fastvlm.models.tiny.train import (
    Trainer,
    TrainingRecipe,
    answers_loss,
    check_replaceable,
    learning_rate,
    main,
    publish,
    read_log,
    replacing,
)

pytestmark = pytest.mark.slow


def test_stopped_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TrainingRecipe(steps=3, batch_size=2, questions=2, warmup_steps=1)
    monkeypatch.setattr("fastvlm.models.tiny.train.VALIDATION_SCENES", 32)
    folders = [tmp_path / name for name in ("straight", "stopped")]
    for folder in folders:
        folder.mkdir()
    straight = Trainer(recipe, folders[0])
    straight.run()

    stopped = Trainer(recipe, folders[1], save_every=2)
    train_step = stopped.train_step

    def stop_after_two(batch):
        if stopped.step == 2:
            raise KeyboardInterrupt
        return train_step(batch)

    monkeypatch.setattr(stopped, "train_step", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = Trainer(recipe, folders[1])
    resumed.run()

    for name, tensor in straight.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert [entry["step"] for entry in read_log(folders[1] / "log.jsonl")] == [3, 3]


def test_incomplete_last_line_of_a_log_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "answers": 2.0}\n{"step": 2, "ans')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "answers": 2.0}]


def test_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(TrainingRecipe(steps=2), tmp_path).save()
    with pytest.raises(SystemExit, match="another recipe"):
        Trainer(TrainingRecipe(steps=3), tmp_path).run()


def test_learning_rate_rises_in_warm_up_and_ends_near_zero() -> None:
    recipe = TrainingRecipe()
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    warm = recipe.warmup_steps
    assert rates[warm - 1] == recipe.learning_rate == max(rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert rates[-1] < 0.02 * recipe.learning_rate


def test_encoder_replaces_the_teacher_over_the_steps() -> None:
    recipe = TrainingRecipe()
    seen = [recipe.seen_at(step) for step in range(recipe.steps)]
    assert seen == sorted(seen)
    assert set(seen) == set(range(recipe.batch_size + 1))
    assert seen.count(0) / recipe.steps == pytest.approx(recipe.taught_share, abs=0.01)
    left = 1 - recipe.taught_share - recipe.blended_share
    assert seen.count(recipe.batch_size) / recipe.steps == pytest.approx(left, abs=0.01)


def test_answers_of_any_length_have_the_same_weight() -> None:
    logits = torch.zeros(6, 4)  # every token costs log 4, a wrong one a little more
    logits[5, 1] = 3.0
    labels, answers = torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 0, 0, 0, 1])
    costs = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(answers_loss(logits, labels, answers), (costs[0] + costs[5]) / 2)


def test_training_log_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the plot extra")
    from PIL import Image

    from fastvlm.models.tiny.train import plot_log

    entries = json.loads('[{"step": 20, "answers": 2.0, "tokens": 4.0}, {"step": 40, "answers": 1.0, "tokens": 3.0}]')
    plot_log([*entries, {"step": 40, "right/count": 0.5}], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width > 600


def test_checkpoint_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, checkpoint = Trainer(TrainingRecipe(steps=2), tmp_path), tmp_path / "checkpoint"
    (tmp_path / "log.jsonl").write_text("")

    def stop(_: object) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fastvlm.models.tiny.train.report", stop)
        publish(trainer, checkpoint)
    assert not checkpoint.exists()
    for _ in range(2):  # also in place of an earlier one
        publish(trainer, checkpoint)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "log.jsonl"]
        assert FolderCheckpoint(checkpoint).layout == "Apple LLaVA"


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_other_files_are_refused_before_training_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("training has started"))
    with pytest.raises(UsageError, match=rf"{name}: was not written by training .*Move it away, or choose another"):
        main()
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_links_and_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "link", tmp_path / "training.json"):
        with pytest.raises(UsageError, match="was not written by training"):
            check_replaceable(path)


def test_checkpoint_moved_by_a_killed_run_is_restored(tmp_path: Path) -> None:
    checkpoint, replaced = tmp_path / "checkpoint", tmp_path / "checkpoint.replaced"
    for folder in (replaced, tmp_path / "checkpoint.partial"):
        folder.mkdir()
        (folder / "training.json").write_text(folder.name)

    def killed_again() -> None:
        with replacing(checkpoint):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_again()
    assert (checkpoint / "training.json").read_text() == replaced.name
    assert not replaced.exists()


def test_checkpoint_is_restored_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, rename = tmp_path / "checkpoint", Path.rename
    for content in ("old", "new"):
        if content == "new":
            monkeypatch.setattr(Path, "rename", lambda self, to: stop() if "partial" in self.name else rename(self, to))
        with contextlib.suppress(KeyboardInterrupt), replacing(checkpoint) as partial:
            (partial / "training.json").write_text(content)
    assert (checkpoint / "training.json").read_text() == "old"


def stop() -> None:
    raise KeyboardInterrupt


def test_imitation_loss_is_the_unexplained_variance(tokenizer_json: str) -> None:
    tokens = Batches(tokenizer_json, range(8), 8, 1)[0].tokens
    taught = Teacher()(tokens)
    assert imitation_loss(taught, taught, tokens).item() == 0
    filled = tokens.any(-1)
    off = taught + torch.where(filled, 2.0, 0.0)[..., None] * taught.std()
    assert imitation_loss(off, taught, tokens).item() == pytest.approx(2.0)  # 4 for filled tokens, 0 for empty ones


def test_teacher_separates_all_classes() -> None:
    teacher = Teacher()
    for column, classes in enumerate(TOKEN_GROUPS):
        tokens = torch.zeros(classes, 1, len(TOKEN_GROUPS), dtype=torch.long)
        tokens[:, 0, column] = torch.arange(classes)
        distances = torch.cdist(teacher(tokens)[:, 0], teacher(tokens)[:, 0]) + torch.eye(classes) * 1e3
        assert distances.min() > 1
