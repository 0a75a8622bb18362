"""The project's own rules, held by reading its source."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "export", "models", "quant", "runtime")
MAY_IMPORT = {
    "cli": {"cli", "export", "runtime", "quant", "models"},
    "export": {"export", "quant", "models"},
    "runtime": {"runtime", "models"},
    "quant": {"quant", "models"},
    "models": {"models"},
}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Yields the absolute names of a source file's imports, relative ones as `fastvlm.folder...`."""
    package = ("fastvlm", *path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def test_sources_were_found() -> None:
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downhill_and_are_relative(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imported_modules(path):
        assert not name.startswith("fastvlm.tests")
        if name.startswith("fastvlm."):
            target = name.split(".")[1]
            assert target in MAY_IMPORT[folder] | {"_version"}, f"{path} imports {name}, uphill"
    absolute = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level == 0 and (node.module or "").startswith("fastvlm") for node in absolute)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_and_mlx_share_no_module(path: Path) -> None:
    names = {name.split(".")[0] for name in imported_modules(path, module_level=True)}
    names |= {"mlx" for name in imported_modules(path, module_level=True) if "._mlx." in name}
    assert not {"torch", "mlx"} <= names


def test_package_list_is_complete() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"fastvlm"}
    for path in SOURCES:
        found.add(".".join(("fastvlm", *path.relative_to(ROOT).parent.parts)))
    assert sorted(found) == sorted(listed)
    assert all(ROOT.joinpath(*name.split(".")[1:], "__init__.py").exists() for name in listed)


HEAVY = ("numpy", "torch", "coremltools", "mlx", "transformers", "matplotlib", "mlx_lm", "ray")


@pytest.mark.parametrize("statement", ["import fastvlm", "import fastvlm.cli.main", "import fastvlm; dir(fastvlm)"])
def test_start_up_imports_nothing_heavy(statement: str) -> None:
    code = f"{statement}; import sys; print(*sorted({{m.split('.')[0] for m in sys.modules}} & {set(HEAVY)!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_public_names_resolve() -> None:
    import fastvlm

    for name in fastvlm.__all__:
        assert getattr(fastvlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastvlm.nonsense  # noqa: B018
    assert callable(fastvlm.export)
    assert callable(__import__("fastvlm.export.exporter").export)
