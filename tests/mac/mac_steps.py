"""The steps of `mac_check.py`, each run as `python mac_steps.py STEP ARGUMENTS`. The last line on stdout is JSON.

A key `not_possible` says why a step had nothing to do on this machine, `failed` that the machine gave a wrong answer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "runtime" / "samples"
MAC = sys.platform == "darwin"
PACKAGES = ("fastvlm", "mlx", "mlx-metal", "mlx-lm", "coremltools", "numpy", "torch", "pillow", "tokenizers")
SYSTEM = {
    "model": ("sysctl", "-n", "hw.model"),
    "chip": ("sysctl", "-n", "machdep.cpu.brand_string"),
    "performance_cores": ("sysctl", "-n", "hw.perflevel0.physicalcpu"),
    "efficiency_cores": ("sysctl", "-n", "hw.perflevel1.physicalcpu"),
    "macos": ("sw_vers", "-productVersion"),
    "build": ("sw_vers", "-buildVersion"),
    "translated": ("sysctl", "-n", "sysctl.proc_translated"),
    "virtual": ("sysctl", "-n", "kern.hv_vmm_present"),
    "xcode": ("xcodebuild", "-version"),
    "power": ("pmset", "-g", "batt"),
}
"""Commands whose answers identify a kind of machine and none of its owner."""


def environment() -> dict[str, Any]:
    """Versions, hardware, Core ML's devices, and what `fastvlm doctor` finds."""
    from fastvlm.runtime.benchmark.machine import environment as measured
    from fastvlm.runtime.doctor import examine

    return {
        "machine": measured(),
        "system": {name: answer for name, command in SYSTEM.items() if (answer := output(*command))},
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "commit": output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "core_ml_devices": core_ml_devices(),
        "metal": metal(),
        "doctor": [finding.as_dict() for finding in examine()],
    }


def core_ml_devices() -> list[str] | str:
    """Names of the classes of Core ML's devices; in words why there are none."""
    if not MAC:
        return "not a Mac"
    try:
        from coremltools.models.compute_device import MLComputeDevice

        return [type(device).__name__ for device in MLComputeDevice.get_all_compute_devices()]
    except Exception as reason:  # older systems cannot say
        return one_line(reason)


def metal() -> dict[str, Any]:
    from fastvlm.models._mlx import mx

    return {
        "default_device": str(mx.default_device()),
        "device": dict(mx.device_info()) if hasattr(mx, "device_info") else {},
    }


def export(model: str, folder: str) -> dict[str, Any]:
    """A folder in int8 with an 8-bit decoder, verified."""
    import fastvlm

    begin = time.perf_counter()
    found = fastvlm.export(model, folder, quant="int8", decoder_bits=8, allow_shortfall=True)
    result = found.as_dict()
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "total_bytes": result["total_bytes"],
        "parity": {name: result["parity"][name]["snr_db"] for name in ("image_features", "logits")},
        "notes": result["notes"],
    }


def units(folder: str, *options: str) -> dict[str, Any]:
    """`fastvlm verify FOLDER --on-device --json`, as a user runs it."""
    done = fastvlm("verify", folder, "--on-device", "--json")
    found = json_in(done)
    return {**found["on_device"], **({} if found["passed"] else {"failed": "; ".join(found["failures"])})}


def bare(folder: str, *options: str) -> dict[str, Any]:
    """What happens without this project's care: an input array that nobody keeps, and a few seconds of allocations.

    On an affected version this process crashes, which says that the machine is one on which the care is needed.
    """
    if not MAC:
        return {"not_possible": "coremltools predicts on a Mac only"}
    child = [sys.executable, "-c", BARE, folder, options[-1] if options else "3"]
    done = subprocess.run(child, capture_output=True, text=True)
    return {"crashed": done.returncode < 0, "exit_code": done.returncode, "said": done.stderr[-500:]}


BARE = """
import gc, sys, time
from pathlib import Path
import numpy as np
import coremltools as ct
package = next(Path(sys.argv[1]).glob("*.mlpackage"))
model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_ONLY)
shape = tuple(model.get_spec().description.input[0].type.multiArrayType.shape)
for number in range(3):
    model.predict({"images": np.random.default_rng(number).random(shape, np.float32)})
    end, held = time.monotonic() + float(sys.argv[2]), []
    while time.monotonic() < end:
        held = [bytearray(size) for size in (1, 7, 40, 300, 2000)] + held[:500]
        gc.collect(0)
"""


def damaged(folder: str) -> dict[str, Any]:
    """An answer where the compiled copy in the cache (off a Mac: the package) is cut short."""
    question = ("generate", folder, "-i", str(SAMPLES / "shapes.png"), "-p", "Describe the image.")
    if MAC:
        first = fastvlm(*question)
        copies = [path for path in Path(os.environ["FASTVLM_CACHE"]).rglob("*.mlmodelc") if path.is_dir()]
        if not copies:
            return {"failed": f"there is no compiled copy to damage: {last_line(first.stderr)}"}
        cut = [path for copy in copies for path in copy.rglob("*") if path.is_file()]
    else:
        copy = Path("damaged")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        question = (question[0], str(copy), *question[2:])
        cut = [path for path in (copy / "fastvithd.mlpackage").rglob("*.mlmodel") if path.is_file()]
    for path in cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = fastvlm(*question)
    said = done.stderr.strip().splitlines()
    readable = (
        done.returncode in (0, 1)
        and "Traceback" not in done.stderr
        and not any(line.rstrip().endswith("{") for line in said)
    )
    found = {"damaged_files": len(cut), "exit_code": done.returncode, "answer": done.stdout.strip(), "said": said[-5:]}
    return found if readable else {**found, "failed": "the error is not a readable line"}


