"""Writes the parts of the documentation that are made from the code: `python docs/build.py`, or `make docs`.

`docs/api.md` lists everything public, and `docs/design.md` has a picture of the imports between folders. A test
compares both with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "export", "runtime", "quant", "models")
START, END = "<!-- made by docs/build.py: begin -->\n", "<!-- made by docs/build.py: end -->\n"

WIDTH = 100
"""The most characters of a signature on one line."""

GROUPS = {
    "Models": ("load", "FastVLM", "Conversation", "Generation", "TokenLogprob"),
    "Export": ("export", "verify", "bundle"),
    "Measure": ("benchmark", "evaluate"),
    "Ray Data": ("ray.Captioner",),
    "Any Core ML package": ("mlprogram.load", "mlprogram.Model", "mlprogram.State"),
    "Errors": ("FastVLMError",),
}
"""The headings of the API page. A public name that is missing here is listed under Others."""


def folder_of(path: Path) -> str:
    """Returns the folder of a source file, with one level of subfolders: `models/mlprogram`."""
    return "/".join(path.relative_to(ROOT).parent.parts[:2])


def imports_between_folders() -> set[tuple[str, str]]:
    """Returns (importing folder, imported folder) for every import inside the package."""
    found = set()
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        here = path.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = here[: len(here) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*target, alias.name) for alias in node.names] if not node.module else [target]
            for name in names:
                folder = "/".join(part for n, part in enumerate(name[:2]) if ROOT.joinpath(*name[: n + 1]).is_dir())
                if folder and folder.split("/")[0] in FOLDERS and folder != folder_of(path):
                    found.add((folder_of(path), folder))
    return found


def layout() -> str:
    """Returns the picture of the folders and their imports, as Mermaid."""
    edges = imports_between_folders()
    folders = sorted({folder for edge in edges for folder in edge}, key=lambda f: (FOLDERS.index(f.split("/")[0]), f))
    lines = ["```mermaid", "graph TD"]
    for top in FOLDERS:
        inside = [folder for folder in folders if folder.split("/")[0] == top]
        lines += [
            f"  subgraph {top}_folder [{top}/]",
            *(f"    {_node(folder)}[{folder}]" for folder in inside),
            "  end",
        ]
    across = sorted({(a.split("/")[0], b.split("/")[0]) for a, b in edges})
    lines += [f"  {_node(a)} --> {_node(b)}" for a, b in across if a != b]
    within = sorted((a, b) for a, b in edges if a.split("/")[0] == b.split("/")[0])
    lines += [f"  {_node(a)} -.-> {_node(b)}" for a, b in within]
    return "\n".join([*lines, "```", ""])


def _node(folder: str) -> str:
    return folder.replace("/", "_") + "_"


def with_layout(page: str) -> str:
    """Returns the design page with the current picture between its two marks."""
    before, rest = page.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{layout()}\n{END}{after}"


def api() -> str:
    """Returns the API page: every public name with its signature and its docstring."""
    import fastvlm

    named = {name.split(".")[0] for names in GROUPS.values() for name in names}
    others = tuple(name for name in fastvlm.__all__ if name not in named and not name.startswith("__"))
    groups = {**GROUPS, **({"Others": others} if others else {})}
    lines = [
        "# Python API",
        "",
        "Made from the code by `docs/build.py`. `import fastvlm` takes milliseconds, and each name is imported when it",
        "is first used.",
    ]
    for heading, names in groups.items():
        lines += ["", f"## {heading}"]
        for name in names:
            if name.split(".")[0] in fastvlm.__all__:
                lines += ["", *_entry(f"fastvlm.{name}", _object(fastvlm, name))]
    return "\n".join(lines) + "\n"


def _object(package: ModuleType, name: str) -> Any:
    """Returns a public object. `fastvlm.export` is a package, so its function is looked up."""
    first, _, rest = name.partition(".")
    found = getattr(package, first)
    if rest:
        return getattr(found, rest)
    if isinstance(found, ModuleType):
        return importlib.import_module("fastvlm.export.exporter").export
    return found


def _entry(name: str, member: Any, level: str = "###") -> Iterator[str]:
    yield f"{level} `{name}`"
    yield ""
    if isinstance(member, property):
        member = member.fget
        yield from ("```python", f"{name.split('.', 1)[1]}: {member.__annotations__['return']}", "```", "")
    elif dataclasses.is_dataclass(member) or not inspect.isclass(member):
        yield from ("```python", *_signature(name.split(".", 1)[1], member), "```", "")
    yield from _prose(inspect.getdoc(member) or "")
    if dataclasses.is_dataclass(member):
        yield from _fields(member)
    if inspect.isclass(member) and not issubclass(member, BaseException):
        for method, value in vars(member).items():
            if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                yield from ("", *_entry(f"{name}.{method}", value, "####"))


def _fields(member: Any) -> Iterator[str]:
    """Yields the strings under the fields of a dataclass as a list."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(member)).body if isinstance(node, ast.ClassDef))
    pairs = []
    for field, text in itertools.pairwise(body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                pairs.append((name, inspect.cleandoc(doc)))
    if pairs:
        yield from ("", "**Attributes**", "")
    for name, doc in pairs:
        first, *others = doc.splitlines()
        yield from (f"- `{name}`: {first}", *(f"  {line}" for line in others))


class _Written(str):
    """A piece of a signature that is printed as it is, without quotes."""

    __repr__ = str.__str__


def _signature(name: str, member: Any) -> list[str]:
    """Returns `name(...)` with one argument per line if it is long. Annotations are as written in the source."""
    signature = inspect.signature(member)
    parameters = [_as_written(parameter) for key, parameter in signature.parameters.items() if key != "self"]
    result = signature.return_annotation
    if inspect.isclass(member) or result is inspect.Signature.empty:
        result = inspect.Signature.empty
    text = str(
        signature.replace(
            parameters=parameters, return_annotation=_Written(result) if isinstance(result, str) else result
        )
    )
    if len(name) + len(text) <= WIDTH:
        return [f"{name}{text}"]
    end = text.rindex(")")
    return [f"{name}(", *(f"    {part}," for part in _arguments(text[1:end])), text[end:]]


def _as_written(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if callable(default) and default is not inspect.Parameter.empty:
        default = _Written("...")
    return parameter.replace(annotation=_Written(parameter.annotation), default=default)


def _arguments(text: str) -> Iterator[str]:
    depth, part = 0, ""
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += letter
    yield part.strip()


def _prose(text: str) -> Iterator[str]:
    """Yields a docstring as Markdown: `Raises:` and `Attributes:` become lists."""
    for line in text.splitlines():
        if re.fullmatch(r"(Raises|Attributes|Returns|Args):", line):
            yield f"**{line[:-1]}**"
            yield ""
        elif line.startswith("        "):
            yield f"  {line.strip()}"
        elif entry := re.fullmatch(r"    (\w[\w, `]*): (.*)", line):
            yield f"- `{entry[1]}`: {entry[2]}"
        else:
            yield line


def main() -> None:
    design = ROOT / "docs" / "design.md"
    design.write_text(with_layout(design.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "api.md").write_text(api(), encoding="utf-8")


if __name__ == "__main__":
    main()
