"""The prompts of calibration and verification."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm.models.layerwise import Prompt
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.tokenizer_files import BEFORE_ANSWER, BEFORE_IMAGE, BEFORE_QUESTION
from fastvlm.quant.prompts import (
    CALIBRATION_TEXTS,
    MAX_IMAGE_TOKENS,
    MAX_TEXT_TOKENS,
    PROBE_QUESTION,
    calibration_prompts,
    probe_prompt,
    thinned,
)

ROWS = 1024
TOKENIZER = RandomCheckpoint("tiny").tokenizer_files()["tokenizer.json"]


def features(tokens: int, value: float = 0.0) -> np.ndarray:
    return np.full((1, tokens, 8), value, np.float32)


def decoded(ids: object) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(TOKENIZER.decode()).decode(list(ids), skip_special_tokens=False)  # type: ignore[call-overload]


def test_each_text_surrounds_the_images_in_turn() -> None:
    found = calibration_prompts(TOKENIZER, [features(4, 1.0), features(4, 2.0)], ROWS)
    assert len(found) == len(CALIBRATION_TEXTS)
    assert [float(prompt.image_features[0, 0, 0]) for prompt in found] == [1.0, 2.0] * (len(found) // 2)
    for (question, answer), prompt in zip(CALIBRATION_TEXTS, found, strict=True):
        assert decoded(prompt.before) == BEFORE_IMAGE
        whole = BEFORE_QUESTION + question + BEFORE_ANSWER + answer
        assert whole.startswith(decoded(prompt.after).rstrip("\N{REPLACEMENT CHARACTER}"))


@pytest.mark.parametrize("rows", [40, ROWS])
def test_ids_without_an_embedding_are_left_out(rows: int) -> None:
    prompts = [*calibration_prompts(TOKENIZER, [features(4)], rows), probe_prompt(TOKENIZER, features(4), rows)]
    ids = [token for prompt in prompts for token in (*prompt.before, *prompt.after)]
    assert ids
    assert max(ids) < rows


def test_texts_are_cut_at_their_limit() -> None:
    lengths = [len(prompt.after) for prompt in calibration_prompts(TOKENIZER, [features(4)], ROWS)]
    assert max(lengths) == MAX_TEXT_TOKENS


def test_probe_keeps_all_image_tokens_and_has_no_answer() -> None:
    prompt = probe_prompt(TOKENIZER, features(256), ROWS)
    assert isinstance(prompt, Prompt)
    assert prompt.image_features.shape == (1, 256, 8)
    assert decoded(prompt.after).endswith(BEFORE_ANSWER)
    assert PROBE_QUESTION in decoded(prompt.after)
    assert PROBE_QUESTION not in dict(CALIBRATION_TEXTS)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (32, 32), (33, 32), (256, 32)])
def test_image_tokens_are_thinned_evenly(count: int, kept: int) -> None:
    ramp = np.arange(count, dtype=np.float32)[None, :, None]
    found = thinned(ramp)[0, :, 0]
    assert len(found) == kept <= MAX_IMAGE_TOKENS
    assert found[0] == 0 and found[-1] == count - 1
    steps = np.diff(found)
    assert steps.size == 0 or steps.max() - steps.min() <= 1
