"""An encoder's process in place of Core ML and the executor: correct, or wrong in one of Core ML's ways.

The environment variable DEVICE_CHILD maps compute units, or the executor's precision, to a behaviour.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fastvlm.runtime.encoder_child import main
from fastvlm.runtime.encoders import Shapes, checked_features

NS_ERROR = """{
    NSLocalizedDescription = "Failed to build the model execution plan with error code: -14.";
}"""


class Encoder:
    """Patch means times fixed weights, with float16's rounding unless it is the float32 executor."""

    projected = False
    compile_ms = 700.0

    def __init__(self, shapes: Shapes, behaviour: str, precision: str) -> None:
        self._shapes, self._behaviour, self._precision = shapes, behaviour, precision
        self._weights = np.random.default_rng(0).normal(size=(3, shapes.channels)).astype(np.float32)
        self._calls = 0

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        self._calls += 1
        if self._behaviour == "SIGKILL at predict":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._behaviour == "SIGSEGV when warm" and self._calls == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._behaviour == "hangs":
            time.sleep(60)
        if self._behaviour == "NSError":
            raise RuntimeError(NS_ERROR)
        side = self._shapes.image_size // 64
        patches = pixel_values.reshape(3, side, 64, side, 64).mean((2, 4)).reshape(3, -1).T  # (N, 3)
        features = (patches @ self._weights)[None]  # (1, N, C)
        if self._precision != "float32":
            features = features.astype(np.float16).astype(np.float32)
        if self._behaviour == "scaled channels":
            features[..., ::3] *= 4
        if self._behaviour == "NaN":
            features[0, 0, 0] = np.nan
        if self._behaviour == "varies":
            features = features * np.float32(1 + 1e-4 * self._calls)
        return checked_features({"image_features": features}, self._shapes)


def opener(order: dict[str, Any], on_stage: Callable[[str], None]) -> tuple[Encoder, dict[str, float]]:
    way = order["compute_units"] or order["precision"]
    behaviour = json.loads(os.environ["DEVICE_CHILD"]).get(way, "correct")
    on_stage("open")
    if behaviour == "SIGABRT at load":
        print("/AppleInternal/.../MPSGraphUtilities.mm: failed assertion `MLIR pass manager failed'", file=sys.stderr)
        os.abort()
    precision = order["precision"] if order["backend"] == "reference" else "float16"
    times = {"import_ms": 10.0, "open_ms": 800.0, "first_predict_ms": 9.0 if order["compute_units"] else 0.0}
    return Encoder(Shapes(*order["shapes"]), behaviour, precision), times


if __name__ == "__main__":
    main(opener)
