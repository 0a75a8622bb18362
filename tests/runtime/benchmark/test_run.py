"""The benchmark of several folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm.models.errors import ImageError
from fastvlm.runtime.benchmark.run import benchmark
from fastvlm.runtime.benchmark.workload import Workload


def test_bad_image_fails_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        benchmark(tmp_path / "nothing", Workload(image=tmp_path / "no.png"))
