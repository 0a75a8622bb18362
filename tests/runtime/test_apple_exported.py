"""Folders that Apple's own scripts exported (`llava-fastvithd_*_llm.*`): used without a change and without a manifest.

Their package is the encoder as upstream traces it, in float32 for iOS 16. Their decoder is in MLX's layout, in float16
or quantized in groups. `<image>` is in `tokenizer_config.json` alone, where `export_vision_encoder.py` adds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import INPUT_NAME, OUTPUT_NAME, PACKAGE_NAME
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.tensor_names import language_shapes, saved_name
from fastvlm.models.versions import import_coremltools
from fastvlm.runtime.fastvlm import load
from fastvlm.runtime.folder import NO_MANIFEST_NOTE

pytestmark = pytest.mark.slow

IMAGE_TOKEN_INDEX = 1023
SIZE = 128


@pytest.fixture(scope="module")
def encoder() -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint("tiny")).reparameterize()


@pytest.fixture(scope="module")
def package(encoder: FastViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as Apple's script converts it, traced in upstream's form and not in the rewritten one."""
    ct = import_coremltools()
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.inference_mode():
        traced = torch.jit.trace(encoder, image)
    path = tmp_path_factory.mktemp("apple") / PACKAGE_NAME
    ct.convert(
        traced,
        inputs=[ct.TensorType(name=INPUT_NAME, shape=image.shape)],
        outputs=[ct.TensorType(name=OUTPUT_NAME, dtype=np.float32)],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    return path


def write_folder(folder: Path, package: Path, bits: int | None) -> None:
    checkpoint = RandomCheckpoint("tiny")
    folder.mkdir()
    (folder / PACKAGE_NAME).symlink_to(package)
    stored = {}
    for name in language_shapes(checkpoint.config):
        saved, weight = saved_name(name), mx.array(checkpoint.read(name, "mlx")).astype(mx.float16)
        stored[saved] = weight
        if bits and weight.ndim == 2 and saved.startswith("language_model"):
            layer = saved.removesuffix(".weight")
            parts = mx.quantize(weight, group_size=64, bits=bits)
            stored.update(zip((saved, f"{layer}.scales", f"{layer}.biases"), parts, strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    config = {
        **checkpoint.config_dict,
        "image_token_index": IMAGE_TOKEN_INDEX,
        "mm_vision_tower": f"mobileclip_l_{SIZE}",
    }
    if bits:
        config |= {"quantization": {"group_size": 64, "bits": bits}}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in checkpoint.tokenizer_files().items():
        (folder / name).write_bytes(content)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(IMAGE_TOKEN_INDEX): {"content": "<image>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_folder_of_apples_scripts_answers_as_it_is(
    encoder: FastViT, package: Path, tmp_path: Path, tolerance: Callable[[str], float], bits: int | None
) -> None:
    write_folder(tmp_path / "apple", package, bits)
    vlm = load(tmp_path / "apple", backend="reference")
    assert NO_MANIFEST_NOTE in vlm.notes
    pixels = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels)).numpy()
    features = vlm.engine.encoder.encode(pixels)
    assert np.abs(features - expected).max() < tolerance("encoder_float32") * np.abs(expected).max()
    image = (255 * pixels[0].transpose(1, 2, 0)).astype(np.uint8)
    with_image = vlm.generate(image, "Describe.", max_tokens=6, ignore_eos=True)
    without = vlm.generate(None, "Describe.", max_tokens=6, ignore_eos=True)
    assert with_image.prompt_tokens == without.prompt_tokens + (SIZE // 64) ** 2 + len(
        vlm.engine.tokenizer.encode("\n")
    )
    assert len(with_image.token_ids) == 6
