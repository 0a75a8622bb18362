"""`encoder="mlx"`: the encoder in the decoder's file, verified, and answered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import fastvlm
from fastvlm.export.exporter import export
from fastvlm.export.inspect_package import inspect
from fastvlm.export.mlx_encoder import verify_mlx_encoder
from fastvlm.export.verify_encoder import EncoderReference, encoder_reference
from fastvlm.models._mlx import mx
from fastvlm.models.errors import PackageError, UsageError, VerificationError, WeightsError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import saved_encoder
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import TINY_FOLDER
from fastvlm.models.safetensors_files import write_safetensors
from fastvlm.quant.calibration import ImageSet, verification_images

pytestmark = pytest.mark.slow

TOWER = "vision_tower.vision_model."


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random:tiny` with `encoder="mlx"`."""
    return export("random:tiny", tmp_path_factory.mktemp("mlx") / "model", encoder="mlx").folder


@pytest.fixture(scope="module")
def encoder() -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint("tiny"))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    whole = verification_images(256)
    return replace(whole, pixels=whole.pixels[:1], kinds=whole.kinds[:1])


@pytest.fixture(scope="module")
def reference(encoder: FastViT, images: ImageSet) -> EncoderReference:
    return encoder_reference(encoder, images)


def test_weights_stand_in_one_file_under_the_clients_names(exported: Path) -> None:
    tensors = mx.load(str(exported / "model.safetensors"))
    assert not (exported / "fastvithd.mlpackage").exists()
    assert tensors[f"{TOWER}patch_embed.blocks.0.reparam_conv.weight"].shape == (16, 3, 3, 3)
    assert tensors[f"{TOWER}network.0.0.layer_scale"].shape == (1, 1, 16)
    assert tensors[f"{TOWER}network.10.0.convffn.conv.bn.running_var"].shape == (256,)
    assert tensors[f"{TOWER}head.proj"].shape == (512, 768)
    assert tensors["mm_projector.0.weight"].shape == (128, 512)
    assert {t.dtype for name, t in tensors.items() if name.startswith(TOWER)} == {mx.bfloat16}
    assert "language_model.model.embed_tokens.scales" in tensors
    assert not any(name.startswith("multi_modal_projector") for name in tensors)


def test_manifest_says_what_it_is(exported: Path) -> None:
    recipe = json.loads((exported / "fastvlm.json").read_text())["recipe"]
    assert (recipe["layout"], recipe["quant"]) == ("mlx", "bf16")
    assert "io" not in recipe and "target" not in recipe


