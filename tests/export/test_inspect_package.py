"""Descriptions of packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm.export.inspect_package import inspect
from fastvlm.export.lint import COMPRESSED_WEIGHTS_KEY
from fastvlm.export.rewrite import rewrite
from fastvlm.export.write_encoder import convert_encoder
from fastvlm.models.errors import PackageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.encoder import quantize, stored_uniformly

pytestmark = pytest.mark.slow


def test_real_package_is_clean_and_counted(tmp_path: Path) -> None:
    network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 256)
    package = tmp_path / "fastvithd.mlpackage"
    stored = stored_uniformly(network, "int8")
    quantize(network, stored, ())
    convert_encoder(network, 256, stored, package, metadata={}, on_stage=lambda _: None)
    report = inspect(package)
    assert report.errors == ()
    assert "turned weights" not in {finding.rule for finding in report.findings}
    assert report.operations["conv"] == 46
    assert report.metadata[COMPRESSED_WEIGHTS_KEY] == str(report.compressed_weights) != "0"
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert numbers < sum(report.weight_bytes.values()) < 1.2 * numbers
    assert report.as_dict()["operation_count"] == sum(report.operations.values())


def test_path_that_is_not_a_package_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="gone does not exist"):
        inspect(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(PackageError, match="neither a .mlpackage nor a folder with"):
        inspect(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PackageError, match=r"Manifest.json"):
        inspect(tmp_path / "folder")
