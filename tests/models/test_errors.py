"""The tree of errors, and the lists of names in their messages."""

from __future__ import annotations

import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models import errors
from fastvlm.models.errors import CrashError, FastVLMError, UsageError, listed


def test_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn: list[tuple[str, str]] = []
    parents = {-1: "Exception"}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+Error)\b", line):
            depth = len(match[1]) // 4
            drawn.append((match[2], parents[depth - 1]))
            parents[depth] = match[2]
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, FastVLMError)]
    assert sorted(drawn) == sorted((one.__name__, one.__bases__[0].__name__) for one in classes)


def test_error_keeps_the_names_of_its_arguments() -> None:
    error = UsageError("min_snr needs quant='mixed'", "min_snr", "quant")
    assert (str(error), error.arguments) == ("min_snr needs quant='mixed'", ("min_snr", "quant"))


def test_crash_keeps_the_signal_and_the_exit_code() -> None:
    error = CrashError("ended", "compute_units", signal_number=6)
    assert (error.signal_number, error.exit_code, error.arguments) == (6, None, ("compute_units",))


@pytest.mark.parametrize(("count", "text"), [(0, ""), (1, "a0"), (2, "a0, a1"), (3, "a0, a1 and 1 more")])
def test_listed_names_say_how_many_more(count: int, text: str) -> None:
    assert listed((f"a{n}" for n in range(count)), most=2) == text


@given(st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True)), st.integers(1, 9))
def test_listed_names_and_the_rest_add_up(names: list[str], most: int) -> None:
    shown, _, more = listed(names, most).partition(" and ")
    assert len([name for name in shown.split(", ") if name]) + int(more.split()[0] if more else 0) == len(names)
