"""The import of MLX, and the device that it computes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastvlm.models import _mlx


def test_device_is_decided_by_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlx, "_cpu", None)
    assert _mlx.on_cpu() is (_mlx.mx.default_device() == _mlx.mx.cpu)
    monkeypatch.setattr(_mlx, "_cpu", not _mlx.on_cpu())
    assert _mlx.on_cpu() is not (_mlx.mx.default_device() == _mlx.mx.cpu)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a BLAS to choose")
def test_fast_blas_is_loaded_before_mlx() -> None:
    code = (
        "import sys\nfrom fastvlm.models import blas\nload = blas.preload_blas\n"
        "def checked():\n    assert 'mlx.core' not in sys.modules\n    return load()\n"
        "blas.preload_blas = checked\nfrom fastvlm.models._mlx import BLAS, mx\nassert 'mlx.core' in sys.modules\n"
        "print(BLAS.reason)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip()
