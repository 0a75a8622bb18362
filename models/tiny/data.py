"""The training data of `tiny`: its tokenizer, and batches of scenes with packed questions.

The questions about an image share one sequence, so that the image is encoded once. The tokenizer is byte-level BPE in
Qwen2's format, with merges learned from the questions and answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PATCH_SIZE
from ..tokenizer_files import (
    BEFORE_ANSWER,
    BEFORE_IMAGE,
    BEFORE_QUESTION,
    DEFAULT_SYSTEM,
    END,
    SPECIAL_TOKENS,
    added_token,
    byte_level_bpe,
    byte_symbols,
)
from .network import TOKENS_PER_IMAGE
from .questions import KINDS, Question, questions_about
from .scenes import COLOURS, MAX_CHARACTERS, PLACES, SCENE_SIZE, SHAPES, Scene, draw_scene, scene_seeds

IGNORED = -100
"""The label of a position whose prediction is not trained."""

CELLS = 16
"""The number of cells along each side of a scene, which is that of the third stage's positions."""
COVERED_SHARE = 0.8
"""The share of a shape's radius within which a point counts as covered by any shape."""

PATCHES = SCENE_SIZE // PATCH_SIZE
"""The number of image tokens along each side of a scene."""

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The characters of printed words and numbers."""

CORPUS_SCENES = 2000
"""The number of scenes whose questions and answers the tokenizer learns from."""
MAX_MERGED_VOCABULARY = 480
"""The number of byte symbols and merges, which makes every word of the sentences one token."""

FRAME = f"system user assistant {DEFAULT_SYSTEM}"
"""The words of the chat template."""

PRINTED = re.compile(r"\b(says|text) [A-Z0-9]+")
"""The printed word or number in an answer."""


def corpus() -> list[str]:
    """Returns the sentences to learn merges from, without printed words, which are encoded letter by letter."""
    sentences = [FRAME] * CORPUS_SCENES
    for seed in scene_seeds("train", CORPUS_SCENES):
        rng = np.random.Generator(np.random.PCG64([seed, 2]))
        for question in questions_about(draw_scene(seed), rng, len(KINDS)):
            sentences += [question.text, PRINTED.sub(r"\1", question.answer)]
    return sentences


def learned_tokenizer() -> str:
    """Returns the content of `tokenizer.json`. The special tokens come after the merges."""
    from tokenizers import Tokenizer
    from tokenizers.trainers import BpeTrainer

    untrained = byte_level_bpe({symbol: i for i, symbol in enumerate(byte_symbols())}, [], [])
    tokenizer = Tokenizer.from_str(json.dumps(untrained))
    trainer = BpeTrainer(
        vocab_size=MAX_MERGED_VOCABULARY, min_frequency=2, initial_alphabet=byte_symbols(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learned["merges"]]
    special = [added_token(len(learned["vocab"]) + i, content) for i, content in enumerate(SPECIAL_TOKENS)]
    return json.dumps(byte_level_bpe(learned["vocab"], merges, special), ensure_ascii=False)


class Batch(NamedTuple):
    """Scenes with their packed questions, as tensors."""

    pixel_values: Tensor
    """(B, 3, 256, 256) uint8."""
    token_ids: Tensor
    """(B, L) int64: the part that all questions share, then each question with its answer."""
    position_ids: Tensor
    """(B, L): each question continues after the shared part."""
    visible: Tensor
    """(B, L, L) bool: a token attends to the shared part and its own question, up to itself."""
    labels: Tensor
    """(B, L): the next token inside an answer, else `IGNORED`."""
    answer_index: Tensor
    """(B, L): the number of the question in the batch whose answer has the label, else -1."""
    kinds: list[str]
    """The kind of each question in the batch."""
    cells: Tensor
    """(B, 3, 16, 16): shape, colour and character at the middle of each cell of 16 x 16 pixels, 0 for none."""
    tokens: Tensor
    """(B, 16, 8): shape, colour and place of the shape centred in each token's patch, place and letters of the text."""
    image_start: int
    """The position of the first image token."""


