"""The readers of each kind of untrusted file. `folder` has the damaged file."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hub_server import Server, serving

from fastvlm.models.errors import FastVLMError
from fastvlm.runtime.benchmark.report import Benchmark

ROOM = (96, 128, 3)


def read_weights(folder: Path) -> None:
    from fastvlm.models._mlx import mx
    from fastvlm.models.checkpoint import load_lazily
    from fastvlm.models.safetensors_files import read_header

    read_header(folder / "model.safetensors")
    mx.eval(list(load_lazily(folder / "model.safetensors").values()))


def read_checkpoint(folder: Path) -> None:
    from fastvlm.models.checkpoint import FolderCheckpoint, shapes, tensors_under
    from fastvlm.models.fastvit_config import FastViTConfig
    from fastvlm.models.tensor_names import APPLE_ENCODER_PREFIX

    checkpoint = FolderCheckpoint(folder)
    FastViTConfig.from_shapes(shapes(tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX)))
    checkpoint.tokenizer_files()
    for name in sorted(checkpoint.tensors)[::20]:
        checkpoint.read(name, "pt")


def read_adapter(folder: Path) -> None:
    from fastvlm.models.adapter import AdaptedCheckpoint
    from fastvlm.models.random_checkpoint import RandomCheckpoint

    base = RandomCheckpoint("tiny")
    checkpoint = AdaptedCheckpoint(base, folder)
    for name in checkpoint.tensors:
        if checkpoint.tensors[name] != base.tensors.get(name):
            checkpoint.read(name, "pt")


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


def inspect_package(folder: Path) -> None:
    from fastvlm.cli.inspect import lines
    from fastvlm.export.inspect_package import inspect

    report = inspect(folder)
    report.as_dict()
    list(lines(report))


def load_model(folder: Path) -> None:
    """Reads everything that `generate` needs, up to the second token of an answer."""
    import fastvlm

    picture = np.zeros(ROOM, np.uint8)
    fastvlm.load(folder).generate(picture, "What is <image> it?", max_tokens=2)


def read_manifest(folder: Path) -> None:
    from fastvlm.runtime.folder import open_folder

    open_folder(folder)


def read_recipe(folder: Path) -> None:
    """Reads a manifest in the way of `export --recipe` and `verify`."""
    from fastvlm.export.options import ExportOptions
    from fastvlm.export.recipe import check_calibration, interface_for, planned_recipe
    from fastvlm.export.recipe import read_recipe as file_recipe
    from fastvlm.export.verify import encoder_floor_db, saved_recipe
    from fastvlm.quant.calibration import verification_images

    earlier = file_recipe(folder / "fastvlm.json")
    recipe = planned_recipe(ExportOptions(), 128, earlier)
    check_calibration(earlier, verification_images(128), recipe.image_size)
    saved = saved_recipe(folder)
    encoder_floor_db(saved)
    interface_for([saved["quant"]], saved=saved)


def bundle_model(folder: Path) -> None:
    """Bundles a damaged model folder."""
    from fastvlm.export.bundle.write import bundle

    to = folder.with_name(f"{folder.name}-bundle")
    shutil.rmtree(to, ignore_errors=True)
    bundle(folder, "mlx-swift-lm", to).as_dict()


def check_bundle(folder: Path) -> None:
    from fastvlm.export.bundle.check import check_bundle
    from fastvlm.export.bundle.contracts import contract_for
    from fastvlm.export.bundle.place import check_place

    check_place(folder, contract_for("mlx-swift-lm"))
    for target in ("mlx-vlm", "mlx-swift-lm", "apple-app"):
        check_bundle(folder, target).as_dict()


def read_image(folder: Path) -> None:
    from fastvlm.models.images import open_image, preprocess

    (path,) = [path for path in folder.iterdir() if path.name == "image"]
    preprocess(open_image(path), 256, "pad")


def read_benchmark(folder: Path) -> None:
    """Compares with an earlier report in the way of `bench --compare`."""
    from fastvlm.runtime.benchmark.comparison import compare
    from fastvlm.runtime.benchmark.markdown import report

    new, old = first_benchmark(folder), benchmark_of(folder)
    "\n".join(report(new, compare(new, old)))


def benchmark_of(folder: Path) -> Benchmark:
    from fastvlm.runtime.benchmark.report import read_benchmark

    return read_benchmark(folder / "bench.json")


@functools.cache
def first_benchmark(folder: Path) -> Benchmark:
    """Returns the report before the first damage."""
    return benchmark_of(folder)


def read_evaluation(folder: Path) -> None:
    """Compares with an earlier report in the way of `eval --compare`."""
    from fastvlm.runtime.evaluation.run import compare, read_evaluation

    old = read_evaluation(folder / "eval.json")
    asked = [
        SimpleNamespace(sample=SimpleNamespace(id=name, kind=str(entry["kind"])), digest=entry["digest"], score=1.0)
        for name, entry in old["scores"].items()
    ]
    compare(SimpleNamespace(answers=asked), old).as_dict()  # type: ignore[arg-type]


def read_questions(folder: Path) -> None:
    """Reads every file of questions, and scores an answer to each."""
    from fastvlm.runtime.evaluation.datasets import open_data

    for file in sorted(folder.glob("*.json*")):
        data = open_data(file, 0, images=folder)
        for sample in data.samples:
            data.prompt(sample)
            data.score(sample, "12 stop")


def read_captions(folder: Path) -> None:
    from fastvlm.runtime.bulk.log import CaptionLog

    with CaptionLog(folder / "captions.jsonl", "run") as file:
        file.add("next.png", {"text": "x"})


def read_zip(folder: Path) -> None:
    from fastvlm.models.download.apple import unpack

    shutil.rmtree(folder / "to", ignore_errors=True)
    (folder / "to").mkdir()
    unpack(folder / "checkpoint.zip", folder / "to", lambda name: True)


def read_part(folder: Path) -> None:
    """Reads the notes of an interrupted download, which determine where it resumes."""
    from fastvlm.models.download.apple import _resumable, _validator

    notes = folder / "a.zip.part.json"
    if _resumable(folder / "a.zip.part", notes, PART_URL):
        _validator(notes)


PART_URL = "http://127.0.0.1:9/a.zip"


def read_hub_answer(folder: Path) -> None:
    """Downloads from a hub whose answer about the repository is damaged."""
    from fastvlm.models.download.hub import download_from_hub

    server = hub()
    for path in [path for path in server.files if path.startswith("/api/") and "/tree/" not in path]:
        server.files[path] = (folder / "info.json").read_bytes()
    shutil.rmtree(folder / "to", ignore_errors=True)
    download_from_hub(HUB_ID, folder / "to", endpoint=server.url)


HUB_ID = "someone/small"


@functools.cache
def hub() -> Server:
    """Returns a hub in a thread of this process, which runs until the process ends."""
    context = serving()
    server = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    server.add_repository(HUB_ID, {"config.json": b"{}", "model.safetensors": bytes(2000)})
    return server


def run_commands(folder: Path) -> None:
    """Runs the commands themselves. An error must be one line on stderr with exit code 1."""
    image = ("--image", folder / "image.png")
    commands: list[tuple[str | Path, ...]] = [
        ("inspect", folder),
        ("generate", folder, *image, "-p", "What?", "--max-tokens", "2", "--json"),
        ("bench", folder, "--estimate", "M4"),
        ("eval", folder, "--data", folder / "mine.json", "--images", folder),
    ]
    failed = [error for error in map(command_error, commands) if error]
    if failed:
        raise FastVLMError(failed[0])


def command_error(command: tuple[str | Path, ...]) -> str | None:
    """Returns the error line of a command that fails as it must. Any other failure raises."""
    from fastvlm.cli.main import main

    arguments = sys.argv
    sys.argv = ["fastvlm", *map(str, command)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            main()
    except SystemExit as end:
        printed = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        code = end.code or 0
        shown = all(character.isprintable() for line in printed for character in line)
        if code not in (0, 1) or len(printed) > 1 or "Traceback" in errors.getvalue() or not shown:
            raise RuntimeError(f"{command[0]} ended with {code}: {errors.getvalue()!r:.600}") from None
        return printed[0] if printed else f"{command[0]}: exit code 1" if code else None
    finally:
        sys.argv = arguments
    raise RuntimeError(f"{command[0]} did not exit")
