"""Chat templates: untrusted programs, run in jinja2's sandbox within bounds of time, memory and output.

jinja2's sandbox keeps a template from reaching Python, but not from `'x' * 10**10`, endless loops or
`tojson(indent=10**9)`. Here only the filters, functions and methods that chat templates need exist. The size of every
intermediate value is checked. Each iteration, call, operation and output is charged to a budget of characters and time.
A template never handles the users' text (`prompt.py` inserts it afterwards), so the bounds can be narrow.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from .errors import ConfigError, PromptError

MAX_TEMPLATE_CHARACTERS = 64 * 1024
"""The longest template that is accepted, in characters. The longest of well-known models have about 20,000."""
MAX_NESTING = 100
"""The deepest nesting of a template's syntax."""
MAX_WEIGHT = 50_000
"""The largest size of one value, in characters and elements."""
MAX_DEPTH = 32
"""The deepest nesting of lists in a value."""
MAX_SPENT = 4_000_000
"""The budget of one rendering, in characters and elements: about 32 MB at worst."""
MAX_SECONDS = 2.0
"""The processor time of one rendering, in seconds. A usual template takes a millisecond."""
MAX_BITS = 4096
"""The longest integer that a template may compute, in bits."""
STEP = 50
"""The charge for an iteration or a call, in characters, in addition to its result."""
CLOCK_STEP = 20_000
"""The charge between two reads of the clock, in characters. A read may take 10 us."""

MAX_DATE_FORMAT = 32
"""The longest format of a date, in characters."""

FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "string",
    "title", "trim", "unique", "upper",
)  # fmt: skip
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower lstrip "
        "partition removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip "
        "title upper".split()
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    LoopContext: frozenset(("changed", "cycle")),
}
"""The methods of each type that may be called. None of them pads or formats to a width."""

REFUSED = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)
"""The statements that refer to other templates, which do not exist here."""


class ExcessError(PromptError):
    """A template exceeds a bound."""

    def __init__(self, excess: str) -> None:
        super().__init__(
            f"the model's chat template {excess}: it is broken or hostile. Do not use this model as it is."
        )


