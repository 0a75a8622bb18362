"""Batches of scenes with their questions, packed: an image is encoded once for all that is asked about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PATCH_SIZE
from ..qwen2_prompt import BEFORE_ANSWER, BEFORE_IMAGE, BEFORE_QUESTION, END
from .network import TOKENS_PER_IMAGE
from .questions import KINDS, Question, questions_about
from .scenes import COLOURS, MAX_CHARACTERS, PLACES, SCENE_SIZE, SHAPES, Scene, draw_scene

IGNORED = -100
"""Label of a position whose prediction is not trained."""

CELLS = 16
"""Cells along each side of a scene: as many as the encoder's third stage has positions."""
COVERED_SHARE = 0.8
"""Share of a shape's radius within which a point counts as covered by it, whatever the shape."""

PATCHES = SCENE_SIZE // PATCH_SIZE

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Batch(NamedTuple):
    pixel_values: Tensor
    """(B, 3, 256, 256) uint8."""
    token_ids: Tensor
    """(B, L) int64: what all questions share, then each question with its answer."""
    position_ids: Tensor
    """(B, L): each question continues behind the shared part."""
    visible: Tensor
    """(B, L, L) bool: a token sees the shared part and its own question, up to itself."""
    labels: Tensor
    """(B, L): the next token inside an answer, else `IGNORED`."""
    answer_index: Tensor
    """(B, L): which question's answer a label belongs to, numbered over the batch; -1 elsewhere."""
    kinds: list[str]
    """Of each question of the batch."""
    cells: Tensor
    """(B, 3, 16, 16): shape, colour and character that cover the middle of each cell of 16 x 16 pixels; 0 for none."""
    tokens: Tensor
    """(B, 16, 8): shape, colour, place of what is centred in each token's patch; of text its place and letters."""
    image_start: int


@dataclass(frozen=True)
class Packer:
    """Turns scenes and questions into tokens."""

    tokenizer: Tokenizer

    def shared(self) -> list[int]:
        """Ids in front of every question; zeros stand where the image goes."""
        return [*self.encode(BEFORE_IMAGE), *([0] * TOKENS_PER_IMAGE), *self.encode(BEFORE_QUESTION)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pack(self, scenes: list[Scene], asked: list[list[Question]]) -> Batch:
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
        """(ids, where the answer starts in them) of each question."""
        for question in questions:
            prompt = self.encode(question.text + BEFORE_ANSWER)
            yield prompt + self.encode(question.answer + END), len(prompt)


def cells(scene: Scene) -> np.ndarray:
    """What covers the middle of each cell; see `Batch.cells`."""
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
    """What is centred in each image token's patch; see `Batch.tokens`."""
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
    """Batch i is made of its own scenes and never changes: training resumes where it stopped."""

    def __init__(self, tokenizer_json: str, seeds: range, batch_size: int, questions: int) -> None:
        """`batch_size` scenes in each, and as many `questions` about each scene."""
        self.packer = Packer(Tokenizer.from_str(tokenizer_json))
        self.seeds, self.batch_size, self.questions = seeds, batch_size, questions

    def __len__(self) -> int:
        return len(self.seeds) // self.batch_size

    def __getitem__(self, index: int) -> Batch:
        seeds = self.seeds[index * self.batch_size : (index + 1) * self.batch_size]
        scenes = [draw_scene(seed) for seed in seeds]
        return self.packer.pack(scenes, [asked_in_training(scene, self.questions) for scene in scenes])


def asked_in_training(scene: Scene, count: int) -> list[Question]:
    """`count` questions, in rounds of different kinds."""
    draw = np.random.Generator(np.random.PCG64([scene.seed, 3]))
    found: list[Question] = []
    while len(found) < count:
        found += questions_about(scene, draw, min(count - len(found), len(KINDS)))
    return found
