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
    (
        "Write a caption for this photo.",
        "An old wooden boat lies on the sand at low tide. Its paint has peeled off in long strips, and two gulls are "
        "sitting on the bow. The sea behind it is grey and calm, with a thin line of light at the horizon.",
    ),
    (
        "Who is in the picture?",
        "I can see a family of four at a kitchen table: a man with a beard who pours tea, a woman reading a letter, "
        "and two children. The younger one, perhaps three years old, is drawing with crayons and seems to ignore "
        "everybody else.",
    ),
    (
        "Transcribe the receipt.",
        "GREEN LEAF MARKET\n12/04/2019 17:42\nOlive oil 1L ... $8.99\nRice 2kg ... $4.50\nEggs (12) ... $3.25\n"
        "SUBTOTAL $16.74\nTAX 7% $1.17\nTOTAL $17.91\nThank you for shopping with us!",
    ),
    (
        "What does the chart show?",
        "The bar chart compares yearly rainfall in five cities between 2010 and 2020. Bergen has by far the highest "
        "value, about 2,250 mm, followed by Glasgow with 1,120 mm. The remaining three stay below 700 mm, and Athens "
        "is the driest at roughly 400 mm.",
    ),
    (
        "Return the objects as JSON.",
        '{"objects": [{"name": "bicycle", "color": "black", "count": 2}, {"name": "bench", "color": "brown", "count": '
        '1}, {"name": "person", "clothes": ["hat", "coat"], "count": 3}], "indoor": false}',
    ),
    (
        "What time is it on the clock, and how do you know?",
        "It is about twenty minutes to eleven. The short hand has almost reached the eleven, while the long hand "
        "points at the eight. Since the sky in the window is bright, it must be morning rather than night.",
    ),
    (
        "Explain this function.",
        "def area(width, height):\n    return width * height\n\nThe function takes two numbers and returns their "
        "product, which is the area of a rectangle. For example, area(3, 4) returns 12. It does not check whether its "
        "arguments are negative.",
    ),
    (
        "What is the animal doing?",
        "The cat is stretching on top of a radiator. Its front paws are pushed forward, its back is arched and its "
        "eyes are nearly closed. This usually means that it has just woken up and feels comfortable.",
    ),
    (
        "How could I cook a meal with what is in this fridge?",
        "You have eggs, spinach, half an onion and some cheese, so an omelette is the simplest choice. First chop the "
        "onion and fry it in butter. Then add the spinach, pour in three beaten eggs, and sprinkle the cheese on top. "
        "Cook it for four minutes.",
    ),
    (
        "Is the person in the photo happy?",
        "It is hard to be certain. She is smiling, but only with her mouth; her eyes look tired and she holds her "
        "arms close to her body. She might simply be cold, because there is snow on the ground.",
    ),
    (
        "Where was this taken?",
        "Probably in Japan. The signs above the shops are written in Japanese characters, the cars drive on the left, "
        "and in the background there is a mountain with a white top that looks like Mount Fuji, seen from the south.",
    ),
    (
        "Describe the room for someone who cannot see it.",
        "You are standing in the doorway of a small bedroom. To your left is a bed with a striped blanket, and in "
        "front of you a desk with a lamp, a closed laptop and a stack of books. The window on the right is open, so "
        "you may hear traffic from the street.",
    ),
    (
        "Compare the two houses.",
        "Both have two floors and a red roof. However, the left one is built of brick and has a large garden with "
        "apple trees, whereas the one on the right is made of concrete, has no garden at all, and its windows are "
        "much wider.",
    ),
    (
        "What sport is this?",
        "This is a game of basketball. A player in a white shirt with the number 23 jumps towards the basket while "
        "two opponents in blue try to stop him. The scoreboard reads 88 to 86 with 0:07 left in the fourth quarter.",
    ),
    (
        "What is unusual about this image?",
        "A man is ironing clothes on a board that is attached to the roof of a moving taxi. That is not something one "
        "would expect to see in the middle of a city, and it would certainly be dangerous.",
    ),
    (
        "Solve the problem on the blackboard.",
        "The equation is 3x + 7 = 25. Subtracting 7 from both sides gives 3x = 18, and dividing by 3 gives x = 6. To "
        "check: 3 * 6 + 7 = 18 + 7 = 25, so the answer is correct.",
    ),
    (
        "Which plant is this, and how should I care for it?",
        "It looks like a peace lily (Spathiphyllum), judging by the glossy dark leaves and the white hood around the "
        "flower. Keep it away from direct sun, water it once a week, and remove the brown leaves. It is poisonous to "
        "cats and dogs.",
    ),
    (
        "List the ingredients on the label.",
        "1. Wheat flour\n2. Sugar\n3. Palm oil\n4. Cocoa powder (6.2 %)\n5. Glucose syrup\n6. Salt\n7. Raising "
        "agents: E500, E503\nMay contain traces of nuts and milk.",
    ),
    (
        "What happened here?",
        "There seems to have been a storm. A large branch has fallen across the road and crushed the front of a "
        "parked car, the power lines are hanging low, and workers in orange jackets are putting up a barrier. Nobody "
        "appears to be hurt.",
    ),
    (
        "Beschreibe das Bild kurz.",
        "Auf dem Bild sieht man einen Marktplatz mit vielen Leuten. In der Mitte steht ein Brunnen, dahinter eine "
        "Kirche mit zwei Türmen. Links verkauft eine Frau Blumen und Gemüse.",
    ),
    (
        "Que voit-on sur cette photo ?",
        "On voit une petite gare de campagne sous la pluie. Un train bleu est arrêté le long du quai, et un homme "
        "avec une valise court pour ne pas le manquer.",
    ),
    (
        "¿Qué dice el cartel?",
        "El cartel dice «Se vende casa, tres habitaciones, cerca de la playa» y debajo hay un número de teléfono: 555 "
        "0147.",
    ),
    (
        "Describe the painting and its style.",
        "It is an oil painting of a harbour at sunrise, made with short, visible strokes of orange, violet and green. "
        "Shapes are suggested rather than drawn, which is typical of the Impressionists, who cared more about light "
        "than about detail.",
    ),
    (
        "What is the error on the screen?",
        'The window shows: "Error 404: page not found". This means that the server was reached, but the address '
        "https://www.example.com/index.html does not exist there. Check the spelling of the link, or start again from "
        "the home page.",
    ),
)
"""The calibration texts as (question, answer) pairs.

With 2,048 tokens the products of matrices keep 1.7 dB more than with the first 300 (measured).
"""

PROBE_QUESTION = "What can be seen in this picture, and where was it probably taken?"
"""The question of the prompt for verification, which calibration does not contain."""

MAX_TEXT_TOKENS = 128
"""The most tokens of a text before or after the image."""
MAX_IMAGE_TOKENS = 32
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
