r"""The reason in an error of Core ML, as coremltools reports it: the printed `userInfo` dictionary of an NSError.

{
    NSLocalizedDescription = "Failed to build the model execution plan ... with error code: -14.";
    NSUnderlyingError = "Error Domain=com.apple.CoreML Code=0 \"The model\U2019s ...\" UserInfo={...}";
}
"""

from __future__ import annotations

import re

MAX_REASON = 400
"""The most characters of a reason. Core ML's descriptions with two paths have about 300."""

_VALUE = r'NSLocalizedDescription\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^";{}]+?))\s*;'
"""The pattern of a value, which is quoted unless it is one word."""

_DESCRIPTIONS = (re.compile(rf"^\s*{_VALUE}", re.MULTILINE | re.DOTALL), re.compile(rf"^\{{\s*{_VALUE}", re.DOTALL))
"""The patterns for a dictionary with a line for each key, and for one on a single line."""

_ERROR = re.compile(r'\bError Domain=\S+ Code=-?\d+ "((?:[^"\\]|\\.)*)"', re.DOTALL)
"""The pattern of a printed NSError, the form of an underlying error in the dictionary."""

MAX_DEPTH = 8
"""The most nested underlying errors that are read. Core ML nests two or three."""

_ESCAPE = re.compile(r"(?:\\U[0-9a-fA-F]{4})+|\\[0-7]{3}|\\.", re.DOTALL)
"""The escapes of a quoted string: UTF-16 units in hexadecimal, a character in octal, or one escaped character."""

_CONTROL = {"n": "\n", "t": "\t", "r": "\r"}


def coreml_reason(error: BaseException) -> str:
    """Returns the reason in an error of Core ML, on one line of at most MAX_REASON characters.

    That is the description, and behind it the innermost underlying error where that says something else. Text of
    another form is returned whole, and an error without text by the name of its class.
    """
    text = str(error)
    errors = _printed_errors(text)
    if described := next(filter(None, (form.search(text) for form in _DESCRIPTIONS)), None):
        reason = _one_line(described[2] if described[1] is None else _unescaped(described[1]))
    else:
        reason = errors[0] if errors else _one_line(text)
    if errors and errors[-1] not in reason:
        reason = f"{reason.rstrip('.')} ({errors[-1].rstrip('.')})"
    reason = reason or type(error).__name__
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 3]}..."


def _printed_errors(text: str) -> list[str]:
    """Returns the descriptions of the NSErrors printed in `text`, outermost first; inner ones are escaped again."""
    errors = []
    for _ in range(MAX_DEPTH):
        while found := _ERROR.search(text):
            errors.append(_one_line(_unescaped(found[1])))
            text = text[found.end() :]
        if "Error Domain=" not in text:
            break
        text = _unescaped(text)
    return [error for error in errors if error]


def _unescaped(quoted: str) -> str:
    return _ESCAPE.sub(_character, quoted)


def _character(escape: re.Match[str]) -> str:
    code = escape[0][1:]
    if code[0] == "U" and len(code) > 1:
        units = bytes.fromhex(escape[0].replace("\\U", ""))
        return units.decode("utf-16-be", errors="replace")
    if len(code) == 3:
        return chr(int(code, 8))
    return _CONTROL.get(code, code)


def _one_line(text: str) -> str:
    return " ".join(text.split())
