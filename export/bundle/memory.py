"""The memory of a bundle on a phone, compared with the limit of iOS for one app."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...models.config import PATCH_SIZE, FastVLMConfig
from ...models.errors import UsageError
from ...models.files import read_json_object
from ...models.folder_layout import CONFIG_NAME, PACKAGE_NAME, weight_files
from ...models.safetensors_files import BITS
from ...models.tensor_names import MLX_ENCODER_PREFIX
from .contracts import Contract
from .tensors import saved_tensors

DEFAULT_CONTEXT = 2048
"""The tokens of context in an estimate without `context`."""

PROMPT_TOKENS = 128
"""The tokens of text in the estimated prompt, besides the image's."""

APP_BYTES = 250e6
"""The bytes of the app itself, its camera frames, and MLX's buffer cache, which the apps limit to about 20 MB."""

LIVE_RESULTS = 3
"""The number of the encoder's largest results in memory at one time: input, hidden width, output."""


@dataclass(frozen=True)
class Phone:
    """The bytes that one app may use on a phone, from published measurements (`os_proc_available_memory` or Xcode)."""

    ram: str
    examples: str
    limit_bytes: float
    entitled_bytes: float
    """With the entitlement com.apple.developer.kernel.increased-memory-limit."""
    source: str


PHONES = (
    Phone("4 GB", "iPhone 12 mini", 2.1e9, 2.4e9, "https://github.com/allenai/OLMoE.swift/pull/38"),
    Phone("6 GB", "iPhone 13 Pro", 3.12e9, 4.2e9, "https://github.com/a-ghorbani/pocketpal-ai/pull/651"),
    Phone("8 GB", "iPhone 15 Pro", 3.0e9, 6.0e9, "https://github.com/introlab/rtabmap/pull/1446"),
)


@dataclass(frozen=True)
class Estimate:
    """An upper estimate of the bytes by part, from the files. It was not measured on a phone."""

    parts: Mapping[str, int]
    context: int

    @property
    def total_bytes(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())

    @property
    def advice(self) -> tuple[str, ...]:
        """The phones with too little memory, and what would help, one line each."""
        return tuple(_advice(self))

    def as_dict(self) -> dict[str, Any]:
        """Returns the estimate as it is printed with `--json`."""
        phones = [
            {
                "ram": phone.ram,
                "examples": phone.examples,
                "limit_bytes": int(phone.limit_bytes),
                "entitled_bytes": int(phone.entitled_bytes),
                "fits": self.total_bytes <= phone.limit_bytes,
                "fits_entitled": self.total_bytes <= phone.entitled_bytes,
                "source": phone.source,
            }
            for phone in PHONES
        ]
        return {
            "parts": dict(self.parts),
            "total_bytes": self.total_bytes,
            "context": self.context,
            "phones": phones,
            "advice": list(self.advice),
        }


def _advice(estimate: Estimate) -> Iterator[str]:
    for phone in PHONES:
        if estimate.total_bytes <= phone.limit_bytes:
            continue
        if estimate.total_bytes <= phone.entitled_bytes:
            yield f"{phone.ram} ({phone.examples}): only with the entitlement increased-memory-limit"
        else:
            yield f"{phone.ram} ({phone.examples}): will not fit"
    if estimate.total_bytes > PHONES[-1].limit_bytes:
        parts = estimate.parts
        largest = max(parts, key=lambda name: parts[name])
        remedy = {
            "decoder": "export the decoder with 4 bits, or use a smaller model",
            "key-value cache": f"use a context of less than {estimate.context} tokens",
            "encoder": "export the encoder as pal6 or pal4",
            "prefill": "use shorter prompts",
        }.get(largest, "use a smaller model")
        yield f"the largest part is the {largest}: {remedy}"


def estimate(folder: Path, contract: Contract, context: int | None = None) -> Estimate:
    """Estimates the memory of a bundle or model folder in the client's app, with `context` tokens of context.

    Raises:
        UsageError: `context` is more than the model's limit.
    """
    decoder = FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME)).decoder
    longest = decoder.max_position_embeddings
    if context is None:
        context = min(DEFAULT_CONTEXT, longest)
    if not 1 <= context <= longest:
        raise UsageError(f"context must be between 1 and the model's {longest} tokens (got {context}).", "context")
    kept = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    tokens = image_tokens(folder, contract) + PROMPT_TOKENS
    parts = {
        "decoder": decoder_bytes(folder),
        "encoder": encoder_weight_bytes(folder),
        "encoder, running": working_bytes(folder, contract),
        "key-value cache": kept * context * contract.cache_bytes,
        # the clients compute logits for every position of the prompt
        "prefill": tokens * (decoder.vocab_size + 2 * decoder.intermediate_size) * contract.cache_bytes,
        "app": int(APP_BYTES),
    }
    return Estimate(parts, context)


def image_size(folder: Path, contract: Contract) -> int:
    """Returns the side of the encoder's input in pixels."""
    return contract.image_size or FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME)).image_size


def image_tokens(folder: Path, contract: Contract) -> int:
    """Returns the number of tokens of one image."""
    return (image_size(folder, contract) // PATCH_SIZE) ** 2


def decoder_bytes(folder: Path) -> int:
    """Returns the bytes of the decoder's and the projector's weights."""
    files = sum(file.stat().st_size for file in weight_files(folder))
    return files if (folder / PACKAGE_NAME).is_dir() else files - encoder_weight_bytes(folder)


def encoder_weight_bytes(folder: Path) -> int:
    """Returns the bytes of the encoder's package, or of its tensors in MLX."""
    package = folder / PACKAGE_NAME
    if package.is_dir():
        return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    infos = [info for name, info in saved_tensors(folder).items() if name.startswith(MLX_ENCODER_PREFIX)]
    return sum(prod(info.shape) * BITS[info.dtype] // 8 for info in infos)


def working_bytes(folder: Path, contract: Contract) -> int:
    """Returns the bytes of the largest results inside the encoder: stage 0's hidden ones, at a quarter of the side."""
    size = image_size(folder, contract)
    if (folder / PACKAGE_NAME).is_dir():
        from ..inspect_package import inspect

        operands = inspect(folder / PACKAGE_NAME).largest_operands
        return LIVE_RESULTS * max((tensor.nbytes for tensor in operands), default=0)
    name = f"{MLX_ENCODER_PREFIX}network.0.0.convffn.fc1.weight"
    hidden = saved_tensors(folder)[name].shape[0]
    return LIVE_RESULTS * hidden * (size // 4) ** 2 * 4  # float32
