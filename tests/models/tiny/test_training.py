"""The path from scenes to a checkpoint, on a few steps; it needs transformers, whose Qwen2 is what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="training needs the dev extra's transformers")

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.fastvit import FastViT
from fastvlm.models.layerwise import LayerwiseDecoder, Prompt, checkpoint_reader, run_layerwise
from fastvlm.models.tiny.auxiliary import TOKEN_GROUPS, Teacher, imitation_loss
from fastvlm.models.tiny.data import CHARACTERS, IGNORED, Batches, Packer, asked_in_training, cells, token_contents
from fastvlm.models.tiny.layout import write_checkpoint
from fastvlm.models.tiny.network import TOKENS_PER_IMAGE, TinyFastVLM
from fastvlm.models.tiny.questions import questions_about
from fastvlm.models.tiny.scenes import COLOURS, PLACES, SHAPES, draw_scene
from fastvlm.models.tiny.tokenizer import learned_tokenizer
from fastvlm.models.tiny.train import Trainer, TrainingRecipe, answers_loss, learning_rate, read_log


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return learned_tokenizer()


@pytest.fixture(scope="module")
def network() -> TinyFastVLM:
    torch.manual_seed(0)
    return TinyFastVLM().eval()


def test_packed_questions_see_only_the_image_and_themselves(network: TinyFastVLM, tokenizer_json: str) -> None:
    batches = Batches(tokenizer_json, range(1), 1, 5)
    scene = draw_scene(0)
    questions = asked_in_training(scene, 5)
    packed = batches.packer.pack([scene], [questions])
    with torch.inference_mode():
        features = network.image_features(packed.pixel_values.float() / 255)
        projected = network.mm_projector(features)
        together = network.logits(network.hidden_states(projected, packed))
        for number, question in enumerate(questions):
            alone = batches.packer.pack([scene], [[question]])
            expected = network.logits(network.hidden_states(projected, alone))[alone.labels != IGNORED]
            torch.testing.assert_close(together[packed.answer_index == number], expected, rtol=1e-4, atol=1e-5)


def test_packed_tokens_are_those_that_generate_asks_with(tokenizer_json: str, tmp_path: Path) -> None:
    from fastvlm.export.tokenizer import export_tokenizer
    from fastvlm.runtime.prompt import DEFAULT_SYSTEM, Message, PromptEncoder
    from fastvlm.runtime.tokenizer import Tokenizer

    write_checkpoint(TinyFastVLM(), tokenizer_json, tmp_path)
    exported = export_tokenizer(FolderCheckpoint(tmp_path).tokenizer_files())
    for name, content in exported.files.items():
        (tmp_path / name).write_bytes(content)
    batches = Batches(tokenizer_json, range(1), 1, 1)
    question = asked_in_training(draw_scene(0), 1)[0]
    packed = batches[0]

    encoder = PromptEncoder(tmp_path, Tokenizer(tmp_path), exported.image_token_index)
    prompt = encoder.encode([Message("system", DEFAULT_SYSTEM), Message("user", question.text, image_count=1)])

    ids = packed.token_ids[0, : int((packed.labels[0] != IGNORED).nonzero()[0]) + 1].tolist()
    start = packed.image_start
    assert list(prompt.ids) == [*ids[:start], exported.image_token_index, *ids[start + TOKENS_PER_IMAGE :]]


def test_written_checkpoint_computes_what_the_network_does(
    network: TinyFastVLM, tokenizer_json: str, tmp_path: Path, tolerance
) -> None:
    for parameter in network.parameters():  # to what the file can hold
        parameter.data = parameter.data.half().float()
    write_checkpoint(network, tokenizer_json, tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    batch = Batches(tokenizer_json, range(1), 1, 1)[0]
    with torch.inference_mode():
        pixels = batch.pixel_values.float() / 255
        features = network.image_features(pixels)
        expected = network.logits(network.hidden_states(network.mm_projector(features), batch))[0].numpy()
        encoder = FastViT.from_checkpoint(checkpoint)
        torch.testing.assert_close(encoder(pixels), features)

    ids, start = batch.token_ids[0].tolist(), batch.image_start
    prompt = Prompt(ids[:start], features.numpy(), ids[start + TOKENS_PER_IMAGE :])
    logits = run_layerwise(LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config), prompt).logits
    error = np.abs(logits - expected[-len(logits) :]).max() / np.abs(expected).max()
    assert error <= tolerance("decoder_logits_float32")


def test_labels_are_the_answers_and_their_end(tokenizer_json: str) -> None:
    batches = Batches(tokenizer_json, range(3), 3, 4)
    batch = batches[0]
    questions = [question for seed in range(3) for question in asked_in_training(draw_scene(seed), 4)]
    decode = batches.packer.tokenizer.decode

    for number, question in enumerate(questions):
        labels = batch.labels[batch.answer_index == number].tolist()
        assert decode(labels, skip_special_tokens=False) == question.answer + "<|im_end|>"
        assert batch.kinds[number] == question.kind


def test_words_of_sentences_are_one_token_and_printed_ones_are_spelled(tokenizer_json: str) -> None:
    packer = Batches(tokenizer_json, range(1), 1, 1).packer
    assert isinstance(packer, Packer)
    draw = np.random.default_rng(0)
    for seed in range(30):
        for question in questions_about(draw_scene(seed), draw):
            assert len(packer.encode(question.text)) <= len(question.text.split()) + 3
    assert len(packer.encode("It says CAFE.")) == len(packer.encode("It says.")) + 5  # a space and four letters


def test_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_log_whose_last_line_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "answers": 2.0}\n{"step": 2, "ans')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "answers": 2.0}]


def test_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(TrainingRecipe(steps=2), tmp_path).save()
    with pytest.raises(SystemExit, match="another recipe"):
        Trainer(TrainingRecipe(steps=3), tmp_path).run()


def test_learning_rate_rises_along_the_warm_up_and_ends_near_zero() -> None:
    recipe = TrainingRecipe()
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    warm = recipe.warmup_steps
    assert rates[warm - 1] == recipe.learning_rate == max(rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert rates[-1] < 0.02 * recipe.learning_rate


def test_cells_and_tokens_name_what_is_there() -> None:
    for seed in range(60):
        scene = draw_scene(seed)
        covered, tokens = cells(scene), token_contents(scene)
        for one in scene.in_painting_order()[-1:]:  # the last one painted hides no part of itself
            found = covered[:, int(one.y) // 16, int(one.x) // 16]
            assert found[0] == 1 + SHAPES.index(one.shape)
            assert found[1] == 1 + list(COLOURS).index(one.colour)
            patch = tokens[int(one.y) // 64 * 4 + int(one.x) // 64]
            assert patch[2] == 1 + PLACES.index(one.place)
        spelled = {"".join(CHARACTERS[c - 1] for c in row[4:] if c) for row in tokens} - {""}
        assert spelled == ({scene.text.content} if scene.text else set())
        assert {CHARACTERS[c - 1] for c in covered[2].flat if c} <= set(scene.text.content if scene.text else "")


def test_decoder_reads_the_teacher_first_and_the_encoder_alone_in_the_end() -> None:
    recipe = TrainingRecipe()
    seen = [recipe.seen_at(step) for step in range(recipe.steps)]
    assert seen == sorted(seen)
    assert set(seen) == set(range(recipe.batch_size + 1))
    assert seen.count(0) / recipe.steps == pytest.approx(recipe.taught_share, abs=0.01)
    left = 1 - recipe.taught_share - recipe.blended_share
    assert seen.count(recipe.batch_size) / recipe.steps == pytest.approx(left, abs=0.01)


def test_each_answer_weighs_the_same_however_long_it_is() -> None:
    logits = torch.zeros(6, 4)  # every token costs log 4; wrong ones a little more
    logits[5, 1] = 3.0
    labels, answers = torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 0, 0, 0, 1])
    costs = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(answers_loss(logits, labels, answers), (costs[0] + costs[5]) / 2)


def test_imitation_loss_is_the_unexplained_share_of_the_teacher_s_variance(tokenizer_json: str) -> None:
    tokens = Batches(tokenizer_json, range(8), 8, 1)[0].tokens
    taught = Teacher()(tokens)
    assert imitation_loss(taught, taught, tokens).item() == 0
    filled = tokens.any(-1)
    off = taught + torch.where(filled, 2.0, 0.0)[..., None] * taught.std()
    assert imitation_loss(off, taught, tokens).item() == pytest.approx(2.0)  # 4 where something is, 0 elsewhere


def test_teacher_tells_every_thing_and_place_apart() -> None:
    teacher = Teacher()
    for column, classes in enumerate(TOKEN_GROUPS):
        tokens = torch.zeros(classes, 1, len(TOKEN_GROUPS), dtype=torch.long)
        tokens[:, 0, column] = torch.arange(classes)
        distances = torch.cdist(teacher(tokens)[:, 0], teacher(tokens)[:, 0]) + torch.eye(classes) * 1e3
        assert distances.min() > 1


def test_training_log_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the plot extra")
    from PIL import Image

    from fastvlm.models.tiny.plot import plot_log

    entries = json.loads('[{"step": 20, "answers": 2.0, "tokens": 4.0}, {"step": 40, "answers": 1.0, "tokens": 3.0}]')
    plot_log([*entries, {"step": 40, "right/count": 0.5}], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width > 600
