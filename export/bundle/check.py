"""The validation of a bundle against a client's contract, from its files alone."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import FastVLMError, ModelFolderError
from ...models.files import read_json_object
from ...models.folder_layout import CONFIG_NAME, INPUT_NAME, OUTPUT_NAME, PACKAGE_NAME
from ...models.tokenizer_files import IMAGE_TOKEN
from .contracts import OPTIONAL_FILES, Contract, contract_for
from .tensors import tensor_faults

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
"""The tokens in the clients' prompts."""

IMAGE_PART = re.compile(r"""['"]image['"]""")
"""The type of an image's part, as a chat template compares it."""


@dataclass(frozen=True)
class BundleCheck:
    """The faults of a folder for one client."""

    folder: Path
    client: str
    faults: tuple[str, ...]
    """The reasons why the client cannot load it, one line each."""

    @property
    def passed(self) -> bool:
        """True if the client can load the folder."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is printed with `--json`."""
        return {"folder": str(self.folder), "target": self.client, "passed": self.passed, "faults": list(self.faults)}


def check_bundle(folder: str | Path, client: str) -> BundleCheck:
    """Validates a folder, which may come from another tool, against the contract of `client`.

    Raises:
        UsageError: the client is unknown.
        ModelFolderError: the folder does not exist.
    """
    folder, contract = Path(folder).expanduser(), contract_for(client)
    if not folder.is_dir():
        zipped = zipfile.is_zipfile(folder)
        raise ModelFolderError(f"{folder} is a zip file. Unzip it first." if zipped else f"{folder} is not a folder.")
    return BundleCheck(folder, client, tuple(bundle_faults(folder, contract)))


def bundle_faults(folder: Path, contract: Contract) -> Iterator[str]:
    """Yields each difference between `folder` and the contract, in one line."""
    files: dict[str, Mapping[str, Any]] = {}
    faulty = False
    for name, rules in contract.rules.items():
        if name in OPTIONAL_FILES and not (folder / name).exists():
            continue
        try:
            files[name] = read_json_object(folder / name, ModelFolderError)
        except ModelFolderError as reason:
            faulty = True
            yield str(reason)
            continue
        for rule in rules:
            for fault in rule.faults(files[name], name):
                faulty = True
                yield fault
    if faulty:
        return  # the checks below read these keys
    config = files[CONFIG_NAME]
    for fault in contract.decoder_faults(config):
        yield f"config.json: the client cannot load the decoder, because {fault}"
    yield from pixel_faults(files["preprocessor_config.json"], config, contract)
    yield from tensor_faults(folder, config, contract)
    yield from tokenizer_faults(folder, files["tokenizer_config.json"], config, contract)
    if contract.encoder == "coreml":
        yield from package_faults(folder / PACKAGE_NAME, contract)


def pixel_faults(preprocessor: Mapping[str, Any], config: Mapping[str, Any], contract: Contract) -> Iterator[str]:
    """Yields the differences between the preprocessed image, the encoder's input, and the width of its features."""
    size = contract.image_size or config["vision_config"]["image_size"]
    if contract.channels and config["mm_hidden_size"] != contract.channels:
        yield f"config.json: 'mm_hidden_size' must be {contract.channels} (got {config['mm_hidden_size']})"
    found = {
        "size.shortest_edge": preprocessor["size"]["shortest_edge"],
        "crop_size.width": preprocessor["crop_size"]["width"],
        "crop_size.height": preprocessor["crop_size"]["height"],
    }
    for key, value in found.items():
        if value != size:
            yield f"preprocessor_config.json: {key!r} must be {size} (got {value})"


def tokenizer_faults(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], contract: Contract
) -> Iterator[str]:
    """Yields the faults of the control tokens, the image's id, the end of an answer, and the chat template."""
    try:
        tokenizer = read_json_object(folder / "tokenizer.json", ModelFolderError)
        ids = added_ids(tokenizer)
    except ModelFolderError as reason:
        yield str(reason)
        return
    for token in CONTROL_TOKENS:
        if token not in ids:
            yield f"tokenizer.json: {token} must be an added token"
    for token, token_id in ids.items():
        if token_id >= config["vocab_size"]:
            rows = config["vocab_size"]
            yield f"tokenizer.json: the id of {token} must be less than {rows}, the vocab_size (got {token_id})"
    yield from end_faults(settings, ids, config)
    if contract.encoder == "coreml" and ids.get(IMAGE_TOKEN) != config["image_token_index"]:
        yield (
            f"config.json: 'image_token_index' must be the id of {IMAGE_TOKEN} in tokenizer.json, "
            f"{ids.get(IMAGE_TOKEN)} (got {config['image_token_index']})"
        )
    if contract.templated:
        yield from template_faults(settings["chat_template"])


def added_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Returns the id of each added token. Raises ModelFolderError if they are malformed."""
    added, model = tokenizer.get("added_tokens"), tokenizer.get("model")
    whole = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
        for token in added
    )
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not whole or not isinstance(added, list) or not isinstance(vocab, dict):
        raise ModelFolderError("tokenizer.json must have 'added_tokens' with ids and a 'model' with a 'vocab'.")
    return {token["content"]: token["id"] for token in added}


def end_faults(settings: Mapping[str, Any], ids: Mapping[str, int], config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the faults of the tokenizer's `eos_token`, at which clients end an answer."""
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if not isinstance(token, str) or token not in ids:
        yield f"tokenizer_config.json: 'eos_token' must be an added token of tokenizer.json (got {token!r:.60})"
    elif ends != [None] and ids[token] not in ends:
        yield f"tokenizer_config.json: the id of 'eos_token' must be in eos_token_id, {ends} (got {ids[token]})"


def template_faults(template: str) -> Iterator[str]:
    """Yields the faults of a template for messages in parts. It is untrusted, so it is parsed but not run."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment().parse(template)
    except (TemplateSyntaxError, RecursionError) as reason:
        yield f"tokenizer_config.json: 'chat_template' is not a valid template ({reason})"
        return
    if IMAGE_TOKEN not in template or not IMAGE_PART.search(template):
        yield (
            f"tokenizer_config.json: 'chat_template' must write {IMAGE_TOKEN} for parts of type 'image', because the "
            "client passes messages in parts"
        )


def package_faults(package: Path, contract: Contract) -> Iterator[str]:
    """Yields the faults of the package's input and output, whose types and shapes the app asserts."""
    from ...models.mlprogram import read_package

    try:
        program = read_package(package)
    except FastVLMError as reason:
        yield str(reason)
        return
    size = contract.image_size or 0
    wanted = {
        "input": (INPUT_NAME, "fp32", (1, 3, size, size)),
        "output": (OUTPUT_NAME, "fp32", (1, (size // 64) ** 2, contract.channels)),
    }
    for what, tensors in (("input", program.inputs), ("output", program.outputs)):
        name, dtype, shape = wanted[what]
        found = [f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors]
        image = f", as an image ({program.image_inputs[name]})" if name in program.image_inputs else ""
        if [(t.name, t.dtype, tuple(t.shape)) for t in tensors] != [wanted[what]] or (what == "input" and image):
            yield f"{package.name}: the {what} must be {name} {dtype} {list(shape)} (got {', '.join(found)}{image})"
