"""An actor of a Ray cluster, called without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm._version import __version__
from fastvlm.runtime import fastvlm as fastvlm_module
from fastvlm.runtime.bulk.log import run_digest
from fastvlm.runtime.bulk.pipeline import Captioner
from fastvlm.runtime.bulk.ray_worker import Worker, WorkerSetup
from fastvlm.runtime.bulk.sources import Source
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.tests.runtime.bulk.conftest import BROKEN, NAMES


@pytest.mark.slow
def test_worker_has_the_rows_of_the_local_captioner(
    write_folder: Callable[..., Path],
    open_vlm: Callable[[Path], FastVLM],
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastvlm_module, "load", lambda folder, **options: open_vlm(Path(folder)))
    folder, options = write_folder(), {"max_tokens": 4, "ignore_eos": True}
    worker = Worker()
    version, digest, host, _ = worker.open(WorkerSetup(str(folder), ("a", "b"), options, {}, 2, 1))
    assert (version, digest) == (__version__, run_digest(folder, (), {}))
    assert host
    paths = [pictures / name for name in NAMES]
    entries = worker.caption([(str(path), path.read_bytes()) for path in paths])
    local = [row.entry for row in Captioner(open_vlm(folder), ["a", "b"], options).rows(Source([pictures]))]
    assert str(pictures / BROKEN) in entries[2]["error"]
    for entry in (*entries, *local):
        for answer in entry.get("answers", ()):
            answer.pop("timings", None)
    assert entries == local
