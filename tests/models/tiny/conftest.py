"""The tokenizer and the network of the training tests, made once."""

from __future__ import annotations

import pytest
import torch

from fastvlm.models.tiny.data import (
    learned_tokenizer,
)
from fastvlm.models.tiny.network import TinyFastVLM


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """The learned tokenizer.json."""
    return learned_tokenizer()


@pytest.fixture(scope="module")
def network() -> TinyFastVLM:
    """An untrained network. It needs transformers, whose Qwen2 is trained."""
    pytest.importorskip("transformers", reason="training needs the dev extra's transformers")
    torch.manual_seed(0)
    return TinyFastVLM().eval()
