"""`fastvlm run`"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..models.errors import UsageError
from . import options as given
from .outputs import check_arrays, write_whole

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..models.mlprogram.model import Model

LISTED_LABELS = 5
"""The number of a classifier's labels that are printed, the likeliest first."""


def run_command(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A .mlpackage, or a folder that has one.")],
    image: Annotated[
        Path | None,
        typer.Option("--image", "-i", metavar="FILE", help="Resize this image for the model's only image-like input."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=FILE.npy", help="Pass an array as an input. Repeat for several."),
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "stretch"], typer.Option(help="Fit the image by cropping, padding or stretching.")
    ] = "crop",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the outputs: all as .npz, or the only one as .npy."),
    ] = None,
    function_name: Annotated[
        str | None,
        typer.Option("--function-name", metavar="NAME", help="Run this function.", show_default="the package's"),
    ] = None,
    precision: Annotated[
        Literal["float32", "float16", "float16-accumulate"],
        typer.Option(help="Compute in float32, round each float16 result as stored, or sum products in float16 too."),
    ] = "float32",
    as_json: given.AsJson = False,
) -> None:
    """Run a Core ML package once, on any machine. Prints each output's type, shape and range.

    An image goes to an input that is declared as one, or to a tensor (1, 3, H, W) as values from 0 to 1.
    """
    check_arrays(out)
    from ..models.folder_layout import PACKAGE_NAME
    from ..models.mlprogram import load

    inside = package / PACKAGE_NAME
    model = load(inside if inside.is_dir() else package, function_name, precision=precision)
    data: dict[str, Any] = dict(map(read_input, inputs or ()))
    if image is not None:
        data |= image_input(model, image, fit, data)
    results = model.predict(data)
    if out is not None:
        write_whole(out, packed(out, results))
    if as_json:
        typer.echo(json.dumps({"outputs": [summary(name, value) for name, value in results.items()]}, indent=2))
    else:
        typer.echo("\n".join(line for name, value in results.items() for line in lines(name, value)))


def read_input(text: str) -> tuple[str, np.ndarray]:
    """Returns the name and the array of `NAME=FILE.npy`.

    Raises:
        UsageError: the text has another form, or the file is not an array of numbers.
    """
    import numpy as np

    name, _, path = text.partition("=")
    if not name or not path:
        raise UsageError(f"inputs must be NAME=FILE.npy (got {text!r})")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as reason:
        raise UsageError(f"{path}: is not a .npy file of numbers. Save it with numpy.save") from reason
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path}: must be one array (got an archive). Save it with numpy.save")
    return name, array


def image_input(model: Model, path: Path, fit: str, others: dict[str, Any]) -> dict[str, Any]:
    """Returns the image for the model's image input or, without one, for its only input (1, 3, H, W).

    Raises:
        ImageError: the image cannot be read.
        UsageError: no input takes an image, or several do.
    """
    import numpy as np

    from ..models.images import open_image

    program = model.program
    candidates = [tensor for tensor in program.inputs if tensor.name not in others]
    declared = [tensor for tensor in candidates if tensor.name in program.image_inputs]
    chosen = declared or [tensor for tensor in candidates if tensor.rank == 4 and tensor.shape[1] == 3]
    if len(chosen) != 1:
        names = ", ".join(f"{tensor.name} {tensor}" for tensor in program.inputs)
        raise UsageError(f"image needs one input that takes it (got {names}). Use --input for arrays", "image")
    (tensor,) = chosen
    described = program.features[tensor.name].shape  # of an image or array that may have several
    height, width = (tensor.shape if tensor.is_fixed else described)[-2:]
    resized = fitted(open_image(path), height, width, fit)
    if declared:
        return {tensor.name: resized}
    return {tensor.name: np.asarray(resized, dtype=np.float32).transpose(2, 0, 1)[None] / np.float32(255)}


def fitted(image: Image.Image, height: int, width: int, fit: str) -> Image.Image:
    """Returns an image resized to a size, cropped to it, padded with black, or stretched."""
    from PIL import Image, ImageOps

    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    resize = ImageOps.fit if fit == "crop" else ImageOps.pad
    return resize(image, (width, height), Image.Resampling.BICUBIC)


def packed(path: Path, results: dict[str, Any]) -> bytes:
    """Returns the outputs as the bytes of a .npz file, or of a .npy file with the only one."""
    import numpy as np

    arrays = {name: np.asarray(list(v.values()) if isinstance(v, dict) else v) for name, v in results.items()}
    stream = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    elif len(arrays) == 1:
        np.save(stream, next(iter(arrays.values())))
    else:
        raise UsageError(f"out must end in .npz for {len(arrays)} outputs (got {path.name})", "out")
    return stream.getvalue()


def summary(name: str, value: Any) -> dict[str, Any]:
    """Returns what is printed of an output: its type, shape and range, or its labels."""
    import numpy as np

    if isinstance(value, dict):
        return {"name": name, "probabilities": value}
    if isinstance(value, str | int):
        return {"name": name, "label": value}
    array = np.asarray(value)
    whole = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
    if not array.size or array.dtype.kind not in "iuf":
        return whole
    wide = array.astype(np.float64)
    finite = bool(np.isfinite(wide).all())
    ranges = {key: float(getattr(wide, key)()) for key in ("min", "max", "mean", "std")} if finite else {}
    return {**whole, "finite": finite, **ranges}


def lines(name: str, value: Any) -> Iterator[str]:
    """Yields the lines that describe an output."""
    found = summary(name, value)
    if "label" in found:
        yield f"{name}: {value}"
    elif "probabilities" in found:
        likeliest = sorted(value.items(), key=lambda item: -item[1])[:LISTED_LABELS]
        yield f"{name}: {', '.join(f'{label} {share:.4f}' for label, share in likeliest)}"
    else:
        ranges = [f"{key} {found[key]:.6g}" for key in ("min", "max", "mean", "std") if key in found]
        note = [] if found.get("finite", True) else ["has NaN or infinity"]
        yield f"{name}: {found['dtype']}{found['shape']}  {'  '.join(ranges + note)}".rstrip()
