"""A Mac check as Markdown: what to look at first, then each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

MARKS = {"ok": "✓", "failed": "✗", "timeout": "✗", "not possible": "-", "left out": "-"}

BY_HAND = """## By hand: Apple's app

1. `git clone https://github.com/apple/ml-fastvlm`, then bundle a FastViTHD model (`random:0.5b` will do) into the
   checkout: CLIENTS.md has a page, "Apple's app". Keep the package versions that `fastvlm bundle` prints.
2. `open ml-fastvlm/app/FastVLM.xcodeproj`.
3. In the project's Package Dependencies, double-click each package, choose "Exact Version", and set the printed
   version. Then File > Packages > Resolve Package Versions.
4. Target "FastVLM App" > Signing & Capabilities: choose your team. Product > Run, on this Mac and on a phone.
5. Write below: Xcode's version, whether it built (the first error if not), whether an answer came, whether it crashed.

Result: (please fill in)
"""


def markdown(check: Mapping[str, Any]) -> str:
    """The report of `mac_check.py`'s JSON."""
    lines = ["# Mac check", "", *about(check), "", *overview(check["steps"]), ""]
    for step in check["steps"]:
        lines += details(step)
    return "\n".join([*lines, BY_HAND])


def about(check: Mapping[str, Any]) -> Iterator[str]:
    first: Mapping[str, Any] = next((s["result"] for s in check["steps"] if s["name"] == "environment"), {})
    system, machine = first.get("system", {}), first.get("machine", {})
    names = ("chip", "model", "macos", "build", "xcode")
    words = [f"{name} {system[name]}" for name in names if name in system] or [first.get("platform", "unknown machine")]
    if machine.get("memory_bytes"):
        words.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
    yield f"- machine: {cell(', '.join(words))}"
    yield f"- packages: {cell(', '.join(f'{name} {found}' for name, found in first.get('packages', {}).items()))}"
    yield f"- Python {first.get('python')}, commit {first.get('commit') or 'unknown'}, {check['created']}"
    yield f"- options: {cell(str(check['options']))}; {check['seconds']:.0f} s in all"
    if not system.get("macos"):
        yield "- **this is not a Mac**: stand-ins ran, and nothing below says anything about Core ML or Metal"
    if system.get("virtual") == "1":
        yield "- **a virtual machine**: it has no usable Neural Engine"
    if check["interrupted"]:
        yield "- **interrupted**: the later steps are missing"


def overview(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (f"{MARKS[step['status']]} {step['status']}", step["title"], f"{step['seconds']:.0f} s", step["reason"])
        for step in steps
    ]
    return table(("", "step", "time", "why"), rows)


def details(step: Mapping[str, Any]) -> Iterator[str]:
    """The findings of a step; nothing for one that found nothing."""
    kind = step["name"] if step["name"] in SHOWN else step["name"].rpartition("-")[0]
    shown = list(SHOWN[kind](step["result"])) if kind in SHOWN and step["result"] else []
    failed = step["status"] in ("failed", "timeout")
    if not shown and not failed:
        return
    yield from (f"## {cell(step['title'])}", "")
    if failed:
        yield from (f"**{step['status']}** {cell(step['reason'])} (exit code {step['exit_code']})", "")
        if step["stderr"].strip():
            yield from ("```", *step["stderr"].strip().replace("```", "'''").splitlines()[-15:], "```", "")
    yield from (*shown, "")


