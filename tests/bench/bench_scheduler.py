"""Many clients at once compared with one after the other, and a second question about an image with the first.

    python tests/bench/bench_scheduler.py FOLDER [--clients 1 4 16] [--answers N] [--tokens N] [--runs N] [--images N]

Each client asks its questions one after the other, about its own image, and a third of them about no image. The same
questions are asked one by one in the same run, in turn with the clients, since machines are shared and noisy. Each side
starts without caches. Times to first token are those that a client sees. `one_by_one` is `generate` without a queue,
`queue` the same clients with a batch of one, who wait for their turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Found = dict[int, tuple[float, tuple[int, ...]]]
"""The time to first token in milliseconds, and the ids, of each question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--answers", type=int, default=2, help="questions of each client")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--images", type=int, default=9, help="images that are asked about twice")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--encoder-process", action="store_true")
    arguments = parser.parse_args()
    import fastvlm

    with fastvlm.load(arguments.folder, encoder_process=arguments.encoder_process) as vlm:
        figures = {
            "clients": {count: client_figures(vlm, count, arguments) for count in arguments.clients},
            "second_question": second_question(vlm, arguments.images),
        }
    print(json.dumps(figures, indent=2))


def client_figures(vlm: Any, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The rate of answers and the times to first token of `clients` at once, and of the same questions one by one."""
    sides = {"one_by_one": 0, "queue": 1, "scheduler": arguments.batch_size}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    ttft_ms: dict[str, list[float]] = {name: [] for name in sides}
    same_ids = True
    for turn in range(arguments.runs + 1):
        requests = list(requests_of(clients, arguments.answers, arguments.tokens, turn))
        found: dict[str, Found] = {}
        for name, size in sides.items():
            vlm.engine.clear_caches()
            start = time.perf_counter()
            found[name] = with_scheduler(vlm, requests, clients, size) if size else one_by_one(vlm, requests)
            seconds = time.perf_counter() - start
            if turn:  # the first run warms up
                rates[name].append(len(requests) / seconds)
                ttft_ms[name] += [ms for ms, _ in found[name].values()]
        same_ids &= all(len({side[n][1] for side in found.values()}) == 1 for n in range(len(requests)))
    return {
        "answers_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "rate": statistics.median(new / old for new, old in zip(rates["scheduler"], rates["one_by_one"], strict=True)),
        "ttft_ms": {
            name: {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 99)}
            for name, values in ttft_ms.items()
        },
        "same_ids": same_ids,
    }


def requests_of(clients: int, answers: int, tokens: int, turn: int) -> Iterator[Any]:
    from fastvlm.runtime.request import prepare

    for n in range(clients * answers):
        image = None if n % 3 == 2 else picture(1000 * turn + n % clients)
        yield prepare(image, f"What is it? ({n})", max_tokens=tokens, ignore_eos=True)


def one_by_one(vlm: Any, requests: list[Any]) -> Found:
    found = {}
    for n, request in enumerate(requests):
        start = time.perf_counter()
        stream = vlm.engine.stream(request)
        pieces = [(piece, time.perf_counter()) for piece in stream]
        found[n] = 1000 * (pieces[0][1] - start), stream.generation.token_ids
    return found


def with_scheduler(vlm: Any, requests: list[Any], clients: int, batch_size: int) -> Found:
    from fastvlm.runtime.scheduler import Scheduler

    found: Found = {}

    def client(number: int) -> None:
        for n in range(number, len(requests), clients):
            first: list[float] = []
            start = time.perf_counter()
            answer = scheduler.submit(requests[n], lambda event, first=first: first.append(time.perf_counter()))
            ids = answer.result().token_ids
            found[n] = 1000 * (first[0] - start), ids

    with Scheduler(vlm.engine, batch_size) as scheduler:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def second_question(vlm: Any, images: int) -> dict[str, Any]:
    """The time to first token of a question about a new image, and of another question about it from another client."""
    from fastvlm.runtime.request import prepare
    from fastvlm.runtime.scheduler import Scheduler

    first, second = [], []
    with Scheduler(vlm.engine) as scheduler:
        for n in range(images + 1):
            image = picture(10_000 + n)
            for question, into in (("Describe the image.", first), ("What colour is it?", second)):
                into.append(scheduler.submit(prepare(image, question, max_tokens=4)).result().timings)
    stages = ("ttft_ms", "encode_ms", "prefill_ms")
    medians = {
        name: {stage: statistics.median(getattr(one, stage) for one in timings[1:]) for stage in stages}
        for name, timings in (("first", first), ("second", second))
    }
    ratios = [new.ttft_ms / old.ttft_ms for old, new in zip(first[1:], second[1:], strict=True)]
    read = [timings[-1].prompt_tokens - timings[-1].reused_tokens for timings in (first, second)]
    return {**medians, "ttft_ratio": statistics.median(ratios), "tokens_read": read}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (200, 300, 3), dtype=np.uint8)


if __name__ == "__main__":
    main()
