"""The rewritten encoder in Core AI's format, run by Apple's interpreter and compared with torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.export import coreai
from fastvlm.export.coreai import Staged, ending, interpret, require_coreai, stage_ends, stage_names
from fastvlm.export.rewrite import rewrite
from fastvlm.models.errors import CrashError, MachineError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.encoder import apply_weights, convolutions, stored_by_plan
from fastvlm.quant.metrics import compare
from fastvlm.quant.schemes import is_candidate

needs_coreai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None,
    reason="the extra coreai is not installed (Apple's wheels: Linux x86_64, macOS 26 and later)",
)

SCHEMES = ("int8", "int4", "pal8", "pal6", "pal4")
STAGES = ["stem", "stage 0", "stage 1", "stage 2", "stage 3", "stage 4", "output"]


def network(size: int = 128) -> torch.nn.Sequential:
    return rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), size)


def test_stages_end_where_the_checkpoints_own_do() -> None:
    encoder = FastViT.from_checkpoint(RandomCheckpoint("tiny"))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = encoder.patch_embed(image)
        expected = [x]
        for part in encoder.network:
            x = part(x)
            if isinstance(part, torch.nn.Sequential):
                expected.append(x)
        found = Staged(rewrite(encoder, 128), torch.float32)(image)
    assert stage_names(network()) == STAGES and len(stage_ends(network())) == len(expected)
    for stage, ours, theirs in zip(STAGES, found, expected, strict=False):
        assert compare(theirs.numpy(), ours.numpy(), stage).snr_db > 100


@pytest.mark.parametrize(
    ("code", "stderr", "text"),
    [
        (-11, b"", "its process was ended by SIGSEGV"),
        (1, b"Traceback\nValueError: no such graph.\n", "its process failed (ValueError: no such graph)"),
        (1, b"", "its process failed (no message)"),
    ],
)
def test_end_of_the_process_is_described(code: int, stderr: bytes, text: str) -> None:
    assert ending(code, stderr) == text


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreai.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'pip install "fastvlm\[coreai\]"') as raised:
        require_coreai()
    assert raised.value.arguments == ("judge",)


@needs_coreai
@pytest.mark.slow
def test_apples_interpreter_equals_torch_on_every_scheme(golden: Path, tolerance: Callable[[str], float]) -> None:
    """The small reference encoder, its weights stored in all schemes in turn, which Apple's operations decode."""
    name = golden / "llava_small_reparam_tied"
    network = rewrite(FastViT.from_checkpoint(open_checkpoint(name)), 256)
    chosen = [one for one, conv in convolutions(network).items() if is_candidate(conv.weight.numpy())]
    stored = stored_by_plan(network, {one: SCHEMES[i % len(SCHEMES)] for i, one in enumerate(chosen)})
    assert {weight.scheme for weight in stored.values()} == set(SCHEMES)
    apply_weights(network, stored, {})
    image = np.load(name / "expected.npz")["0.pixel_values"]
    with torch.inference_mode():
        expected = Staged(network, torch.float32)(torch.from_numpy(image))
    found = interpret(network, stored, image, ["float32"])["float32"].results
    for stage, values in zip(STAGES, expected, strict=True):
        assert compare(values.numpy(), found[stage], stage).snr_db > tolerance("coreai_float32_snr_db"), stage


@needs_coreai
@pytest.mark.slow
def test_failure_inside_the_process_is_an_error() -> None:
    with pytest.raises(CrashError, match="Core AI: its process failed .*float12"):
        interpret(network(), {}, np.zeros((1, 3, 128, 128), np.float32), ["float12"])
