"""The imports of an answer: nothing slow that it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SLOW = ("transformers", "mlx_lm", "torch", "coremltools", "matplotlib", "scipy", "sklearn", "huggingface_hub", "rich")

ANSWER = """
import json, sys
import numpy as np
from pathlib import Path
from fastvlm.runtime import fastvlm

class Encoder:
    name, projected, compile_ms, image_size = "fake", False, 0.0, 256
    def encode(self, pixel_values):
        return np.ones((1, 16, 512), np.float32)

fastvlm.open_encoder = lambda *args: Encoder()
model = fastvlm.load(Path(sys.argv[1]))
answer = model.generate(np.zeros((20, 30, 3), np.uint8), "Hi", max_tokens=3, ignore_eos=True)
print(json.dumps({"modules": sorted({name.split(".")[0] for name in sys.modules}), "ids": answer.token_ids,
                  "cold": answer.timings.cold}))
"""


@pytest.fixture(scope="module")
def run() -> Callable[..., dict]:
    def run(code: str, *args: str) -> dict:
        found = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        assert found.stderr == ""
        return json.loads(found.stdout)

    return run


def test_answering_imports_nothing_slow(run: Callable[..., dict], write_folder: Callable[..., Path]) -> None:
    found = run(ANSWER, str(write_folder()))
    assert len(found["ids"]) == 3
    assert found["cold"]
    assert not set(found["modules"]) & set(SLOW)
    assert {"mlx", "tokenizers", "PIL"} <= set(found["modules"])


def test_package_modules_import_without_the_back_ends(run: Callable[..., dict]) -> None:
    code = "import json, sys, fastvlm.runtime.encoders; print(json.dumps({'modules': sorted(sys.modules)}))"
    modules = {name.split(".")[0] for name in run(code)["modules"]}
    assert not modules & {*SLOW, "mlx"}
