"""Untrusted chat templates: the features of real ones work, and nothing grows or hangs."""

from __future__ import annotations

import time

import pytest

from fastvlm.models.errors import ConfigError, PromptError
from fastvlm.models.template import MAX_TEMPLATE_CHARACTERS, ChatTemplate
from fastvlm.models.tokenizer_files import CHAT_TEMPLATE

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def render(text: str) -> str:
    return ChatTemplate(text).render(messages=MESSAGES, add_generation_prompt=True, tools=None, eos_token="<e>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHAT_TEMPLATE,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("{% if not tools is defined %}a{% elif tools is none %}b{% endif %}", "b"),
        ("{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}{{ ns.found }}", "2False"),
        ("{% set rest = messages[1:] %}{{ rest[0]['content'] }}{{ rest | length }}", "U1"),
        ("{% macro turn(m, end='.') %}<{{ m.role }}>{{ m['content'] }}{{ end }}{% endmacro %}"
         "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='!') }}{% endfor %}",
         "<system>S.<system>S!<user>U.<user>U!"),
        ("{% for m in messages %}{{ loop.index0 }}{{ ',' if not loop.last }}{{ loop.length }}{% endfor %}", "0,212"),
        ("{{ messages | tojson }}",
         '[{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]'),
        ("{{ messages[0] | tojson(indent=2) }}", '{\n  "role": "system",\n  "content": "S"\n}'),
        ("{{ messages | map(attribute='role') | join(', ') | upper }}", "SYSTEM, USER"),
        ("{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content }}", "U"),
        ("{{ ('a-b'.split('-') | last).strip() + 'x' * 3 ~ eos_token ~ 5 % 3 }}", "bxxx<e>2"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=system;content=S;"),
        ("{{ ' t '.strip() | trim | replace('t', 'yes') | safe }}{{ 'a,b'.replace(',', '') }}", "yesab"),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% else %}no{% endfor %}", "02"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}", "a1B"),
        ("{%- for m in messages if m.role == 'user' -%}{{ m.content }}{% endfor %}", "U"),
        ("{{ nothing }}{{ nothing or 'd' }}{{ nothing | default('e') }}", "de"),
        ("{% for m in messages | reverse %}{{ m.role in ['user', 'tool'] }}{% endfor %}", "TrueFalse"),
    ],
)  # fmt: skip
def test_features_of_real_templates_are_rendered(template: str, expected: str) -> None:
    assert render(template) == expected


DOUBLING = "{% set a = 'x' * 40000 %}" + "{% set a = a OP a %}" * 30 + "{{ a }}"
LISTS = "{% set a = [1] %}" + "{% set a = [a, a] %}" * 40

