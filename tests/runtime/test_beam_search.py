"""Beam search: the ids of transformers, and the likeliest answer where all can be listed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models._mlx import mx
from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import UsageError
from fastvlm.models.kv_cache import KVCache
from fastvlm.models.qwen2 import Qwen2
from fastvlm.runtime import beam_search as beam_search_module
from fastvlm.runtime.batch import Batch
from fastvlm.runtime.beam_search import MAX_BEAMS, BeamOptions, BeamSearch, best_ids
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import prefill
from fastvlm.runtime.prompt_cache import CachedPrompt
from fastvlm.runtime.request import prepare

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)


@dataclass(frozen=True)
class Pair:
    """One decoder in both libraries."""

    ours: Qwen2
    theirs: Any

    def ids(
        self, prompt: list[int], options: BeamOptions, eos: list[int], count: int, penalty: float = 1.0
    ) -> list[int]:
        cache = self.ours.make_cache()
        logits = prefill(self.ours, self.ours.embed(mx.array([prompt])), cache)
        search = BeamSearch(options, eos, count)
        found = list(best_ids(self.ours, logits, cache, search, penalty, prompt))
        assert cache[0].offset == len(prompt)  # the prompt can be used again
        return [token_id for token_id in found if token_id is not None]

    def expected(
        self, prompt: list[int], options: BeamOptions, eos: list[int], count: int, penalty: float = 1.0
    ) -> list[int]:
        import torch

        ids = torch.tensor([prompt])
        found = self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            repetition_penalty=penalty,
            max_new_tokens=count,
            eos_token_id=eos or None,
            pad_token_id=0,
            do_sample=False,
        )
        return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=["llava_small_reparam_tied", "llava_small_train_untied"])
def pair(request: pytest.FixtureRequest, golden: Path, language_side: Callable) -> Pair:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    checkpoint = FolderCheckpoint(golden / request.param)
    config = Qwen2Config(**{k: v for k, v in checkpoint.config_dict.items() if not k.startswith(("mm_", "model_type"))})
    theirs = Qwen2ForCausalLM(config).eval()
    weights = {
        name: torch.as_tensor(checkpoint.read(name, "pt")).float()
        for name in theirs.state_dict()
        if name in checkpoint.tensors
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return Pair(language_side(checkpoint).language_model, theirs)


CASES = [
    (BeamOptions(beams, length, early), number // 4 % 4, 1.3 if number % 5 == 0 else 1.0)
    for number, (beams, length, early) in enumerate(
        itertools.product((2, 3, 4, 5), (-1.0, 0.0, 0.6, 1.0, 2.0), (False, True, "never"))
    )
]
"""Options, the number of end tokens and the penalty for repetition."""


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_ids_equal_transformers(pair: Pair, half: int) -> None:
    rng = np.random.default_rng(half)
    lengths = set()
    for options, eos_count, penalty in CASES[half::4]:
        prompt = rng.integers(0, 300, rng.integers(1, 12)).tolist()
        likely = pair.ids(prompt, BeamOptions(2), [], 8)  # ids that occur in answers, so that some end early
        eos = sorted(set(likely[2:]))[:eos_count]
        expected = pair.expected(prompt, options, eos, 12, penalty)
        assert pair.ids(prompt, options, eos, 12, penalty) == expected, (options, eos, penalty)
        lengths.add(len(expected))
    assert len(lengths) > 3  # some answers have ended early


class Table:
    """A decoder whose logits depend on the last token alone."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = mx.array(logits)  # (V, V)

    def embed(self, ids: mx.array) -> mx.array:
        return ids

    def __call__(self, inputs_embeds: mx.array, cache: list[KVCache]) -> mx.array:
        return self._logits[inputs_embeds]  # (B, 1, V)


@given(
    seed=st.integers(0, 999),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    eos=st.sets(st.integers(0, 2), max_size=2),
)
def test_wide_beam_finds_the_best_of_all_answers(seed: int, length_penalty: float, eos: set[int]) -> None:
    V, count = 3, 4
    table = np.random.default_rng(seed).normal(0, 2, (V, V)).astype(np.float32)
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))  # (V, V), log-probabilities
    scores = {}
    for length in range(1, count + 1):
        for ids in itertools.product(range(V), repeat=length):
            if not eos.intersection(ids[:-1]) and (length == count or ids[-1] in eos):
                total = sum(logs[before, after] for before, after in itertools.pairwise((0, *ids)))
                scores[ids] = total / length**length_penalty
    cache = KVCache()
    cache.update(mx.zeros((1, 1, 1, 32)), mx.zeros((1, 1, 1, 32)))
    search = BeamSearch(BeamOptions(MAX_BEAMS, length_penalty, "never"), sorted(eos), count)
    found = tuple(i for i in best_ids(Table(table), mx.array(table[:1]), [cache], search) if i is not None)
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-5)


