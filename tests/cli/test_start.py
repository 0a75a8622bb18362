"""The command's first moments."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

BEGIN = (
    "import sys, os, signal\n"
    "sys.argv = ['fastvlm', '--version']\n"
    "class Kill:\n"
    "    def find_spec(self, name, *rest):\n"
    "        if name == 'typer':\n"
    "            os.kill(os.getpid(), signal.{name})\n"
    "sys.meta_path.insert(0, Kill())\n"
    "from fastvlm.cli.start import main\n"
    "main()\n"
)
"""Sends the signal amid the imports."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_amid_the_imports_is_one_line(number: signal.Signals) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN.format(name=number.name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "error: interrupted\n")


def test_command_begins_there() -> None:
    code = "import sys; sys.argv = ['fastvlm', '--version']\nfrom fastvlm.cli.start import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fastvlm ")


AMID = (
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
"""A Ctrl-C at a moment of a command's."""


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
        ("raise AttributeError('a fault of ours')", 1, "AttributeError: a fault of ours\n"),
    ],
    ids=["in a finalizer", "as another exception", "at the end", "amid an extension's import", "not at all"],
)
def test_ctrl_c_is_neither_lost_nor_a_traceback(body: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", AMID.format(body=body)], capture_output=True, text=True, timeout=60)
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
"""A thread that outlives the command and that Python waits for, and a signal meanwhile."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_thread_that_is_waited_for_does_not_hold_up_ctrl_c(number: signal.Signals) -> None:
    code = AMID.format(body=BUSY.format(name=number.name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + number, "error: interrupted\n")
    assert done.stdout.startswith("what is known\n")
