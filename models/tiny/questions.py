"""Questions about a scene in natural language, with their answers, and the check of a given answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .scenes import CENTRE, COLOURS, PLACES, SHAPES, Scene, Shape

T = TypeVar("T")

KINDS = ("describe", "count", "colour", "shape", "where", "text", "yes-no")

"""The kinds of questions."""

NUMBERS = ("no", "one", "two", "three", "four")

"""The number words of answers, by number."""

PHRASINGS = {
    "describe": (
        "Describe the image.",
        "Describe this picture.",
        "What is in the image?",
        "What do you see?",
        "What does the picture show?",
        "Tell me what is in the picture.",
    ),
    "count": ("How many {things} are there?", "How many {things} do you see?", "Count the {things}."),
    "colour": (
        "What colour is {the_thing}?",
        "Which colour does {the_thing} have?",
        "Tell me the colour of {the_thing}.",
    ),
    "shape": ("What shape is {the_thing}?", "Which shape does {the_thing} have?", "Tell me the shape of {the_thing}."),
    "where": ("Where is {the_thing}?", "Where do you see {the_thing}?", "Tell me where {the_thing} is."),
    "text": ("What is written?", "What is written in the image?", "What does the text say?", "Read the text."),
    "yes-no": ("Is there {a_thing}?", "Do you see {a_thing}?", "Does the image show {a_thing}?"),
}

"""The wordings of each kind of question."""

TEXTLESS_SHARE = 0.2
"""The share of the scenes without text that get a question about text."""


@dataclass(frozen=True)
class Question:
    """A question of one of the `KINDS`, with its right answer."""

    kind: str
    text: str
    answer: str


def questions_about(scene: Scene, rng: np.random.Generator, count: int = len(KINDS)) -> list[Question]:
    """Returns up to `count` questions of different kinds that have an answer in the scene, in random order."""
    found: list[Question] = []
    for index in rng.permutation(len(KINDS)):
        if len(found) < count and (question := ask(KINDS[index], scene, rng)):
            found.append(question)
    return found


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """Returns a question of a kind, or None if the scene has no unambiguous answer to one."""
    asked = ASKERS[kind](scene, rng)
    return None if asked is None else Question(kind, asked[0], asked[1])


Asked = tuple[str, str] | None
"""A question and its answer, or None."""


def ask_describe(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks for a description of the image."""
    return phrase("describe", rng), describe(scene)


def describe(scene: Scene) -> str:
    """Returns one sentence with every shape, its colour and place in reading order, then the text."""
    parts = [f"{article(one.colour)} {one.colour} {one.shape} {at(one.place)}" for one in scene.objects]
    if scene.text:
        parts.append(f"the text {scene.text.content} {at(scene.text.place)}")
    joined = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return joined[0].upper() + joined[1:] + "."