@dataclass(frozen=True)
class Packer:
    """Turns scenes and questions into tokens."""

    tokenizer: Tokenizer

    def shared(self) -> list[int]:
        """Returns the ids before every question, with zeros for the image tokens."""
        return [*self.encode(BEFORE_IMAGE), *([0] * TOKENS_PER_IMAGE), *self.encode(BEFORE_QUESTION)]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pack(self, scenes: list[Scene], asked: list[list[Question]]) -> Batch:
        """Returns the batch of `scenes` with the questions `asked` about each."""
        shared = self.shared()
        rows = [list(self.segments(questions)) for questions in asked]
        length = len(shared) + max(sum(len(ids) for ids, _ in row) for row in rows)
        B = len(scenes)
        token_ids, positions = np.zeros((B, length), np.int64), np.zeros((B, length), np.int64)
        labels, answers = np.full((B, length), IGNORED, np.int64), np.full((B, length), -1, np.int64)
        segment = np.full((B, length), -1, np.int64)  # -1 is padding, 0 the shared part
        number = 0
        for b, row in enumerate(rows):
            end = len(shared)
            token_ids[b, :end], positions[b, :end], segment[b, :end] = shared, np.arange(end), 0
            for i, (ids, answer_start) in enumerate(row, 1):
                start, end = end, end + len(ids)
                token_ids[b, start:end], segment[b, start:end] = ids, i
                positions[b, start:end] = len(shared) + np.arange(len(ids))
                labels[b, start + answer_start - 1 : end - 1] = ids[answer_start:]
                answers[b, start + answer_start - 1 : end - 1] = number
                number += 1
        segments = torch.from_numpy(segment)
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)  # (B, L, L)
        visible = same & torch.ones(length, length, dtype=torch.bool).tril()
        return Batch(
            pixel_values=torch.from_numpy(np.stack([np.asarray(one.image()).transpose(2, 0, 1) for one in scenes])),
            token_ids=torch.from_numpy(token_ids),
            position_ids=torch.from_numpy(positions),
            visible=visible,
            labels=torch.from_numpy(labels),
            answer_index=torch.from_numpy(answers),
            kinds=[question.kind for questions in asked for question in questions],
            cells=torch.from_numpy(np.stack([cells(one) for one in scenes])),
            tokens=torch.from_numpy(np.stack([token_contents(one) for one in scenes])),
            image_start=len(self.encode(BEFORE_IMAGE)),
        )

    def segments(self, questions: list[Question]) -> Iterator[tuple[list[int], int]]:
        """Yields the ids of each question with its answer, and the start of the answer in them."""
        for question in questions:
            prompt = self.encode(question.text + BEFORE_ANSWER)
            yield prompt + self.encode(question.answer + END), len(prompt)


def cells(scene: Scene) -> np.ndarray:
    """Returns one scene's row of `Batch.cells`."""
    side = SCENE_SIZE // CELLS
    y, x = side * (np.mgrid[0:CELLS, 0:CELLS] + 0.5)  # (16, 16) each, pixels
    found = np.zeros((3, CELLS, CELLS), np.int64)
    for one in scene.in_painting_order():
        covered = np.hypot(x - one.x, y - one.y) < COVERED_SHARE * one.radius
        found[0][covered], found[1][covered] = 1 + SHAPES.index(one.shape), 1 + list(COLOURS).index(one.colour)
    if scene.text:
        height = abs(y - scene.text.y) < scene.text.extent[1]
        for character, (left, right) in zip(scene.text.content, scene.text.spans(), strict=True):
            found[2][height & (x >= left) & (x < right)] = 1 + CHARACTERS.index(character)
    return found


def token_contents(scene: Scene) -> np.ndarray:
    """Returns one scene's row of `Batch.tokens`."""
    found = np.zeros((PATCHES, PATCHES, 4 + MAX_CHARACTERS), np.int64)
    for one in scene.in_painting_order():
        found[one.patch][:3] = (
            1 + SHAPES.index(one.shape),
            1 + list(COLOURS).index(one.colour),
            1 + PLACES.index(one.place),
        )
    if scene.text:
        patch = found[scene.text.patch]
        patch[3] = 1 + PLACES.index(scene.text.place)
        patch[4 : 4 + len(scene.text.content)] = [1 + CHARACTERS.index(c) for c in scene.text.content]
    return found.reshape(TOKENS_PER_IMAGE, -1)


class Batches(Dataset[Batch]):
    """The batches of a training run. Batch i always has the same scenes, so that training can resume."""

    def __init__(self, tokenizer_json: str, seeds: range, batch_size: int, questions: int) -> None:
        """Creates batches of `batch_size` scenes with `questions` questions about each scene."""
        self.packer = Packer(Tokenizer.from_str(tokenizer_json))
        self.seeds, self.batch_size, self.questions = seeds, batch_size, questions

    def __len__(self) -> int:
        return len(self.seeds) // self.batch_size

    def __getitem__(self, index: int) -> Batch:
        seeds = self.seeds[index * self.batch_size : (index + 1) * self.batch_size]
        scenes = [draw_scene(seed) for seed in seeds]
        return self.packer.pack(scenes, [asked_in_training(scene, self.questions) for scene in scenes])


def asked_in_training(scene: Scene, count: int) -> list[Question]:
    """Returns `count` questions, in rounds of different kinds."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, 3]))
    found: list[Question] = []
    while len(found) < count:
        found += questions_about(scene, rng, min(count - len(found), len(KINDS)))
    return found
