"""Clients that run here, on what is bundled for them: mlx-vlm, mlx-lm, tokenizers, transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvlm
from fastvlm.export.bundle.write import bundle
from fastvlm.export.exporter import export
from fastvlm.models._mlx import mx, nn
from fastvlm.models.folder_layout import saved_weights
from fastvlm.models.images import preprocess, to_pixel_values
from fastvlm.runtime.prompt import Message, PromptEncoder
from fastvlm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

IDS = [5, 17, 300, 44, 211, 9, 100]
SENTINEL = -200
PROMPTS = ("What is in the picture?", "  Zwei Wörter,\n\tand 12345 + 678!", "日本語のテキスト 🙂", "don't ... 'tis", "")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random:tiny` in MLX with nothing rounded but to float16 in the decoder."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    return export("random:tiny", folder, encoder="mlx", quant="fp32", decoder_bits=16).folder


def our_logits(vlm: fastvlm.FastVLM, pixels: np.ndarray | None = None) -> np.ndarray:
    """Returns the logits of `IDS`, with an image's features after the third if there are pixels."""
    decoder = vlm.engine.language.language_model
    embedded = [decoder.embed(mx.array([IDS]))]
    if pixels is not None:
        features = vlm.engine.language.multi_modal_projector(mx.array(vlm.engine.encoder.encode(pixels)))
        embedded = [decoder.embed(mx.array([IDS[:3]])), features, decoder.embed(mx.array([IDS[3:]]))]
    return np.array(decoder(mx.concatenate(embedded, axis=1), all_positions=True)[0])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture
def load_in_mlx_vlm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], nn.Module]:
    """mlx-vlm's own loader, strict, with the small encoder's numbers where its code has FastViTHD's."""
    reason = "mlx-vlm is not installed (pip install mlx-vlm); it is no dependency"
    config = pytest.importorskip("mlx_vlm.models.fastvlm.config", reason=reason)
    utils = pytest.importorskip("mlx_vlm.utils", reason=reason)

    def load(folder: Path) -> nn.Module:
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        for name in ("layers", "embed_dims", "mlp_ratios"):
            monkeypatch.setattr(config.VisionConfig, name, vision[name])
        return utils.load_model(folder)

    return load


def test_mlx_vlm_gives_our_logits(
    exact: Path, load_in_mlx_vlm: Callable[[Path], nn.Module], tmp_path: Path, tolerance: Callable[[str], float]
) -> None:
    client = load_in_mlx_vlm(bundle(exact, "mlx-vlm", tmp_path / "b").path)
    client.set_dtype(mx.float32)
    vlm = fastvlm.load(exact)
    picture = Image.fromarray(np.indices((90, 120)).sum(0).astype(np.uint8)).convert("RGB")
    pixels = to_pixel_values(preprocess(picture, vlm.engine.encoder.image_size, "pad"))
    text = client(mx.array([IDS]), None, None).logits[0]
    assert relative_error(np.array(text), our_logits(vlm)) < tolerance("client_logits_float32")
    image = client(mx.array([[*IDS[:3], SENTINEL, *IDS[3:]]]), mx.array(pixels), None).logits[0]
    assert relative_error(np.array(image), our_logits(vlm, pixels)) < tolerance("client_logits_float32")


def test_mlx_vlm_loads_quantized_decoders(
    bundles: dict[str, Path], folders: dict[str, Path], load_in_mlx_vlm: Callable[[Path], nn.Module]
) -> None:
    client = load_in_mlx_vlm(bundles["mlx-vlm"])
    logits = np.array(client(mx.array([IDS]), None, None).logits[0].astype(mx.float32))
    ours = our_logits(fastvlm.load(folders["mlx"]))
    assert 10 * np.log10((ours**2).sum() / ((logits - ours) ** 2).sum()) > 30  # it computes in float16


@pytest.mark.parametrize("encoder", ["coreml", "mlx"])
def test_mlx_lm_loads_the_decoder_of_any_folder(
    folders: dict[str, Path], encoder: str, tolerance: Callable[[str], float]
) -> None:
    from mlx_lm.models.qwen2 import Model, ModelArgs

    folder = folders[encoder]
    config = json.loads((folder / "config.json").read_text())
    prefix = "language_model."
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in saved_weights(folder).items() if name.startswith(prefix)
    }
    client = Model(ModelArgs.from_dict(config))
    affine = {key: config["quantization"][key] for key in ("group_size", "bits")}
    nn.quantize(client, **affine, class_predicate=lambda path, _: f"{path}.scales" in weights)
    client.load_weights(list(weights.items()))  # strict
    client.set_dtype(mx.float32)
    logits = np.array(client(mx.array([IDS]))[0])
    assert relative_error(logits, our_logits(fastvlm.load(folder))) < tolerance("client_logits_float32")


@pytest.mark.parametrize("target", ["apple-app", "mlx-swift-lm", "mlx-vlm"])
def test_tokenizers_agree(bundles: dict[str, Path], target: str) -> None:
    import tokenizers
    from transformers import AutoTokenizer

    folder = bundles[target]
    ours, library = Tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    hugging_face = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = ours.encode(prompt)
        assert library.encode(prompt, add_special_tokens=False).ids == ids
        assert hugging_face(prompt, add_special_tokens=False)["input_ids"] == ids


def test_prompts_of_clients_are_ours(bundles: dict[str, Path]) -> None:
    """Both clients split the template's text at `<image>` and put -200 between the parts."""
    from transformers import AutoTokenizer

    folder = bundles["mlx-swift-lm"]
    hugging_face = AutoTokenizer.from_pretrained(folder)
    ours = PromptEncoder(folder, Tokenizer(folder), SENTINEL).encode([Message("user", "What is this?", image_count=1)])
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    for content in (parts, "<image>\nWhat is this?"):
        messages = [{"role": "user", "content": content}]
        text = hugging_face.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, behind = (hugging_face(piece, add_special_tokens=False)["input_ids"] for piece in text.split("<image>"))
        assert [*before, SENTINEL, *behind] == list(ours.ids)