def ask_count(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks for the number of all shapes, or of those of one shape or colour, which may be zero."""
    subject = rng.random()
    if subject < 0.4:
        return counted(scene, "object", lambda one: True, rng)
    if subject < 0.7:
        shape = pick([one.shape for one in scene.objects] if rng.random() < 0.8 else SHAPES, rng)
        return counted(scene, shape, lambda one: one.shape == shape, rng)
    colour = pick([one.colour for one in scene.objects] if rng.random() < 0.8 else list(COLOURS), rng)
    return counted(scene, f"{colour} object", lambda one: one.colour == colour, rng)


def counted(scene: Scene, noun: str, belongs: Callable[[Shape], bool], rng: np.random.Generator) -> Asked:
    """Returns the question for the number of shapes that `belongs` accepts, which `noun` names."""
    number = sum(map(belongs, scene.objects))
    verb, ending = ("is", "") if number == 1 else ("are", "s" if not noun.endswith("s") else "es")
    plural = noun + ("es" if noun.endswith("s") else "s")
    return phrase("count", rng, things=plural), f"There {verb} {NUMBERS[number]} {noun}{ending}."


def ask_colour(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks for the colour of the shape in a place, or of the only one of its kind."""
    if rng.random() < 0.4:
        one = pick(scene.objects, rng)
        return phrase("colour", rng, the_thing=f"the object {at(one.place)}"), f"It is {one.colour}."
    one_of_a_shape = alone(scene, lambda one: one.shape)
    if not one_of_a_shape:
        return None
    one = pick(one_of_a_shape, rng)
    return phrase("colour", rng, the_thing=f"the {one.shape}"), f"It is {one.colour}."


def ask_shape(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks for the shape of the object in a place, or of the only one of its colour."""
    one, thing = None, ""
    if rng.random() < 0.4:
        one = pick(scene.objects, rng)
        thing = f"the object {at(one.place)}"
    elif one_of_a_colour := alone(scene, lambda one: one.colour):
        one = pick(one_of_a_colour, rng)
        thing = f"the {one.colour} object"
    if one is None:
        return None
    return phrase("shape", rng, the_thing=thing), f"It is {article(one.shape)} {one.shape}."


def ask_where(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks for the place of the text, or of a shape that is the only one of its colour or kind."""
    if scene.text and rng.random() < 0.2:
        return phrase("where", rng, the_thing="the text"), f"It is {at(scene.text.place)}."
    things = [(f"the {one.colour} object", one) for one in alone(scene, lambda one: one.colour)]
    things += [(f"the {one.shape}", one) for one in alone(scene, lambda one: one.shape)]
    if not things:
        return None
    thing, one = things[int(rng.integers(len(things)))]
    return phrase("where", rng, the_thing=thing), f"It is {at(one.place)}."


def ask_text(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks for the printed text."""
    if scene.text is None:
        return (phrase("text", rng), "There is no text.") if rng.random() < TEXTLESS_SHARE else None
    return phrase("text", rng), f"It says {scene.text.content}."


def ask_yes_no(scene: Scene, rng: np.random.Generator) -> Asked:
    """Asks if there is text, a thing in a place, a shape or a colour. Half of the answers are yes."""
    true = bool(rng.random() < 0.5)
    if rng.random() < 0.2:
        return phrase("yes-no", rng, a_thing="any text"), "Yes." if scene.text else "No."
    if rng.random() < 0.25:
        taken = {one.place for one in scene.objects} | ({scene.text.place} if scene.text else set())
        places = [place for place in PLACES if (place in taken) == true]
        return phrase("yes-no", rng, a_thing=f"something {at(pick(places, rng))}"), "Yes." if true else "No."
    if rng.random() < 0.5:
        noun = pick([shape for shape in SHAPES if any(one.shape == shape for one in scene.objects) == true], rng)
    else:
        colours = [colour for colour in COLOURS if any(one.colour == colour for one in scene.objects) == true]
        noun = f"{pick(colours, rng)} object"
    return phrase("yes-no", rng, a_thing=f"{article(noun)} {noun}"), "Yes." if true else "No."


ASKERS = {
    "describe": ask_describe,
    "count": ask_count,
    "colour": ask_colour,
    "shape": ask_shape,
    "where": ask_where,
    "text": ask_text,
    "yes-no": ask_yes_no,
}


def alone(scene: Scene, key: Callable[[Shape], object]) -> list[Shape]:
    """Returns the shapes whose `key` no other shape has."""
    shared = Counter(key(one) for one in scene.objects)
    return [one for one in scene.objects if shared[key(one)] == 1]


def phrase(kind: str, rng: np.random.Generator, **things: str) -> str:
    """Returns a random wording of a kind of question, filled with `things`."""
    return pick(PHRASINGS[kind], rng).format(**things)


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """Returns a random choice."""
    return choices[int(rng.integers(len(choices)))]


def at(place: str) -> str:
    """Returns a place with its preposition and article."""
    return f"in the {place}" if place == CENTRE else f"at the {place}"


def article(noun: str) -> str:
    """Returns the indefinite article of a noun."""
    return "an" if noun[0] in "aeio" else "a"


def is_right(question: Question, prediction: str) -> bool:
    """Returns True if an answer equals the right one, up to case, spaces and the final period.

    A description is right if it names every thing of the scene and nothing else, in any order.
    """
    if question.kind == "describe":
        return described(prediction) == described(question.answer)
    return normalized(prediction) == normalized(question.answer)


def described(text: str) -> Counter[str]:
    """Returns the things in a description, with their counts."""
    parts = re.split(r",\s*(?:and\s+)?|\s+and\s+", normalized(text))
    return Counter(re.sub(r"^(a|an|the)\s+", "", part) for part in parts)


def normalized(text: str) -> str:
    """Returns a text in lower case, with single spaces and without the final period."""
    return " ".join(text.casefold().split()).rstrip(". ")
