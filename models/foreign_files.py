"""Files of other programs where a checkpoint, a config or an image is expected: what they are, and what to do.

A file is recognized by its first bytes, a folder by the names in it. Each is one row of a table, so a new format is a
new row. The texts complete an error: `<file> is <what>. <remedy>`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 64
"""The number of bytes at the start of a file that decide what it is."""
MAX_QUOTED = 80
"""The longest text of a file that a message quotes, in characters."""

GET_WEIGHTS = "Pass a checkpoint with *.safetensors, such as `fastvlm download apple/FastVLM-0.5B` writes."
DOWNLOAD_AGAIN = "Download it again."


@dataclass(frozen=True)
class Foreign:
    """A file that is not what its name says."""

    what: str
    """A noun phrase, such as `a git-lfs pointer`."""
    remedy: str
    """A sentence with what to do."""

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


LFS = Foreign("a git-lfs pointer, not the file itself", "Run `git lfs install` and `git lfs pull` in its folder.")
ANNEX = Foreign("a git-annex pointer, not the file itself", "Run `git annex get` in its folder.")
APPLE_DOUBLE = Foreign(
    "an AppleDouble file, which macOS writes for a file's attributes", "Use the file without `._` in its name."
)
WEB_PAGE = Foreign("a web page, not the file itself", "Download the file (its link on the hub has /resolve/).")
GGUF = Foreign("a GGUF file of llama.cpp", GET_WEIGHTS)
PICKLE = Foreign(
    "a pickle of PyTorch with another name",
    "Rename it to pytorch_model.bin and pass allow_pickle=True, or convert it to safetensors.",
)
EMPTY = Foreign("an empty file: a download or a copy did not finish", DOWNLOAD_AGAIN)
ZEROS = Foreign("a file of zeros: a download or a copy did not finish", DOWNLOAD_AGAIN)

HEADS: tuple[tuple[bytes, Foreign], ...] = (
    (b"version https://git-lfs", LFS),
    (b"/annex/objects/", ANNEX),
    (b"../.git/annex/objects/", ANNEX),
    (b"\x00\x05\x16\x07", APPLE_DOUBLE),
    (b"<!DOCTYPE html", WEB_PAGE),
    (b"<!doctype html", WEB_PAGE),
    (b"<html", WEB_PAGE),
    (b"GGUF", GGUF),
    (b"\x80\x02", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"PK\x03\x04", PICKLE),
    (b"\x93NUMPY", Foreign("a NumPy array", GET_WEIGHTS)),
    (b"\x89HDF\r\n", Foreign("an HDF5 file of Keras", GET_WEIGHTS)),
    (b"\x1f\x8b", Foreign("a gzip archive", "Unpack it first.")),
    (b"\x28\xb5\x2f\xfd", Foreign("a Zstandard archive", "Unpack it first.")),
    (b"\xfd7zXZ", Foreign("an xz archive", "Unpack it first.")),
    (b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", "Unpack it first.")),
    (b"Salted__", Foreign("an encrypted file", "Decrypt it first.")),
)
"""The table of files by their first bytes."""

CONVERT = "Convert it to JPEG or PNG."
IMAGE_HEADS: tuple[tuple[bytes, Foreign], ...] = (
    (b"\xff\x0a", Foreign("a JPEG XL image, which Pillow does not read", CONVERT)),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", Foreign("a JPEG XL image, which Pillow does not read", CONVERT)),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", Foreign("a JPEG 2000 image, which this Pillow does not read", CONVERT)),
    (b"\xff\x4f\xff\x51", Foreign("a JPEG 2000 image, which this Pillow does not read", CONVERT)),
    (b"8BPS", Foreign("a Photoshop file", CONVERT)),
    (b"%PDF", Foreign("a PDF document", "Convert each page to PNG.")),
    (b"%!PS", Foreign("a PostScript document", CONVERT)),
    (b"v/1\x01", Foreign("an OpenEXR image of high dynamic range", CONVERT)),
    (b"#?RADIANCE", Foreign("a Radiance image of high dynamic range", CONVERT)),
    (b"<svg", Foreign("an SVG drawing", "Render it to PNG.")),
    (b"<?xml", Foreign("an XML document, perhaps an SVG drawing", "Render it to PNG.")),
    (b"FUJIFILMCCD-RAW", Foreign("a camera's raw file", CONVERT)),
    (b"IIRO", Foreign("a camera's raw file", CONVERT)),
    (b"IIU\x00", Foreign("a camera's raw file", CONVERT)),
    (b"\x1aE\xdf\xa3", Foreign("a Matroska or WebM video", "Extract its frames as images.")),
    (b"PK\x03\x04", Foreign("a ZIP archive", "Unpack it first.")),
)
"""The table of files in the place of an image, by their first bytes."""

BOXES: tuple[tuple[tuple[bytes, ...], Foreign], ...] = (
    ((b"crx ",), Foreign("a camera's raw file", CONVERT)),
    ((b"avif", b"avis"), Foreign("an AVIF image, which this Pillow does not read", "Update Pillow to 11.3 or newer.")),
    (
        (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
        Foreign("a damaged HEIF image, or one of an unsupported codec", CONVERT),
    ),
    ((b"qt  ", b"isom", b"mp41", b"mp42", b"iso5", b"iso6", b"M4V "), Foreign("a video", "Extract its frames.")),
)
"""The table of files of ISO boxes (`ftyp` at byte 4), by their major brand."""


@dataclass(frozen=True)
class ForeignFolder:
    """The folder of another program or another step, by patterns of the names in it."""

    patterns: tuple[str, ...]
    what: str
    remedy: str
    arguments: tuple[str, ...] = ()
    """The Python arguments that `remedy` names."""


ADAPTER_FILES = ("adapter_model*.safetensors", "*adapters.safetensors", "non_lora_trainables*.safetensors")
"""The weight files of an adapter, which may be in the folder of its base."""
PROJECTOR_FILES = ("mm_projector*.safetensors", "mm_projector*.bin")
"""The weight files of LLaVA's first stage, which trains the projector alone."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NOT_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "*-of-*.idx.bin")
"""The pickles of a trainer that hold no weights."""