def test_inspect_says_what_a_folder_without_a_package_is(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="encoder as MLX weights, .* and no package to inspect.$"):
        inspect(exported)
    with pytest.raises(PackageError, match=r"is a checkpoint, .* Export it first: `fastvlm export .*checkpoint`.$"):
        inspect(TINY_FOLDER)
    for name in ("config.json", "fastvlm.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    with pytest.raises(PackageError, match="lacks fastvithd.mlpackage. Export the model again.$"):
        inspect(tmp_path)


def test_folder_without_a_package_answers(exported: Path, encoder: FastViT) -> None:
    vlm = fastvlm.load(exported)
    assert vlm.engine.encoder.name == "mlx"
    pixels = verification_images(256)[0]
    features = vlm.engine.encoder.encode(pixels)
    assert fastvlm.load(exported, backend="mlx").engine.encoder.encode(pixels).tobytes() == features.tobytes()
    assert features.shape == (1, 16, 512)
    answer = vlm.generate(Image.new("RGB", (90, 60), "red"), "Describe the image.", max_tokens=4)
    assert len(answer.token_ids) == 4


def test_backend_that_does_not_fit_the_folder_is_refused(exported: Path) -> None:
    with pytest.raises(UsageError, match="has its encoder in MLX"):
        fastvlm.load(exported, backend="reference")


def test_saved_encoder_keeps_what_bfloat16_keeps(
    exported: Path, encoder: FastViT, images: ImageSet, reference: EncoderReference, tolerance: Callable
) -> None:
    found = verify_mlx_encoder(exported, images, reference, encoder, "bf16")
    assert found.output.snr_db > tolerance("encoder_mlx_bf16_snr_db")
    assert list(found.stages) == ["stem", *(f"stage {i}" for i in range(5))]
    assert found.weights.failures == []
    assert found.weights.count == len(saved_encoder(exported)) - 1  # all but the head


def test_float32_is_exact(tmp_path: Path) -> None:
    result = export("random:tiny", tmp_path / "model", encoder="mlx", quant="fp32", decoder_bits=16)
    assert result.verification.encoder.output.snr_db > 100
    assert result.encoder_bytes > 4e6


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("network.2.1.convffn.fc1.weight", lambda t: t * 1.02, "must keep 60 dB"),
        ("network.4.0.token_mixer.reparam_conv.weight", lambda t: t[::-1], "must keep 60 dB"),
        ("conv_exp.se.reduce.bias", lambda t: t * 0, "conv_exp.se.reduce.bias"),
    ],
)
def test_changed_weights_are_named(
    exported: Path,
    encoder: FastViT,
    images: ImageSet,
    reference: EncoderReference,
    tmp_path: Path,
    name: str,
    change: Callable,
    message: str,
) -> None:
    found = verify_mlx_encoder(changed(exported, tmp_path, name, change), images, reference, encoder, "bf16")
    (failure,) = found.weights.failures
    assert name in failure and message in failure


def test_weights_that_are_not_finite_are_refused(
    exported: Path, encoder: FastViT, images: ImageSet, reference: EncoderReference, tmp_path: Path
) -> None:
    folder = changed(exported, tmp_path, "network.0.0.layer_scale", lambda t: t * float("nan"))
    with pytest.raises(VerificationError, match="network.0.0.layer_scale holds 16 NaN"):
        verify_mlx_encoder(folder, images, reference, encoder, "bf16")


def test_encoders_of_other_shapes_are_refused(
    exported: Path, encoder: FastViT, images: ImageSet, reference: EncoderReference, tmp_path: Path
) -> None:
    folder = changed(exported, tmp_path, "network.0.0.layer_scale", lambda t: t[..., :8])
    with pytest.raises(WeightsError, match="network.0.0.layer_scale must be"):
        verify_mlx_encoder(folder, images, reference, encoder, "bf16")


def changed(exported: Path, tmp_path: Path, name: str, change: Callable[[mx.array], mx.array]) -> Path:
    tensors = mx.load(str(exported / "model.safetensors"))
    tensors[TOWER + name] = change(tensors[TOWER + name])
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int8"}, r"quant must be bf16 or fp32 with encoder='mlx' \(got 'int8'\)"),
        ({"io": "float16"}, "io is about the Core ML package"),
        ({"with_projector": True}, "with_projector is about"),
        ({"min_snr": 40.0}, "min_snr is about"),
        ({"recipe": "recipe.json"}, "recipe is about"),
    ],
)
def test_options_of_the_package_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export("random:tiny", tmp_path / "model", encoder="mlx", **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"encoder must be coreml or mlx \(got 'onnx'\)"):
        export("random:tiny", tmp_path / "model", encoder="onnx")


def test_safetensors_hold_every_type(tmp_path: Path) -> None:
    mx.random.seed(0)
    tensors = {dtype: mx.random.normal((3, 5)).astype(getattr(mx, dtype)) for dtype in ("bfloat16", "float16")}
    tensors |= {"float32": mx.random.normal((7,)), "uint32": mx.array([1, 2**32 - 1], mx.uint32)}
    tensors["transposed"] = tensors["float16"].T
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "mlx"})
    found, metadata = mx.load(str(tmp_path / "a.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert mx.array_equal(found[name], tensor)
    write_safetensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"format": "mlx"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