def placement(folder: str) -> dict[str, Any]:
    """Where Core ML would run each operation; off a Mac what there is to place."""
    done = fastvlm("inspect", folder, "--json", *(["--placement"] if MAC else []))
    found = json_in(done)
    if not MAC:
        return {"operations": found["operations"], "not_possible": "only Core ML knows where it places an operation"}
    placed = found["placement"]
    away = [place for place in placed["operations"] if place["device"] != "neural engine"]
    costly = sorted(away, key=lambda place: -place["cost"])[:12]
    return {
        "engine_share": placed["engine_share"],
        "cost_by_device": placed["cost_by_device"],
        "operations": len(placed["operations"]),
        "costliest_elsewhere": costly,
    }


def load_times(folder: str) -> dict[str, Any]:
    """Three runs of the whole command in a row: the second and third must not compile again."""
    runs = []
    for _ in range(3):
        begin = time.perf_counter()
        done = fastvlm("generate", folder, "-i", str(SAMPLES / "shapes.png"), "-p", "Hi", "--max-tokens", "4", "--json")
        seconds = time.perf_counter() - begin
        timings = json_in(done)["timings"]
        kept = {name: timings[name] for name in ("load_ms", "compile_ms", "encode_ms", "ttft_ms") if name in timings}
        runs.append({"command_s": round(seconds, 2), **kept})
    again = [run["compile_ms"] for run in runs[1:] if run.get("compile_ms")]
    return {"runs": runs, **({"failed": "the package was compiled again"} if again else {})}


def bench(folder: str, *options: str) -> dict[str, Any]:
    """`fastvlm.benchmark` of the folder."""
    import fastvlm
    from fastvlm.runtime.benchmark.markdown import report
    from fastvlm.runtime.benchmark.workload import Workload

    quick = "--quick" in options
    workload = Workload(runs=1, warmup=0, max_tokens=8) if quick else Workload(runs=5, warmup=2, max_tokens=64)
    found = fastvlm.benchmark(folder, workload, processes=1 if quick else 2)
    return {"report": found.as_dict(), "markdown": "\n".join(report(found))}


def decode(folder: str, *options: str) -> dict[str, Any]:
    """`decode_speed.py`, with few tokens in a quick check."""
    if version("mlx-lm") is None:
        return {"not_possible": "mlx-lm is not installed"}
    few = ["--prompt-tokens", "32", "--tokens", "8", "--turns", "1"] if "--quick" in options else []
    script = Path(__file__).with_name("decode_speed.py")
    done = subprocess.run([sys.executable, "-P", str(script), folder, *few], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:] or f"exit code {done.returncode}")
    return dict(json.loads(done.stdout))


def venv(python: str, folder: str) -> dict[str, Any]:
    """A virtual environment of another Python with this project in it."""
    for command in (
        [python, "-m", "venv", folder],
        [f"{folder}/bin/python", "-m", "pip", "install", "-qq", "-e", str(ROOT)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"failed": last_line(done.stderr) or f"exit code {done.returncode}"}
    return {"python": output(f"{folder}/bin/python", "--version")}


def app(folder: str) -> dict[str, Any]:
    """Not run: what to do by hand."""
    if not MAC:
        return {"not_possible": "Xcode runs on a Mac only"}
    if not output("xcodebuild", "-version"):
        return {"not_possible": "Xcode is not installed"}
    return {"not_possible": "by hand: see the end of this report"}


STEPS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "environment": environment,
    "export": export,
    "units": units,
    "bare": bare,
    "damaged": damaged,
    "placement": placement,
    "load-times": load_times,
    "bench": bench,
    "decode": decode,
    "venv": venv,
    "app": app,
}
"""By the step's name; `export-tiny` and `bare-3.12` are `export` and `bare`."""


def fastvlm(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of this project in a new process."""
    return subprocess.run([sys.executable, "-P", "-m", "fastvlm", *words], capture_output=True, text=True)


def json_in(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The output of a command, from JSON. Raises SystemExit with its last line when that is not JSON."""
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        raise SystemExit(last_line(done.stderr) or f"exit code {done.returncode}") from None


def output(*command: str) -> str:
    """The output of a system's command; empty when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(re.sub(r"\(id=\d+\)", "", done.stdout).split())


def version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def one_line(reason: BaseException) -> str:
    return " ".join(str(reason).split())[:300] or type(reason).__name__


def main() -> None:
    name, *arguments = sys.argv[1:]
    step = STEPS.get(name) or STEPS[name.rpartition("-")[0]]
    print(json.dumps(step(*arguments), ensure_ascii=False))


if __name__ == "__main__":
    main()
