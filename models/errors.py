"""Every error that fastvlm raises on purpose.

    FastVLMError
    ├── UsageError            a request that cannot be met as it was worded
    ├── ModelReferenceError   MODEL names nothing that can be opened
    ├── CheckpointError       a source checkpoint is not what it should be
    │   ├── ConfigError       config.json or a tokenizer file: missing, malformed, contradictory
    │   ├── WeightsError      tensors: unreadable, missing, unexpected, of a wrong shape, not finite
    │   └── AdapterError      a LoRA adapter cannot be merged into a checkpoint
    ├── DownloadError         something cannot be fetched, or is not what it should be
    ├── PackageError          a .mlpackage cannot be read or run
    ├── ModelFolderError      an exported folder is incomplete or does not match its manifest
    ├── ImageError            an image cannot be opened
    ├── DataSetError          a data set to evaluate on cannot be read
    ├── ReportError           an earlier report is not what this tool wrote
    ├── PromptError           a prompt cannot be turned into tokens for this model
    ├── OutputError           the result cannot be written
    ├── VerificationError     an export falls short of the checkpoint that it came from
    └── MachineError          this machine lacks something that the request needs

A message is one line: what failed, what was expected, what was found, what to do.
"""

from __future__ import annotations


class FastVLMError(Exception):
    """Base of every error raised on purpose; the command line turns it into one line and exit code 1."""


class UsageError(FastVLMError):
    """A request that cannot be met as it was worded."""


class ModelReferenceError(FastVLMError):
    """MODEL names nothing that can be opened."""


class CheckpointError(FastVLMError):
    """A source checkpoint is not what it should be."""


class ConfigError(CheckpointError):
    """`config.json` or a tokenizer file is missing, malformed or contradictory."""


class WeightsError(CheckpointError):
    """Tensors are unreadable, missing, unexpected, of a wrong shape or not finite."""


class AdapterError(CheckpointError):
    """A LoRA adapter cannot be merged into a checkpoint: malformed, or made for another."""


class DownloadError(FastVLMError):
    """Something cannot be fetched, or is not what it should be."""


class PackageError(FastVLMError):
    """A `.mlpackage` cannot be read or run."""


class ModelFolderError(FastVLMError):
    """An exported folder is incomplete or does not match its manifest."""


class ImageError(FastVLMError):
    """An image cannot be opened."""


class DataSetError(FastVLMError):
    """A data set to evaluate on cannot be read, or lacks answers or images."""


class ReportError(FastVLMError):
    """An earlier report, to compare with, is not what this tool wrote."""


class PromptError(FastVLMError):
    """A prompt cannot be turned into tokens for this model."""


class OutputError(FastVLMError):
    """The result cannot be written."""


class VerificationError(FastVLMError):
    """An export falls short of the checkpoint that it came from."""


class MachineError(FastVLMError):
    """This machine lacks something that the request needs."""
