"""The encoder in a process of its own: its features, its crashes as errors, and that nothing of it stays behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.errors import CrashError, MachineError, PackageError, UsageError
from fastvlm.runtime import encoder_process
from fastvlm.runtime.encoder_process import EncoderProcess, Limits
from fastvlm.runtime.encoders import SeparateEncoder, Shapes

from .processes import BAD_CHILD, is_running, until

pytestmark = pytest.mark.slow

SHAPES = Shapes(128, 3, hidden_size=6)
PIXELS = np.random.default_rng(0).random((1, 3, 128, 128), dtype=np.float32)
LIMITS = Limits(load=60, predict=60)
SHORT = Limits(load=3.0, predict=3.0)

CRASHES = ("segv", "abort", "kill", "exit", "hang", "rubbish", "nonsense", "long", "close")
REPORTS = {
    "segv": "was ended by SIGSEGV",
    "abort": 'was ended by SIGABRT .*its last output: "MPSGraph: error: MLIR pass manager failed"',
    "kill": "was ended by SIGKILL .* memory runs out",
    "exit": "exited with code 7",
    "hang": "did not answer within 3 s",
    "rubbish": "sent data other than messages .*E5RT",
    "nonsense": "sent data other than messages",
    "long": "sent data other than messages .*got a message of",
    "close": "sent data other than messages .*closed its pipe",
}


def means(pixel_values: np.ndarray) -> np.ndarray:
    side = pixel_values.shape[2] // 64
    return pixel_values.reshape(3, side, 64, side, 64).mean((2, 4)).reshape(3, -1).T[None]


Make = Callable[..., EncoderProcess]


@pytest.fixture
def make() -> Iterator[Make]:
    """A function that makes an encoder whose process fails once, such as `make("segv", when="load")`."""
    made: list[EncoderProcess] = []

    def make(fault: str = "none", when: object = "never", once: object = "-", **options: object) -> EncoderProcess:
        program = (str(BAD_CHILD), fault, str(when), str(once))
        limits = SHORT if fault in ("hang", "close") else LIMITS
        made.append(EncoderProcess(Path("model/x.mlpackage"), SHAPES, program=program, **{"limits": limits, **options}))
        return made[-1]

    yield make
    for encoder in made:
        encoder.close()


def test_features_are_those_of_the_child(make: Make) -> None:
    encoder = make()
    for pixel_values in (PIXELS, 1 - PIXELS):
        np.testing.assert_array_equal(encoder.encode(pixel_values), means(pixel_values))
    assert encoder.predict_ms > 0
    assert (encoder.name, encoder.image_size, encoder.projected, encoder.compile_ms) == ("coreml", 128, False, 0.0)
    assert encoder.times.open_ms == 1.0
    assert encoder.notes == ("slow here",)


def test_images_are_submitted_before_earlier_ones_are_read(make: Make) -> None:
    encoder = make("slow", 0.02)
    images = [np.full_like(PIXELS, n / 8) for n in range(8)]
    pending = [encoder.submit(image) for image in images]  # more than there is room for
    for image, one in zip(images, pending, strict=True):
        np.testing.assert_array_equal(one.result(), means(image))
        assert one.done


def test_threads_share_a_process(make: Make) -> None:
    encoder, wrong = make(), []

    def ask(seed: int) -> None:
        pixel_values = np.random.default_rng(seed).random((1, 3, 128, 128), dtype=np.float32)
        for _ in range(10):
            if not np.array_equal(encoder.encode(pixel_values), means(pixel_values)):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_printed_text_does_not_reach_the_replies(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    for when in ("load", 1):
        np.testing.assert_array_equal(make("print", when).encode(PIXELS), means(PIXELS))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("when", ["load", 1, 10])
@pytest.mark.parametrize("fault", CRASHES)
def test_crash_is_one_line_and_the_next_answer_right(fault: str, when: object, make: Make, tmp_path: Path) -> None:
    encoder = make(fault, when, tmp_path / "once", compute_units="CPU_AND_GPU")
    before = 0 if when == "load" else int(str(when)) - 1
    for _ in range(before):
        encoder.encode(PIXELS)
    pid = encoder.pid
    with pytest.raises(CrashError, match=REPORTS[fault]) as caught:
        encoder.encode(PIXELS)
    message = str(caught.value)
    assert "\n" not in message
    at = "loaded the package" if when == "load" else "encoded an image"
    for words in (at, "CPU_AND_GPU", "compute_units='CPU_ONLY'", "fastvlm verify model --on-device"):
        assert words in message
    assert caught.value.arguments == ("compute_units",)
    numbers = {"segv": signal.SIGSEGV, "abort": signal.SIGABRT, "kill": signal.SIGKILL}
    assert caught.value.signal_number == numbers.get(fault)
    assert caught.value.exit_code == (7 if fault == "exit" else None)
    assert pid is not None
    assert not is_running(pid)
    np.testing.assert_array_equal(encoder.encode(1 - PIXELS), means(1 - PIXELS))


def test_image_that_waits_behind_a_crash_is_encoded(make: Make, tmp_path: Path) -> None:
    encoder = make("segv", 1, tmp_path / "once")
    first, second, third = encoder.submit(PIXELS), encoder.submit(1 - PIXELS), encoder.submit(PIXELS / 2)
    np.testing.assert_array_equal(third.result(), means(PIXELS / 2))
    np.testing.assert_array_equal(second.result(), means(1 - PIXELS))
    with pytest.raises(CrashError, match="SIGSEGV"):
        first.result()


def test_process_that_ends_while_idle_is_started_again(make: Make) -> None:
    encoder = make()
    for _ in range(4):
        encoder.encode(PIXELS)
        assert encoder.pid is not None
        os.kill(encoder.pid, signal.SIGKILL)
        assert until(lambda: encoder.pid is None)
    np.testing.assert_array_equal(encoder.encode(PIXELS), means(PIXELS))


def test_crash_loop_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make("exit", 1)
    with pytest.raises(CrashError):
        encoder.encode(PIXELS)
    with pytest.raises(MachineError, match="exited with code 7 .*in a row: 2"):
        encoder.encode(PIXELS)
    start = time.monotonic()
    for _ in range(100):
        with pytest.raises(MachineError, match="in a row: 2"):
            encoder.encode(PIXELS)
    assert time.monotonic() - start < 0.5  # without a process for each
    monkeypatch.setattr(encoder_process, "RETRY_SECONDS", 0.0)
    with pytest.raises(MachineError, match="in a row: 3"):
        encoder.encode(PIXELS)


def test_crash_while_loading_is_reported_before_another_child(make: Make) -> None:
    encoder = make("exit", when="load")
    assert until(lambda: encoder.pid is None)
    assert isinstance(encoder, SeparateEncoder)  # Python 3.11 reads the properties of a protocol
    with pytest.raises(CrashError, match=r"exited with code 7 while it loaded .*[^)]$"):
        encoder.wait_ready()


def test_advice_fits_the_backend_and_the_units(make: Make) -> None:
    with pytest.raises(CrashError, match="backend='reference'") as caught:
        make("exit", "load", compute_units="CPU_ONLY").wait_ready()
    assert caught.value.arguments == ("backend",)
    with pytest.raises(CrashError, match="Leave out encoder_process=True") as caught:
        make("exit", "load", backend="reference").wait_ready()
    assert caught.value.arguments == ("encoder_process",)


def test_pixels_of_another_shape_are_refused(make: Make) -> None:
    with pytest.raises(PackageError, match="float32 of shape"):
        make().submit(PIXELS[:, :2])


def test_closed_encoder_is_a_usage_error(make: Make) -> None:
    encoder = make("slow", 5)
    pending, pid = encoder.submit(PIXELS), encoder.pid
    start = time.monotonic()
    encoder.close()
    encoder.close()
    assert time.monotonic() - start < 0.5
    assert pid is not None
    assert not is_running(pid)
    for ask in (pending.result, lambda: encoder.encode(PIXELS)):
        with pytest.raises(UsageError, match="closed"):
            ask()


def test_process_ends_with_the_last_reference() -> None:
    encoder = EncoderProcess(Path("x"), SHAPES, program=(str(BAD_CHILD), "none", "never", "-"))
    encoder.wait_ready()
    pid = encoder.pid
    assert pid is not None
    del encoder
    gc.collect()
    assert not is_running(pid)


def test_slow_load_is_reported_with_its_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, float]] = []
    monkeypatch.setattr(encoder_process, "QUIET_SECONDS", 0.3)
    encoder = make("hang", "load", compute_units="CPU_AND_NE", on_wait=lambda *args: heard.append(args))
    with pytest.raises(CrashError, match="did not answer"):
        encoder.wait_ready()
    text, seconds = heard[0]
    assert text == "Compiling for the Neural Engine (first use, up to two minutes)"
    assert 0.3 < seconds < 2
    assert [more for _, more in heard] == sorted(more for _, more in heard)


def test_open_files_and_processes_do_not_grow(make: Make, tmp_path: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    make().encode(PIXELS)
    before = count()
    for turn in range(5):
        encoder = make("segv", 1, tmp_path / f"once{turn}")
        with pytest.raises(CrashError):
            encoder.encode(PIXELS)
        encoder.encode(PIXELS)
        encoder.close()
    assert until(lambda: count() <= before)


def test_fork_leaves_the_child_to_its_parent(make: Make) -> None:
    encoder = make()
    encoder.wait_ready()
    fork = os.fork()
    if fork == 0:
        os._exit(0 if encoder.pid is None else 1)
    assert os.waitpid(fork, 0)[1] == 0
    np.testing.assert_array_equal(encoder.encode(PIXELS), means(PIXELS))
