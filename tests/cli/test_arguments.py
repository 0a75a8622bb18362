"""Python arguments in errors, as options of the command line."""

from __future__ import annotations

import pickle

import pytest

from fastvlm.cli.arguments import in_options
from fastvlm.models.errors import FastVLMError, OutputError, UsageError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("group_size must be 64 (got 7)", "group_size"), "--group-size must be 64 (got 7)"),
        (UsageError("min_snr needs quant='mixed'", "min_snr", "quant"), "--min-snr needs --quant mixed"),
        (UsageError('decoder_bits="mixed", please', "decoder_bits"), "--decoder-bits mixed, please"),
        (UsageError("ask for decoder_bits=4.", "decoder_bits"), "ask for --decoder-bits 4."),
        (UsageError("give min_snr=37.5 or less", "min_snr"), "give --min-snr 37.5 or less"),
        (OutputError("out exists. Pass force=True", "force"), "out exists. Pass --force"),
        (
            UsageError("needs quantize_embeddings=False", "quantize_embeddings"),
            "needs --no-quantize-embeddings",
        ),
        (UsageError("recipe_file has no model", "recipe_file"), "--recipe has no model"),
        (UsageError("folder is not a bundle for client", "client"), "folder is not a bundle for --for"),
        (UsageError("use backend='reference'", "backend"), "use --backend reference"),
    ],
)
def test_listed_arguments_become_options(error: FastVLMError, line: str) -> None:
    assert in_options(error) == line


@pytest.mark.parametrize("text", ["my-quant/quant.json: quantum, x.quant and quant_bits", "no argument at all"])
def test_other_words_stay_as_they_are(text: str) -> None:
    assert in_options(UsageError(text, "quant")) == text
    assert in_options(UsageError("the key 'quant' is missing")) == "the key 'quant' is missing"


def test_arguments_survive_pickling() -> None:
    copy = pickle.loads(pickle.dumps(UsageError("quant is missing", "quant")))
    assert (str(copy), copy.arguments) == ("quant is missing", ("quant",))