HOSTILE = {
    "endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}" + "y" * 40_000 + "{% endfor %}",
    "a loop within a filtered loop": "{% for i in range(99999) if range(99999) | list | length < 0 %}{% endfor %}",
    "a product": "{{ 'x' * 10**10 }}",
    "a product that is never used": "{{ 'x' * 10**10 if false else ('x' * 10**10) | length }}",
    "a product of lists": "{% set a = [0] * 10**9 %}{{ a | length }}",
    "a product of products": "{{ ('x' * 50000) * 50000 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{% set a = 9 ** 1200 %}{% for i in range(999) %}{% set a = a * a %}{{ a }}{% endfor %}",
    "squares": "{% set ns = namespace(a=7) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "a sum that doubles": DOUBLING.replace("OP", "+"),
    "a concatenation that doubles": DOUBLING.replace("OP", "~"),
    "a capture that doubles": "{% set a = 'x' * 40000 %}"
    + "{% set a %}{{ a }}{{ a }}{% endset %}" * 30
    + "{{ a | length }}",
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}{{ f(60) }}",
    "macros that recur": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "lists that double, printed": LISTS + "{{ a }}",
    "lists that double, compared": LISTS + LISTS.replace("a", "b") + "{{ a == b }}",
    "lists that double, as JSON": LISTS + "{{ a | tojson }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "namespaces that double": "{% set a = namespace() %}"
    + "{% set a = namespace(x=a, y=a) %}" * 40
    + "{{ a | string }}",
    "JSON indented": "{{ messages | tojson(indent=10**9) }}",
    "JSON separated": "{{ messages | tojson(separators=('x' * 40000, ':')) }}",
    "JSON skips": "{{ [[[[[[]]]]]] | tojson(indent='x' * 40000) }}",
    "a replacement": "{{ ('x' * 40000) | replace('x', 'y' * 40000) }}",
    "a replacement of nothing": "{{ ('x' * 40000).replace('', 'y' * 40000) }}",
    "a join": "{{ ('x' * 40000) | join('y' * 40000) }}",
    "a join by method": "{{ ('y' * 40000).join('x' * 40000) }}",
    "a padding": "{{ 'x'.ljust(10**10) }}",
    "a centre": "{{ 'x' | center(10**10) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a format by method": "{{ '{:10000000000d}'.format(1) }}",
    "a format by filter": "{{ '%10000000000d' | format(1) }}",
    "a date": "{{ strftime_now('%10000000000d') }}",
    "an indentation": "{{ 'a\nb' | indent(10**10) }}",
    "batches": "{{ [1] | batch(10**10, 'x') | list }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "rounding": "{{ 1.5 | round(10**9) }}",
    "a list of all": "{{ range(99999) | list }}{{ range(99999) | list }}",
    "text split and split": "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set ns.a = ns.a + ('x ' * 30000).split() %}{% endfor %}",
    "copies by slicing": "{% set a = 'x y ' * 10000 %}{% set a = a.split() %}" + "{% set b = a[1:] %}" * 2000,
    "Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python by filter": "{{ [''] | map(attribute='__class__') | list | first | string | x }}",
    "Python by a function": "{{ raise_exception.__globals__.x }}",
    "Python by format": "{{ '{0.__class__}'.format('') }}",
    "a change": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "a recursive loop": "{% for m in [[[[]]]] recursive %}{{ loop(m) }}{% endfor %}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "nested loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "a long sum": "{{ " + "+".join(["1"] * 5000) + " }}",
    "a long template": "x" * (MAX_TEMPLATE_CHARACTERS + 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_in_seconds(name: str) -> None:
    start = time.thread_time()
    with pytest.raises(Exception) as raised:
        text = render(HOSTILE[name])
        assert not text, "it should have been refused"
    assert not isinstance(raised.value, MemoryError | AssertionError)
    assert time.thread_time() - start < 4  # the bound is 2 s, and compiling comes before it


def test_errors_name_the_excess_of_a_template() -> None:
    with pytest.raises(PromptError, match="makes a value of more than 50000 characters: it is broken or hostile"):
        render(HOSTILE["a product"])
    with pytest.raises(PromptError, match="calls 'ljust', which is not allowed"):
        render(HOSTILE["a padding"])
    with pytest.raises(ConfigError, match="a statement of the kind 'include', which is not allowed"):
        render(HOSTILE["files"])


def test_each_rendering_has_a_budget_of_its_own() -> None:
    template = ChatTemplate("{% for i in range(99) %}{{ 'x' * 5000 }}{% endfor %}")
    assert len({template.render() for _ in range(4)}) == 1


def test_generation_tags_change_nothing() -> None:
    plain = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}!{% endfor %}"
    tagged = plain.replace("{{ m.content }}", "{% generation %}{{ m.content }}{%- endgeneration %}")
    assert ChatTemplate(tagged).render(messages=MESSAGES) == ChatTemplate(plain).render(messages=MESSAGES) == "!U!"
    with pytest.raises(ConfigError, match="malformed at line 1"):
        ChatTemplate("{% generation %}")


def test_generation_tags_are_charged_as_their_content() -> None:
    inner = "{% generation %}{% for b in range(9999) %}x{% endfor %}{% endgeneration %}"
    endless = "{% for a in range(9999) %}" + inner + "{% endfor %}"
    with pytest.raises(PromptError, match="broken or hostile"):
        ChatTemplate(endless).render()
