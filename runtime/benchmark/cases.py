"""The rows of a benchmark: exported folders, each with a prompt length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...models.errors import UsageError
from ...models.folder_layout import MANIFEST_NAME, PACKAGE_NAME
from ...models.hub_cache import cached_folder
from ..folder import open_folder


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: a folder, and the length of its prompt (None: without filler)."""

    label: str
    folder: Path
    prompt_tokens: int | None = None


def cases_of(folders: Sequence[str | Path | Case], prompt_tokens: Sequence[int] = ()) -> list[Case]:
    """Returns a case per folder and prompt length, with unique labels. Raises UsageError without folders."""
    if not folders:
        raise UsageError("folders must have at least one exported folder.")
    given = [one if isinstance(one, Case) else case_of(Path(one).expanduser()) for one in folders]
    names = [case.label for case in given]
    given = [case if names.count(case.label) == 1 else replace(case, label=str(case.folder)) for case in given]
    if not prompt_tokens:
        return given
    return [
        replace(case, label=f"{case.label}, {length} tokens", prompt_tokens=length)
        for case in given
        for length in prompt_tokens
    ]


def case_of(folder: Path) -> Case:
    """Returns the case of a folder, labelled with its name."""
    return Case(folder.resolve().name, folder)


def exported_folder(model: str) -> Path | None:
    """Returns the exported folder that `model` names, in the hub's cache too, or None for anything else."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = cached_folder(model) or folder
    return folder if (folder / MANIFEST_NAME).is_file() or (folder / PACKAGE_NAME).is_dir() else None


def folder_case(folder: Path, sizes: Sequence[int], quant: str | None) -> Case:
    """Returns the case of an exported folder.

    Raises:
        UsageError: another image size or a scheme is asked for, which only an export can change.
    """
    found = open_folder(folder).config.image_size
    for argument, other in (("quant", quant is not None), ("image_size", any(size != found for size in sizes))):
        if other:
            raise UsageError(
                f"{argument} cannot change an exported folder ({folder} is for {found} pixels). "
                "Pass a checkpoint instead, or export one folder per setting.",
                argument,
            )
    return case_of(folder)
