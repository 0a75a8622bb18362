"""`fastvlm run` as a user types it, and its parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm.cli.run import fitted, lines, read_input
from fastvlm.models.errors import UsageError

SHAPES = Path(__file__).resolve().parents[2] / "runtime" / "samples" / "shapes.png"


@pytest.mark.slow
def test_image_and_array_give_the_same_outputs(
    fastvlm: Callable, here: Callable, one_line_error: Callable, model: Path, tmp_path: Path
) -> None:
    package = model / "fastvithd.mlpackage"
    done = fastvlm("run", package, "--image", SHAPES, "-o", "image.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "image_features: float32[1, 16, 512]" in done.stdout
    pixels = np.asarray(Image.open(SHAPES).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC))
    np.save(tmp_path / "x.npy", pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
    done = here("run", model, "--input", "images=x.npy", "-o", "array.npy", "--json", cwd=tmp_path)
    (output,) = json.loads(done.stdout)["outputs"]
    found = np.load(tmp_path / "array.npy")
    assert output["shape"] == list(found.shape) and output["max"] == pytest.approx(found.max())
    np.testing.assert_array_equal(np.load(tmp_path / "image.npz")["image_features"], found)
    one_line_error(here("run", package, cwd=tmp_path), "data must have the inputs images fp32[1, 3, 256, 256]")
    wrong = here("run", package, "--input", "images=x.npy", "-o", "x.txt", cwd=tmp_path)
    one_line_error(wrong, "arrays are written as .npy or .npz")
    one_line_error(here("run", "gone.mlpackage", cwd=tmp_path), "must be a .mlpackage folder")


@pytest.mark.parametrize("text", ["x", "=x.npy", "x="])
def test_input_without_name_or_file_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"NAME=FILE\.npy"):
        read_input(text)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_text("no array")
    np.savez(tmp_path / "two.npz", a=np.zeros(1))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    for name in ("x.npy", "two.npz", "object.npy"):
        with pytest.raises(UsageError, match=r"numpy\.save"):
            read_input(f"x={tmp_path / name}")


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fitted_image_has_the_size(fit: str) -> None:
    image = Image.new("RGB", (40, 20), "white")
    result = fitted(image, 16, 24, fit)
    assert result.size == (24, 16)
    has_border = np.asarray(result).min() == 0
    assert has_border == (fit == "pad")


def test_outputs_are_described_in_lines() -> None:
    assert list(lines("label", "cat")) == ["label: cat"]
    assert list(lines("probs", {"a": 0.25, "b": 0.75})) == ["probs: b 0.7500, a 0.2500"]
    assert list(lines("y", np.array([1.0, 3.0], np.float32))) == ["y: float32[2]  min 1  max 3  mean 2  std 1"]
    assert list(lines("z", np.array([np.inf], np.float32))) == ["z: float32[1]  has NaN or infinity"]
