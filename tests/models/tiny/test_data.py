"""The training data: labels, cells, tokens, and the same prompt as in `generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.tiny.data import (
    CHARACTERS,
    IGNORED,
    Batches,
    Packer,
    asked_in_training,
    cells,
    token_contents,
)
from fastvlm.models.tiny.network import TOKENS_PER_IMAGE, TinyFastVLM, write_checkpoint
from fastvlm.models.tiny.questions import questions_about
from fastvlm.models.tiny.scenes import COLOURS, PLACES, SHAPES, draw_scene

pytestmark = pytest.mark.slow


def test_packed_tokens_equal_those_of_generate(tokenizer_json: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="training needs the dev extra's transformers")
    from fastvlm.export.tokenizer import export_tokenizer
    from fastvlm.models.tokenizer_files import DEFAULT_SYSTEM
    from fastvlm.runtime.prompt import Message, PromptEncoder
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


def test_labels_are_the_answers_and_their_end(tokenizer_json: str) -> None:
    batches = Batches(tokenizer_json, range(3), 3, 4)
    batch = batches[0]
    questions = [question for seed in range(3) for question in asked_in_training(draw_scene(seed), 4)]
    decode = batches.packer.tokenizer.decode

    for number, question in enumerate(questions):
        labels = batch.labels[batch.answer_index == number].tolist()
        assert decode(labels, skip_special_tokens=False) == question.answer + "<|im_end|>"
        assert batch.kinds[number] == question.kind


def test_words_are_one_token_and_printed_text_is_spelled(tokenizer_json: str) -> None:
    packer = Batches(tokenizer_json, range(1), 1, 1).packer
    assert isinstance(packer, Packer)
    draw = np.random.default_rng(0)
    for seed in range(30):
        for question in questions_about(draw_scene(seed), draw):
            assert len(packer.encode(question.text)) <= len(question.text.split()) + 3
    assert len(packer.encode("It says CAFE.")) == len(packer.encode("It says.")) + 5  # a space and four letters


def test_cells_and_tokens_match_the_scene() -> None:
    for seed in range(60):
        scene = draw_scene(seed)
        covered, tokens = cells(scene), token_contents(scene)
        for one in scene.in_painting_order()[-1:]:  # nothing covers the last painted shape
            found = covered[:, int(one.y) // 16, int(one.x) // 16]
            assert found[0] == 1 + SHAPES.index(one.shape)
            assert found[1] == 1 + list(COLOURS).index(one.colour)
            patch = tokens[int(one.y) // 64 * 4 + int(one.x) // 64]
            assert patch[2] == 1 + PLACES.index(one.place)
        spelled = {"".join(CHARACTERS[c - 1] for c in row[4:] if c) for row in tokens} - {""}
        assert spelled == ({scene.text.content} if scene.text else set())
        assert {CHARACTERS[c - 1] for c in covered[2].flat if c} <= set(scene.text.content if scene.text else "")
