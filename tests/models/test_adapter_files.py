"""The folder of an adapter: which layout it is, its scale, and the tensors that it changes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastvlm.models.adapter import AdaptedCheckpoint
from fastvlm.models.adapter_files import MAX_WILDCARDS, SAFE_PATTERN, open_adapter, part_of
from fastvlm.models.errors import AdapterError, CheckpointError, WeightsError
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.models.safetensors_files import TensorInfo
from fastvlm.quant.decoder import check_language_tensors

QUERY, TABLE = "model.layers.1.self_attn.q_proj", "model.embed_tokens"
PROJECTOR = "model.mm_projector.0.weight"
MLX_LORA = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}


def write(folder: Path, settings: dict[str, Any] | None, **files: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    for name, tensors in files.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder


def mlx_factors(module: str, names: tuple[str, str] = ("lora_a", "lora_b")) -> dict[str, torch.Tensor]:
    """Returns random factors of a module of `random:tiny`, as MLX names and lays them out."""
    rows, columns = RandomCheckpoint("tiny").tensors[f"{module}.weight"].shape
    draw = torch.Generator().manual_seed(3)
    first = rows if module == TABLE else columns
    a = torch.randn((first, 4), generator=draw)
    b = torch.randn((4, columns if module == TABLE else rows), generator=draw)
    return {f"language_model.{module}.{names[0]}": a, f"language_model.{module}.{names[1]}": b}


def merged(folder: Path, module: str) -> np.ndarray:
    return AdaptedCheckpoint(RandomCheckpoint("tiny"), folder).read(f"{module}.weight", "pt")


@pytest.mark.slow  # imports mlx-lm
@pytest.mark.parametrize("module", [QUERY, TABLE])
def test_mlx_adapter_is_merged_as_mlx_fuses_it(tmp_path: Path, module: str) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    factors = mlx_factors(module)
    folder = write(tmp_path, MLX_LORA, adapters=factors)
    weight = RandomCheckpoint("tiny").read(f"{module}.weight", "pt")
    a, b = (mx.array(tensor.numpy()) for tensor in factors.values())
    if module == TABLE:
        layer: Any = LoRAEmbedding.from_base(nn.Embedding(*weight.shape), r=4, scale=20.0)
        layer.embedding.weight = mx.array(weight)
    else:
        layer = LoRALinear.from_base(nn.Linear(weight.shape[1], weight.shape[0], bias=False), r=4, scale=20.0)
        layer.linear.weight = mx.array(weight)
    layer.lora_a, layer.lora_b = a, b
    np.testing.assert_allclose(merged(folder, module), np.array(layer.fuse().weight), rtol=1e-5, atol=1e-4)


def test_older_mlx_vlm_adapter_scales_by_alpha_alone(tmp_path: Path) -> None:
    factors = mlx_factors(QUERY, ("A", "B"))
    folder = write(tmp_path, {"rank": 4, "alpha": 0.1, "dropout": 0.1}, adapters=factors)
    a, b = factors.values()
    expected = RandomCheckpoint("tiny").read(f"{QUERY}.weight", "pt") + 0.1 * (a @ b).T.numpy()
    np.testing.assert_allclose(merged(folder, QUERY), expected, rtol=1e-5, atol=1e-5)


def test_fully_tuned_mlx_weights_replace_the_base(tmp_path: Path) -> None:
    weight = torch.randn(RandomCheckpoint("tiny").tensors[f"{QUERY}.weight"].shape)
    folder = write(tmp_path, {"fine_tune_type": "full"}, adapters={f"language_model.{QUERY}.weight": weight})
    assert np.array_equal(merged(folder, QUERY), weight.numpy())


def test_only_saved_step_of_an_mlx_run_is_read(tmp_path: Path) -> None:
    factors = {"0000100_adapters": mlx_factors(QUERY)}
    folder = write(tmp_path, MLX_LORA, **factors)
    (folder / "._0000200_adapters.safetensors").write_bytes(b"\0\5\x16\7")
    assert [file.name for file in open_adapter(folder, allow_pickle=False).files] == ["0000100_adapters.safetensors"]
    write(tmp_path, None, **{"0000200_adapters": mlx_factors(QUERY)})
    with pytest.raises(AdapterError, match="got 2 saved steps: 0000100_adapters.safetensors, 0000200"):
        open_adapter(folder, allow_pickle=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**MLX_LORA, "fine_tune_type": "dora"}, "fine_tune_type must be 'lora' or 'full', got 'dora'. Fuse"),
        (
            {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}},
            "has rank=8 for .*factors have rank 4",
        ),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}, "scale must be a positive number, got None"),
        ({"fine_tune_type": "lora", "lora_parameters": []}, "lora_parameters must be an object"),
        ({"rank": 4}, "alpha must be a positive number, got None"),
        ({"r": 4}, "peft_type must be 'LORA', got None"),
    ],
)
def test_mlx_settings_that_are_wrong_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        AdaptedCheckpoint(RandomCheckpoint("tiny"), write(tmp_path, settings, adapters=mlx_factors(QUERY)))


@pytest.mark.parametrize("name", [PROJECTOR, PROJECTOR.removeprefix("model."), f"base_model.model.{PROJECTOR}"])
@pytest.mark.parametrize("file", ["mm_projector", "model"])
def test_projector_alone_is_taken_on_top_of_a_base(tmp_path: Path, name: str, file: str) -> None:
    projector = torch.randn(RandomCheckpoint("tiny").tensors[PROJECTOR].shape)
    folder = write(tmp_path, None, **{file: {name: projector}})
    checkpoint = open_checkpoint(folder, base="random:tiny")
    assert np.array_equal(checkpoint.read(PROJECTOR, "pt"), projector.numpy())
    assert checkpoint.tensors.keys() == RandomCheckpoint("tiny").tensors.keys()


def test_decoder_alone_asks_for_a_base(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(1) for name in RandomCheckpoint("tiny").tensors if "vision_tower" not in name}
    folder = write(tmp_path, None, model=tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_qwen2"}))
    with pytest.raises(CheckpointError, match="has a decoder and a projector without a vision encoder.*base=MODEL"):
        open_checkpoint(folder)


def resized(folder: Path, rows: int, head_rows: int | None = None, tokens: int | None = None) -> Path:
    """Writes a PEFT adapter with a resized vocabulary, and perhaps a tokenizer with `tokens` ids."""
    table = torch.randn(rows, 128)
    tensors = {f"base_model.model.{TABLE}.weight": table}
    if head_rows:
        tensors["base_model.model.lm_head.weight"] = table[:head_rows].clone()
    write(folder, {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, adapter_model=tensors)
    if tokens:
        content = json.loads(RandomCheckpoint("tiny").tokenizer_files()["tokenizer.json"])
        used = {*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])}
        flags = content["added_tokens"][0]
        content["added_tokens"] += [{**flags, "id": n, "content": f"<|new-{n}|>"} for n in range(max(used) + 1, tokens)]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_resized_vocabulary_is_taken_with_its_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("random:tiny", resized(tmp_path, 1030, 1030, tokens=1030))
    assert checkpoint.tensors[f"{TABLE}.weight"].shape == (1030, 128)
    assert checkpoint.config.decoder.tie_word_embeddings
    assert any("resizes the vocabulary from 1024 to 1030 rows" in note for note in checkpoint.notes)
    assert b"<|new-1029|>" in checkpoint.tokenizer_files()["tokenizer.json"]
    check_language_tensors(checkpoint)


@pytest.mark.parametrize(("rows", "head_rows", "tokens"), [(500, 500, 1020), (1030, 1028, 1030)])
def test_resized_vocabulary_that_does_not_fit_is_refused(
    tmp_path: Path, rows: int, head_rows: int, tokens: int
) -> None:
    with pytest.raises(
        AdapterError, match=f"must fit the tokenizer .got embeddings of {rows} rows, a head of {head_rows}"
    ):
        open_checkpoint("random:tiny", resized(tmp_path, rows, head_rows, tokens))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight", ("A", False)),
        ("language_model.model.layers.1.self_attn.q_proj.lora_a", ("A", True)),
        ("model.layers.1.self_attn.q_proj.lora_b", ("B", True)),
        ("model.layers.1.self_attn.q_proj.B", ("B", True)),
        ("model.layers.1.self_attn.q_proj.weight", ("whole", False)),
        ("module.model.layers.1.self_attn.q_proj.modules_to_save.default.weight", ("whole", False)),
        ("base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight", ("A", False)),
        ("base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_B.weight", ("B", False)),
        ("language_model.layers.1.self_attn.q_proj.lora_a", ("A", True)),
        ("model.layers.1.self_attn.qkv_proj.lora_A.weight", None),
        ("model.layers.1.self_attn.q_proj.m", None),
    ],
)
def test_names_of_every_layout_are_understood(name: str, part: tuple[str, bool] | None) -> None:
    found = part_of(name, TensorInfo((4, 128), "F32"), {f"{QUERY}.weight"})
    assert (None if found is None else (found.kind, found.transposed)) == part
    assert found is None or found.target == f"{QUERY}.weight"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("^model.layers.1.self_attn.q_proj$", True),
        (r".*\.layers\.1\..*(q_proj|k_proj|v_proj|o_proj)$", True),
        (r"layers\.1\.self_attn\.(?:q_proj|o_proj)", True),
        (r".*\.layers\.2\..*q_proj", False),
        ("_proj", False),
        ("layers.1", False),
    ],
)
def test_patterns_match_as_in_peft(tmp_path: Path, pattern: str, matches: bool) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {pattern: 128}}
    assert open_adapter(write(tmp_path, settings), allow_pickle=False).scale(QUERY, 4) == (32 if matches else 2)


@pytest.mark.parametrize("pattern", ["(.+)+q", "[a-z]*q_proj", "(a|b)*", ".*.*.*q", "q{9}", "x" * 201, "(a|(b|c))"])
def test_patterns_that_could_take_forever_are_refused(tmp_path: Path, pattern: str) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {pattern: 4}}
    with pytest.raises(AdapterError, match="rank_pattern must have names or simple patterns"):
        open_adapter(write(tmp_path, settings), allow_pickle=False).scale(QUERY, 4)


@given(st.text("q_proj.*|()?:^$\\", max_size=200))
def test_accepted_patterns_are_matched_in_no_time(pattern: str) -> None:
    if SAFE_PATTERN.fullmatch(pattern) and pattern.count(".*") <= MAX_WILDCARDS:
        start = time.thread_time()
        re.match(rf"(.*\.)?({pattern})$", "q_proj." * 12)
        assert time.thread_time() - start < 0.5


def test_adapter_of_zero_3_names_its_cause(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{QUERY}.lora_{part}.weight": torch.zeros(0) for part in "AB"}
    folder = write(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, adapter_model=tensors)
    with pytest.raises(WeightsError, match="2 tensors are empty, as DeepSpeed's ZeRO-3 saves them"):
        AdaptedCheckpoint(RandomCheckpoint("tiny"), folder)


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    write(tmp_path / "default", {"peft_type": "LORA"})
    with pytest.raises(AdapterError, match="Pass an adapter inside it .got default"):
        open_adapter(tmp_path, allow_pickle=False)


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a folder. Pass the folder that the trainer wrote"):
        open_adapter(tmp_path / "gone", allow_pickle=False)
