"""Decoder and projector as the exported folder stores them: float16, or affine in groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..models._mlx import mx
from ..models.checkpoint import Checkpoint, check_tensors, iter_float_tensors, shapes
from ..models.errors import WeightsError
from ..models.layerwise import LayerwiseDecoder, Prompt
from ..models.tensor_names import APPLE_ENCODER_PREFIX, language_shapes, saved_name
from .decoder_gptq import gptq_tensors
from .decoder_scheme import DecoderScheme


def check_language_tensors(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder's and projector's tensors, after a strict comparison with the config.

    Raises:
        WeightsError: tensors are missing, unexpected or of a wrong shape.
    """
    table = checkpoint.tensors.get("model.embed_tokens.weight")
    expected = language_shapes(checkpoint.config, embedding_rows=table.shape[0] if table else None)
    found = {
        name: shape for name, shape in shapes(checkpoint.tensors).items() if not name.startswith(APPLE_ENCODER_PREFIX)
    }
    if checkpoint.config.decoder.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # a redundant copy
    check_tensors(expected, found, "decoder")
    return expected


def saved_tensors(
    checkpoint: Checkpoint, scheme: DecoderScheme, prompts: Sequence[Prompt] = ()
) -> Iterator[tuple[str, mx.array]]:
    """(name, array) of everything that `model.safetensors` holds, in the order of the computation, one at a time.

    Quantized matrices come as three: `.weight` (uint32, packed), `.scales` and `.biases` (float16, one per group).
    `prompts` are what a scheme that `needs_calibration` is calibrated on.

    Raises:
        WeightsError: a tensor is not finite, or does not fit into float16.
    """
    apple_names = {saved_name(name): name for name in check_language_tensors(checkpoint)}

    def read(saved: str) -> mx.array:
        return _read(checkpoint, apple_names[saved])

    if scheme.is_quantized and scheme.quantizer == "gptq":
        yield from gptq_tensors(LayerwiseDecoder(read, checkpoint.config), list(apple_names), scheme, prompts)
        return
    for saved in apple_names:
        weight, layer = read(saved).astype(mx.float16), saved.removesuffix(".weight")
        if not scheme.applies_to(saved, weight.shape):
            yield saved, weight
            continue
        affine = scheme.affine(layer)
        # On the CPU, also where there is a GPU: the two need not round alike, and equal checkpoints give equal bytes.
        packed = mx.quantize(weight, group_size=affine.group_size, bits=affine.bits, stream=mx.cpu)
        yield from zip((saved, f"{layer}.scales", f"{layer}.biases"), packed, strict=True)


def _read(checkpoint: Checkpoint, name: str) -> mx.array:
    """The tensor in float32. Raises WeightsError when float16 cannot hold it."""
    ((_, values),) = iter_float_tensors(checkpoint, [name], "mlx")
    weight = mx.array(values)
    if not mx.isfinite(weight.astype(mx.float16)).all().item():
        raise WeightsError(f"{name} holds NaN, infinite values or numbers beyond float16's 65,504")
    return weight.astype(mx.float32)
