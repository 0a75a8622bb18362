"""The cost of the server: time to first token over HTTP, compared with `generate` in this process, and the start-up.

    python tests/bench/bench_server.py FOLDER [--runs N] [--side PIXELS]

The two sides alternate within one run, on images that neither has seen, since machines are shared and noisy. The
difference is split: `computing_ms` is that of the stages which both sides report, and `around_ms` what is left, the
way of the request and of the first text.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))
from fuzz_server import served

from fastvlm.runtime.timings import TTFT_STAGES

FIRST, SECOND = "Describe the image.", "What colour is it?"
CHAT = "/v1/chat/completions"

PAUSE_S = 0.5
"""The time between the sides. Threads of the side before spin for a while before they sleep, on the other's cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--side", type=int, default=256, help="the side of the images in pixels")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    import fastvlm

    vlm = fastvlm.load(folder)
    times: dict[str, list[float]] = {name: [] for name in ("server", "process", "server_again", "process_again")}
    stages: dict[str, list[dict[str, float]]] = {"server": [], "process": []}
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        with (
            served(folder, "--quiet", log=Path(place) / "log") as (url, _),
            closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)) as client,
        ):
            over_http(client, picture(0, arguments.side), FIRST)
            start_up_s = time.perf_counter() - start
            for n in range(arguments.runs + 1):
                image = picture(n + 1, arguments.side)
                sides = [("server", lambda text, image=image: over_http(client, image, text)),
                         ("process", lambda text, image=image: in_process(vlm, image, text))]  # fmt: skip
                for name, ask in sides if n % 2 else sides[::-1]:
                    time.sleep(PAUSE_S)
                    (first, first_stages), (second, _) = ask(FIRST), ask(SECOND)
                    if n:
                        times[name].append(first)
                        times[f"{name}_again"].append(second)
                        stages[name].append(first_stages)
    medians = {name: statistics.median(values) for name, values in times.items()}
    differences = [a - b for a, b in zip(times["server"], times["process"], strict=True)]
    computing = [a["ttft_ms"] - b["ttft_ms"] for a, b in zip(stages["server"], stages["process"], strict=True)]
    around = [a - b for a, b in zip(differences, computing, strict=True)]
    figures = {
        "runs": arguments.runs,
        "start_to_first_token_s": round(start_up_s, 2),
        "ttft_ms": {name: round(value, 2) for name, value in medians.items()},
        "server_adds_ms": round(statistics.median(differences), 2),
        "of_which": {
            "computing_ms": round(statistics.median(computing), 2),
            "around_ms": round(statistics.median(around), 2),
        },
        "stages_ms": {
            name: {
                stage: round(statistics.median(one[stage] for one in found), 2)
                for stage in (*TTFT_STAGES, "image_open_ms")
            }
            for name, found in stages.items()
        },
        "second_question_share": round(medians["server_again"] / medians["server"], 3),
    }
    print(json.dumps(figures, indent=2))


def picture(seed: int, side: int) -> bytes:
    """A PNG of large coloured squares."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def over_http(connection: http.client.HTTPConnection, image: bytes, text: str) -> tuple[float, dict[str, float]]:
    """Returns the milliseconds from sending a request to the first text of its answer, and its timings.

    The client is Python's own, with a body made before: a client library's time is not the server's.
    """
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": 4}
    content = json.dumps(body).encode()
    start, first, timings = time.perf_counter(), None, None
    connection.request("POST", CHAT, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        if first is None and b'"delta":{"content":' in line:
            first = 1000 * (time.perf_counter() - start)
        if b'"timings":' in line:
            timings = json.loads(line.removeprefix(b"data: "))["timings"]
    assert first is not None and timings is not None
    return first, timings


def in_process(vlm: Any, image: bytes, text: str) -> tuple[float, dict[str, float]]:
    """Returns the milliseconds from the call to the first text of an answer, and its timings."""
    start, first = time.perf_counter(), None
    stream = vlm.stream(image, text, max_tokens=4)
    for _ in stream:
        first = first or 1000 * (time.perf_counter() - start)
    assert first is not None
    return first, stream.generation.timings.as_dict()


if __name__ == "__main__":
    main()
