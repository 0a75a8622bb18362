"""The int8 inputs of w8a8: their scales, the choice of the convolutions that have one, and the pass that writes them.

Inputs are symmetric int8 with one scale per tensor, as coremltools' documents describe the engine's int8 path. Scales
reach the largest magnitude that was measured on calibration images. Tried without a gain across networks: clipping for
the least squared error, biases corrected for the rounding of inputs, and channels that are centred and evened out by
folds into the convolution before. All three fit the few calibration images, and lose up to 9 dB on others. Zero points
gained 1.4 dB on `tiny`, whose accuracy equals that of fp16 without them.

A few inputs cause most of the noise, and they are seldom those with most arithmetic. So each is measured alone, and
those with the most noise per multiplication stay float16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.errors import PackageError
from .constexprs import conv_name
from .encoder import convolutions
from .search import noise_of, outputs, partial_outputs

if TYPE_CHECKING:
    import torch
    from torch import nn

PASS_NAME = "fastvlm::int8_inputs"

INT8_MAX = 127
"""The largest int8 level of a symmetric range."""

MIN_SCALE = 2.0**-14
"""The smallest normal float16 number. Inputs that need a smaller scale stay float16."""

MAX_ADDED_NOISE = 3.0
"""The noise of int8 inputs as a multiple of the noise of int8 weights, above which inputs stay float16. Both together
are then 6 dB above the weights alone, as in Apple's rule of thumb for w8a8 (6 to 8 dB)."""

MAX_FLOAT16_SHARE = 0.1
"""The most of the multiplications of the candidates that may stay float16, because w8a8 is chosen for its speed."""


@dataclass(frozen=True)
class InputCost:
    """One int8 input: the noise that it adds to the output, and the arithmetic that it makes int8."""

    noise: float
    """The noise relative to the output's energy, with this input alone in int8."""
    multiplications: int


def chosen_inputs(costs: Mapping[str, InputCost], weights_noise: float) -> list[str]:
    """Returns the names of the inputs that become int8. Those with the most noise per multiplication stay float16.

    The noises of inputs add up, as their rounding errors are independent. They may reach `MAX_ADDED_NOISE` times
    `weights_noise`, the noise of the weights relative to the output's energy. At most `MAX_FLOAT16_SHARE` of the
    multiplications stay float16, also if the noise is larger then.
    """
    noise, limit = sum(cost.noise for cost in costs.values()), MAX_ADDED_NOISE * weights_noise
    room = MAX_FLOAT16_SHARE * sum(cost.multiplications for cost in costs.values())
    left: list[str] = []
    for name in sorted(costs, key=lambda name: -costs[name].noise / costs[name].multiplications):
        if noise > limit and costs[name].multiplications <= room:
            room -= costs[name].multiplications
            noise -= costs[name].noise
            left.append(name)
    for name in sorted(left, key=lambda name: -costs[name].multiplications):  # a later one can make it unnecessary
        if noise + costs[name].noise <= limit:
            noise += costs[name].noise
            left.remove(name)
    return [name for name in costs if name not in left]


def input_costs(
    network: nn.Sequential, scales: Mapping[str, np.float16], images: Sequence[np.ndarray]
) -> dict[str, InputCost]:
    """Measures each int8 input of `scales` alone, on `images` (1, 3, S, S) float32.

    Each takes a run per image of the layers from the convolution on. `images` may be smaller than the encoder's input.
    """
    prefixes = [list(partial_outputs(network, image)) for image in images]
    expected = [found[-1].numpy() for found in prefixes]
    costs = {}
    for name, scale in scales.items():
        part = int(name.split(".")[0])
        with int8_inputs(network, {name: scale}) as multiplications:
            found = [outputs(network[part:], prefix[part]) for prefix in prefixes]
        costs[name] = InputCost(noise_of(expected, found), multiplications[name])
    return costs


