"""The parsers of untrusted files, each with real files and a way to damage them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import readers
from .mutators import (
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_program,
    damaged_safetensors,
    damaged_template,
)
from .parser import Parser, damaged

MANIFEST = "fastvlm.json"
PACKAGE = "fastvithd.mlpackage"


def parsers(model: Path, checkpoint: Path, extra: Path) -> list[Parser]:
    """Returns all parsers, for an exported `model`, a source `checkpoint`, and the files of `inputs.py` in `extra`."""
    return [
        *checkpoint_parsers(checkpoint, extra),
        *text_parsers(model),
        *model_parsers(model, extra),
        *bundle_parsers(extra),
        *report_parsers(model, extra),
        *download_parsers(extra),
        *image_parsers(),
    ]


def checkpoint_parsers(checkpoint: Path, extra: Path) -> list[Parser]:
    """Returns the parsers of checkpoints in each layout, of shards and of adapters."""

    def source(name: str, folder: Path, *configs: str) -> Parser:
        files = {
            **damaged(damaged_json, folder, "config.json", *configs),
            **damaged(damaged_safetensors, folder, "model.safetensors"),
        }
        return Parser(name, files, readers.read_checkpoint, folder)

    index = damaged(damaged_json, extra / "shards", "model.safetensors.index.json", "config.json")
    adapter = {
        **damaged(damaged_json, extra / "adapter", "adapter_config.json"),
        **damaged(damaged_safetensors, extra / "adapter", "adapter_model.safetensors"),
    }
    small = {"model.safetensors": (small_safetensors(), damaged_safetensors)}
    return [
        Parser("safetensors", small, readers.read_weights),
        source("checkpoint", checkpoint),
        source("checkpoint, hf", extra / "hf", "preprocessor_config.json", "tokenizer_config.json"),
        source("checkpoint, mlx-vlm", extra / "mlx"),
        Parser("checkpoint, shards", index, readers.read_checkpoint, extra / "shards", share=0.5),
        Parser("adapter", adapter, readers.read_adapter),
    ]


def text_parsers(model: Path) -> list[Parser]:
    tokenizer = damaged(damaged_json, model, "tokenizer.json", "tokenizer_config.json")
    template = json.loads(tokenizer["tokenizer_config.json"][0])["chat_template"].encode()
    with_template = {**tokenizer, "chat_template.jinja": (template, damaged_template)}
    return [
        Parser("tokenizer", tokenizer, readers.read_tokenizer),
        OnlyTemplate("chat template", with_template, readers.read_template),
    ]


def model_parsers(model: Path, extra: Path) -> list[Parser]:
    """Returns the parsers of exported folders.

    A manifest keeps all other damaged files from their parsers. Apple's folders lack it.
    """
    weights = damaged(damaged_safetensors, model, "model.safetensors")
    configs = damaged(damaged_json, model, "config.json", "tokenizer_config.json", "tokenizer.json")
    inner = f"{PACKAGE}/Data/com.apple.CoreML"
    package = {
        **damaged(damaged_json, model, f"{PACKAGE}/Manifest.json"),
        **damaged(damaged_program, model, f"{inner}/model.mlmodel"),
        **damaged(damaged_bytes, model, f"{inner}/weights/weight.bin"),
    }
    picture = (extra / "questions/0.png").read_bytes()
    shown = {
        "image.png": (picture, damaged_bytes),
        "0.png": (picture, damaged_bytes),
        "1.png": (picture, damaged_bytes),
        "mine.json": ((extra / "questions/mine.json").read_bytes(), damaged_json),
    }
    manifest, bare = damaged(damaged_json, model, MANIFEST), (MANIFEST,)
    with_config = {**manifest, **damaged(damaged_json, model, "config.json")}
    return [
        Parser("mlpackage", package, readers.read_package),
        Parser("mlpackage, inspect", package, readers.inspect_package, share=0.5),
        Parser("recipe", manifest, readers.read_recipe),
        Parser("model folder", with_config, readers.read_manifest, model),
        Parser("model, loaded", {**configs, **weights}, readers.load_model, model, 0.3, bare),
        Parser("commands", {**configs, **package, **shown}, readers.run_commands, model, 0.15, bare),
    ]


def bundle_parsers(extra: Path) -> list[Parser]:
    names = ("config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")
    made = damaged(damaged_json, extra / "bundle", "fastvlm-bundle.json", *names)
    weights = damaged(damaged_safetensors, extra / "bundle", "model.safetensors")
    source = damaged(damaged_json, extra / "layout-mlx", *names[:3])
    manifest = damaged(damaged_json, extra / "layout-mlx", MANIFEST)
    return [
        Parser("bundle, check", {**made, **weights}, readers.check_bundle, extra / "bundle", 0.5),
        Parser("bundle, source", source, readers.bundle_model, extra / "layout-mlx", 0.3, (MANIFEST,)),
        Parser("bundle, manifest", manifest, readers.bundle_model, extra / "layout-mlx", 0.2),
    ]


def report_parsers(model: Path, extra: Path) -> list[Parser]:
    """Returns the parsers of reports for comparison, of questions, and of captions to resume."""
    names = ("textvqa.json", "docvqa.json", "test_human.json", "mine.json")
    questions = damaged(damaged_json, extra / "questions", *names)
    lines = damaged(damaged_lines, extra / "questions", "lines.jsonl")
    captions = damaged(damaged_lines, extra, "captions.jsonl")
    return [
        Parser("benchmark", damaged(damaged_json, extra, "bench.json"), readers.read_benchmark),
        Parser("evaluation", damaged(damaged_json, extra, "eval.json"), readers.read_evaluation, share=0.5),
        Parser("questions", {**questions, **lines}, readers.read_questions, extra / "questions"),
        Parser("captions", captions, readers.read_captions, share=0.5),
    ]


def download_parsers(extra: Path) -> list[Parser]:
    notes = json.dumps({"url": readers.PART_URL, "size": 9, "validator": '"e"'}).encode()
    part = {"a.zip.part.json": (notes, damaged_json), "a.zip.part": (b"123", damaged_bytes)}
    (info,) = {content for path, content in readers.hub().files.items() if "/revision/" in path}
    return [
        Parser("zip", damaged(damaged_bytes, extra, "checkpoint.zip"), readers.read_zip),
        Parser("download, notes", part, readers.read_part, share=0.3),
        Parser("download, hub", {"info.json": (info, damaged_json)}, readers.read_hub_answer, share=0.3),
    ]


def image_parsers() -> list[Parser]:
    """Returns the parsers of small images in every format that Pillow decodes on this machine."""
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
        except (KeyError, OSError):  # this build of Pillow lacks the format
            continue
        files = {"image": (stream.getvalue(), damaged_bytes)}
        parsers.append(Parser(f"image {name}", files, readers.read_image, share=0.25))
    return parsers


class OnlyTemplate(Parser):
    """A parser whose template alone is damaged, next to an undamaged tokenizer."""

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
