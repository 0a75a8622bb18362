"""The fixtures of all test folders."""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import settings

os.environ["MLX_ENABLE_TF32"] = "0"  # before the import of MLX, since tolerances assume full float32
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin take the other workers' cores
if sys.platform == "darwin":
    # torch's and scikit-learn's wheels each bring an OpenMP library there, and a process that loads both aborts with
    # "OMP: Error #15" or hangs. The tests compare palettes with scikit-learn's, with one thread and small arrays.
    os.environ["KMP_DUPLICATE_LIB_OK"] = "TRUE"

ROOT = Path(__file__).resolve().parent.parent

SLOW_FIXTURES = frozenset(
    (
        "fastvlm",
        "here",
        "model",
        "random_tiny",
        "shipped_tiny",
        "exported",
        "exports",
        "at_four_bits",
        "fastvithd_package",
        "folders",
        "bundles",
    )
)
"""The fixtures that start commands or export models. A test with one of them is marked `slow`."""

LONGEST = (
    "test_docs.py",
    "export/test_exporter.py",
    "export/test_write_encoder.py",
    "mac/test_mac_check.py",
    "models/mlprogram/test_constexpr.py",
    "cli/test_export.py",
    "runtime/bulk/test_ray_pool.py",
    "export/test_verify.py",
    "models/mlprogram/test_package.py",
    "runtime/server/test_ray.py",
    "export/test_verify_encoder.py",
    "export/test_recipe.py",
    "cli/test_verify.py",
    "cli/test_bench.py",
    "runtime/bulk/test_ray_data.py",
    "cli/test_serve.py",
    "soak/test_soak_captions.py",
    "models/test_random_encoder.py",
)
"""The files of more than about ten seconds, the longest first, so that none runs alone at the end."""

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


class RootFolder:
    """Collects the root as a plain folder, although its `__init__.py` makes it the package `fastvlm`.

    As a package it would be imported under the name of its folder, which a clone chooses and which may have a hyphen.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootFolder())  # a hook of this file alone would not be asked about its parent


@pytest.hookimpl(tryfirst=True)  # before the option -m deselects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests with an expensive fixture as `slow`, and puts the longest files first."""
    for item in items:
        if isinstance(item, pytest.Function) and SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns the function from a name to the folder that `make(folder)` writes, once for all workers of a run.

    Tests that change the folder copy it.
    """

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        root = tmp_path_factory.getbasetemp()
        root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                make(root / name)
        return root / name

    return folder_of


@pytest.fixture(scope="session")
def random_tiny(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """An exported `random:tiny` with every default."""
    from fastvlm.export.exporter import export

    return once("random-tiny", lambda folder: export("random:tiny", folder))


@pytest.fixture(scope="session")
def shipped_tiny(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """An exported `tiny` with every default."""
    from fastvlm.export.exporter import export

    return once("shipped-tiny", lambda folder: export("tiny", folder))


@pytest.fixture(scope="session")
def tolerance() -> Callable[[str], float]:
    """Returns the function from a name to its tolerance in `tests/tolerances.py`."""
    table = runpy.run_path(str(Path(__file__).with_name("tolerances.py")))["TOLERANCES"]
    return lambda key: table[key].value


@pytest.fixture(scope="module")
def float32_decoder() -> Iterator[None]:
    """Runs MLX on the CPU, where weights are expanded to float32 and a row gives the same numbers alone and in a batch.

    On Metal a batch runs other kernels than a single answer, in float16, which can decide near ties differently.
    """
    from fastvlm.models import _mlx

    before, on_cpu = _mlx.mx.default_device(), _mlx.on_cpu()
    _mlx.mx.set_default_device(_mlx.mx.cpu)
    _mlx._cpu = True
    yield
    _mlx.mx.set_default_device(before)
    _mlx._cpu = on_cpu


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with numbers of the reference implementations. Its tests are skipped if it is absent."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no reference numbers at {folder}")
    return folder


@pytest.fixture(scope="session")
def core_ml_error() -> Callable[[str], RuntimeError]:
    """Returns the function from a description to coremltools' error for that NSError, with its printed `userInfo`."""
    return lambda description: RuntimeError(f'{{\n    NSLocalizedDescription = "{description}";\n}}')


@pytest.fixture
def computing_on() -> Iterator[Callable[[Literal["cpu", "gpu"]], None]]:
    """Yields a function that selects the branches for a CPU or a GPU. MLX's CPU device computes both.

    MLX compiles nothing, since on a CPU this would run the system's C++ compiler.
    """
    from fastvlm.models import _mlx

    before = _mlx.on_cpu()

    def switch(device: Literal["cpu", "gpu"]) -> None:
        _mlx._cpu = device == "cpu"
        _mlx.mx.disable_compile()

    yield switch
    _mlx._cpu = before
    _mlx.mx.enable_compile()


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes `random:tiny` as a checkpoint folder in Apple's layout and returns it.

    Options: `change(tensors)` edits the torch tensors first; `dtype` casts them; `shards` splits them over files.
    """
    import json

    import torch
    from safetensors.torch import save_file

    from fastvlm.models.random_checkpoint import RandomCheckpoint

    def write(change: Callable | None = None, dtype: torch.dtype | None = None, shards: int = 1) -> Path:
        source = RandomCheckpoint("tiny")
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        tensors = {name: torch.from_numpy(source.read(name, "pt")) for name in source.tensors}
        if change:
            change(tensors)
        tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
        else:
            weight_map = {}
            for k in range(shards):
                file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
                part = {name: tensors[name] for name in sorted(tensors)[k::shards]}
                save_file(part, folder / file)
                weight_map.update(dict.fromkeys(part, file))
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(source.config_dict))
        for name, content in source.tokenizer_files().items():
            (folder / name).write_bytes(content)
        return folder

    return write


@pytest.fixture(scope="session")
def language_side() -> Callable:
    """Returns the function that loads projector and decoder of a source checkpoint in float32."""
    from fastvlm.models.checkpoint import Checkpoint
    from fastvlm.models.language import LanguageSide, load_language
    from fastvlm.models.layerwise import checkpoint_reader
    from fastvlm.models.tensor_names import language_shapes, saved_name

    def load(checkpoint: Checkpoint) -> LanguageSide:
        read = checkpoint_reader(checkpoint)
        names = map(saved_name, language_shapes(checkpoint.config))
        return load_language({name: read(name) for name in names}, checkpoint.config, expand=True)

    return load
