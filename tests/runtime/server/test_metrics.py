"""The metrics are what was answered, in a form that Prometheus reads."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import CHAT, png, question


def values(client: httpx.Client) -> dict[str, float]:
    """All samples, as `name{label}` -> value."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{value}" for _, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_answers_are_counted(client: httpx.Client) -> None:
    before = values(client)
    answers = [client.post(CHAT, json=question(text, png(1))).json() for text in ("What?", "Where?")]
    client.post(CHAT, json={})
    after = values(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown(f"fastvlm_requests_total{{{CHAT},200}}") == 2
    assert grown(f"fastvlm_requests_total{{{CHAT},400}}") == 1
    assert grown("fastvlm_ttft_seconds_count") == grown("fastvlm_queue_seconds_count") == 2
    seconds = sum(answer["timings"]["ttft_ms"] for answer in answers) / 1000
    assert grown("fastvlm_ttft_seconds_sum") == pytest.approx(seconds, rel=1e-3)
    assert grown("fastvlm_generated_tokens_total") == sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert grown("fastvlm_prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)


def test_stages_add_up_to_the_first_token(client: httpx.Client) -> None:
    client.post(CHAT, json=question("What?", png(2)))
    found = values(client)
    stages = [value for name, value in found.items() if name.startswith("fastvlm_ttft_stage_seconds_sum")]
    assert len(stages) == 5
    assert sum(stages) == pytest.approx(found["fastvlm_ttft_seconds_sum"], rel=1e-6)


def test_state_and_memory_are_reported(client: httpx.Client) -> None:
    found = values(client)
    assert found["fastvlm_running"] == found["fastvlm_queued"] == 0
    assert found["fastvlm_mlx_active_bytes"] > 0
    assert found["fastvlm_peak_memory_bytes"] > 10e6


def test_paths_of_clients_do_not_become_labels(client: httpx.Client) -> None:
    client.get("/secret-path")
    client.get("/v1/models/secret-model")
    assert "secret" not in client.get("/metrics").text
