"""`fastvlm doctor` as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path


def test_findings_have_the_blas_and_the_versions(fastvlm: Callable, tmp_path: Path) -> None:
    done = fastvlm("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["coremltools"]["detail"].startswith("9.")
    if sys.platform == "linux":
        assert "BLAS" in findings
        assert findings["vision"]["state"] == "limited"
    plain = fastvlm("doctor", cwd=tmp_path).stdout
    assert all(subject in plain for subject in findings)
