"""The tested versions of the dependencies."""

from __future__ import annotations

import importlib.metadata

import pytest

from fastvlm.models import versions
from fastvlm.models.errors import MachineError


def test_release_is_the_leading_numbers() -> None:
    assert versions.release("2.13.0+cpu") == (2, 13, 0)
    assert versions.release("0.30.dev1") == (0, 30)


def test_range_excludes_its_upper_end() -> None:
    assert versions.tested_range("coremltools") == ">=9.0,<9.1"
    assert versions.is_tested("coremltools", "9.0")
    assert not versions.is_tested("coremltools", "9.1")


@pytest.mark.parametrize("found", [None, "8.3"])
def test_missing_or_untested_version_is_refused(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MachineError, match=r'pip install "coremltools>=9\.0,<9\.1"'):
        versions.require_tested("coremltools")
