"""The encoder's convolutions in fewer bits: a scheme per weight, and corrected biases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .schemes import (
    INT8_MAX,
    PALETTE_BITS,
    PaletteWeight,
    StoredWeight,
    drowns_a_row,
    is_kept,
    store,
    stored_if_kept,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .gptq import Feedback, Hessian, Nearest


Plan = Mapping[str, str]
"""The scheme of every convolution's weight, by the convolution's name in the rewritten network."""

COMPENSATED = ("int8", "pal8", "pal6")
"""The schemes whose rounding GPTQ chooses. With 4 bits the compensation is as large as the faults that an audit of the
weights finds."""

DAMPING = 0.02
"""The damping of GPTQ's Hessians, as a share of their mean.

At 0.2, 0.05 and 0.01 int8 at 256 px keeps 40.4, 40.9 and 41.3 dB of `random:7b` and 41.9, 42.5 and 42.0 dB of
`random:0.5b`, on photographs that were not calibrated on. Less moves the weights themselves further.
"""


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Returns every convolution of `network` by its name, in the order of the computation."""
    from torch import nn

    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def stored_uniformly(network: nn.Module, scheme: str, spared: Collection[str] = ()) -> dict[str, StoredWeight]:
    """Returns the weights that `scheme` keeps well, stored in it, without those of the convolutions `spared`.

    A palette cannot keep rows of very unequal sizes, such as those of an unbounded residual stream. Such a weight is
    stored in int8, with a scale per row. What int8 does not keep either stays float16, and is left out.
    """
    found = {}
    for name, conv in convolutions(network).items():
        if name in spared:
            continue
        stored = stored_if_kept(conv.weight.numpy(), scheme)
        if stored is None and scheme in PALETTE_BITS:
            stored = stored_if_kept(conv.weight.numpy(), "int8")
        if stored is not None:
            found[name] = stored
    return found


def stored_by_plan(network: nn.Module, plan: Plan) -> dict[str, StoredWeight]:
    """Returns the weights that `plan` compresses, each stored in its scheme."""
    convs = convolutions(network)
    return {name: store(convs[name].weight.numpy(), scheme) for name, scheme in plan.items() if scheme != "fp16"}


def plan_of(network: nn.Module, stored: Mapping[str, StoredWeight]) -> dict[str, str]:
    """Returns the plan of stored weights, with float16 for the other convolutions."""
    return {name: stored[name].scheme if name in stored else "fp16" for name in convolutions(network)}


class Rounding:
    """The weights `names` of a network in fewer bits, those of 1 x 1 convolutions rounded by GPTQ.

    `images` are inputs of the network, (1, 3, S, S) float32. The network has its original weights whenever a weight is
    asked for. Each is rounded once per scheme. Sums use one thread, because a sum in another order would round some
    weights to another level.
    """

    def __init__(self, network: nn.Module, names: Collection[str], images: Sequence[np.ndarray]) -> None:
        self.names = list(names)
        self.convs = convolutions(network)
        self._kept: dict[tuple[str, str], StoredWeight] = {}
        self._feedback: dict[str, Feedback] = {}
        with one_thread():
            hessians = input_hessians(network, [name for name in names if self._is_pointwise(name)], images)
            for name in list(hessians):
                self._feedback[name] = hessians.pop(name).feedback(DAMPING)

    def _is_pointwise(self, name: str) -> bool:
        return self.convs[name].kernel_size == (1, 1)

    def by_plan(self, plan: Plan) -> dict[str, StoredWeight]:
        """Returns the weights that `plan` compresses."""
        return {name: self.stored(name, scheme) for name, scheme in plan.items() if scheme != "fp16"}

    def stored(self, name: str, scheme: str) -> StoredWeight:
        """Returns a weight in one scheme."""
        if (name, scheme) not in self._kept:
            self._kept[name, scheme] = self.compensated(name, store(self.convs[name].weight.numpy(), scheme))
        return self._kept[name, scheme]

    def compensated(self, name: str, stored: StoredWeight) -> StoredWeight:
        """Returns `stored` rounded by GPTQ to the same levels, in the same bytes.

        Weights of other schemes than `COMPENSATED` stay, and those whose own error would pass what the scheme allows.
        """
        if name not in self._feedback or stored.scheme not in COMPENSATED:
            return stored
        from .gptq import compensated_codes

        weight = self.convs[name].weight.numpy()
        with one_thread():
            codes = compensated_codes(weight[:, :, 0, 0], self._feedback[name], nearest_level(stored))
        other = with_codes(stored, codes.reshape(weight.shape))
        return other if is_kept(weight, other) and not drowns_a_row(weight, other.dense()) else stored


