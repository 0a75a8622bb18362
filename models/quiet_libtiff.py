"""libtiff without its own lines on stderr: what is wrong with a file is told by our error."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path

import PIL


@functools.cache
def silence_libtiff() -> None:
    """Takes away the error handler of the libtiff in Pillow's wheel, for the process. Another libtiff keeps its own.

    Pillow itself takes away the handler of warnings only. No thread depends on it.
    """
    package = Path(PIL.__file__).parent
    for library in (*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)
