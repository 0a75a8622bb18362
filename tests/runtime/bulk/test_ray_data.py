"""The callable for Ray Data: batches without Ray, and a data set on a cluster that loses a node."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastvlm
from fastvlm.models.errors import UsageError
from fastvlm.runtime.bulk import ray_data
from fastvlm.runtime.bulk.ray_data import Captioner, object_array
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.tests.runtime.bulk.conftest import BROKEN, NAMES, make_images, two_nodes

OPTIONS: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def captioner(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Captioner]:
    """A function that makes a captioner of the small random model."""
    monkeypatch.setattr(ray_data, "load_model", lambda folder, **options: vlm)
    return lambda prompts="Describe it.", options=None, **more: Captioner(
        "model", prompts, {**OPTIONS, **(options or {})}, **more
    )


def batch_of(pictures: Path, *columns: str) -> dict[str, np.ndarray]:
    """Returns the pictures as `read_binary_files` does."""
    paths = [pictures / name for name in NAMES]
    cells = {"bytes": [path.read_bytes() for path in paths], "path": [str(path) for path in paths], "key": NAMES}
    cells["image"] = [{"bytes": None, "path": str(path)} for path in paths]
    return {name: object_array(cells[name]) for name in columns}


@pytest.mark.slow
def test_batch_has_the_answers_of_generate(captioner: Callable[..., Captioner], vlm: FastVLM, pictures: Path) -> None:
    done = captioner()(batch_of(pictures, "bytes", "path"))
    assert list(done) == ["path", "text", "tokens", "finish_reason", "error"]
    for path, text, tokens, error in zip(done["path"], done["text"], done["tokens"], done["error"], strict=True):
        if path.endswith(BROKEN):
            assert (text, tokens) == ("", 0)
            assert path in error
        else:
            assert (text, tokens, error) == (vlm.generate(path, "Describe it.", **OPTIONS).text, 5, "")
    for columns in (("path", "key"), ("image",)):
        assert list(captioner()(batch_of(pictures, *columns))["text"]) == list(done["text"])
    assert "bytes" in captioner(keep_images=True)(batch_of(pictures, "bytes", "key"))


@pytest.mark.slow
def test_columns_do_not_depend_on_the_batch(captioner: Callable[..., Captioner], pictures: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    asked = captioner(["a", "b"], {"schema": schema, "max_tokens": 40, "ignore_eos": False})
    good, bad = asked(batch_of(pictures, "bytes", "key")), asked({"bytes": object_array([b"x"])})
    names = ["text", "tokens", "finish_reason", "answer"]
    assert list(good) == ["key", *(f"{name}_1" for name in names), *(f"{name}_2" for name in names), "error"]
    assert list(bad) == list(good)[1:]
    assert json.loads(good["answer_2"][0]) == {"n": 7}
    assert bad["error"][0].startswith("0 ")
    for name in bad:
        assert {type(value) for value in (*good[name], *bad[name])} == {int if name.startswith("tokens") else str}


def test_batch_without_images_is_an_error(captioner: Callable[..., Captioner]) -> None:
    with pytest.raises(UsageError, match="must have the column bytes or image or path \\(got a\\)"):
        captioner()({"a": object_array([1])})
    with pytest.raises(UsageError, match="must have the column picture"):
        captioner(column="picture")({"bytes": object_array([b""])})
    with pytest.raises(UsageError, match="Use batch_format='numpy'"):
        captioner()([1])  # type: ignore[arg-type]
    arrays = captioner()({"image": np.zeros((1, 4, 4, 3), np.uint8)})
    assert "0 must be encoded bytes or a path (got ndarray)" in arrays["error"][0]


def test_captioner_is_public_and_needs_no_ray() -> None:
    assert fastvlm.ray.Captioner is Captioner


class NotedCaptioner(Captioner):
    """Notes the node and the process of each batch in a file."""

    def __init__(self, notes: str, **arguments: Any) -> None:
        self._notes = Path(notes)
        super().__init__(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray

        done = super().__call__(batch)
        with self._notes.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()}\n")
        return done


@pytest.mark.slow
def test_data_set_survives_a_killed_node(random_tiny: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 60)
    notes = tmp_path / "notes"
    options = {"max_tokens": 24, "ignore_eos": True}
    arguments: dict[str, Any] = {"model": str(random_tiny), "prompts": "What?", "options": options, "batch_size": 2}
    with two_nodes(head_cpus=2) as (address, kill_second):
        import ray
        from ray import cloudpickle

        from fastvlm.runtime.bulk.ray_pool import connect

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        connect(address, 2, 1)
        images = ray.data.read_binary_files(str(tmp_path / "images"), include_paths=True, override_num_blocks=16)
        captions = images.map_batches(
            NotedCaptioner, fn_constructor_kwargs={"notes": str(notes), **arguments}, batch_size=4, num_cpus=0.9,
            compute=ray.data.ActorPoolStrategy(size=2),
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        for row in captions.iter_rows():
            rows.append(row)
            if len(rows) == 1:
                while len({line.split()[0] for line in notes.read_text().splitlines()}) < 2:
                    time.sleep(0.01)
                kill_second()
                before = notes.read_text().splitlines()
    assert len(before) < 12, "the node was killed in the middle of the run"
    assert len({line.split()[1] for line in notes.read_text().splitlines()}) == 3, "an actor was started again"
    paths = sorted(str(path) for path in (tmp_path / "images").iterdir())
    assert sorted(row["path"] for row in rows) == paths
    local = Captioner(**arguments)({"path": object_array(paths)})
    by_path = {row["path"]: row for row in rows}
    for name in ("text", "tokens", "finish_reason", "error"):
        assert [by_path[path][name] for path in paths] == list(local[name])
