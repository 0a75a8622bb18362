"""The BLAS of MLX: the choice, its use, and the fallback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm.models import blas
from fastvlm.models.blas import TF32_VARIABLE, disable_tf32

pytestmark = pytest.mark.slow

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX brings a fast BLAS elsewhere")
with_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

PROBE = """
import json, sys
from fastvlm.models._mlx import BLAS, mx
a = mx.random.normal((512, 512))
mx.eval(a @ a)
print(json.dumps({"name": BLAS.name, "path": BLAS.path, "reason": BLAS.reason, "torch": "torch" in sys.modules}))
"""


def probe(wish: str | None, code: str = PROBE, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != blas.ENVIRONMENT_VARIABLE} | variables
    if wish is not None:
        environment[blas.ENVIRONMENT_VARIABLE] = wish
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulates a process that has not imported MLX. No library is loaded into this process."""
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(blas.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(blas, "_load_globally", lambda path: None if "good" in path else "broken")
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


def decide() -> blas.Blas:
    return blas.preload_blas.__wrapped__()


def bindings(log: Path) -> dict[tuple[str, str], str]:
    """Returns the called library by (calling library, symbol), by file names, from the dynamic linker's log."""
    line = re.compile(r"binding file (\S+) \[\d+\] to (\S+) \[\d+\]: .*symbol `(\w+)'")
    found = {}
    for file in log.parent.glob(f"{log.name}.*"):  # one for each process
        for caller, called, symbol in line.findall(file.read_text()):
            found[Path(caller).name, symbol] = Path(called).name
        file.unlink()  # 20 MB
    return found


@linux_only
@with_torch
@pytest.mark.parametrize("wish", [None, "none"], ids=["torch", "default"])
def test_mlx_multiplies_by_torchs_blas_unless_disabled(tmp_path: Path, wish: str | None) -> None:
    log = tmp_path / "linker"
    found = probe(wish, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(log))
    bound = bindings(log)
    wheels = bound["libmlx.so", "cblas_sgemm"]
    assert bound[wheels, blas.REQUIRED_SYMBOL] == ("libtorch_cpu.so" if wish is None else wheels)
    assert found["name"] == ("torch" if wish is None else "default")
    assert not found["torch"], "torch itself must not be imported"


@linux_only
@with_torch
def test_torch_is_unchanged_when_its_library_was_loaded_first() -> None:
    code = """
import json
from fastvlm.models._mlx import BLAS, mx
import torch
torch.manual_seed(0)
a = torch.randn(64, 64, dtype=torch.float64)
c = torch.randn(32, 32, dtype=torch.complex64)
inverse = torch.linalg.inv(a) @ a - torch.eye(64, dtype=torch.float64)
dot = torch.dot(c.flatten(), c.flatten()) - (c.flatten() * c.flatten()).sum()
product = abs((a.float() @ a.float()).double() - a @ a).max() + abs(dot)
print(json.dumps({"inverse": abs(inverse).max().item(), "product": product.item()}))
"""
    found = probe(None, code)
    assert found["inverse"] < 1e-9
    assert found["product"] < 1e-3


@linux_only
@pytest.mark.parametrize("kind", ["missing", "text", "no_symbol", "folder"])
def test_next_library_is_taken_when_the_named_one_cannot_serve(tmp_path: Path, kind: str) -> None:
    text = tmp_path / "libtext.so"
    text.write_text("this is no library")
    path = {"missing": "/none/libfast.so", "text": str(text), "no_symbol": "libm.so.6", "folder": str(tmp_path)}[kind]
    found = probe(path, "import json; from fastvlm.models.blas import *; print(json.dumps(vars(preload_blas())))")
    assert found["name"] != "custom"
    assert f"not {path}: " in found["reason"]


def test_named_library_is_taken_first(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(blas.ENVIRONMENT_VARIABLE, "/opt/good.so")
    assert decide() == blas.Blas("custom", "/opt/good.so", "set in FASTVLM_BLAS")


def test_system_library_serves_only_when_torchs_does_not(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []
    fresh.setattr(blas, "_torch_library", lambda: tmp_path / "libtorch_cpu.so")
    fresh.setattr(blas, "_load_globally", lambda path: tried.append(path) or "broken")
    found = decide()
    assert [Path(path).name for path in tried] == ["libtorch_cpu.so", *blas.SYSTEM_LIBRARIES]
    assert found.name == "default"
    assert all(path in found.reason for path in tried)


def test_nothing_is_loaded_when_the_variable_is_none(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(blas.ENVIRONMENT_VARIABLE, "None")
    fresh.setattr(blas, "_load_globally", lambda path: pytest.fail(f"loaded {path}"))
    assert decide() == blas.Blas("default", None, "FASTVLM_BLAS=none")


def test_nothing_is_loaded_when_mlx_was_imported_before(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "mlx.core", object())
    fresh.setattr(blas, "_load_globally", lambda path: pytest.fail(f"loaded {path}"))
    assert "imported before" in decide().reason


def test_nothing_is_loaded_on_a_mac(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(sys, "platform", "darwin")
    fresh.setattr(blas, "_load_globally", lambda path: pytest.fail(f"loaded {path}"))
    assert "Accelerate" in decide().reason


def test_torch_is_skipped_when_its_module_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = type(sys)("torch")
    stand_in.__spec__ = None
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    assert blas._torch_library() is None


@pytest.mark.parametrize("spec", [None, importlib.util.spec_from_loader("torch", loader=None)], ids=["none", "empty"])
def test_torch_is_passed_over_when_it_is_not_installed(spec: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert blas._torch_library() is None


def test_second_call_gives_the_same_answer() -> None:
    assert blas.preload_blas() is blas.preload_blas()


THREADS = """
import json, time
from pathlib import Path
from fastvlm.models.blas import preload_blas, release_torch_threads
def threads():
    return len(list(Path("/proc/self/task").iterdir()))
preload_blas()
import torch
torch.set_num_threads(2)
a = torch.rand(512, 512)
counts = []
for _ in range(2):
    first = a @ a
    counts.append(threads())
    release_torch_threads()
    deadline = time.monotonic() + 60
    while threads() == counts[-1] and time.monotonic() < deadline:
        time.sleep(0.001)
    counts.append(threads())
print(json.dumps({"counts": counts, "same": bool(torch.equal(first, a @ a))}))
"""


@linux_only
@with_torch
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: torch keeps no threads")
def test_torchs_waiting_threads_end_and_come_back() -> None:
    run = probe(None, THREADS)
    used, released, used_again, released_again = run["counts"]
    assert used == used_again == released + 1 == released_again + 1
    assert run["same"]


def test_products_are_kept_in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TF32_VARIABLE)
    disable_tf32()
    assert os.environ[TF32_VARIABLE] == "0"


def test_a_users_choice_of_precision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TF32_VARIABLE, "1")
    disable_tf32()
    assert os.environ[TF32_VARIABLE] == "1"


@pytest.mark.parametrize(
    "words", [["verify", "nowhere", "--against", "nothing"], ["export", "nothing", "-o", "nowhere"]]
)
def test_command_asks_for_float32_before_mlx_is_imported(words: list[str]) -> None:
    code = f"""
import os, sys
from importlib.abc import MetaPathFinder
os.environ.pop({TF32_VARIABLE!r}, None)
class Seen(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "mlx" and os.environ.get({TF32_VARIABLE!r}) != "0":
            os._exit(7)
sys.meta_path.insert(0, Seen())
sys.argv = ["fastvlm", *{words!r}]
from fastvlm.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing" in done.stderr, done.stderr


def test_suite_runs_in_full_float32() -> None:
    assert os.environ[TF32_VARIABLE] == "0"
