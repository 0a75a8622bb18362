"""`load(...).predict(...)` on packages that coremltools converts: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastvlm.models.errors import FastVLMError, PackageError, UsageError
from fastvlm.models.mlprogram import Model, load
from fastvlm.models.mlprogram.model import array_of, image_of

pytestmark = pytest.mark.slow
Convert = Callable[..., Path]


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


class Function(nn.Module):
    """A network without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@pytest.fixture(scope="module")
def convert(ct: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Returns `convert(network, example, **options)`, which returns the path of the float32 package."""

    def save(network: nn.Module, example: Any, target: str = "iOS17", **options: Any) -> Path:
        options.setdefault("compute_precision", ct.precision.FLOAT32 if target != "iOS18" else None)
        with torch.inference_mode():
            traced = torch.jit.trace(network.eval(), example)
        model = ct.convert(
            traced, minimum_deployment_target=getattr(ct.target, target), skip_model_load=True, **options
        )
        path = tmp_path_factory.mktemp("models") / "model.mlpackage"
        model.save(str(path))
        return path

    return save


@pytest.fixture(scope="module")
def open_size(ct: ModuleType, convert: Convert) -> Model:
    sizes = (ct.RangeDim(1, 4), 3, ct.RangeDim(16, 64), ct.RangeDim(16, 64))
    return load(convert(Pool(), torch.rand(1, 3, 32, 32), inputs=[ct.TensorType(name="x", shape=sizes)]))


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 48, 20), (4, 3, 64, 64)])
def test_open_sizes_run_within_their_range(
    open_size: Model, shape: tuple[int, ...], tolerance: Callable[[str], float]
) -> None:
    x = torch.rand(shape)
    (found,) = open_size.predict({"x": x}).values()
    torch.testing.assert_close(torch.from_numpy(found), Pool()(x).detach(), atol=tolerance("op_float32"), rtol=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": np.zeros((1, 3, 8, 8))}, "input x: size must be 1 to 4 x 3 x 16 to 64 x 16 to 64 (got 1 x 3 x 8 x 8)"),
        ({"x": np.zeros((5, 3, 16, 16))}, "(got 5 x 3 x 16 x 16)"),
        ({}, "data must have the inputs x fp32['?', 3, '?', '?'] (got none)"),
        ({"x": np.zeros((1, 3, 16, 16)), "y": 1}, "(got x, y)"),
        ({"x": Image.new("RGB", (16, 16))}, "input x: must be an array of fp32"),
    ],
)
def test_wrong_data_is_one_error(open_size: Model, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        open_size.predict(data)
    assert "\n" not in str(caught.value)


def test_listed_shapes_are_the_only_ones(ct: ModuleType, convert: Convert) -> None:
    shapes = ct.EnumeratedShapes([(1, 3, 32, 32), (1, 3, 64, 64)])
    model = load(convert(Pool(), torch.rand(1, 3, 32, 32), inputs=[ct.TensorType(name="x", shape=shapes)]))
    items = [{"x": np.zeros((1, 3, size, size))} for size in (32, 64)]
    assert [next(iter(result.values())).shape for result in model.predict(items)] == [(1, 4)] * 2
    with pytest.raises(UsageError, match="must be 1 x 3 x 32 x 32 or 1 x 3 x 64 x 64"):
        model.predict({"x": np.zeros((1, 3, 48, 48))})


@pytest.mark.parametrize("color", ["RGB", "BGR", "GRAYSCALE"])
def test_images_go_in_and_come_out(ct: ModuleType, convert: Convert, color: str) -> None:
    """A network that inverts an image between 0 and 1, in the color layout that the package declares."""
    channels = 1 if color == "GRAYSCALE" else 3
    layout, shape = getattr(ct.colorlayout, color), (1, channels, 6, 8)
    path = convert(
        Function(lambda x: 255 - x * 255), torch.rand(shape),
        inputs=[ct.ImageType(name="x", shape=shape, scale=1 / 255, color_layout=layout)],
        outputs=[ct.ImageType(name="y", color_layout=layout)],
    )  # fmt: skip
    model = load(path)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)[..., : 3 if channels == 3 else 1]
    image = Image.fromarray(pixels.squeeze())
    found = model.predict({"x": image})["y"]
    assert found.mode == image.mode
    np.testing.assert_array_equal(np.asarray(found), 255 - np.asarray(image))
    as_array = model.predict({"x": array_of(image, color)})["y"]
    np.testing.assert_array_equal(np.asarray(as_array), np.asarray(found))
    with pytest.raises(UsageError, match=re.escape("size must be 6 x 8 (height x width) (got 8 x 6)")):
        model.predict({"x": image.rotate(90, expand=True)})


def test_floating_grey_keeps_fractions_and_others_are_clipped() -> None:
    grey = np.array([[0.25, 300.0]], np.float32)[None, None]
    assert np.asarray(image_of(grey, "GRAYSCALE_FLOAT16")).tolist() == [[0.25, 300.0]]
    assert np.asarray(image_of(grey, "GRAYSCALE")).tolist() == [[0, 255]]
    with pytest.raises(PackageError, match="RGB image must have shape"):
        image_of(grey, "RGB")


@pytest.mark.parametrize("labels", [["cat", "dog", "fish"], [7, 8, 9]])
def test_classifier_gives_a_label_and_probabilities(ct: ModuleType, convert: Convert, labels: list[Any]) -> None:
    path = convert(
        Function(lambda x: x.softmax(-1)), torch.rand(1, 3),
        inputs=[ct.TensorType(name="x", shape=(1, 3))], classifier_config=ct.ClassifierConfig(labels),
    )  # fmt: skip
    x = np.array([[0.5, 2.0, 1.0]], np.float32)
    results = load(path).predict({"x": x})
    assert results["classLabel"] == labels[1]
    expected = np.exp(x[0]) / np.exp(x[0]).sum()
    assert list(results["classLabel_probs"]) == labels
    np.testing.assert_allclose(list(results["classLabel_probs"].values()), expected, rtol=1e-6)


def test_optional_input_has_its_default(ct: ModuleType, convert: Convert) -> None:
    given = np.full((1, 4), 2, np.float32)
    inputs = [ct.TensorType(name="x", shape=(1, 4)), ct.TensorType(name="y", shape=(1, 4), default_value=given)]
    model = load(convert(Function(lambda x, y: x - y), (torch.rand(1, 4), torch.rand(1, 4)), inputs=inputs))
    x = np.ones((1, 4), np.float32)
    assert [next(iter(model.predict({"x": x, **y}).values())).tolist() for y in ({}, {"y": x})] == [
        [[-1.0] * 4],
        [[0.0] * 4],
    ]


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 2


def test_state_is_changed_in_place(ct: ModuleType, convert: Convert) -> None:
    half = {"shape": (1, 4), "dtype": np.float16}
    model = load(
        convert(
            Sum(), torch.rand(1, 4).half(), "iOS18", inputs=[ct.TensorType(name="x", **half)],
            outputs=[ct.TensorType(name="y", dtype=np.float16)],
            states=[ct.StateType(wrapped_type=ct.TensorType(**half), name="total")],
        )
    )  # fmt: skip
    ones = {"x": np.ones((1, 4), np.float16)}
    state, other = model.make_state(), model.make_state()
    assert [model.predict(ones, state)["y"][0, 0] for _ in range(3)] == [2, 4, 6]
    assert model.predict(ones, other)["y"][0, 0] == 2
    assert model.predict(ones)["y"][0, 0] == 2
    assert state.read_state("total").tolist() == [[3.0] * 4] and state.read_state("total").dtype == np.float16
    state.write_state("total", np.zeros((1, 4)))
    assert model.predict(ones, state)["y"][0, 0] == 2
    for wrong in (lambda: state.read_state("sum"), lambda: state.write_state("total", np.zeros(4))):
        with pytest.raises(UsageError, match="got"):
            wrong()


def test_functions_of_one_package_are_chosen_by_name(ct: ModuleType, convert: Convert, tmp_path: Path) -> None:
    pool, x = Pool(), torch.rand(1, 3, 8, 8)
    paths = [convert(network, x, inputs=[ct.TensorType(name="x", shape=x.shape)]) for network in (pool, pool.conv)]
    several = ct.utils.MultiFunctionDescriptor()
    for path, name in zip(paths, ("pool", "grid"), strict=True):
        several.add_function(str(path), "main", name)
    several.default_function_name = "pool"
    ct.utils.save_multifunction(several, str(tmp_path / "several.mlpackage"))
    models = [load(tmp_path / "several.mlpackage", name) for name in (None, "pool", "grid")]
    shapes = [next(iter(model.predict({"x": x}).values())).shape for model in models]
    assert shapes == [(1, 4), (1, 4), (1, 4, 4, 4)]
    with pytest.raises(PackageError, match=r"function_name must be one of grid, pool \(got 'none'\)"):
        load(tmp_path / "several.mlpackage", "none")


@pytest.mark.parametrize("kind", ["pipeline", "neuralNetwork"])
def test_other_kinds_of_model_are_one_error(small_package: Path, edit: Callable[..., Path], kind: str) -> None:
    def change(model: Any) -> None:
        getattr(model, kind).SetInParent()

    with pytest.raises(FastVLMError, match=f"must be an mlProgram, got {kind}") as caught:
        load(edit(small_package, change))
    assert "\n" not in str(caught.value)


class DecoderStep(nn.Module):
    """Attention of new tokens over a cache of 8, whose written part is as long as the mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("keys", torch.zeros(1, 2, 8, 4))
        self.register_buffer("values", torch.zeros(1, 2, 8, 4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).view(1, x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        end = mask.shape[-1]
        begin = end - x.shape[1]
        self.keys[:, :, begin:end] = keys
        self.values[:, :, begin:end] = values
        attended = nn.functional.scaled_dot_product_attention(
            queries, self.keys[:, :, :end], self.values[:, :, :end], attn_mask=mask
        )
        return self.out(attended.transpose(1, 2).reshape(1, x.shape[1], 8))


def causal(new: int, all_: int) -> np.ndarray:
    places = np.arange(all_ - new, all_)[:, None]
    return np.where(np.arange(all_) > places, -np.inf, 0).astype(np.float32)[None, None]


def test_stateful_decoder_step_agrees_with_the_whole_sequence(ct: ModuleType, convert: Convert) -> None:
    new, whole = ct.RangeDim(1, 8, default=2), ct.RangeDim(1, 8, default=4)
    tensors = {name: ct.TensorType(shape=(1, 2, 8, 4), dtype=np.float16) for name in ("keys", "values")}
    path = convert(
        DecoderStep(), (torch.rand(1, 2, 8), torch.zeros(1, 1, 2, 4)), "iOS18",
        inputs=[ct.TensorType(name="x", shape=(1, new, 8)), ct.TensorType(name="mask", shape=(1, 1, new, whole))],
        outputs=[ct.TensorType(name="y")],
        states=[ct.StateType(wrapped_type=tensor, name=name) for name, tensor in tensors.items()],
    )  # fmt: skip
    model, x = load(path), np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    with torch.no_grad():
        expected = DecoderStep()(torch.from_numpy(x), torch.from_numpy(causal(6, 6))).numpy()
    state, found = model.make_state(), []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        data = {"x": x[:, start:end], "mask": causal(end - start, end)}
        found.append(model.predict(data, state)["y"])
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=2e-3)  # weights and states are float16
    assert np.abs(state.read_state("keys")[:, :, :6]).min() > 0
    assert not state.read_state("keys")[:, :, 6:].any()
