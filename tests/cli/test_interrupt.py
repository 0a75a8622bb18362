"""Ctrl-C at the moments where Python or C++ could lose it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = (
    "import atexit, os, signal, sys\n"
    "import fastvlm.runtime.doctor as doctor\n"
    "from fastvlm.cli.main import main\n"
    "press = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    "class Finalized:\n"
    "    def __del__(self):\n"
    "        press()\n"
    "def examine():\n"
    "    {body}\n"
    "doctor.examine = examine\n"
    "sys.argv = ['fastvlm', 'doctor', '--json']\n"
    "main()\n"
)
"""A Ctrl-C at one moment of a command."""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("import time; Finalized(); time.sleep(120); return []", 130, "error: interrupted\n"),
        ("try: press()\n    except BaseException: raise AttributeError from None", 130, "error: interrupted\n"),
        ("atexit.register(press); return []", 0, ""),
        (
            "import _imp, importlib.machinery, time\n"
            "    _imp.exec_dynamic = lambda module: (press(), os.write(2, b'made\\n'))\n"
            "    importlib.machinery.ExtensionFileLoader('x', '/x').exec_module(None); time.sleep(120)",
            130,
            "made\nerror: interrupted\n",
        ),
        ("raise AttributeError('a bug')", 1, "AttributeError: a bug\n"),
    ],
    ids=["in a finalizer", "as another exception", "at the end", "during an extension's import", "not at all"],
)
def test_ctrl_c_is_neither_lost_nor_a_traceback(body: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr == said if code != 1 else done.stderr.endswith(said)


BUSY = (
    "import threading, time, fastvlm.cli.interrupt as begun\n"
    "    def busy():\n"
    "        while signal.getsignal(signal.{name}) is begun.interrupt: time.sleep(0.001)\n"
    "        os.kill(os.getpid(), signal.{name}); time.sleep(20)\n"
    "    threading.Thread(target=busy).start()\n"
    "    sys.stdout.write('what is known\\n'); return []"
)
"""A thread that outlives the command, which Python waits for, and a signal meanwhile."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_running_thread_does_not_delay_ctrl_c(number: signal.Signals) -> None:
    code = SCRIPT.format(body=BUSY.format(name=number.name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + number, "error: interrupted\n")
    assert done.stdout.startswith("what is known\n")
