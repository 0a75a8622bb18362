"""What a bundle takes up on a phone, against what iOS gives to one app."""

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
from .contract import Contract
from .tensors import saved_tensors

DEFAULT_CONTEXT = 2048
PROMPT_TOKENS = 128
"""Of text, beside the image's, for the estimate."""
APP_BYTES = 250e6
"""The app itself, its camera frames and MLX's buffer cache (the apps keep it to 20 MB or so)."""
LIVE_RESULTS = 3
"""Of the largest results in the encoder, how many are in memory at once: input, hidden width, output."""


@dataclass(frozen=True)
class Phone:
    """What one app may take up, in bytes: measured by others, with `os_proc_available_memory` or by Xcode."""

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
    """Bytes by part, at most as far as it can be told from the files; not measured on a phone."""

    parts: Mapping[str, int]
    context: int

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def advice(self) -> tuple[str, ...]:
        return tuple(_advice(self))

    def as_dict(self) -> dict[str, Any]:
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
            "decoder": "export with --decoder-bits 4, or take a smaller model",
            "key-value cache": f"ask for less than --context {estimate.context}",
            "encoder": "export with --quant pal6 or pal4",
            "prefill": "ask for shorter prompts",
        }.get(largest, "take a smaller model")
        yield f"the largest part is the {largest}: {remedy}"


def estimate(folder: Path, contract: Contract, context: int | None = None) -> Estimate:
    """What the bundle or model folder in `folder` takes up in the client's app, with so many tokens of context.

    Raises:
        UsageError: the model has not so much context.
    """
    decoder = FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME)).decoder
    longest = decoder.max_position_embeddings
    if context is None:
        context = min(DEFAULT_CONTEXT, longest)
    if not 1 <= context <= longest:
        raise UsageError(f"--context should be from 1 to the model's {longest} tokens; found {context}")
    kept = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    tokens = context_tokens(folder, contract) + PROMPT_TOKENS
    parts = {
        "decoder": decoder_bytes(folder),
        "encoder": encoder_weight_bytes(folder),
        "encoder, running": working_bytes(folder, contract),
        "key-value cache": kept * context * contract.cache_bytes,
        # the clients compute logits at every position of the prompt
        "prefill": tokens * (decoder.vocab_size + 2 * decoder.intermediate_size) * contract.cache_bytes,
        "app": int(APP_BYTES),
    }
    return Estimate(parts, context)


def image_size(folder: Path, contract: Contract) -> int:
    return contract.image_size or FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME)).image_size


def context_tokens(folder: Path, contract: Contract) -> int:
    return (image_size(folder, contract) // PATCH_SIZE) ** 2


def decoder_bytes(folder: Path) -> int:
    files = sum(file.stat().st_size for file in weight_files(folder))
    return files if (folder / PACKAGE_NAME).is_dir() else files - encoder_weight_bytes(folder)


def encoder_weight_bytes(folder: Path) -> int:
    package = folder / PACKAGE_NAME
    if package.is_dir():
        return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    infos = [info for name, info in saved_tensors(folder).items() if name.startswith(MLX_ENCODER_PREFIX)]
    return sum(prod(info.shape) * BITS[info.dtype] // 8 for info in infos)


def working_bytes(folder: Path, contract: Contract) -> int:
    """Of results inside the encoder: the largest are stage 0's hidden ones, a quarter of the image's side."""
    size = image_size(folder, contract)
    if (folder / PACKAGE_NAME).is_dir():
        from ..package_report import inspect

        operands = inspect(folder / PACKAGE_NAME).largest_operands
        return LIVE_RESULTS * max((tensor.nbytes for tensor in operands), default=0)
    name = f"{MLX_ENCODER_PREFIX}network.0.0.convffn.fc1.weight"
    hidden = saved_tensors(folder)[name].shape[0]
    return LIVE_RESULTS * hidden * (size // 4) ** 2 * 4  # float32
