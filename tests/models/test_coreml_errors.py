"""Core ML's reasons, in each form in which they reach us."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastvlm.models.coreml_errors import MAX_REASON, coreml_reason

PLAN = (
    "Failed to build the model execution plan using a model architecture file '/tmp/a.mlmodelc/model.mil' with error "
    "code: -14."
)

UNDERLYING = r"""{
    NSLocalizedDescription = "Unable to load model: file:///tmp/a.mlmodelc/. See Console logs for details.";
    NSLocalizedFailureReason = "the plan was not built";
    NSUnderlyingError = "Error Domain=com.apple.CoreML Code=0 \"Failed to build the plan; code: -7.\" UserInfo={NSLocalizedDescription=Failed to build the plan; code: -7., NSUnderlyingError=0x60000 {Error Domain=com.apple.appleneuralengine Code=13 \"ANECCompile() FAILED\" UserInfo={NSLocalizedDescription=ANECCompile() FAILED}}}";
}"""  # noqa: E501

BEFORE = r"""{
    A = "Error Domain=a Code=1 \"One; two.\" UserInfo={NSLocalizedDescription=One; two.}";
    NSLocalizedDescription = "It fails.";
}"""

ESCAPES_TWICE = r"""{
    NSLocalizedDescription = "It fails.";
    NSUnderlyingError = "Error Domain=a Code=-1 \"The \\\"file\\\" can\\U2019t be opened.\" UserInfo={NSFilePath=/a}";
}"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'{{\n    NSLocalizedDescription = "{PLAN}";\n}}', PLAN),
        ("{\n    NSLocalizedDescription = Failed;\n}", "Failed"),
        ('{ NSLocalizedDescription = "On one line."; }', "On one line."),
        ('{\n    NSLocalizedDescription = "can\\U2019t; \\"a\\\\b\\"\\n c \\Ud83d\\Ude00 \\251";\n}',
         'can\u2019t; "a\\b" c 😀 ©'),
        (UNDERLYING, "Unable to load model: file:///tmp/a.mlmodelc/. See Console logs for details "
                     "(ANECCompile() FAILED)"),
        (BEFORE, "It fails (One; two)"),
        (ESCAPES_TWICE, "It fails (The \"file\" can\u2019t be opened)"),
        ('Error Domain=com.apple.CoreML Code=3 "Cannot be read." UserInfo={NSLocalizedDescription=Cannot be read.}',
         "Cannot be read."),
        ("Error compiling model:\n  no\tmodel", "Error compiling model: no model"),
        ("{\n    Other = 1;\n}", "{ Other = 1; }"),
        ('{\n    NSLocalizedDescription = "";\n}', "RuntimeError"),
        ("", "RuntimeError"),
    ],
)  # fmt: skip
def test_reason_is_the_description_on_one_line(text: str, reason: str) -> None:
    assert coreml_reason(RuntimeError(text)) == reason


def test_long_reason_is_cut(core_ml_error: Callable[[str], RuntimeError]) -> None:
    assert coreml_reason(core_ml_error("x" * MAX_REASON)) == "x" * MAX_REASON
    assert coreml_reason(core_ml_error("x" * 5000)) == "x" * (MAX_REASON - 3) + "..."
    assert len(coreml_reason(RuntimeError("{\n" * 5000))) == MAX_REASON
