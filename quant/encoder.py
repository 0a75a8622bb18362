"""The encoder's convolutions in fewer bits: a scheme per weight, corrected biases, and the int8 inputs of w8a8.

Inputs are symmetric int8 with one scale per tensor, as coremltools' documents describe the engine's int8 path. Scales
reach the largest magnitude that was measured on calibration images. Clipping for the least squared error showed no gain
across networks. Zero points gained 1.4 dB on `tiny`, whose accuracy equals that of fp16 without them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.errors import PackageError
from .constexprs import conv_name
from .schemes import PALETTE_BITS, StoredWeight, store, stored_if_kept

if TYPE_CHECKING:
    from torch import Tensor, nn


Plan = Mapping[str, str]
"""The scheme of every convolution's weight, by the convolution's name in the rewritten network."""

PASS_NAME = "fastvlm::int8_inputs"

INT8_MAX = 127
"""The largest int8 level of a symmetric range."""

MIN_SCALE = 2.0**-14
"""The smallest normal float16 number. Inputs that need a smaller scale stay float16."""


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
