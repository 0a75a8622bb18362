"""Every error that fastvlm raises on purpose.

    FastVLMError
    ├── UsageError            arguments that are invalid or exclude each other
    ├── ModelReferenceError   MODEL names nothing that can be opened
    ├── CheckpointError       a source checkpoint is invalid
    │   ├── ConfigError       config.json or a tokenizer file: missing, malformed, contradictory
    │   ├── WeightsError      tensors: unreadable, missing, unexpected, of a wrong shape, not finite
    │   └── AdapterError      a LoRA adapter cannot be merged into a checkpoint
    ├── DownloadError         a file cannot be downloaded, or is not the expected one
    ├── PackageError          a .mlpackage cannot be read or run
    │   └── CrashError        the process that runs a package ended, or hung
    ├── ModelFolderError      an exported folder is incomplete or does not match its manifest
    ├── ImageError            an image cannot be opened
    ├── DataSetError          a data set for evaluation cannot be read
    ├── ReportError           an earlier report was not written by fastvlm
    ├── PromptError           a prompt cannot be turned into tokens for this model
    ├── OutputError           the result cannot be written
    ├── VerificationError     an export falls short of its checkpoint
    ├── MachineError          this machine lacks something that the request needs
    ├── UnavailableError      the scheduler does not take a request, or could not start it in time
    │   └── QueueFullError    too many requests are waiting already
    └── CancelledError        an answer was cancelled before its end

A message is one line: `<subject>: <what is wrong> (got <found>). <what to do>.`

A message names *Python* arguments, and lists their names after the text:

    raise UsageError(f"group_size must be 32, 64 or 128 (got {size})", "group_size")
    raise UsageError("min_snr needs quant='mixed'", "min_snr", "quant")
    raise OutputError(f"{folder} exists. Pass force=True to replace it", "force")

The command line replaces each listed name by its option, with its value if there is one: `--group-size`,
`--quant mixed`, `--force`. Names that are not listed stay as they are, so quoted file content is never changed. An
argument whose option is not its name with dashes is in the table of `cli/arguments.py`.
"""

from __future__ import annotations

from collections.abc import Iterable


class FastVLMError(Exception):
    """The base of every error raised on purpose. The command line prints it as one line and exits with 1.

    Attributes:
        arguments: names of the Python arguments that occur in the message.
    """

    def __init__(self, message: str = "", *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments


class UsageError(FastVLMError):
    """Arguments are invalid or exclude each other."""


class ModelReferenceError(FastVLMError):
    """MODEL names nothing that can be opened."""


class CheckpointError(FastVLMError):
    """A source checkpoint is invalid."""


class ConfigError(CheckpointError):
    """`config.json` or a tokenizer file is missing, malformed or contradictory."""


class WeightsError(CheckpointError):
    """Tensors are unreadable, missing, unexpected, of a wrong shape or not finite."""


class AdapterError(CheckpointError):
    """A LoRA adapter is malformed, or was trained for another checkpoint."""


class DownloadError(FastVLMError):
    """A file cannot be downloaded, or is not the expected one."""


class PackageError(FastVLMError):
    """A `.mlpackage` cannot be read or run."""


class CrashError(PackageError):
    """The process that runs a package ended, or hung.

    Attributes:
        signal_number: the signal that ended it, if one did.
        exit_code: what it exited with, if it did.
    """

    def __init__(
        self, message: str, *arguments: str, signal_number: int | None = None, exit_code: int | None = None
    ) -> None:
        super().__init__(message, *arguments)
        self.signal_number = signal_number
        self.exit_code = exit_code


class ModelFolderError(FastVLMError):
    """An exported folder is incomplete or does not match its manifest."""


class ImageError(FastVLMError):
    """An image cannot be opened."""


class DataSetError(FastVLMError):
    """A data set for evaluation cannot be read, or lacks answers or images."""


class ReportError(FastVLMError):
    """An earlier report was not written by fastvlm."""


class PromptError(FastVLMError):
    """A prompt cannot be turned into tokens for this model."""


class OutputError(FastVLMError):
    """The result cannot be written."""


class VerificationError(FastVLMError):
    """An export falls short of its checkpoint."""


class MachineError(FastVLMError):
    """This machine lacks something that the request needs."""


class UnavailableError(FastVLMError):
    """The scheduler does not take a request, or could not start it in time."""


class QueueFullError(UnavailableError):
    """Too many requests are waiting already."""


class CancelledError(FastVLMError):
    """An answer was cancelled before its end."""


MAX_LISTED = 6
"""The number of names that one message lists before it says how many more there are."""


def listed(names: Iterable[str], most: int = MAX_LISTED) -> str:
    """Returns the first `most` of `names`, separated by commas, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
