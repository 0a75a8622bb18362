"""The int8 inputs of w8a8: the choice of the convolutions that have one, and the pass that writes them.

A few inputs cause most of the noise, and they are seldom those with most arithmetic. So each is measured alone, and
those with the most noise per multiplication stay float16. `input_ranges` has the scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.errors import PackageError
from .constexprs import conv_name
from .encoder import convolutions
from .input_ranges import INT8_MAX, INT8_MIN, InputRange
from .search import noises_of, outputs, partial_outputs

if TYPE_CHECKING:
    import torch
    from torch import nn

PASS_NAME = "fastvlm::int8_inputs"

MAX_NOISE = 3.0
"""The noise of int8 inputs as a multiple of the noise of int8 weights and float16 results, above which inputs stay
float16. Both together are 6 dB below int8. Apple's rule of thumb for w8a8 is 6 to 8 dB, and on other images it was up
to 2 dB more."""

MAX_FLOAT16_SHARE = 0.7
"""The most of the multiplications of the candidates that may stay float16, because w8a8 is chosen for its speed.

At 0.6 `random:0.5b` was 8.6 dB below int8 on photographs, and at two thirds 8.1 dB.
"""


@dataclass(frozen=True)
class InputCost:
    """One int8 input: the noise that it adds to the output, and the arithmetic that it makes int8."""

    noises: np.ndarray
    """The noise of each image's output, relative to its energy, with this input alone in int8 (images,)."""
    multiplications: int


def chosen_inputs(costs: Mapping[str, InputCost], limits: np.ndarray) -> list[str]:
    """Returns the names of the inputs that become int8. Those with the most noise per multiplication stay float16.

    The noises of inputs add up, as their rounding errors are independent. They may reach `limits` (images,), each image
    for itself: a noisy kind of images would hide behind the energy of another. At most `MAX_FLOAT16_SHARE` of the
    multiplications stay float16, also if the noise is larger then.
    """
    noises = sum((cost.noises for cost in costs.values()), np.zeros(len(limits)))
    room = MAX_FLOAT16_SHARE * sum(cost.multiplications for cost in costs.values())
    left: list[str] = []

    def price(name: str) -> float:
        return float((costs[name].noises / limits).max()) / costs[name].multiplications

    for name in sorted(costs, key=price, reverse=True):
        if (noises > limits).any() and costs[name].multiplications <= room:
            room -= costs[name].multiplications
            noises = noises - costs[name].noises
            left.append(name)
    for name in sorted(left, key=lambda name: -costs[name].multiplications):  # a later one can make it unnecessary
        if (noises + costs[name].noises <= limits).all():
            noises = noises + costs[name].noises
            left.remove(name)
    return [name for name in costs if name not in left]


def input_costs(
    network: nn.Sequential, ranges: Mapping[str, InputRange], images: Sequence[np.ndarray]
) -> dict[str, InputCost]:
    """Measures each int8 input of `ranges` alone, on `images` (1, 3, S, S) float32.

    Each takes a run per image of the layers from the convolution on. `images` may be smaller than the encoder's input.
    """
    prefixes = [list(partial_outputs(network, image)) for image in images]
    expected = [found[-1].numpy() for found in prefixes]
    costs = {}
    for name, chosen in ranges.items():
        part = int(name.split(".")[0])
        with int8_inputs(network, {name: chosen}) as multiplications:
            found = [outputs(network[part:], prefix[part]) for prefix in prefixes]
        costs[name] = InputCost(noises_of(expected, found), multiplications[name])
    return costs


@contextlib.contextmanager
def int8_inputs(network: nn.Module, ranges: Mapping[str, InputRange]) -> Iterator[dict[str, int]]:
    """Rounds the inputs of convolutions to int8 inside the block. Yields the multiplications of their last run."""
    convs = convolutions(network)
    multiplications: dict[str, int] = {}

    def rounding(name: str) -> Callable[..., tuple[torch.Tensor]]:
        scale, zero = float(ranges[name].scale), ranges[name].zero_point

        def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            levels = ((inputs[0] / scale).round() + zero).clamp(INT8_MIN, INT8_MAX)
            return ((levels - zero) * scale,)

        return hook

    def counting(name: str) -> Callable[..., None]:
        def hook(conv: nn.Conv2d, _: Any, output: torch.Tensor) -> None:
            multiplications[name] = conv.weight[0].numel() * output.numel()

        return hook

    hooks = [
        hook
        for name in ranges
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


def with_int8_inputs(pipeline: Any, ranges: Mapping[str, InputRange]) -> Any:
    """Adds a last pass to `pipeline`, a coremltools `PassPipeline`, that rounds convolutions' inputs to int8.

    The keys of `ranges` are the convolutions' names in the traced network. Passes that rename weights have to come
    later. The pass raises PackageError unless it finds every convolution.
    """
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    if PASS_NAME not in PASS_REGISTRY:
        _register()
    pipeline.append_pass(PASS_NAME)
    pipeline.set_options(PASS_NAME, {"ranges": ranges})
    return pipeline


def _register() -> None:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace=PASS_NAME.split("::")[0], name=PASS_NAME.split("::")[1])
    class Int8Inputs(AbstractGraphPass):
        ranges: Mapping[str, InputRange] = {}

        def apply(self, prog: Any) -> None:
            round_inputs(prog, self.ranges)


def round_inputs(prog: Any, ranges: Mapping[str, InputRange]) -> None:
    """Inserts `quantize` and `dequantize` before convolutions of a coremltools program.

    Raises:
        PackageError: the program lacks a convolution of `ranges`.
    """
    done = 0
    for function in prog.functions.values():
        with function:
            fold_gains(function)
            for conv in [op for op in function.operations if op.op_type == "conv"]:
                name = conv_name(conv.weight.name)
                if name in ranges:
                    round_input(function, conv, f"{name}_input_{done}", ranges[name])
                    done += 1
    if done != len(ranges):
        raise PackageError(
            f"the program must have {len(ranges)} int8 inputs, got {done}. Export with the pinned coremltools."
        )


def round_input(function: Any, conv: Any, name: str, chosen: InputRange) -> None:
    """Inserts `quantize` and `dequantize` before one convolution."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - the name in its documents

    levels: dict[str, Any] = {"scale": chosen.scale}
    if chosen.zero_point:
        levels["zero_point"] = np.int8(chosen.zero_point)
    integers = mb.quantize(input=conv.x, **levels, output_dtype="int8", name=f"{name}_int8", before_op=conv)
    rounded = mb.dequantize(input=integers, **levels, name=name, before_op=conv)
    function.replace_uses_of_var_after_op(anchor_op=rounded.op, end_op=conv, old_var=conv.x, new_var=rounded)


def fold_gains(function: Any) -> None:
    """Makes the products of layer norms with constants their gains, which is one operation fewer for each."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - the name in its documents

    for product in [op for op in function.operations if op.op_type == "mul"]:
        norm, gain = product.x.op, product.y.val
        if norm is None or norm.op_type != "layer_norm" or gain is None or norm.gamma is not None:
            continue
        folded = mb.layer_norm(
            x=norm.x,
            axes=norm.axes.val,
            gamma=gain.reshape(-1),
            epsilon=norm.epsilon.val,
            name=f"{norm.name}_evened",
            before_op=product,
        )
        function.replace_uses_of_var_after_op(anchor_op=folded.op, old_var=product.outputs[0], new_var=folded)
        function.remove_ops([product])
        if not norm.outputs[0].child_ops:
            function.remove_ops([norm])
