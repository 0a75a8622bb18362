"""The decoder and projector weights of an exported folder: float16, or affine in groups."""

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
    """Compares the decoder's and projector's tensors with the config, and returns their names and shapes.

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
    """Yields (name, array) of every tensor of `model.safetensors`, one at a time in the order of the computation.

    A quantized matrix becomes three tensors: `.weight` (uint32, packed), `.scales` and `.biases` (float16, one per
    group). `prompts` are the calibration prompts of a scheme that `needs_calibration`.

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
    """Reads a tensor in float32. Raises WeightsError if float16 cannot represent it."""
    ((_, values),) = iter_float_tensors(checkpoint, [name], "mlx")
    weight = mx.array(values)
    if not mx.isfinite(weight.astype(mx.float16)).all().item():
        raise WeightsError(
            f"{name} holds NaN, infinite values or numbers beyond float16's 65,504. Check the checkpoint."
        )
    return weight.astype(mx.float32)
