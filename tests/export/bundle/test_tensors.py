"""The tensors in the weight files of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm.export.bundle.tensors import named, saved_tensors
from fastvlm.models._mlx import mx
from fastvlm.models.errors import ModelFolderError
from fastvlm.models.safetensors_files import write_safetensors


def test_tensor_in_two_weight_files_is_refused(tmp_path: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in names:
        write_safetensors(tmp_path / name, {"x": mx.zeros(2)}, {})
    index = {"weight_map": dict(zip("xy", names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=r"tensor 'x' is in two weight files \(the second is model-00002"):
        saved_tensors(tmp_path)


def test_only_the_first_tensors_are_named() -> None:
    assert list(named("missing", set())) == []
    assert list(named("missing", set("gfedcba"))) == ["7 tensors missing: a, b, c, d, e and 2 more"]