FOLDERS: tuple[ForeignFolder, ...] = (
    ForeignFolder(
        (*ADAPTER_FILES, "adapter_model*.bin", "adapter_config.json"),
        "a LoRA fine-tune without its base",
        "Pass the base as model, and this folder as adapter.",
        ("model", "adapter"),
    ),
    ForeignFolder(
        PROJECTOR_FILES,
        "a checkpoint of LLaVA's first stage, which has only the projector",
        "Pass the checkpoint that it was trained on with base=MODEL.",
        ("base",),
    ),
    ForeignFolder(
        ("global_step*", "zero_to_fp32.py", "zero_pp_rank_*"),
        "a DeepSpeed checkpoint, whose weights are spread over ZeRO shards",
        "Run `python zero_to_fp32.py . OUT --safe_serialization` in it, and copy config and tokenizer to OUT.",
    ),
    ForeignFolder(
        ("pytorch_model_fsdp*", "*.distcp", "__0_0.distcp"),
        "a sharded checkpoint of PyTorch's FSDP",
        "Run `accelerate merge-weights FOLDER OUT` first.",
    ),
    ForeignFolder(
        ("*.incomplete", "*.part", "*.crdownload", "*.aria2", "*.download"),
        "an unfinished download",
        "Finish it, or download the checkpoint again.",
    ),
    ForeignFolder(("*.gguf",), "for llama.cpp (GGUF)", GET_WEIGHTS),
    ForeignFolder(("onnx", "*.onnx", "*.onnx_data"), "for ONNX Runtime", GET_WEIGHTS),
    ForeignFolder(("*.litertlm", "*.tflite", "*.task"), "for LiteRT", GET_WEIGHTS),
    ForeignFolder(("*.pte",), "for ExecuTorch", GET_WEIGHTS),
    ForeignFolder(("*.engine", "*.plan"), "for TensorRT", GET_WEIGHTS),
    ForeignFolder(("*.aimodel",), "for Core AI", GET_WEIGHTS),
    ForeignFolder(("flax_model*.msgpack", "tf_model*.h5", "saved_model.pb"), "for Flax or TensorFlow", GET_WEIGHTS),
    ForeignFolder(("weights*.npz",), "for an early version of MLX", GET_WEIGHTS),
    ForeignFolder(("*.mlpackage", "*.mlmodelc"), "a Core ML model without the decoder's weights", GET_WEIGHTS),
    ForeignFolder(("*.zip", "*.tar", "*.tar.gz", "*.tgz"), "the folder of an archive", "Unpack it first."),
)
"""The table of folders by the names in them. The first match counts."""