@contextlib.contextmanager
def int8_inputs(network: nn.Module, scales: Mapping[str, np.float16]) -> Iterator[dict[str, int]]:
    """Rounds the inputs of convolutions to int8 inside the block. Yields the multiplications of their last run."""
    convs = convolutions(network)
    multiplications: dict[str, int] = {}

    def rounding(name: str) -> Callable[..., tuple[torch.Tensor]]:
        scale = float(scales[name])

        def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return ((inputs[0] / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale,)

        return hook

    def counting(name: str) -> Callable[..., None]:
        def hook(conv: nn.Conv2d, _: Any, output: torch.Tensor) -> None:
            multiplications[name] = conv.weight[0].numel() * output.numel()

        return hook

    hooks = [
        hook
        for name in scales
        for hook in (
            convs[name].register_forward_pre_hook(rounding(name)),
            convs[name].register_forward_hook(counting(name)),
        )
    ]
    try:
        yield multiplications
    finally:
        for hook in hooks:
            hook.remove()


def int8_scales(network: Any, names: Collection[str], images: Sequence[np.ndarray]) -> dict[str, np.float16]:
    """Returns the scale at which int8 reaches each convolution's largest input, by the convolution's name.

    `images` are inputs of `network`, (1, 3, S, S) float32. Inputs with only tiny values are left out.
    """
    maxima = input_maxima(network, names, images)
    scales = {name: np.float16(largest / INT8_MAX) for name, largest in maxima.items()}
    return {name: scale for name, scale in scales.items() if scale >= MIN_SCALE}


def input_maxima(network: Any, names: Collection[str], images: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns the largest magnitude of each convolution's input over `images`."""
    import torch

    convs = convolutions(network)
    maxima = dict.fromkeys(names, 0.0)

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor]) -> None:
            maxima[name] = max(maxima[name], float(inputs[0].abs().max()))

        return hook

    hooks = [convs[name].register_forward_pre_hook(keep(name)) for name in maxima]
    try:
        with torch.no_grad():
            for image in images:
                network(torch.from_numpy(image))
    finally:
        for handle in hooks:
            handle.remove()
    return maxima


def with_int8_inputs(pipeline: Any, scales: Mapping[str, np.float16]) -> Any:
    """Adds a last pass to `pipeline`, a coremltools `PassPipeline`, that rounds convolutions' inputs to int8.

    The keys of `scales` are the convolutions' names in the traced network. Passes that rename weights have to come
    later. The pass raises PackageError unless it finds every convolution.
    """
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    if PASS_NAME not in PASS_REGISTRY:
        _register()
    pipeline.append_pass(PASS_NAME)
    pipeline.set_options(PASS_NAME, {"scales": scales})
    return pipeline


def _register() -> None:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace=PASS_NAME.split("::")[0], name=PASS_NAME.split("::")[1])
    class Int8Inputs(AbstractGraphPass):
        scales: Mapping[str, np.float16] = {}

        def apply(self, prog: Any) -> None:
            round_inputs(prog, self.scales)


def round_inputs(prog: Any, scales: Mapping[str, np.float16]) -> None:
    """Inserts `quantize` and `dequantize` before convolutions of a coremltools program.

    Raises:
        PackageError: the program lacks a convolution of `scales`.
    """
    done = 0
    for function in prog.functions.values():
        with function:
            for conv in [op for op in function.operations if op.op_type == "conv"]:
                name = conv_name(conv.weight.name)
                if name in scales:
                    round_input(function, conv, f"{name}_input_{done}", scales[name])
                    done += 1
    if done != len(scales):
        raise PackageError(
            f"the program must have {len(scales)} int8 inputs, got {done}. Export with the pinned coremltools."
        )


def round_input(function: Any, conv: Any, name: str, scale: np.float16) -> None:
    """Inserts `quantize` and `dequantize` before one convolution."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - the name in its documents

    integers = mb.quantize(input=conv.x, scale=scale, output_dtype="int8", name=f"{name}_int8", before_op=conv)
    rounded = mb.dequantize(input=integers, scale=scale, name=name, before_op=conv)
    function.replace_uses_of_var_after_op(anchor_op=rounded.op, end_op=conv, old_var=conv.x, new_var=rounded)
