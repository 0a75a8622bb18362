"""Verification of a package on this machine: `fastvlm verify FOLDER --on-device`.

Each way to run the package has a process of its own, because a package can abort a process, be killed or hang. All of
them encode one real image and are compared with the reference executor, which rounds every result to float16 as the
Neural Engine and the GPU do.
"""

from __future__ import annotations

import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ..models.errors import CrashError, FastVLMError, UsageError
from ..models.folder_layout import PACKAGE_NAME
from ..models.images import open_image, preprocess, to_pixel_values
from .coreml import COMPUTE_UNITS, default_compute_units
from .encoder_process import EncoderProcess, Limits
from .encoders import Shapes
from .engine_share import ENGINE_UNITS, MIN_ENGINE_SHARE, planned_share
from .folder import ModelFolder, open_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..models.images import Fit
    from ..models.mlprogram.executor import Precision

SAMPLE = Path(__file__).parent / "samples" / "shapes.png"
"""The image that is encoded unless another is given."""

FLOOR_DB = 20.0
"""The SNR of a unit's features, in dB, below which they are reported as wrong.

Units that work differ by float16's rounding, 50 dB, or by an integer path of their own. The published failures of the
engine are below 3 dB (cosine 0.03 to 0.63), and its correct results are above 23 dB (cosine 0.9975 and more). The noise
of a 4-bit palette is at 13 dB, and costs `tiny` one answer in a hundred.
"""

WARM_RUNS = 5
"""The number of predictions, from the second of a process, whose median is `warm_ms`."""

SMALL_PACKAGE_BYTES = 30_000_000
"""The size in bytes below which a package may be placed differently from FastViTHD, which has 62 MB at least."""

LIMITS = Limits(load=180.0, predict=120.0)
"""The limits of each process. The slowest reported first use on an engine took 105 s, and a load without an engine can
hang for half an hour. The executor takes up to 10 s for an image on two cores."""


@dataclass(frozen=True)
class Way:
    """A way to run a package."""

    backend: Literal["coreml", "reference"]
    compute_units: str | None = None
    precision: Precision = "float32"

    @property
    def label(self) -> str:
        """The name in reports."""
        return self.compute_units or f"executor, {self.precision}"


BASELINE = Way("reference", precision="float16")
"""The way that the others are compared with."""
EXACT = Way("reference", precision="float32")
"""The way that `generate` takes off a Mac."""


@dataclass(frozen=True)
class DeviceRun:
    """The result of one way to run the package."""

    way: Way
    default: bool = False
    """True if `generate` runs the package this way here by default."""
    error: str | None = None
    """The error of a way without features, None for one with features."""
    signal: str | None = None
    """The signal that ended the process, such as SIGABRT."""
    finite: bool | None = None
    snr_db: float | None = None
    """The SNR compared with the executor in float16."""
    cosine: float | None = None
    load_ms: float | None = None
    """The time of opening the package after the imports, with compiling at the first use."""
    compile_ms: float | None = None
    """The part of load_ms for the first use of the package on the engine, 0 for later uses."""
    first_ms: float | None = None
    """The time of the first prediction."""
    warm_ms: float | None = None
    """The median time of later predictions."""
    engine_share: float | None = None
    """The share of the estimated cost that Core ML plans for the Neural Engine, 0 to 1."""
    notes: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        """The fault in a few words, None for a correct run."""
        if self.signal:
            return f"crashed with {self.signal}"
        if self.finite is False:
            return "not finite"
        if self.error:
            return "failed"
        if self.snr_db is not None and self.snr_db < FLOOR_DB:
            return "wrong features"
        return None

    @property
    def verdict(self) -> str:
        """The fault, or `baseline` or `agrees`."""
        return self.fault or ("baseline" if self.way == BASELINE else "agrees")

    def as_dict(self) -> dict[str, Any]:
        """Returns a dictionary for JSON, with rounded figures."""
        values = asdict(self)
        way = values.pop("way")
        rounded = {"snr_db": 1, "cosine": 6, "engine_share": 4}
        values = {
            name: round(value, rounded.get(name, 2)) if isinstance(value, float) else value
            for name, value in values.items()
        }
        return {"label": self.way.label, **way, "verdict": self.verdict, **values, "notes": list(self.notes)}


