"""The trained checkpoint in the package."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from fastvlm.models.fastvit import FastViT
from fastvlm.models.references import DEFAULT_MODEL, TINY_FOLDER, open_checkpoint
from fastvlm.models.tiny.data import learned_tokenizer

pytestmark = pytest.mark.slow

MAX_BYTES = 12 * 2**20


def test_default_model_is_a_checkpoint_in_training_form() -> None:
    checkpoint = open_checkpoint(DEFAULT_MODEL)

    assert checkpoint.name == "tiny"
    assert not FastViT.from_checkpoint(checkpoint).config.reparameterized
    assert checkpoint.config.tokens_per_image == 16


def test_checkpoint_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in TINY_FOLDER.iterdir()) <= MAX_BYTES


def test_tokenizer_and_recipe_are_those_of_the_training() -> None:
    pytest.importorskip("transformers", reason="training needs the dev extra's transformers")
    from fastvlm.models.tiny.train import TrainingRecipe

    training = json.loads((TINY_FOLDER / "training.json").read_text())
    assert training["recipe"] == json.loads(json.dumps(asdict(TrainingRecipe())))
    assert json.loads((TINY_FOLDER / "tokenizer.json").read_text()) == json.loads(learned_tokenizer())
