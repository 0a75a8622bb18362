"""Whether a folder is what a client demands, read back from its files alone."""

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
from .contract import Contract
from .targets import OPTIONAL_FILES, contract_for
from .tensors import tensor_faults

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
"""What the clients' prompts are written with."""

IMAGE_PART = re.compile(r"""['"]image['"]""")


@dataclass(frozen=True)
class BundleCheck:
    """What a client would make of a folder."""

    folder: Path
    target: str
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "target": self.target, "passed": self.passed, "faults": list(self.faults)}


def check_bundle(folder: str | Path, target: str) -> BundleCheck:
    """Judges a folder, whoever made it, by the contract of `target`.

    Raises:
        UsageError: no such target.
        ModelFolderError: there is no such folder.
    """
    folder, contract = Path(folder).expanduser(), contract_for(target)
    if not folder.is_dir():
        what = "is a zip file: unzip it first" if zipfile.is_zipfile(folder) else "is not a folder"
        raise ModelFolderError(f"{folder} {what}; --check takes a bundle's folder")
    return BundleCheck(folder, target, tuple(bundle_faults(folder, contract)))


def bundle_faults(folder: Path, contract: Contract) -> Iterator[str]:
    """Everything in which `folder` differs from the contract, each in one line."""
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
        return  # what follows reads these keys
    config = files[CONFIG_NAME]
    for fault in contract.decoder_faults(config):
        yield f"config.json: the client cannot load the decoder, {fault}"
    yield from pixel_faults(files["preprocessor_config.json"], config, contract)
    yield from tensor_faults(folder, config, contract)
    yield from tokenizer_faults(folder, files["tokenizer_config.json"], config, contract)
    if contract.layout == "apple":
        yield from package_faults(folder / PACKAGE_NAME, contract)


def pixel_faults(preprocessor: Mapping[str, Any], config: Mapping[str, Any], contract: Contract) -> Iterator[str]:
    """The square that images become has to be the one that the encoder takes; its features as wide as the client's."""
    size = contract.image_size or config["vision_config"]["image_size"]
    if contract.channels and config["mm_hidden_size"] != contract.channels:
        yield f"config.json: 'mm_hidden_size' should be {contract.channels}; found {config['mm_hidden_size']}"
    found = {
        "size.shortest_edge": preprocessor["size"]["shortest_edge"],
        "crop_size.width": preprocessor["crop_size"]["width"],
        "crop_size.height": preprocessor["crop_size"]["height"],
    }
    for key, value in found.items():
        if value != size:
            yield f"preprocessor_config.json: {key!r} should be {size}; found {value}"


def tokenizer_faults(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], contract: Contract
) -> Iterator[str]:
    """Control tokens, the image's id, the end of an answer, the chat template."""
    try:
        tokenizer = read_json_object(folder / "tokenizer.json", ModelFolderError)
        ids = added_ids(tokenizer)
    except ModelFolderError as reason:
        yield str(reason)
        return
    for token in CONTROL_TOKENS:
        if token not in ids:
            yield f"tokenizer.json: {token} should be an added token"
    for token, token_id in ids.items():
        if token_id >= config["vocab_size"]:
            rows = config["vocab_size"]
            yield f"tokenizer.json: {token} has the id {token_id}, past the {rows} rows of the embeddings"
    yield from end_faults(settings, ids, config)
    if contract.layout == "apple" and ids.get(IMAGE_TOKEN) != config["image_token_index"]:
        yield (
            f"config.json: 'image_token_index' should be the id of {IMAGE_TOKEN} in tokenizer.json, "
            f"{ids.get(IMAGE_TOKEN)}; found {config['image_token_index']}"
        )
    if contract.templated:
        yield from template_faults(settings["chat_template"])


def added_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Id of each added token. Raises ModelFolderError when they are malformed."""
    added, model = tokenizer.get("added_tokens"), tokenizer.get("model")
    whole = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
        for token in added
    )
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not whole or not isinstance(added, list) or not isinstance(vocab, dict):
        raise ModelFolderError("tokenizer.json should have 'added_tokens' with ids and a 'model' with a 'vocab'")
    return {token["content"]: token["id"] for token in added}


def end_faults(settings: Mapping[str, Any], ids: Mapping[str, int], config: Mapping[str, Any]) -> Iterator[str]:
    """The clients end an answer at the tokenizer's `eos_token`."""
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if not isinstance(token, str) or token not in ids:
        yield f"tokenizer_config.json: 'eos_token' should be an added token of tokenizer.json; found {token!r:.60}"
    elif ends != [None] and ids[token] not in ends:
        yield f"tokenizer_config.json: 'eos_token' has the id {ids[token]}, config.json's eos_token_id is {ends}"


def template_faults(template: str) -> Iterator[str]:
    """Messages come in parts, of type image and text. Nothing is run: a stranger may have written the template."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment().parse(template)
    except (TemplateSyntaxError, RecursionError) as reason:
        yield f"tokenizer_config.json: 'chat_template' is no template: {reason}"
        return
    if IMAGE_TOKEN not in template or not IMAGE_PART.search(template):
        yield (
            f"tokenizer_config.json: 'chat_template' should write {IMAGE_TOKEN} for parts of type 'image'; the client "
            "hands it messages in parts"
        )


def package_faults(package: Path, contract: Contract) -> Iterator[str]:
    """The app compiles `fastvithd` and asserts types and shapes at its border."""
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
            yield f"{package.name}: the {what} should be {name} {dtype} {list(shape)}; found {', '.join(found)}{image}"