CHECKPOINT_NAME = re.compile(r"checkpoint-\d+|(llava-)?fastv(lm|ithd)[\w.-]*", re.IGNORECASE)
"""The names of folders that trainers and downloads give to checkpoints."""


SYSTEM_FILES = ("._*", ".DS_Store")
"""The files that macOS adds to folders: attributes (AppleDouble), and the Finder's view."""


def is_system_file(path: Path) -> bool:
    """Returns True for a file that macOS added to its folder."""
    return matches(path.name, SYSTEM_FILES)


def has_content(folder: Path) -> bool:
    """Returns True if a folder has a file or a folder that macOS did not add."""
    return any(not is_system_file(path) for path in folder.iterdir())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns True if `name` matches one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def foreign_bytes(head: bytes) -> Foreign | None:
    """Returns what a file is that should have been weights or JSON, by its first bytes, or None."""
    if not head:
        return EMPTY
    if head[8:9] == b"{":  # safetensors, whose length could be any bytes
        return None
    if not head[:HEAD_BYTES].strip(b"\0"):
        return ZEROS
    return next((found for start, found in HEADS if head.lstrip().startswith(start) or head.startswith(start)), None)


def foreign_text(head: bytes) -> Foreign | None:
    """Returns a server's refusal that was saved in place of a file, or None."""
    try:
        text = head[:HEAD_BYTES].decode().strip()
    except UnicodeDecodeError:
        return None
    if not text or not text.isprintable() or " " not in text or text[0] in "{[":
        return None
    return Foreign(f"a text, not the file itself (it begins with {text!r:.{MAX_QUOTED}})", DOWNLOAD_AGAIN)


def foreign_image(head: bytes) -> Foreign | None:
    """Returns what a file is that should have been an image, by its first bytes, or None."""
    known = next((found for start, found in IMAGE_HEADS if head.startswith(start)), None)
    if known is None and head[4:8] == b"ftyp":
        known = next((found for brands, found in BOXES if head[8:12] in brands), None)
    return known or foreign_bytes(head) or foreign_text(head)


def foreign_file(path: Path) -> Foreign | None:
    """Returns what a file is that should have been weights or JSON, or None. It may be unreadable."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return None
    return foreign_bytes(head) or foreign_text(head)


def pickles_in(folder: Path) -> list[Path]:
    """Returns the pickles of a folder that may hold weights, sorted."""
    return sorted(
        path
        for path in folder.iterdir()
        if matches(path.name, PICKLES) and not is_system_file(path) and not matches(path.name, NOT_WEIGHTS)
    )


def foreign_folder(folder: Path) -> ForeignFolder | None:
    """Returns what a folder without a checkpoint is, or None."""
    names = [path.name for path in folder.iterdir() if not is_system_file(path)]
    return next((known for known in FOLDERS if any(matches(name, known.patterns) for name in names)), None)


def checkpoints_inside(folder: Path) -> list[str]:
    """Returns the subfolders that are checkpoints, or have the name of one, as paths relative to `folder`."""
    snapshots = folder / "snapshots"
    parents = [folder, snapshots] if snapshots.is_dir() else [folder]  # a model in the hub's cache
    inside = sorted(path for parent in parents for path in parent.iterdir() if path.is_dir())
    whole = [path for path in inside if (path / "config.json").is_file()]
    named = [path for path in inside if CHECKPOINT_NAME.fullmatch(path.name)]
    return [path.relative_to(folder).as_posix() for path in whole or named]