def test_search_gives_one_answer_alone_in_a_batch_and_in_a_chat(vlm: FastVLM) -> None:
    plain = {"max_tokens": 9, "ignore_eos": True, "repetition_penalty": 20.0}
    options = {"num_beams": 3, **plain}
    expected = vlm.generate(PICTURE, "What is it?", **options)
    assert len(expected.token_ids) == 9
    assert expected.token_ids != vlm.generate(PICTURE, "What is it?", **plain).token_ids
    assert expected.finish_reason == "length"
    assert vlm.chat(PICTURE).ask("What is it?", **options).token_ids == expected.token_ids
    requests = [prepare(PICTURE, "What is it?", **options), prepare(None, "Hi", max_tokens=5)]
    found = list(Batch(vlm.engine, 2).outcomes(requests))
    assert found[0].token_ids == expected.token_ids
    assert found[1].token_ids == vlm.generate(None, "Hi", max_tokens=5).token_ids


def test_question_after_a_search_continues_the_chat(vlm: FastVLM) -> None:
    chat, fresh = vlm.chat(PICTURE), vlm.chat(PICTURE)
    for one in (chat, fresh):
        one.ask("What is it?", num_beams=3, max_tokens=6)
    fresh._cached.clear()
    vlm.engine.clear_caches()
    assert chat.ask("Why?", max_tokens=6).token_ids == fresh.ask("Why?", max_tokens=6).token_ids
    assert chat.messages == fresh.messages


def test_search_works_with_quantized_keys_and_values(vlm: FastVLM) -> None:
    engine = vlm.engine
    small = FastVLM(vlm.folder, engine.encoder, engine.language, engine.tokenizer, 1.0, kv_bits=8)
    assert len(small.generate(None, "Hi", num_beams=4, max_tokens=5, ignore_eos=True).token_ids) == 5


def test_stop_string_cuts_the_best_answer(vlm: FastVLM) -> None:
    options = {"num_beams": 2, "max_tokens": 12, "ignore_eos": True}
    whole = vlm.generate(None, "Hi", **options)
    stop = whole.text[4:6]
    found = vlm.generate(None, "Hi", stop=stop, **options)
    assert found.text == whole.text[: whole.text.index(stop)]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)


def test_rate_counts_the_whole_search(vlm: FastVLM, standing_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    standing_clock.slow(beam_search_module.BeamSearch, "advance", 2.0)
    answer = vlm.generate(None, "Hi", num_beams=2, max_tokens=5, ignore_eos=True)
    assert answer.timings.decode_tps == pytest.approx(4 / 10)  # 5 steps of 2 s


def test_others_compute_between_the_steps_of_a_search(vlm: FastVLM) -> None:
    request = prepare(None, "Hi", num_beams=2, max_tokens=4, ignore_eos=True)
    prefilled = vlm.engine.prefill(request, CachedPrompt())
    found = list(vlm.engine.decoded_ids(request, prefilled))
    assert found[:3] == [None] * 3
    assert None not in found[3:] and len(found) == 7


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_beams": 0}, "num_beams must be an integer from 1 to 64 .got 0"),
        ({"num_beams": 65}, "num_beams must be"),
        ({"num_beams": True}, "num_beams must be"),
        ({"num_beams": 2.0}, "num_beams must be"),
        ({"length_penalty": math.nan}, "length_penalty must be"),
        ({"length_penalty": 11}, "length_penalty must be from -10 to 10"),
        ({"early_stopping": "yes"}, "early_stopping must be"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams above 1 cannot be combined with temperature"),
        ({"num_beams": 2, "choice": ["a"]}, "num_beams above 1 cannot be combined with choice"),
    ],
)
def test_usage_error_when_an_option_is_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        prepare(None, "Hi", **options)