def compensated(
    network: nn.Module, stored: Mapping[str, StoredWeight], images: Sequence[np.ndarray]
) -> dict[str, StoredWeight]:
    """Returns `stored` with the weights of 1 x 1 convolutions rounded by GPTQ, as `Rounding.compensated` does."""
    rounding = Rounding(network, [name for name, kept in stored.items() if kept.scheme in COMPENSATED], images)
    return {name: rounding.compensated(name, kept) for name, kept in stored.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute in one thread inside the block."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def nearest_level(stored: StoredWeight) -> Nearest:
    """Returns the rounding of a column of weights (out,) to the levels of `stored`, an int8 weight or a palette."""
    import torch

    if isinstance(stored, PaletteWeight):
        lut = torch.from_numpy(stored.lut.astype(np.float32))
        edges = (lut[1:] + lut[:-1]) / 2

        def index(column: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.bucketize(column.contiguous(), edges, right=True)
            return codes, lut[codes]

        return index

    scales = torch.from_numpy(stored.scale.reshape(-1).astype(np.float32))
    inverses = torch.where(scales > 0, 1 / scales, 0.0)

    def step(column: Tensor) -> tuple[Tensor, Tensor]:
        codes = (column * inverses).round_().clamp_(-INT8_MAX, INT8_MAX)
        return codes, codes * scales

    return step


def with_codes(stored: StoredWeight, codes: np.ndarray) -> StoredWeight:
    """Returns `stored` with other codes of its levels."""
    if isinstance(stored, PaletteWeight):
        return replace(stored, indices=codes.astype(np.uint8))
    return replace(stored, data=codes.astype(np.int8))


def input_hessians(network: nn.Module, names: Collection[str], images: Sequence[np.ndarray]) -> dict[str, Hessian]:
    """Returns the products of the inputs of the 1 x 1 convolutions `names`, summed over `images` and positions."""
    import torch

    from .gptq import Hessian

    convs = convolutions(network)
    found = {name: Hessian(convs[name].in_channels, 1) for name in names}

    def adding(name: str) -> Callable[..., None]:
        return lambda _, inputs, __: found[name].add(inputs[0][0].flatten(1).mT.numpy())  # (HW, C)

    hooks = [convs[name].register_forward_hook(adding(name)) for name in names]
    try:
        with torch.inference_mode():
            for image in images if names else ():
                network(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def quantize(network: nn.Module, stored: Mapping[str, StoredWeight], images: Sequence[np.ndarray]) -> None:
    """Puts the stored weights into `network`, and corrects biases by the shift of the mean outputs, in place.

    Inputs after a GELU have means far from zero, so rounding errors add up to a constant per channel. That is most of
    int8's noise (arXiv 1906.04721, section 4.2). The means are taken over `images`, each (1, 3, S, S). Without images,
    biases stay.
    """
    apply_weights(network, stored, input_means(network, stored, images))


def apply_weights(network: nn.Module, stored: Mapping[str, StoredWeight], means: Mapping[str, Tensor]) -> None:
    """Quantizes as `quantize` does, with given mean inputs (in,) of the convolutions."""
    import torch

    from ..models.fastvit import bias_of

    convs = convolutions(network)
    for name, weight in stored.items():
        conv = convs[name]
        dense = torch.from_numpy(weight.dense())
        if name in means:
            shift = (conv.weight.data - dense).sum((2, 3)) @ means[name]  # (out, in) @ (in,)
            bias_of(conv).data = (
                bias_of(conv).data + shift
            )  # not in place, as the tensor may be a view of the open file
        conv.weight.data = dense


def input_means(network: nn.Module, names: Collection[str], images: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Returns the mean of each input channel (in,) of the convolutions `names`, over `images` and positions."""
    import torch

    convs = convolutions(network)
    images = images if names else ()
    means: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs, __: means[name].append(inputs[0].mean((0, 2, 3)))

    hooks = [convs[name].register_forward_hook(keep(name)) for name in means]
    try:
        with torch.inference_mode():
            for image in images:
                network(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(found).mean(0) for name, found in means.items() if found}
