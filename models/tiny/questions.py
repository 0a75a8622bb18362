"""Questions about a scene in natural words, with their answers, and whether a given answer is right."""

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

NUMBERS = ("no", "one", "two", "three", "four")

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

TEXTLESS_SHARE = 0.2
"""How often a scene without text is asked for it."""


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def questions_about(scene: Scene, draw: np.random.Generator, count: int = len(KINDS)) -> list[Question]:
    """`count` questions of different kinds, of all seven at most, that the scene has an answer to, in a drawn order."""
    found: list[Question] = []
    for index in draw.permutation(len(KINDS)):
        if len(found) < count and (question := ask(KINDS[index], scene, draw)):
            found.append(question)
    return found


def ask(kind: str, scene: Scene, draw: np.random.Generator) -> Question | None:
    """A question of a kind; None where the scene has no clear answer to one."""
    asked = ASKERS[kind](scene, draw)
    return None if asked is None else Question(kind, asked[0], asked[1])


Asked = tuple[str, str] | None
"""Question and answer."""


def ask_describe(scene: Scene, draw: np.random.Generator) -> Asked:
    return phrase("describe", draw), describe(scene)


def describe(scene: Scene) -> str:
    """One sentence that names every shape in reading order with its colour and place, then the text."""
    parts = [f"{article(one.colour)} {one.colour} {one.shape} {at(one.place)}" for one in scene.objects]
    if scene.text:
        parts.append(f"the text {scene.text.content} {at(scene.text.place)}")
    joined = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return joined[0].upper() + joined[1:] + "."


def ask_count(scene: Scene, draw: np.random.Generator) -> Asked:
    """How many shapes, of a kind or a colour or all; now and then of one that is not there."""
    which = draw.random()
    if which < 0.4:
        return counted(scene, "object", lambda one: True, draw)
    if which < 0.7:
        shape = pick([one.shape for one in scene.objects] if draw.random() < 0.8 else SHAPES, draw)
        return counted(scene, shape, lambda one: one.shape == shape, draw)
    colour = pick([one.colour for one in scene.objects] if draw.random() < 0.8 else list(COLOURS), draw)
    return counted(scene, f"{colour} object", lambda one: one.colour == colour, draw)


def counted(scene: Scene, noun: str, belongs: Callable[[Shape], bool], draw: np.random.Generator) -> Asked:
    number = sum(map(belongs, scene.objects))
    verb, ending = ("is", "") if number == 1 else ("are", "s" if not noun.endswith("s") else "es")
    plural = noun + ("es" if noun.endswith("s") else "s")
    return phrase("count", draw, things=plural), f"There {verb} {NUMBERS[number]} {noun}{ending}."


def ask_colour(scene: Scene, draw: np.random.Generator) -> Asked:
    if draw.random() < 0.4:
        one = pick(scene.objects, draw)
        return phrase("colour", draw, the_thing=f"the object {at(one.place)}"), f"It is {one.colour}."
    one_of_a_shape = alone(scene, lambda one: one.shape)
    if not one_of_a_shape:
        return None
    one = pick(one_of_a_shape, draw)
    return phrase("colour", draw, the_thing=f"the {one.shape}"), f"It is {one.colour}."


def ask_shape(scene: Scene, draw: np.random.Generator) -> Asked:
    one, thing = None, ""
    if draw.random() < 0.4:
        one = pick(scene.objects, draw)
        thing = f"the object {at(one.place)}"
    elif one_of_a_colour := alone(scene, lambda one: one.colour):
        one = pick(one_of_a_colour, draw)
        thing = f"the {one.colour} object"
    if one is None:
        return None
    return phrase("shape", draw, the_thing=thing), f"It is {article(one.shape)} {one.shape}."


def ask_where(scene: Scene, draw: np.random.Generator) -> Asked:
    if scene.text and draw.random() < 0.2:
        return phrase("where", draw, the_thing="the text"), f"It is {at(scene.text.place)}."
    things = [(f"the {one.colour} object", one) for one in alone(scene, lambda one: one.colour)]
    things += [(f"the {one.shape}", one) for one in alone(scene, lambda one: one.shape)]
    if not things:
        return None
    thing, one = things[int(draw.integers(len(things)))]
    return phrase("where", draw, the_thing=thing), f"It is {at(one.place)}."


def ask_text(scene: Scene, draw: np.random.Generator) -> Asked:
    if scene.text is None:
        return (phrase("text", draw), "There is no text.") if draw.random() < TEXTLESS_SHARE else None
    return phrase("text", draw), f"It says {scene.text.content}."


def ask_yes_no(scene: Scene, draw: np.random.Generator) -> Asked:
    """As many yes as no: of text, of things in a place, of a shape and of a colour."""
    true = bool(draw.random() < 0.5)
    if draw.random() < 0.2:
        return phrase("yes-no", draw, a_thing="any text"), "Yes." if scene.text else "No."
    if draw.random() < 0.25:
        taken = {one.place for one in scene.objects} | ({scene.text.place} if scene.text else set())
        places = [place for place in PLACES if (place in taken) == true]
        return phrase("yes-no", draw, a_thing=f"something {at(pick(places, draw))}"), "Yes." if true else "No."
    if draw.random() < 0.5:
        noun = pick([shape for shape in SHAPES if any(one.shape == shape for one in scene.objects) == true], draw)
    else:
        colours = [colour for colour in COLOURS if any(one.colour == colour for one in scene.objects) == true]
        noun = f"{pick(colours, draw)} object"
    return phrase("yes-no", draw, a_thing=f"{article(noun)} {noun}"), "Yes." if true else "No."


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
    """The shapes that no other shares `key` with."""
    shared = Counter(key(one) for one in scene.objects)
    return [one for one in scene.objects if shared[key(one)] == 1]


def phrase(kind: str, draw: np.random.Generator, **things: str) -> str:
    return pick(PHRASINGS[kind], draw).format(**things)


def pick(choices: Sequence[T], draw: np.random.Generator) -> T:
    return choices[int(draw.integers(len(choices)))]


def at(place: str) -> str:
    return f"in the {place}" if place == CENTRE else f"at the {place}"


def article(noun: str) -> str:
    return "an" if noun[0] in "aeio" else "a"


def is_right(question: Question, prediction: str) -> bool:
    """Whether an answer says what the right one says; case, spaces and the final stop aside.

    A description is right when it names every thing of the scene and nothing else, in any order.
    """
    if question.kind == "describe":
        return described(prediction) == described(question.answer)
    return normalized(prediction) == normalized(question.answer)


def described(text: str) -> Counter[str]:
    """The things that a description names."""
    parts = re.split(r",\s*(?:and\s+)?|\s+and\s+", normalized(text))
    return Counter(re.sub(r"^(a|an|the)\s+", "", part) for part in parts)


def normalized(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(". ")
