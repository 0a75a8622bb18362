"""Channels evened out: results stay, factors arrive, and the opposite exponents restore the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.export.evening import as_digits, even_channels, from_digits
from fastvlm.export.rewrite import branch_convolutions, rewrite
from fastvlm.models.errors import UsageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.encoder import convolutions
from fastvlm.quant.search import outputs

SIZE = 64


@pytest.fixture
def network() -> nn.Sequential:
    with torch.no_grad():
        return rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), SIZE)


def drawn_exponents(network: nn.Module) -> dict[str, list[int]]:
    draw, convs = np.random.default_rng(3), convolutions(network)
    names = [name for name in branch_convolutions(network) if not name.endswith("fc2")]
    return {name: [int(power) for power in -draw.integers(0, 6, convs[name].in_channels)] for name in names}


def inputs(network: nn.Module, name: str, image: np.ndarray) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = convolutions(network)[name].register_forward_pre_hook(lambda _, x: found.append(x[0]))
    outputs(network, image)
    hook.remove()
    return found[0]


def test_results_stay_when_channels_are_evened_out(network: nn.Sequential) -> None:
    image = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
    before = outputs(network, image)
    exponents = drawn_exponents(network)
    plain = {name: inputs(network, name, image) for name in exponents}
    even_channels(network, exponents)
    np.testing.assert_array_equal(outputs(network, image), before)  # powers of two round nothing
    for name, powers in exponents.items():
        factors = torch.tensor(powers, dtype=torch.float32).exp2()[:, None, None]
        assert torch.equal(inputs(network, name, image) * factors, plain[name]), name


def test_opposite_exponents_restore_the_weights(network: nn.Sequential) -> None:
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    exponents = drawn_exponents(network)
    even_channels(network, exponents)
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in network.named_parameters())
    assert changed >= 2 * len(exponents) - 2  # gains of layer norms are not parameters
    even_channels(network, {name: [-power for power in powers] for name, powers in exponents.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_parameters())


@pytest.mark.parametrize("name", ["3.convffn.fc2", "3.convffn.gone", "0.0", "network"])
def test_convolution_without_a_linear_writer_is_refused(network: nn.Sequential, name: str) -> None:
    channels = convolutions(network)[name].in_channels if name in convolutions(network) else 4
    with pytest.raises(UsageError, match="evened: .* Export again"):
        even_channels(network, {name: [-1] * channels})


def test_wrong_number_of_channels_is_refused(network: nn.Sequential) -> None:
    (name, *_) = branch_convolutions(network)
    with pytest.raises(UsageError, match="has no 3 channels"):
        even_channels(network, {name: [-1] * 3})


def test_digits_are_read_as_they_were_written() -> None:
    assert as_digits([0, -1, -10, -35]) == "01az"
    assert from_digits("01az") == (0, -1, -10, -35)
    for broken in ("0-1", "0A", 5):
        with pytest.raises(UsageError, match="evened: exponents must be"):
            from_digits(broken)
