"""`fastvlm verify` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def test_exit_code_is_the_verdict(fastvlm: Callable, model: Path, tmp_path: Path, write_checkpoint: Callable) -> None:
    good = fastvlm("verify", model, "--against", "random:tiny", cwd=tmp_path)
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "passed")

    def change(tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= -1

    bad = fastvlm("verify", model, "--against", write_checkpoint(change=change), "--json", cwd=tmp_path)
    assert bad.returncode == 1
    result = json.loads(bad.stdout)
    assert result["passed"] is False
    assert result["failures"][0].startswith("language_model.model.layers.0.mlp.up_proj.weight must keep")
    assert result["failures"][1].startswith("logits reach")
