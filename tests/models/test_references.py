"""The values of MODEL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import FastVLMError, ModelReferenceError
from fastvlm.models.references import open_checkpoint

WriteCheckpoint = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("random:9b", "random:9b is unknown"),
        ("nobody/FastVLM-0.5B", "fastvlm download nobody/FastVLM-0.5B"),
        ("0.5b-stage3", "fastvlm download 0.5b-stage3"),
        ("no such thing", "neither a folder"),
        (__file__, "is a file"),
    ],
)
def test_unknown_references_are_refused_with_the_known_ones(reference: str, message: str) -> None:
    with pytest.raises(ModelReferenceError, match=message) as caught:
        open_checkpoint(reference)
    assert isinstance(caught.value, FastVLMError)
