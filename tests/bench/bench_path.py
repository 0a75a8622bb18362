"""`make bench`: the whole path at full size, compared with doing the same without this toolkit.

Every figure that matters is a ratio of two times within this run, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoders import DECODED_TOKENS, PROMPT_TOKENS, in_turns

SAMPLE = Path(__file__).resolve().parents[2] / "runtime" / "samples" / "shapes.png"
PRODUCTS = 20
"""The matrix products of 2048 x 2048 that are timed together, alternating with the encoders."""
# The un-rewritten encoder, converted as the upstream exporter does: float32, no folding, no compression.
PLAIN_CONVERSION = """
import sys
from pathlib import Path
import numpy as np
from fastvlm.export.write_encoder import quiet_coremltools
from fastvlm.models.fastvit import FastViT
from fastvlm.models.references import open_checkpoint
import torch
checkpoint = open_checkpoint(sys.argv[1])
size = checkpoint.config.image_size
encoder = FastViT.from_checkpoint(checkpoint)
with quiet_coremltools(Path(sys.argv[2])) as ct, torch.inference_mode():
    traced = torch.jit.trace(encoder, torch.zeros(1, 3, size, size), check_trace=False)
    ct.convert(
        traced,
        inputs=[ct.TensorType("images", shape=(1, 3, size, size), dtype=np.float32)],
        outputs=[ct.TensorType("image_features", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(sys.argv[2] + "/plain.mlpackage")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:0.5b")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the JSON")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mixed", action="store_true", help="also search `mixed` at the SNR that int8 reaches")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(arguments.model, Path(scratch), arguments.runs, mixed=arguments.mixed)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "path.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


def measure(model: str, scratch: Path, runs: int, *, mixed: bool = False) -> dict[str, Any]:
    folder = scratch / "model"
    command = [sys.executable, "-m", "fastvlm.cli.main"]
    log("export")
    export = run_measured([*command, "export", model, "--quant", "int8", "-o", str(folder), "--json"])
    log("convert the un-rewritten encoder")
    plain = run_measured([sys.executable, "-c", PLAIN_CONVERSION, model, str(scratch)])
    log("generate, in a new process")
    words = [
        *command,
        "generate",
        str(folder),
        "-i",
        str(SAMPLE),
        "-p",
        "Describe the image.",
        "--ignore-eos",
        "--json",
    ]
    generate = run_measured([*words, "--max-tokens", "16"])
    export["result"] = json.loads(export.pop("stdout"))
    return {
        "machine": machine(),
        "model": model,
        "export": export,
        "mixed": mixed_at(encoder_figures(export)[1], model, scratch) if mixed else None,
        "plain_conversion": {key: plain[key] for key in ("seconds", "peak_bytes")},
        "generate": {**generate, "result": json.loads(generate.pop("stdout"))},
        "tiny_seconds": cold_seconds(scratch, runs),
        "encode": encode_times(model, folder, runs),
        "decoder": decoder_times(folder, runs),
    }


def cold_seconds(scratch: Path, runs: int) -> float:
    """Returns the median wall time of the whole `generate` command on `tiny`, each in a new process."""
    folder = str(scratch / "tiny")
    command = [sys.executable, "-m", "fastvlm.cli.main"]
    run_measured([*command, "export", "tiny", "-o", folder])
    words = [*command, "generate", folder, "-i", str(SAMPLE), "-p", "Describe the image."]
    return statistics.median(run_measured(words)["seconds"] for _ in range(2 * runs))


def mixed_at(snr_db: float, model: str, scratch: Path) -> dict[str, Any]:
    """Exports `mixed` at an SNR of `image_features`."""
    log(f"export mixed at {snr_db:.1f} dB")
    words = ["export", model, "--quant", "mixed", "--min-snr", f"{snr_db:.2f}", "-o", str(scratch / "mixed"), "--json"]
    run = run_measured([sys.executable, "-m", "fastvlm.cli.main", *words])
    return {**run, "result": json.loads(run.pop("stdout"))}


def encoder_figures(export: dict[str, Any]) -> tuple[int, float]:
    """Returns the bytes of an export's package, and the SNR in dB of its executed output."""
    result = export["result"]
    size = sum(count for name, count in result["file_bytes"].items() if ".mlpackage/" in name)
    return size, result["parity"]["image_features"]["snr_db"]


def run_measured(command: list[str]) -> dict[str, Any]:
    """Runs a command; its wall time, its peak resident memory (of the largest child so far) and its stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        pid_peak = 0
        while process.poll() is None:
            pid_peak = max(pid_peak, resident_peak(process.pid))
            time.sleep(0.05)
        stdout, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command[:5]} failed:\n{stderr}")
    return {"seconds": time.perf_counter() - begin, "peak_bytes": pid_peak, "stdout": stdout}


def resident_peak(pid: int) -> int:
    """Returns the peak resident bytes of a running process, or 0 if the system does not report them."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if sys.platform == "darwin" else 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def encode_times(model: str, folder: Path, runs: int) -> dict[str, Any]:
    """Returns times of the saved int8 package in the executor, and of the original encoder in eager torch float32."""
    import torch

    from fastvlm.models.fastvit import FastViT
    from fastvlm.models.mlprogram.executor import Executor
    from fastvlm.models.references import open_checkpoint

    log("encode")
    encoder = FastViT.from_checkpoint(open_checkpoint(model))
    encoder_last = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    size = open_checkpoint(model).config.image_size
    images = torch.rand(1, 3, size, size)
    images_last = images.to(memory_format=torch.channels_last)
    executor = Executor(folder / "fastvithd.mlpackage")
    a, b = torch.rand(2, 2048, 2048).unbind()
    candidates: dict[str, Callable[[], Any]] = {
        "executor": lambda: executor.run({"images": images.numpy()}),
        "eager_nchw": lambda: encoder(images),
        "eager_channels_last": lambda: encoder_last(images_last),
        "sgemm": lambda: [a @ b for _ in range(PRODUCTS)],
    }
    with torch.inference_mode():
        seconds = interleaved(candidates, 2 * runs)
    return {"seconds": seconds, "sgemm_gflops": PRODUCTS * 2 * 2048**3 / seconds.pop("sgemm") / 1e9}


def decoder_times(folder: Path, runs: int) -> dict[str, dict[str, float]]:
    """Returns times of prefill and decode in MLX, and of an equal Qwen2 in transformers on torch if it is installed."""
    log("prefill and decode")
    return in_turns(folder, 2 * runs)


def interleaved(candidates: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Returns the median seconds of each candidate, after one warm-up. They alternate, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(runs + 1):
        for name, call in candidates.items():
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def machine() -> dict[str, Any]:
    import os

    from fastvlm.models.blas import preload_blas

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "blas": preload_blas().name,
    }


def table(figures: dict[str, Any]) -> str:
    """Returns the figures as a Markdown table."""
    export, plain, generate = figures["export"], figures["plain_conversion"], figures["generate"]
    encode, decoder = figures["encode"]["seconds"], figures["decoder"]
    timings = generate["result"]["timings"]
    eager = min(encode["eager_nchw"], encode["eager_channels_last"])
    bound = 487 / figures["encode"]["sgemm_gflops"]
    rows = [
        ("export, whole command", f"{export['seconds']:.1f} s, peak {export['peak_bytes'] / 1e9:.2f} GB", ""),
        (
            "plain float32 conversion",
            f"{plain['seconds']:.1f} s, peak {plain['peak_bytes'] / 1e9:.2f} GB",
            "un-rewritten",
        ),
        (
            "generate, new process: TTFT",
            f"{timings['ttft_ms'] / 1e3:.2f} s",
            f"encode {timings['encode_ms'] / 1e3:.2f} s",
        ),
        ("generate, whole command", f"{generate['seconds']:.1f} s, peak {generate['peak_bytes'] / 1e9:.2f} GB", ""),
        ("generate on tiny, whole command", f"{figures['tiny_seconds']:.1f} s", "new processes"),
        ("encode, executor", f"{encode['executor']:.2f} s", f"{encode['executor'] / eager:.2f} x eager torch float32"),
        ("encode, GEMM bound", f"{bound:.2f} s", f"executor takes {encode['executor'] / bound:.2f} x that"),
    ]
    if mixed := figures["mixed"]:
        (size, snr_db), (int8_size, int8_db) = encoder_figures(mixed), encoder_figures(export)
        baseline = f"int8 {int8_size / 1e6:.1f} MB, {int8_db:.1f} dB"
        rows.append(("package, mixed", f"{size / 1e6:.1f} MB, {snr_db:.1f} dB in {mixed['seconds']:.0f} s", baseline))
    for stage, what in (
        ("prefill", f"prefill of {PROMPT_TOKENS} tokens"),
        ("decode", f"decode of {DECODED_TOKENS} tokens"),
    ):
        seconds, theirs = decoder["ours"][stage], decoder.get("transformers")
        baseline = (
            f"{seconds / theirs[stage]:.2f} x transformers on torch" if theirs else "transformers is not installed"
        )
        rows.append((what, f"{seconds:.2f} s", baseline))
    title = f"{figures['model']}, int8 encoder, 8-bit decoder; {figures['machine']}"
    return f"{title}\n\n| what | figure | next to |\n|---|---|---|\n" + "\n".join(
        f"| {what} | {figure} | {baseline} |" for what, figure, baseline in rows
    )


def log(stage: str) -> None:
    print(f"  {stage} ...", file=sys.stderr)


if __name__ == "__main__":
    main()