def environment(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Core ML's devices: {cell(str(found.get('core_ml_devices')))}"
    yield f"- MLX: {cell(str(found.get('metal')))}"
    for finding in found.get("doctor", []):
        if finding["state"] != "ok":
            yield f"- doctor, {finding['subject']}: {cell(finding['detail'])}. {cell(finding['advice'])}"


def export(found: Mapping[str, Any]) -> Iterator[str]:
    parity = found.get("parity", {})
    yield (
        f"{found.get('seconds')} s, {found.get('total_bytes', 0) / 1e6:.1f} MB; image_features "
        f"{parity.get('image_features')} dB, logits {parity.get('logits')} dB"
    )


def units(found: Mapping[str, Any]) -> Iterator[str]:
    header = ("runs on", "verdict", "SNR, dB", "cosine", "load, ms", "first, ms", "warm, ms", "on the engine")
    rows = []
    for run in found.get("runs", []):
        share = run["engine_share"]
        name = f"{run['label']}{' (default)' if run['default'] else ''}"
        times = [number(run[key]) for key in ("load_ms", "first_ms", "warm_ms")]
        rows.append((name, run["verdict"], number(run["snr_db"]), number(run["cosine"], 6), *times,
                     "-" if share is None else f"{share:.1%}"))  # fmt: skip
    yield from table(header, rows)
    yield ""
    for run in found.get("runs", []):
        if run["error"]:
            yield f"- {run['label']}: {cell(run['error'])}"
    for text in (*found.get("notes", []), *found.get("missing", [])):
        yield f"- {cell(text)}"


def bare(found: Mapping[str, Any]) -> Iterator[str]:
    if "crashed" in found:
        told = "crashed: this machine needs what fastvlm does about it" if found["crashed"] else "did not crash"
        yield f"coremltools alone {told} (exit code {found['exit_code']})"
        if found["said"].strip() and found["exit_code"]:
            yield from ("", "```", *found["said"].strip().splitlines()[-5:], "```")


def after_answer(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Python {found.get('python')}, {found.get('vision')}: {found.get('answers')} answers, "
        f"{found.get('seconds_after_each')} s and {found.get('allocations', 0):,} allocations in all, no crash; "
        f"encoder in {'a process of its own' if found.get('own_process') else 'the same process'}"
    )


def damaged(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found.get('damaged_files')} files cut in half: exit code {found.get('exit_code')}; stderr:"
    yield from ("", "```", *(found.get("said") or ["nothing"]), "```")


def placement(found: Mapping[str, Any]) -> Iterator[str]:
    if "cost_by_device" not in found:
        return
    shares = ", ".join(f"{device} {share:.1%}" for device, share in found["cost_by_device"].items())
    yield from (f"{shares} of the estimated cost, {found['operations']} operations", "")
    rows = [(p["name"], p["kind"], p["device"], f"{p['cost']:.2%}") for p in found["costliest_elsewhere"]]
    yield from table(("not on the engine", "kind", "device", "cost"), rows)


def load_times(found: Mapping[str, Any]) -> Iterator[str]:
    names = ("command_s", "load_ms", "compile_ms", "encode_ms", "ttft_ms")
    rows = [(str(k), *(number(run.get(name)) for name in names)) for k, run in enumerate(found["runs"], start=1)]
    yield from table(("run", *names), rows)


def bench(found: Mapping[str, Any]) -> Iterator[str]:
    yield from found.get("markdown", "").splitlines()


def decode(found: Mapping[str, Any]) -> Iterator[str]:
    if "decode_ratio" not in found:
        return
    rows = [
        (side, found[side]["dtype"], number(found[side]["prefill_ms"]), number(found[side]["decode_tps"]))
        for side in ("ours", "mlx_lm")
    ]
    yield from table(("side", "dtype", "prefill, ms", "tokens/s"), rows)
    yield ""
    yield (
        f"decoding at {found['decode_ratio']:.2f} x mlx-lm's rate, prefill in {found['prefill_ratio']:.2f} x its time; "
        f"the first {found['same_ids']} of {found['tokens']} ids are the same"
    )


SHOWN: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "environment": environment,
    "export": export,
    "units": units,
    "bare": bare,
    "after-answer": after_answer,
    "damaged": damaged,
    "placement": placement,
    "load-times": load_times,
    "bench": bench,
    "decode": decode,
}
"""By the step's name without what it was asked about."""


def number(value: object, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(cell, row))} |" for row in (header, ["---"] * len(header), *rows)]


def cell(text: str) -> str:
    """Text of any origin on one line, with nothing that ends a table's cell."""
    return " ".join(str(text).split()).replace("|", "/").replace("<", "&lt;").replace(">", "&gt;")
