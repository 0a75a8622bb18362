"""The seeded ways to damage a file: its bytes, its JSON, its protobuf or its template."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 255, 2**31, -(2**31), 2**32 - 1, 2**63, 10**30, 10**38, -0.0, 1.5, 1e-320, 1e308,
    "", "x", "x" * 100_000, "\ue0000\ue001", "../../etc/passwd", "/dev/zero", "a\nb", "\x00", "\u202e", "<image>",
    [], {}, [[]], [1, 2, 3], ["a", 1], [None], {"": ""}, {"type": "default"}, [0] * 10_000,
)  # fmt: skip

RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e-999", b"9" * 5000, b'"\\ud800"', b'"\\udc00\\ud800"', b"'x'",
    b"[" * 200 + b"]" * 200, b"[" * 5000, b'{"a":' * 5000, b"\xff", b"\x00", b"undefined", b"//", b"0x10", b"01",
)  # fmt: skip

TEMPLATE_PARTS = (
    "{% for i in range(99999) %}", "{% for m in messages %}", "{% endfor %}", "{% if messages %}", "{% endif %}",
    "{% set a = a ~ a %}", "{% set a = 'x' * 99999 %}", "{% set a = [a, a] %}", "{{ a }}", "{{ a * a }}", "{{ a | tojson }}",
    "{{ 'x' * 10**10 }}", "{{ 10 ** (10 ** 10) }}", "{{ messages | tojson(indent=10**9) }}", "{{ 'x'.ljust(10**10) }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}", "{{ f(9) }}", "{{ messages[0].content }}", "{{ ''.__class__ }}",
    "{% set ns = namespace(a='x') %}", "{% set ns.a = ns.a + ns.a %}", "{{ ns }}", "{% include 'x' %}", "{% raw %}",
    "{% endraw %}", "{#", "#}", "{{", "}}", "{%", "%}", "((((((((((((((((((((((((((((((", "{{ loop.cycle(a, a) }}",
    "{{ a | replace('', a) }}", "{{ a | join(a) }}", "{{ a.join(a) }}", "{{ '%99999999999d' % 1 }}", "{% break %}",
    "{{ messages | map('upper') | list }}", "{{ range(99999) | list | string }}", "{% filter upper %}", "{% endfilter %}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%999999999d') }}", "{{ cycler }}{{ lipsum(9999) }}{{ dict(a=1) }}",
    "{% set x %}", "{% endset %}", "{{ a[::-1] }}", "{{ a[0:10**9] }}", "{{ (a, a) == (a, a) }}", "{{ 'ä' | upper }}",
)  # fmt: skip
# ruff: noqa: E501


def damaged_bytes(content: bytes, rng: random.Random, focus: int | None = None) -> bytes:
    """Makes one to four edits. `focus` limits them to the first bytes, such as those of a header."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = max(1, min(len(data), focus or len(data)))
        at, length = rng.randrange(end), min(rng.choice((1, 2, 4, 8, 64, 1024)), max(1, len(data)))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            del data[rng.randrange(len(data) + 1) :]
        elif kind == 5:
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
        elif kind == 6:
            data[at : at + 8] = struct.pack(">Q", rng.choice((0, 2**31, 2**63 - 1, 2**64 - 1)))
        else:
            data += rng.choice((b"\x00" * 4096, bytes(data[:4096]), rng.randbytes(100)))
    return bytes(data)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Replaces values, keys or pieces of text of a JSON file, and sometimes bytes."""
    kind = rng.randrange(10)
    if kind == 0:
        return damaged_bytes(content, rng)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = _with_change(value, rng)
    text = json.dumps(value).encode()
    if kind == 1:  # text that JSON writers never write
        at = rng.randrange(len(text))
        colon = text.find(b":", at)
        at = colon + 1 if colon >= 0 else at
        text = text[:at] + rng.choice(RAW) + (b"," if rng.random() < 0.5 else b"") + text[at:]
    return text


def damaged_lines(content: bytes, rng: random.Random) -> bytes:
    """A line of a file of JSON lines, damaged, doubled or left out."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(content, rng)
    lines[at] = lines[at] * 2 if kind == 1 else damaged_json(lines[at], rng) + b"\n"
    return b"".join(lines)


