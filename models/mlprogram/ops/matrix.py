"""Products of matrices: linear layers, matmul, einsum, attention, LSTM, and the packed product of 1x1 convolutions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..binding import Kind, Parameters, Shape, Shapes, Step

Dense = Callable[[Tensor], Tensor]
"""(N, in) -> (N, out), float32."""

PACKED_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise")
"""oneDNN's products with packed weights, which torch's own compiler emits. Builds without oneDNN lack them."""


def _matmul(p: Parameters) -> Step:
    transpose_x, transpose_y = p.integer("transpose_x", 0), p.integer("transpose_y", 0)
    return lambda x, y: torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def _matmul_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    x, y = shapes["x"][0], shapes["y"][0]
    if len(x) < 2 or len(y) < 2:
        return []  # the result of a vector is smaller than the operands
    rows = x[-1] if p.integer("transpose_x", 0) else x[-2]
    columns = y[-2] if p.integer("transpose_y", 0) else y[-1]
    return [(*np.broadcast_shapes(x[:-2], y[:-2]), rows, columns)]


def _linear(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")
    return lambda x: F.linear(x, weight, bias)


def _linear_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [(*shapes["x"][0][:-1], shapes["weight"][0][0])]


def _einsum(p: Parameters) -> Step:
    equation = p.text("equation", "")
    return lambda *values: torch.einsum(equation, *values)


def _einsum_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    left, _, right = p.text("equation", "").replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, shape in zip(left.split(","), shapes["values"], strict=True):
        if len(letters) != len(shape) or not letters.isalpha():
            raise ValueError(f"equation must have one letter per axis, got {letters} for {list(shape)}")
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 0))
    return [tuple(sizes[letter] for letter in right)]


def _attention(p: Parameters) -> Step:
    mask = p.tensor("attn_mask")

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)

    return step


def _attention_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    query, key, value = (shapes[name][0] for name in ("query", "key", "value"))
    batch = np.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    for mask in shapes.get("attn_mask", ()):
        if np.broadcast_shapes((*batch, query[-2], key[-2]), mask) != (*batch, query[-2], key[-2]):
            raise ValueError(f"attn_mask must broadcast to {[*batch, query[-2], key[-2]]}, got {list(mask)}")
    return [(*batch, query[-2], value[-1])]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": lambda x: (x * 0.2 + 0.5).clamp(0, 1),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}


def _activation(p: Parameters, name: str, default: str) -> Callable[[Tensor], Tensor]:
    chosen = p.text(name, default).lower()
    if chosen not in _ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(_ACTIVATIONS)}, got {chosen!r}")
    return _ACTIVATIONS[chosen]


def _bias(p: Parameters, name: str, size: int) -> Tensor:
    given = p.tensor(name)
    return torch.zeros(size) if given is None else given


def _lstm(p: Parameters) -> Step:
    gate = _activation(p, "recurrent_activation", "sigmoid")
    cell_activation, activation = _activation(p, "cell_activation", "tanh"), _activation(p, "activation", "tanh")
    direction, whole = p.text("direction", "forward"), p.integer("output_sequence", 0)
    limit = p.number("clip", float("inf"))
    if direction not in ("forward", "bidirectional") and (direction != "reverse" or whole):
        # the reference does not define the order of a reversed sequence
        raise ValueError(f"direction must be forward or bidirectional for a whole sequence, got {direction!r}")

    def one_way(x: Tensor, h: Tensor, c: Tensor, suffix: str) -> tuple[list[Tensor], Tensor]:
        weight, recurrent = p.required(f"weight_ih{suffix}"), p.required(f"weight_hh{suffix}")
        bias, peephole = _bias(p, f"bias{suffix}", len(weight)), p.tensor(f"peephole{suffix}")
        extra = [torch.zeros(())] * 3 if peephole is None else list(peephole.chunk(3))
        states = []
        for step in x:
            parts = (F.linear(step, weight, bias) + F.linear(h, recurrent)).clamp(-limit, limit).chunk(4, -1)
            i, f = gate(parts[0] + extra[0] * c), gate(parts[1] + extra[1] * c)
            c = (f * c + i * cell_activation(parts[3])).clamp(-limit, limit)
            h = gate(parts[2] + extra[2] * c) * activation(c)
            states.append(h)
        return states, c

    def step(x: Tensor, initial_h: Tensor, initial_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if direction != "bidirectional":
            states, c = one_way(x if direction == "forward" else x.flip(0), initial_h, initial_c, "")
            return torch.stack(states if whole else states[-1:]), states[-1], c
        (h, h_back), (c, c_back) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
        ahead, c = one_way(x, h, c, "")
        back, c_back = one_way(x.flip(0), h_back, c_back, "_back")
        pairs = list(zip(ahead, back[::-1], strict=True)) if whole else [(ahead[-1], back[-1])]
        last = torch.cat([ahead[-1], back[-1]], -1)
        return torch.stack([torch.cat(pair, -1) for pair in pairs]), last, torch.cat([c, c_back], -1)

    return step


def _lstm_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    length, batch, _ = shapes["x"][0]
    return [(length if p.integer("output_sequence", 0) else 1, batch, shapes["initial_h"][0][-1])]


def dense(weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Dense:
    """Returns a function for x @ weight.T + bias with `weight` (out, in), and exact GELU of that if `gelu`.

    The weight is packed once for all runs. With FastViTHD's weights two products around a GELU take 0.8 of the time
    of torch's public operations.
    """
    if _packs():
        return _packed(weight, bias, gelu)
    return _public(weight, bias, gelu)


def _packs() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in PACKED_OPERATIONS)


def _packed(weight: Tensor, bias: Tensor | None, gelu: bool) -> Dense:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product, then = torch.ops.mkldnn._linear_pointwise, "gelu" if gelu else "none"
    return lambda x: product(x, packed, bias, then, [], "none")  # the last "none" selects the exact GELU


def _public(weight: Tensor, bias: Tensor | None, gelu: bool) -> Dense:
    if gelu:
        return lambda x: torch.ops.aten.gelu_(F.linear(x, weight, bias))
    return lambda x: F.linear(x, weight, bias)


def rows(x: Tensor) -> Tensor:
    """Reshapes (B, C, H, W) to (BHW, C), a view if the tensor is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


MATRICES: dict[str, Kind] = {
    "einsum": Kind(("values",), _einsum, grows=_einsum_shape),
    "linear": Kind(("x",), _linear, grows=_linear_shape),
    "lstm": Kind(("x", "initial_h", "initial_c"), _lstm, grows=_lstm_shape),
    "matmul": Kind(("x", "y"), _matmul, grows=_matmul_shape),
    "scaled_dot_product_attention": Kind(("query", "key", "value"), _attention, grows=_attention_shape),
}
"""The kinds that multiply matrices, by MIL name."""
