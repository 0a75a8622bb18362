"""Pickles: what is read as tensors, what is refused, and that nothing in them runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastvlm.models import pickles
from fastvlm.models.adapter import AdaptedCheckpoint
from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import AdapterError, CheckpointError, WeightsError
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint

PROJECTOR = "model.mm_projector.0.weight"


def converted(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Returns what the process prints, without a process and without its limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickles, "_limit", lambda size: None)  # it would hold for all tests after this one
        pickles.main([str(source), str(target), "0"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_tensors_of_every_form_survive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], legacy: bool, nested: str | None
) -> None:
    tied = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": tied, "b": tied, "turned": tied.T, "part": tied[1:], "half": torch.ones(2).bfloat16()}
    content = {"epoch": 3, nested: tensors} if nested else {**tensors, "step": 7}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    assert converted(tmp_path / "x.bin", tmp_path / "x.safetensors", capsys) == {"names": sorted(tensors)}
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


class Hostile:
    """An object whose pickle writes a file when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.file, "ran"))


@pytest.mark.parametrize("content", ["hostile", "hostile archive", "damaged", "empty", "no tensors"])
def test_what_is_not_tensors_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "x.bin"
    data = {"hostile": pickle.dumps(Hostile(tmp_path / "ran")), "damaged": b"\x80\x02garbage", "empty": b""}
    if content == "no tensors":
        torch.save({"epoch": 3}, file)
    elif content == "hostile archive":
        torch.save({"a": torch.zeros(1), "b": Hostile(tmp_path / "ran")}, file)
    else:
        file.write_bytes(data[content])
    answer = converted(file, tmp_path / "x.safetensors", capsys)
    assert "\n" not in str(answer["error"])
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "x.safetensors").exists()


@pytest.fixture
def pickled(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Callable[[int], Path]:
    """Writes `random:tiny` as pickles, one or several shards with an index."""

    def write(shards: int) -> Path:
        folder = write_checkpoint()
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if shards == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
            return folder
        weight_map = {}
        for k in range(shards):
            name = f"pytorch_model-{k + 1:05}-of-{shards:05}.bin"
            part = {key: tensors[key] for key in sorted(tensors)[k::shards]}
            torch.save(part, folder / name)
            weight_map.update(dict.fromkeys(part, name))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write


@pytest.mark.slow
def test_pickled_checkpoint_equals_the_safe_one(pickled: Callable[[int], Path]) -> None:
    folder, source = pickled(2), RandomCheckpoint("tiny")
    before = sorted(path.name for path in folder.iterdir())
    checkpoint = FolderCheckpoint(folder, allow_pickle=True)
    assert checkpoint.tensors == source.tensors
    assert np.array_equal(checkpoint.read(PROJECTOR, "pt").numpy(), source.read(PROJECTOR, "pt"))
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.slow
def test_process_refuses_hostile_pickles_and_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(WeightsError, match=r"x.bin cannot be read as tensors only .*Convert it") as caught:
        pickles.as_safetensors(tmp_path / "x.bin", tmp_path / "y")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not pickles.KEPT_VARIABLES.fullmatch("HF_TOKEN")


@pytest.mark.slow
def test_writing_more_than_the_pickle_holds_is_stopped(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10_000_000)}, tmp_path / "x.bin")  # 40 MB of a kilobyte
    with pytest.raises(WeightsError, match="cannot be read"):
        pickles.as_safetensors(tmp_path / "x.bin", tmp_path / "y")


def test_slow_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    monkeypatch.setattr(pickles, "START_SECONDS", 0.01)
    with pytest.raises(WeightsError, match="is not read after 0 s"):
        pickles.as_safetensors(tmp_path / "x.bin", tmp_path / "y")


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        (["a.bin", "b.bin"], None, "found the pickle a.bin"),
        ([], {"weight_map": {"a": "gone.bin"}}, "the shards must be in the folder .got gone.bin"),
        (["x.bin"], {"weight_map": {"a": "../x.bin"}}, r"the shards must be in the folder .got \.\./x.bin"),
        (["x.bin"], {}, "the shards must be in the folder .got no names"),
    ],
)
def test_ambiguous_or_missing_pickles_are_refused(
    tmp_path: Path, names: list[str], index: dict[str, object] | None, message: str
) -> None:
    (tmp_path.parent / "x.bin").write_bytes(b"")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    if index is not None:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        pickles.weights_as_safetensors(tmp_path, tmp_path)


@pytest.mark.slow
def test_pickled_projector_is_taken_on_top_of_a_base(tmp_path: Path) -> None:
    projector = torch.randn(RandomCheckpoint("tiny").tensors[PROJECTOR].shape)
    torch.save({PROJECTOR: projector}, tmp_path / "mm_projector.bin")
    with pytest.raises(AdapterError, match="mm_projector.bin is a pickle.*allow_pickle=True"):
        open_checkpoint(tmp_path, base="random:tiny")
    checkpoint = open_checkpoint(tmp_path, base="random:tiny", allow_pickle=True)
    assert isinstance(checkpoint, AdaptedCheckpoint)
    assert np.array_equal(checkpoint.read(PROJECTOR, "pt"), projector.numpy())
    assert len(checkpoint.digest()) == 64