class ChatTemplate:
    """A compiled template. Several threads may render it.

    Raises:
        ConfigError: the template is malformed or too long, or uses a feature that is not allowed.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise ConfigError(
                f"the chat template must have at most {MAX_TEMPLATE_CHARACTERS} characters (got {len(text)})"
            )
        environment = _Environment()
        try:
            tree = _Bounds().visit(environment.parse(text))
            environment.literal_characters = _literal_characters(tree)
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as reason:
            raise ConfigError(f"the chat template is malformed at line {reason.lineno}: {reason.message}") from None
        except (SyntaxError, RecursionError, ValueError, MemoryError) as reason:  # in the Python that jinja2 writes
            raise ConfigError(f"the chat template cannot be compiled: {type(reason).__name__}") from None
        self._environment = environment
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None), None)

    def render(self, **variables: Any) -> str:
        """Returns the text of the prompt.

        Raises:
            PromptError: the template refuses the variables, or exceeds a bound.
            Exception: anything that a faulty template causes.
        """
        self._environment.begin()
        return self._template.render(**variables)


class _Environment(ImmutableSandboxedEnvironment):
    """An environment with Hugging Face's settings (block trimming, loop controls) and with bounds."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        # Without optimization, and with a `finalize` that takes the context, jinja2 folds no constants.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            optimized=False,
            finalize=_finalize,
        )
        self.literal_characters = 0
        self._spent = threading.local()
        kept: dict[str, Any] = {name: self._weighing(self.filters[name]) for name in FILTERS}
        own: dict[str, Any] = {
            "join": self.joined,
            "replace": self.replaced,
            "tojson": self.to_json,
            "safe": lambda x: x,
        }
        self.filters = {**kept, **{name: self._weighing(own[name]) for name in own}}
        self.filters |= {"_iterations": self._iterations, "_weighed": self.weighed, "_concat": self.joined}
        self.globals = {
            "range": self.globals["range"],
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def begin(self) -> None:
        """Starts a new budget for this thread."""
        self._spent.characters, self._spent.next_check = 0, CLOCK_STEP
        self._spent.deadline = time.thread_time() + MAX_SECONDS

    def spend(self, characters: int) -> None:
        """Charges this thread's budget. Raises ExcessError when it is used up."""
        self._spent.characters += characters
        if self._spent.characters > MAX_SPENT:
            raise ExcessError(f"makes more than {MAX_SPENT} characters")
        if self._spent.characters > self._spent.next_check:
            self._spent.next_check = self._spent.characters + CLOCK_STEP
            if time.thread_time() > self._spent.deadline:
                raise ExcessError(f"takes more than {MAX_SECONDS:g} s")

    def weighed(self, value: Any) -> Any:
        """Charges for `value` and returns it. A generator becomes a list. Raises ExcessError for a large value."""
        if isinstance(value, Iterator):
            value = list(itertools.islice(value, MAX_WEIGHT + 1))
        self.spend(STEP + _weight(value))
        return value

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a macro, or a function or method that is allowed. Raises PromptError for anything else."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        self.spend(STEP)
        if isinstance(obj, Macro):
            self.spend(self.literal_characters)
        elif isinstance(owner, str) and name == "join":
            return self.joined(args[0], owner)
        elif isinstance(owner, str) and name == "replace":
            return self.replaced(owner, *args)
        elif not any(obj is known for known in self.globals.values()) and name not in METHODS.get(type(owner), ()):
            raise PromptError(f"the chat template calls {name or type(obj).__name__!r:.40}, which is not allowed")
        result = super().call(context, obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else self.weighed(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes an arithmetic operation, after a check of the result's size. Raises PromptError."""
        if operator == "%" and isinstance(left, str):
            raise PromptError("the chat template formats a string with %, which is not allowed")
        if operator == "*" and _bits(left) + _bits(right) > MAX_BITS:
            raise ExcessError("computes a huge number")
        for many, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(many, str | list | tuple) and isinstance(times, int):
                _within(len(many) * times)
        if operator == "**" and _bits(left) * (abs(right) if isinstance(right, int) else 1) > MAX_BITS:
            raise ExcessError("computes a huge number")
        return self.weighed(super().call_binop(context, operator, left, right))

    def joined(self, value: Iterable[Any], d: Any = "") -> str:
        """Joins the elements of `value` with `d`, as jinja2's filter does. Raises ExcessError."""
        texts, between = [str(part) for part in itertools.islice(value, MAX_WEIGHT + 1)], str(d)
        _within(sum(map(len, texts)) + len(between) * len(texts))
        return self.weighed(between.join(texts))

    def replaced(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        """Replaces `old` by `new`, as jinja2's filter does. Raises ExcessError."""
        text = str(text)
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        _within(len(text) + times * len(new))
        return self.weighed(text.replace(old, new, times))

    def to_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        """Returns `value` as JSON, as Hugging Face's filter does. Raises ExcessError."""
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 8):
            raise ExcessError(f"indents JSON by {str(indent)!r:.20}")
        allowed: dict[str, Any] = {
            key: options[key] for key in ("sort_keys", "ensure_ascii", "separators") if key in options
        }
        if any(len(str(text)) > 8 for text in allowed.get("separators") or ()):
            raise ExcessError("separates JSON by long strings")
        return json.dumps(value, **dict[str, Any](ensure_ascii=False, indent=indent) | allowed)

    def _weighing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps the mark that it takes the context
        def filtered(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, Namespace) for value in (*args, *kwargs.values())):
                raise PromptError("the chat template filters a namespace, which is not allowed")
            return self.weighed(function(*args, **kwargs))

        return filtered

    def _iterations(self, values: Iterable[Any], literals: int) -> Iterator[Any]:
        """Charges for each iteration of a loop whose body contains `literals` characters of text."""
        for value in values:
            self.spend(STEP + literals)
            yield value


class _Generation(Extension):
    """The tags `{% generation %}` and `{% endgeneration %}`, with which transformers marks what a model is trained on.

    They change nothing in the text.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounds(NodeTransformer):
    """Inserts the charges into a template's tree: in loops, and where values are made without a call."""

    _depth = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, REFUSED) or (isinstance(node, nodes.For) and node.recursive):
            kind = "recursive loop" if isinstance(node, nodes.For) else type(node).__name__.lower()
            raise ConfigError(f"the chat template has a statement of the kind '{kind}', which is not allowed")
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise ConfigError(f"the chat template is nested more than {MAX_NESTING} deep")
        literals = nodes.Const(_literal_characters(node)) if isinstance(node, nodes.For) else None
        self.generic_visit(node)
        self._depth -= 1
        if literals is not None and isinstance(node, nodes.For):
            node.iter = _filter(node.iter, "_iterations", literals)
        elif isinstance(node, nodes.Concat):
            return _filter(nodes.List(node.nodes), "_concat")
        literal = isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and getattr(node, "ctx", "load") == "load"
        part = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        return _filter(node, "_weighed") if literal or part else node


def _filter(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    made = nodes.Filter(node, name, list(args), [], None, None)
    made.set_lineno(getattr(node, "lineno", 0) or 0)
    return made


def _literal_characters(node: nodes.Node) -> int:
    return sum(len(text.data) for text in node.find_all(nodes.TemplateData))


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """Returns the text of a value that the template outputs."""
    if isinstance(value, Undefined):
        return value
    environment = context.environment
    return environment.weighed(value if isinstance(value, str) else str(environment.weighed(value)))


def _weight(value: Any, depth: int = 0) -> int:
    """Returns the number of characters and elements in `value`, shared ones counted each time. Raises ExcessError."""
    weight = 0
    if isinstance(value, str):
        weight = len(value)
    elif isinstance(value, dict | list | tuple):
        if depth > MAX_DEPTH:
            raise ExcessError(f"nests values more than {MAX_DEPTH} deep")
        _within(len(value))
        for part in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            weight += 1 + (len(part) if isinstance(part, str) else _weight(part, depth + 1))
            if weight > MAX_WEIGHT:
                break
    elif isinstance(value, Namespace):
        raise PromptError("the chat template uses a namespace as a value, which is not allowed")
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ExcessError("computes a huge number")
    _within(weight)
    return weight


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _within(weight: int) -> None:
    if weight > MAX_WEIGHT:
        raise ExcessError(f"makes a value of more than {MAX_WEIGHT} characters")


def _raise_exception(message: Any) -> None:
    raise PromptError(f"the chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE_FORMAT or not re.fullmatch(r"(?:[^%]|%-?[A-Za-z%])*", form):  # a width could be gigabytes
        raise PromptError(f"the chat template formats the date as {form!r:.40}, which is not allowed")
    return datetime.now().strftime(form)
