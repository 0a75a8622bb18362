"""Sends a running server what its OpenAPI document allows, and what it does not, and prints a table of the statuses.

python tests/soak/fuzz_server.py [--calls 5000] [--seed 0]

Fails if a response has a status of 500 or more, or is not what the document says.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.core.failures import Failure, FailureGroup

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
"""The promises of the document that every response must keep."""


@contextlib.contextmanager
def served(folder: Path, *options: str, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Starts `fastvlm serve` on a free port. Yields its URL and process, and stops it."""
    command = [sys.executable, "-m", "fastvlm.cli.main", "serve", str(folder), "--port", "0", *options]
    with log.open("w") as sink, subprocess.Popen(command, stderr=sink, cwd=folder.parent) as process:
        try:
            yield wait_for_url(process, log), process
        finally:
            process.terminate()
            process.wait(60)


def wait_for_url(process: subprocess.Popen, log: Path) -> str:
    """Returns the URL that a server prints once it is ready."""
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving on "):
                return line.split()[2].removesuffix("/v1")
        time.sleep(0.02)
    raise RuntimeError(f"the server ended: {log.read_text()}")


def export(folder: Path) -> Path:
    """Exports `tiny`."""
    subprocess.run(
        [sys.executable, "-m", "fastvlm.cli.main", "export", "tiny", "-q", "int8", "-o", str(folder)], check=True
    )
    return folder


def fuzz(url: str, calls: int, seed: int) -> tuple[collections.Counter, list[str]]:
    """Makes about `calls` calls, spread over all routes. Returns the statuses by route, and the faults."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    weights = [6 if operation.method == "post" else 1 for operation in operations]
    statuses: collections.Counter = collections.Counter()
    faults: list[str] = []
    for operation, weight in zip(operations, weights, strict=True):
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except Exception:  # an operation without anything to make wrong
                continue
            run(strategy, operation.label, max(1, calls * weight // (2 * sum(weights))), seed, statuses, faults)
    return statuses, faults


def run(strategy: Any, label: str, count: int, seed: int, statuses: collections.Counter, faults: list[str]) -> None:
    """Makes `count` calls of one operation."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def call(case: Any) -> None:
        response = case.call(timeout=60)
        statuses[label, response.status_code] += 1
        if response.status_code >= 500:
            faults.append(f"{label}: {response.status_code} {response.text[:200]} for {str(case.body)[:500]}")
        elif not faults:
            try:
                case.validate_response(response, checks=CHECKS)
            except (Failure, FailureGroup) as reason:
                faults.append(f"{label}: {str(reason)[:1500]}")

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, log = export(Path(place) / "model"), Path(place) / "log"
        with served(folder, "--max-tokens", "4", "--quiet", log=log) as (url, process):
            statuses, faults = fuzz(url, arguments.calls, arguments.seed)
            alive = process.poll() is None
        text = log.read_text()
    print(f"{'operation':32} {'status':>6} {'calls':>6}")
    for (label, status), count in sorted(statuses.items()):
        print(f"{label:32} {status:>6} {count:>6}")
    print(f"{sum(statuses.values())} calls, {len(faults)} faults, tracebacks in the log: {text.count('Traceback')}")
    for fault in faults[:10]:
        print(f"FAULT {fault}")
    sys.exit(1 if faults or not alive or "Traceback" in text else 0)


if __name__ == "__main__":
    main()
