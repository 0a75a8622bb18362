"""Rules for single keys of JSON files."""

from __future__ import annotations

from typing import Any

import pytest

from fastvlm.export.bundle.contracts import KINDS, Rule


def test_null_is_as_good_as_absent_for_what_is_optional() -> None:
    rule = Rule("rope_theta", "a number", required=False)
    assert list(rule.faults({"rope_theta": None}, "c")) == []
    assert list(rule.faults({"rope_theta": 1}, "c")) == []
    assert list(rule.faults({"rope_theta": True}, "c")) != []


@pytest.mark.parametrize("value", [None, True, 1.5, "1", [], {}, -1, 2**40])
def test_no_kind_takes_a_value_of_another(value: Any) -> None:
    assert sum(test(value) for test in KINDS.values()) <= 4
    assert not KINDS["a list of five sizes"](value)