def _with_change(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return a_value(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, other_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key])) if other_key in _keys(other) else None
    elif kind == 2 and isinstance(holder, dict):
        holder[str(rng.choice(("new", key + "x", "", "\x00")))] = a_value(rng)
    elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = rng.choice(
            (holder[key] + 1, -holder[key], holder[key] * 2**20, holder[key] / 3, str(holder[key]))
        )
    else:
        holder[key] = a_value(rng)
    return value


def a_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))  # later changes must not reach other files


def _keys(holder: Any) -> Any:
    return holder.keys() if isinstance(holder, dict) else range(len(holder))


def _places(value: Any, depth: int = 0) -> Any:
    """Yields (holder, key) of everything in a value, but only of the ends of long lists and maps."""
    if depth > 8 or not isinstance(value, dict | list):
        return
    keys = list(_keys(value))
    for key in keys if len(keys) < 40 else [*keys[:5], *keys[-5:]]:
        yield value, key
        yield from _places(value[key], depth + 1)


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Damages mostly the header, and sometimes its length."""
    if rng.random() < 0.3:
        return damaged_bytes(content, rng, focus=rng.choice((8, 2000, None)))
    (count,) = struct.unpack("<Q", content[:8])
    header = damaged_json(content[8 : 8 + count], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**63, 2**64 - 1, 100_000_000, len(header) + 1))
    return struct.pack("<Q", length) + header + content[8 + count :]


def damaged_template(content: bytes, rng: random.Random) -> bytes:
    """Joins pieces of hostile templates, or inserts them into a real one."""
    parts = [rng.choice(TEMPLATE_PARTS) for _ in range(rng.randint(1, 12))]
    text = content.decode()
    if rng.random() < 0.5:
        at = rng.randrange(len(text))
        return (text[:at] + "".join(parts) + text[at:]).encode()
    return ("{% set a = 'x' %}" + "".join(parts)).encode()


def damaged_program(content: bytes, rng: random.Random) -> bytes:
    """Changes one to three fields in the operations of a Core ML program."""
    from fastvlm.models.mlprogram import model_class

    if rng.random() < 0.25:
        return damaged_bytes(content, rng)
    model = model_class()()
    model.ParseFromString(content)
    main = model.mlProgram.functions["main"]
    operations = main.block_specializations[main.opset].operations
    for _ in range(rng.randint(1, 3)):
        _change_operation(operations, rng)
    return model.SerializeToString()


def _change_operation(operations: Any, rng: random.Random) -> None:
    operation, other = rng.choice(operations), rng.choice(operations)
    kind = rng.randrange(8)
    if kind == 0:
        operation.type = rng.choice((other.type, "while_loop", "custom_layer", "", "conv", "matmul", "concat", "a\nb"))
    elif kind == 1 and operation.outputs:
        dimensions = operation.outputs[0].type.tensorType.dimensions
        if dimensions:
            rng.choice(dimensions).constant.size = rng.choice((0, 1, 3, 2**20, 2**40, 2**63))
    elif kind == 2 and operation.inputs:
        name = rng.choice(sorted(operation.inputs))
        arguments = operation.inputs[name].arguments
        if arguments:
            arguments[0].name = rng.choice((other.outputs[0].name if other.outputs else "x", "nothing", "", "images"))
    elif kind == 3:
        _change_values(operation, rng)
    elif kind == 4:
        operations.remove(operation)
    elif kind == 5:
        operations.add().CopyFrom(operation)
    elif kind == 6 and operation.outputs:
        operation.outputs[0].name = rng.choice((other.outputs[0].name if other.outputs else "x", "", "\n"))
    else:
        operation.outputs[0].type.tensorType.dataType = rng.choice((0, 1, 2, 10, 11, 21, 23, 99))


def _change_values(operation: Any, rng: random.Random) -> None:
    """Changes the offset or the value of a constant."""
    for value in operation.attributes.values():
        which = value.WhichOneof("value")
        if which == "blobFileValue":
            value.blobFileValue.offset = rng.choice((0, 1, 64, 2**31, 2**63, value.blobFileValue.offset + 64))
            return
        tensor = value.immediateValue.tensor if which == "immediateValue" else None
        found = tensor.WhichOneof("value") if tensor is not None else None
        values = getattr(tensor, found).values if found in ("ints", "floats", "longInts") else None
        if values:
            large = (0, 1, -1, 7, 10**4, 2**31 - 1, -(2**31))
            values[rng.randrange(len(values))] = rng.choice(large)
            return