@dataclass(frozen=True)
class DeviceVerification:
    """The results of every way to run a folder's package on this machine."""

    folder: str
    image: str
    package_bytes: int
    runs: tuple[DeviceRun, ...]
    """The results, with the baseline first."""
    missing: tuple[str, ...]
    """The checks that are not possible here, with their reasons."""

    @property
    def default(self) -> DeviceRun:
        """The way that `generate` takes by default."""
        return next(run for run in self.runs if run.default)

    @property
    def failures(self) -> list[str]:
        """The faults of the baseline and of the default way, which `generate` depends on."""
        judged = (self.runs[0], self.default) if self.runs[0].fault else (self.default,)
        found = []
        for run in judged:
            if run.fault:
                figures = "" if run.snr_db is None else f" ({run.snr_db:.1f} dB, the floor is {FLOOR_DB:.0f} dB)"
                found.append(f"{run.way.label}: {run.fault}{figures}{f': {run.error}' if run.error else ''}")
        if not found and self.default.snr_db is None:
            found.append(f"{self.default.way.label}: it could not be compared with the baseline")
        return found

    @property
    def passed(self) -> bool:
        """True if the default way works."""
        return not self.failures

    @property
    def notes(self) -> list[str]:
        """Notes on faults of other units, on placement and on size."""
        found = [f"{run.way.label}: {note}" for run in self.runs for note in run.notes]
        for run in self.runs:
            if run.fault and not run.default and run is not self.runs[0]:
                app = ". Apple's app loads packages with ALL" if run.way.compute_units == "ALL" else ""
                found.append(f"{run.way.label} does not work here ({run.fault}). Do not choose it{app}")
            if run.engine_share is not None and run.engine_share < MIN_ENGINE_SHARE:
                found.append(
                    f"{run.way.label}: only {run.engine_share:.0%} of the estimated cost is on the Neural Engine"
                )
        if self.package_bytes < SMALL_PACKAGE_BYTES:
            found.append(
                f"this package is small ({self.package_bytes / 1e6:.1f} MB): Core ML may leave such models on the CPU, "
                "so its placement and speed do not predict those of FastViTHD. Use random:0.5b for that"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Returns a dictionary for JSON."""
        return {
            "folder": self.folder,
            "image": self.image,
            "package_bytes": self.package_bytes,
            "baseline": BASELINE.label,
            "floor_db": FLOOR_DB,
            "default": self.default.way.label,
            "passed": self.passed,
            "failures": self.failures,
            "runs": [run.as_dict() for run in self.runs],
            "missing": list(self.missing),
            "notes": self.notes,
        }


OpenProcess = Callable[[Path, Shapes, Way], EncoderProcess]
"""A package, its sizes and a way -> the process that runs it."""
EngineShare = Callable[[Path, str], float | None]
"""A package and compute units -> the engine's share of the cost, or None if it is unknown. Raises FastVLMError."""


def open_process(package: Path, shapes: Shapes, way: Way) -> EncoderProcess:
    """Starts a process that runs a package in one way."""
    return EncoderProcess(
        package, shapes, backend=way.backend, compute_units=way.compute_units, precision=way.precision, limits=LIMITS
    )


def verify_on_device(
    folder: str | Path,
    *,
    image: str | Path = SAMPLE,
    warm_runs: int = WARM_RUNS,
    on_stage: Callable[[str], None] = lambda _: None,
    compute_units: Sequence[str] | None = None,
    opener: OpenProcess = open_process,
    engine_share: EngineShare = planned_share,
) -> DeviceVerification:
    """Runs a folder's package on every compute unit of this Mac, or in both modes of the executor, and compares them.

    `compute_units` are the units to try. None tries all of them on a Mac and none elsewhere.

    Raises:
        ModelFolderError: the folder is incomplete.
        UsageError: the folder has no package.
        ImageError: the image cannot be opened.
    """
    opened = open_folder(folder)
    if not opened.package.is_dir():
        raise UsageError(f"{folder} has no {PACKAGE_NAME} to run on this device. Its encoder is in MLX.")
    config = opened.config
    pixel_values = to_pixel_values(
        preprocess(open_image(image), config.image_size, cast("Fit", config.image_aspect_ratio))
    )
    units = tuple(compute_units if compute_units is not None else COMPUTE_UNITS if sys.platform == "darwin" else ())
    default = Way("coreml", default_compute_units()) if units else EXACT
    ways = [EXACT, *(Way("coreml", one) for one in units)]
    if default not in ways:
        ways.append(default)
    shapes = Shapes.of(config)

    def run(way: Way, baseline: NDArray[np.float32] | None) -> tuple[DeviceRun, NDArray[np.float32] | None]:
        on_stage(way.label)
        found, features = run_way(opener, opened.package, shapes, way, pixel_values, baseline, warm_runs)
        return replace(found, default=way == default), features

    first, baseline = run(BASELINE, None)
    runs = [first]
    for way in ways:
        found, _ = run(way, baseline)
        runs.append(with_engine_share(found, opened.package, engine_share))
    return DeviceVerification(
        folder=str(folder),
        image=Path(image).name,
        package_bytes=package_bytes(opened),
        runs=tuple(runs),
        missing=tuple(missing(units)),
    )


def run_way(
    opener: OpenProcess,
    package: Path,
    shapes: Shapes,
    way: Way,
    pixel_values: NDArray[np.float32],
    baseline: NDArray[np.float32] | None,
    warm_runs: int,
) -> tuple[DeviceRun, NDArray[np.float32] | None]:
    """Loads, predicts and compares in a process of its own. An error becomes a row, not an exception."""
    found = DeviceRun(way)
    try:
        with opener(package, shapes, way) as encoder:
            times = encoder.times
            found = replace(found, load_ms=times.open_ms, compile_ms=times.compile_ms)
            features = encoder.encode(pixel_values)
            found = replace(found, finite=True, first_ms=times.first_predict_ms or encoder.predict_ms)
            if baseline is not None:
                snr_db, cosine = agreement(baseline, features)
                found = replace(found, snr_db=snr_db, cosine=cosine)
            warm = []
            for _ in range(warm_runs):
                again = encoder.encode(pixel_values)
                warm.append(encoder.predict_ms)
                if (again != features).any() and not found.notes:
                    found = replace(found, notes=("another run on the same image gave other features",))
            found = replace(found, warm_ms=statistics.median(warm) if warm else None)
    except FastVLMError as reason:
        return replace(found, **failure(reason)), None
    return found, features


def failure(reason: FastVLMError) -> dict[str, Any]:
    """Returns the fields of a run that ended with an error."""
    number = reason.signal_number if isinstance(reason, CrashError) else None
    finite = False if "not finite" in str(reason) else None
    return {"error": str(reason), "signal": None if number is None else signal_name(number), "finite": finite}


def signal_name(number: int) -> str:
    """Returns the name of a signal, such as `SIGABRT`, or `signal 99` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


MAX_SNR_DB = 200.0
"""The SNR that is reported for equal features, in dB. It is beyond the precision of float32."""


def agreement(baseline: NDArray[np.float32], features: NDArray[np.float32]) -> tuple[float, float]:
    """Returns the SNR in dB and the cosine of features compared with the baseline's."""
    a, b = baseline.astype(np.float64).ravel(), features.astype(np.float64).ravel()
    signal_power, noise_power = float(a @ a), float((a - b) @ (a - b))
    if noise_power == 0:
        snr_db = MAX_SNR_DB
    elif signal_power == 0:
        snr_db = -MAX_SNR_DB
    else:
        snr_db = min(MAX_SNR_DB, 10 * float(np.log10(signal_power / noise_power)))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return snr_db, float(a @ b) / norm if norm else 0.0


def with_engine_share(run: DeviceRun, package: Path, engine_share: EngineShare) -> DeviceRun:
    """Adds the engine's share of the compute plan to a run of Core ML on units with the engine."""
    if run.way.compute_units not in ENGINE_UNITS or run.error:
        return run
    try:
        share = engine_share(package, run.way.compute_units)
        reason = "a plan needs macOS 14.4, or it failed"
    except FastVLMError as error:
        share, reason = None, str(error)
    if share is None:
        return replace(run, notes=(*run.notes, f"Core ML's compute plan is not available: {reason}"))
    return replace(run, engine_share=share)


def package_bytes(folder: ModelFolder) -> int:
    """Returns the size of a folder's package."""
    return sum(path.stat().st_size for path in folder.package.rglob("*") if path.is_file())


def missing(units: Sequence[str]) -> Iterator[str]:
    """Yields the checks that were not possible, with the reason."""
    if not units:
        yield (
            f"Core ML on {', '.join(COMPUTE_UNITS)}: it runs on a Mac only. Results, speed and placement on the Neural "
            "Engine and the GPU are not measured here"
        )
