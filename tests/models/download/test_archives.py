"""The catalog of Apple's archives, and the files of a checkpoint that are needed."""

from __future__ import annotations

import pytest

from fastvlm.models.download.archives import FOLDERS, archive_url, is_needed


def test_urls_are_apples() -> None:
    base = "https://ml-site.cdn-apple.com/datasets/fastvlm/llava-fastvithd"
    assert archive_url("0.5b-stage3") == f"{base}_0.5b_stage3.zip"
    assert archive_url("7b-stage2") == f"{base}_7b_stage2.zip"
    assert archive_url("1.5b-stage3-int8") == f"{base}_1.5b_stage3_llm.int8.zip"
    assert len(FOLDERS) == 9


@pytest.mark.parametrize(
    "name", ["fastvithd.mlpackage/../../config.json", "onnx/config.json", "model.bin", ".config.json", "run.py"]
)
def test_code_pickles_and_hidden_files_are_not_needed(name: str) -> None:
    assert not is_needed(name)
