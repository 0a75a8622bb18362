"""What reads files from strangers, each with a real file to damage and a way to damage it."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import mutators

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Parser:
    """`read(folder)` reads what stands in a folder in which `files` are damaged, one of them at a time."""

    name: str
    files: dict[str, tuple[bytes, Damage]]
    read: Callable[[Path], Any]
    fixed: Path | None = None
    """A folder whose files lie beside the damaged one."""
    share: float = 1.0
    """Of the cases that a parser gets on average."""

    def prepare(self, folder: Path) -> None:
        """The whole files, in a new `folder`."""
        folder.mkdir(parents=True)
        if self.fixed is not None:
            shutil.copytree(self.fixed, folder, dirs_exist_ok=True)
        for name, (content, _) in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def damage(self, folder: Path, seed: int) -> str:
        """Damages one file and returns its name; `restore` mends it."""
        rng = random.Random(f"{self.name} {seed}")
        name = rng.choice(sorted(self.files))
        content, damage = self.files[name]
        (folder / name).write_bytes(damage(content, rng))
        return name

    def restore(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(self.files[name][0])


def read_weights(folder: Path) -> None:
    from fastvlm.models._mlx import mx
    from fastvlm.models.checkpoint import load_lazily
    from fastvlm.models.safetensors_header import read_header

    read_header(folder / "model.safetensors")
    mx.eval(list(load_lazily(folder / "model.safetensors").values()))


def read_checkpoint(folder: Path) -> None:
    from fastvlm.models.checkpoint import FolderCheckpoint

    FolderCheckpoint(folder)


def read_tokenizer(folder: Path) -> None:
    from fastvlm.export.tokenizer import export_tokenizer
    from fastvlm.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("What is <|im_start|> in the picture?  \n" * 20)
    tokenizer.decode(ids)
    export_tokenizer({path.name: path.read_bytes() for path in folder.iterdir()})


def read_template(folder: Path) -> None:
    from fastvlm.runtime.prompt import Message, PromptEncoder
    from fastvlm.runtime.tokenizer import Tokenizer

    encoder = PromptEncoder(folder, Tokenizer(folder), 1)
    encoder.encode([Message("system", "S"), Message("user", "Question", 1)])


def read_package(folder: Path) -> None:
    from fastvlm.models.mlprogram import Executor, read_package

    program = read_package(folder / "fastvithd.mlpackage")
    executor = Executor(program)
    executor.run({tensor.name: np.zeros(tensor.shape, np.float32) for tensor in program.inputs})


def read_image(folder: Path) -> None:
    from fastvlm.models.images import open_image, preprocess

    (path,) = [path for path in folder.iterdir() if path.name == "image"]
    preprocess(open_image(path), 256, "pad")


def read_recipe(folder: Path) -> None:
    from fastvlm.quant.recipe import read_recipe

    read_recipe(folder / "fastvlm.json")


def read_manifest(folder: Path) -> None:
    from fastvlm.runtime.folder import open_folder

    open_folder(folder)


def read_bench(folder: Path) -> None:
    from fastvlm.runtime.benchmark.reading import read_benchmark

    read_benchmark(folder / "bench.json")


def read_zip(folder: Path) -> None:
    from fastvlm.models.download.unpack import unpack

    shutil.rmtree(folder / "to", ignore_errors=True)
    (folder / "to").mkdir()
    unpack(folder / "checkpoint.zip", folder / "to", lambda name: True)


def image_parsers() -> list[Parser]:
    """Small pictures in every format that Pillow decodes here."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    many = {"save_all": True, "append_images": [picture]}
    variants: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "PNG": (picture, {}),
        "PNG palette": (picture.convert("P"), {}),
        "PNG 16 bits": (Image.fromarray(np.zeros((9, 9), np.uint16)), {}),
        "JPEG": (picture, {}),
        "JPEG CMYK": (picture.convert("CMYK"), {}),
        "JPEG progressive": (picture, {"progressive": True}),
        "GIF animated": (picture, many),
        "WEBP": (picture, {}),
        "WEBP animated": (picture, many),
        "TIFF": (picture, {"compression": "tiff_lzw"}),
        **{name: (picture, {}) for name in ("BMP", "PPM", "ICO", "AVIF", "JPEG2000")},
    }
    parsers = []
    for name, (image, options) in variants.items():
        stream = io.BytesIO()
        try:
            image.save(stream, format=name.split()[0], **options)
        except (KeyError, OSError):  # this Pillow was built without
            continue
        files = {"image": (stream.getvalue(), mutators.damaged_bytes)}
        parsers.append(Parser(f"image {name}", files, read_image, share=0.25))
    return parsers


def parsers(model: Path, checkpoint: Path, extra: Path) -> list[Parser]:
    """All of them, on an exported `model` folder, a source `checkpoint`, and `extra` files (a benchmark, a zip)."""

    def damaged(damage: Damage, root: Path, *names: str) -> dict[str, tuple[bytes, Damage]]:
        return {name: ((root / name).read_bytes(), damage) for name in names}

    tokenizer = damaged(mutators.damaged_json, model, "tokenizer.json", "tokenizer_config.json")
    template = json.loads(tokenizer["tokenizer_config.json"][0])["chat_template"].encode()
    package = "fastvithd.mlpackage/Data/com.apple.CoreML"
    package_files = {
        **damaged(mutators.damaged_json, model, "fastvithd.mlpackage/Manifest.json"),
        **damaged(mutators.damaged_program, model, f"{package}/model.mlmodel"),
        **damaged(mutators.damaged_bytes, model, f"{package}/weights/weight.bin"),
    }
    source = {
        **damaged(mutators.damaged_json, checkpoint, "config.json"),
        **damaged(mutators.damaged_safetensors, checkpoint, "model.safetensors"),
    }
    found = [
        Parser("safetensors", {"model.safetensors": (small_safetensors(), mutators.damaged_safetensors)}, read_weights),
        Parser("checkpoint", source, read_checkpoint, checkpoint),
        Parser("tokenizer", tokenizer, read_tokenizer),
        OnlyTemplate(
            "chat template", {**tokenizer, "chat_template.jinja": (template, mutators.damaged_template)}, read_template
        ),
        Parser("mlpackage", package_files, read_package),
        Parser("recipe", damaged(mutators.damaged_json, model, "fastvlm.json"), read_recipe),
        Parser(
            "model folder", damaged(mutators.damaged_json, model, "fastvlm.json", "config.json"), read_manifest, model
        ),
        *image_parsers(),
    ]
    if (extra / "bench.json").is_file():
        found.append(Parser("benchmark", damaged(mutators.damaged_json, extra, "bench.json"), read_bench))
    if (extra / "checkpoint.zip").is_file():
        found.append(Parser("zip", damaged(mutators.damaged_bytes, extra, "checkpoint.zip"), read_zip))
    return found


class OnlyTemplate(Parser):
    """Damages the template alone: the tokenizer beside it is whole."""

    def damage(self, folder: Path, seed: int) -> str:
        name = "chat_template.jinja"
        content, damage = self.files[name]
        (folder / name).write_bytes(damage(content, random.Random(f"{self.name} {seed}")))
        return name


def small_safetensors() -> bytes:
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    tensors = {f"layers.{n}.weight": rng.normal(size=(4, n + 1)).astype(np.float16) for n in range(6)}
    return save({**tensors, "scale": np.ones((), np.float32), "empty": np.zeros((0, 3), np.int64)})
