"""Decoders that mlx-lm quantizes: plain rounding, and its learned quantizations on the calibration texts of an export.

Their functions are called as their commands call them, with these texts in rows of 128 tokens. The tied table
has the bits and groups of the matrices, but in `gptq-table-6`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np

from fastvlm.models._mlx import mx, nn, on_cpu
from fastvlm.models.layerwise import Prompt
from fastvlm.models.quantization import Affine, Quantization
from fastvlm.models.tensor_names import saved_name

GROUP_SIZE = 64
ROW_TOKENS = 128
DECODER = "language_model."
"""The prefix of the decoder's saved names, which mlx-lm's names do not have."""

DWQ_STEPS = 48
DWQ_RATE = 1e-5
"""The steps of training and their learning rate. mlx-lm's command makes 512 at 1e-6, on texts that do not repeat."""

DWQ_BATCH, DWQ_LONGEST, DWQ_SEED = 4, 1025, 123
"""The defaults of mlx-lm's command."""


def mlx_lm_decoder(
    checkpoint: Any, prompts: Sequence[Prompt], bits: int, quantizer: str
) -> tuple[dict[str, mx.array], Quantization]:
    """Returns the tensors of the checkpoint's decoder in float16 and packed words, and their quantization."""
    from mlx.utils import tree_flatten

    own = {saved_name(name): mx.array(checkpoint.read(name, "mlx")) for name in checkpoint.tensors}
    kept = {name: array.astype(mx.float16) for name, array in own.items() if not name.startswith(DECODER)}
    weights = [(name.removeprefix(DECODER), array) for name, array in own.items() if name not in kept]
    with expanded_products():
        model = QUANTIZERS[quantizer](_model(checkpoint.config.decoder, weights), prompts, bits)
    model.set_dtype(mx.float16)
    found = {DECODER + name: array for name, array in tree_flatten(model.parameters())}
    widths = {DECODER + name: module.bits for name, module in model.named_modules() if hasattr(module, "bits")}
    odd = {name: Affine(GROUP_SIZE, width) for name, width in widths.items() if width != bits}
    return {**kept, **found}, Quantization(Affine(GROUP_SIZE, bits), odd)


def _model(decoder: Any, weights: list[tuple[str, mx.array]]) -> nn.Module:
    from mlx_lm.models import qwen2

    fields = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps",
              "vocab_size", "num_key_value_heads", "rope_theta", "tie_word_embeddings")  # fmt: skip
    model = qwen2.Model(qwen2.ModelArgs(model_type="qwen2", **{name: getattr(decoder, name) for name in fields}))
    model.load_weights(weights)
    return model


def _rtn(model: nn.Module, prompts: Sequence[Prompt], bits: int) -> nn.Module:
    from mlx_lm.utils import quantize_model

    model.set_dtype(mx.float16)
    return quantize_model(model, {"model_type": "qwen2"}, GROUP_SIZE, bits)[0]


def _gptq(model: nn.Module, prompts: Sequence[Prompt], bits: int, table_bits: int | None = None) -> nn.Module:
    from mlx_lm.quant.gptq import gptq_quantize

    return gptq_quantize(model, _rows(prompts), bits, GROUP_SIZE, table_bits or bits, GROUP_SIZE)[0]


def _awq(model: nn.Module, prompts: Sequence[Prompt], bits: int) -> nn.Module:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    awq_quantize(model, _rows(prompts), AWQ_MODEL_CONFIGS["qwen2"], GROUP_SIZE, bits, GROUP_SIZE, bits)
    return model


def _dwq(model: nn.Module, prompts: Sequence[Prompt], bits: int) -> nn.Module:
    """Trains scales, biases and norms in float32, where mlx-lm's command has bfloat16."""
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    student, _ = quantize_model(copy.deepcopy(model), {"model_type": "qwen2"}, GROUP_SIZE, bits)
    seen: dict[bytes, mx.array] = {}

    def targets(batch: mx.array, index: int, split: str) -> mx.array:
        key = np.array(batch).tobytes()
        if key not in seen:
            seen[key] = model(batch)
        return seen[key]

    rows = [(row, 0) for row in _rows(prompts).tolist()]
    training = list(islice(cycle(rows), DWQ_STEPS * DWQ_BATCH))
    optimizer = Adam(DWQ_RATE, bias_correction=True)
    dwq_quantize(
        student, targets, optimizer, training, rows[:DWQ_BATCH], DWQ_BATCH, DWQ_LONGEST, DWQ_SEED, dtype=mx.float32
    )
    return student


QUANTIZERS: dict[str, Callable[[nn.Module, Sequence[Prompt], int], nn.Module]] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "gptq-table-6": partial(_gptq, table_bits=6),
    "awq": _awq,
    "dwq": _dwq,
}
"""The functions by name. With `gptq-table-6` the tied table has 6 bits, the default of mlx-lm's command."""


def _rows(prompts: Sequence[Prompt]) -> mx.array:
    ids = [token for prompt in prompts for token in (*prompt.before, *prompt.after)]
    return mx.array(ids[: len(ids) // ROW_TOKENS * ROW_TOKENS]).reshape(-1, ROW_TOKENS)


@contextmanager
def expanded_products() -> Iterator[None]:
    """Expands quantized matrices before a product on a CPU, where MLX's own product takes some 20 times as long."""

    def product(self: Any, x: mx.array) -> mx.array:
        weight = mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)
        return x @ weight.T + self.get("bias", 0.0)

    saved = nn.QuantizedLinear.__call__, nn.QuantizedEmbedding.as_linear
    if on_cpu():
        nn.QuantizedLinear.__call__ = nn.QuantizedEmbedding.as_linear = product
    try:
        yield
    finally:
        nn.QuantizedLinear.__call__, nn.QuantizedEmbedding.as_linear = saved
