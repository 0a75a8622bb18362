"""The cost of the server: time to first token over HTTP, compared with `generate` in this process, and the start-up.

    python tests/bench/bench_server.py FOLDER [--runs N] [--side PIXELS]

The two sides alternate within one run, on images that neither has seen, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))
from fuzz_server import served

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
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        with served(folder, "--quiet", log=Path(place) / "log") as (url, _), httpx.Client(base_url=url) as client:
            over_http(client, picture(0, arguments.side), FIRST)
            start_up_s = time.perf_counter() - start
            for n in range(arguments.runs + 1):
                image = picture(n + 1, arguments.side)
                sides = [("server", lambda text, image=image: over_http(client, image, text)),
                         ("process", lambda text, image=image: in_process(vlm, image, text))]  # fmt: skip
                for name, ask in sides if n % 2 else sides[::-1]:
                    time.sleep(PAUSE_S)
                    first, second = ask(FIRST), ask(SECOND)
                    if n:
                        times[name].append(first)
                        times[f"{name}_again"].append(second)
    medians = {name: statistics.median(values) for name, values in times.items()}
    differences = [a - b for a, b in zip(times["server"], times["process"], strict=True)]
    figures = {
        "runs": arguments.runs,
        "start_to_first_token_s": round(start_up_s, 2),
        "ttft_ms": {name: round(value, 2) for name, value in medians.items()},
        "server_adds_ms": round(statistics.median(differences), 2),
        "second_question_share": round(medians["server_again"] / medians["server"], 3),
    }
    print(json.dumps(figures, indent=2))


def picture(seed: int, side: int) -> bytes:
    """A PNG of large coloured squares."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def over_http(client: httpx.Client, image: bytes, text: str) -> float:
    """Returns the milliseconds from sending a request to the first text of its answer."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": 4}
    start, first = time.perf_counter(), None
    with client.stream("POST", CHAT, json=body, timeout=600) as response:
        for line in response.iter_lines():
            if first is None and '"delta":{"content":' in line:
                first = 1000 * (time.perf_counter() - start)
    assert first is not None
    return first


def in_process(vlm: Any, image: bytes, text: str) -> float:
    """Returns the milliseconds from the call to the first text of an answer."""
    start, first = time.perf_counter(), None
    for _ in vlm.stream(image, text, max_tokens=4):
        first = first or 1000 * (time.perf_counter() - start)
    assert first is not None
    return first


if __name__ == "__main__":
    main()
