"""The prompts on which decoders are calibrated and verified: texts around an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..models.layerwise import Prompt
from ..models.tokenizer_files import BEFORE_ANSWER, BEFORE_IMAGE, BEFORE_QUESTION

CALIBRATION_TEXTS = (
    (
        "Describe the image in detail.",
        "The picture shows a busy street after rain. Two people under a red umbrella cross in front of a yellow tram, "
        "while shop windows are reflected in the wet stones. On the left a waiter is wiping the tables of a café.",
    ),
    (
        "What is written on the sign?",
        'The sign says "NO PARKING 8:00 - 18:30, except Sundays". Below it, in smaller letters: "Tow-away zone".',
    ),
    ("How many animals are there, and what are they doing?", "There are three: two dogs chase a ball, a cat sleeps."),
    (
        "Is it safe to cross the road now? Explain briefly.",
        "No. The light for pedestrians is red, and a white van is approaching from the right at about 40 km/h.",
    ),
    (
        "Read the table and give the total.",
        "| item | price |\n|---|---|\n| bread | 2.40 |\n| milk | 1.15 |\n| apples | 3.20 |\n\nThe total is 6.75 euros.",
    ),
    (
        "Which colours and shapes stand out?",
        "A large blue circle in the middle, a green triangle above it and several small orange squares near the edge.",
    ),
)
"""The calibration texts as (question, answer) pairs."""

PROBE_QUESTION = "What can be seen in this picture, and where was it probably taken?"
"""The question of the prompt for verification, which calibration does not contain."""

MAX_TEXT_TOKENS = 96
"""The most tokens of a text before or after the image."""
MAX_IMAGE_TOKENS = 64
"""The most tokens of an image in calibration. They are evenly spaced, since neighbours are similar.

More image tokens would outweigh the text.
"""


def calibration_prompts(tokenizer_json: bytes, image_features: Sequence[np.ndarray], rows: int) -> list[Prompt]:
    """Returns each calibration text around one of the images, in turn. Ids from `rows` on have no embedding."""
    encode = _encoder(tokenizer_json, rows)
    return [
        Prompt(
            encode(BEFORE_IMAGE),
            thinned(image_features[index % len(image_features)]),
            encode(BEFORE_QUESTION + question + BEFORE_ANSWER + answer),
        )
        for index, (question, answer) in enumerate(CALIBRATION_TEXTS)
    ]


def probe_prompt(tokenizer_json: bytes, image_features: np.ndarray, rows: int) -> Prompt:
    """Returns the prompt on which decoders are compared, without an answer."""
    encode = _encoder(tokenizer_json, rows)
    return Prompt(encode(BEFORE_IMAGE), image_features, encode(BEFORE_QUESTION + PROBE_QUESTION + BEFORE_ANSWER))


def thinned(image_features: np.ndarray, most: int = MAX_IMAGE_TOKENS) -> np.ndarray:
    """Returns at most `most` evenly spaced positions of image features (1, N, C)."""
    count = image_features.shape[1]
    return image_features[:, np.linspace(0, count - 1, min(count, most)).round().astype(int)]


def _encoder(tokenizer_json: bytes, rows: int) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    return lambda text: [token for token in tokenizer.encode(text).ids if token < rows][:MAX_TEXT_TOKENS]
