"""Questions about scenes: true, unambiguous answers, and the check of a prediction."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.tiny.questions import KINDS, NUMBERS, Question, ask, describe, is_right, questions_about
from fastvlm.models.tiny.scenes import COLOURS, PLACES, SHAPES, Scene, draw_scene

scenes = st.integers(0, 10**9).map(draw_scene)
draws = st.integers(0, 10**9).map(np.random.default_rng)


@settings(max_examples=200, deadline=None)
@given(scenes, draws)
def test_yes_no_answers_match_the_scene(scene: Scene, draw: np.random.Generator) -> None:
    question = ask("yes-no", scene, draw)
    assert question is not None
    thing = re.sub(r"^(Is there|Do you see|Does the image show) |\?$", "", question.text)
    if thing == "any text":
        true = scene.text is not None
    elif match := re.fullmatch(r"something (?:at|in) the (.+)", thing):
        things = [*scene.objects, *([scene.text] if scene.text else [])]
        true = match[1] in {one.place for one in things}
    else:
        named = thing.split()[1]
        true = named in {name for one in scene.objects for name in (one.colour, one.shape)}
    assert question.answer == ("Yes." if true else "No.")


@settings(max_examples=200, deadline=None)
@given(scenes, draws)
def test_counts_match_the_scene(scene: Scene, draw: np.random.Generator) -> None:
    question = ask("count", scene, draw)
    assert question is not None
    words = re.findall(r"[a-z]+", question.text)
    colours, shapes = set(words) & set(COLOURS), {s for s in SHAPES for w in words if w in (f"{s}s", f"{s}es")}
    true = sum((not colours or one.colour in colours) and (not shapes or one.shape in shapes) for one in scene.objects)
    assert NUMBERS[true] in question.answer.split()


THING = re.compile(
    rf"the (?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)}|object)"
    rf"(?: (?:at|in) the (?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))}))?"
)


@settings(max_examples=200, deadline=None)
@given(scenes, draws)
def test_questions_are_unambiguous_and_answers_right(scene: Scene, draw: np.random.Generator) -> None:
    for kind in ("colour", "shape", "where"):
        question = ask(kind, scene, draw)
        if question is None or "the text" in question.text:
            continue
        named = THING.search(question.text)
        assert named is not None
        (one,) = [
            one
            for one in scene.objects
            if named["colour"] in (None, one.colour)
            and named["shape"] in ("object", one.shape)
            and named["place"] in (None, one.place)
        ]
        said = {"colour": one.colour, "shape": one.shape, "where": one.place}[kind]
        assert re.fullmatch(rf"It is (a |an |at the |in the )?{said}\.", question.answer)


@settings(max_examples=100, deadline=None)
@given(scenes, draws)
def test_right_answers_pass_and_kinds_do_not_repeat(scene: Scene, draw: np.random.Generator) -> None:
    questions = questions_about(scene, draw)
    assert len({question.kind for question in questions}) == len(questions) <= len(KINDS)
    for question in questions:
        assert is_right(question, f"  {question.answer.upper().rstrip('.')} ")
        assert not is_right(question, "")
        assert not is_right(question, question.answer + " Maybe.")


@settings(max_examples=100, deadline=None)
@given(scenes)
def test_description_needs_every_thing_in_any_order(scene: Scene) -> None:
    question = Question("describe", "Describe the image.", describe(scene))
    turned = replace(scene, objects=scene.objects[::-1])
    assert is_right(question, describe(turned))

    one = scene.objects[0]
    other = "red" if one.colour != "red" else "blue"
    changed = replace(scene, objects=(replace(one, colour=other), *scene.objects[1:]))
    assert not is_right(question, describe(changed))
    if len(scene.objects) > 1:
        assert not is_right(question, describe(replace(scene, objects=scene.objects[1:])))
    if scene.text:
        assert not is_right(question, describe(replace(scene, text=None)))
        assert not is_right(question, describe(replace(scene, text=replace(scene.text, content="99999"))))


def test_some_textless_scenes_get_a_question_about_text() -> None:
    scene = replace(next(s for s in map(draw_scene, range(50)) if s.text is None))
    answers = [ask("text", scene, np.random.default_rng(i)) for i in range(60)]
    found = {question.answer for question in answers if question}
    assert found == {"There is no text."}
    assert None in answers
