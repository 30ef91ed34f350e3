"""Templates of prompts: what they can say, and that they can neither escape nor run away."""

import subprocess
import sys
import time

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.prompt_template import check_template, fill_template

COLUMNS = {
    "problem": "How many?",
    "options": ["35°", "70°"],
    "subject": "maths",
    "scores": {"a": 1, "b": 2.5},
    "empty": None,
    "huge": "x" * 90_000,
}

CAN = {
    "{{ problem }}": "How many?",
    "{{ problem }}\n": "How many?",
    "<image> {{ problem }} <b>&": "<image> How many? <b>&",
    "{% for o in options %}{{ 'ABCD'[loop.index0] }}. {{ o }}{% if not loop.last %}\n{% endif %}"
    "{% endfor %}": "A. 35°\nB. 70°",
    "{% for o in options if o != '35°' %}{{ o }}{% else %}none{% endfor %}": "70°",
    "{% if options %}{{ options | join(', ') }}{% else %}free{% endif %}": "35°, 70°",
    "{{ options | length }} {{ options[0] }} {{ options[-1] }} {{ options[:1] }}": (
        "2 35° 70° ['35°']"
    ),
    "{{ missing | default('none') }} {{ empty or '-' }} {{ 'A' if empty is none else 'B' }}": (
        "none - A"
    ),
    "{{ problem.upper() }} {{ problem | replace('How', 'So') | trim('?') }}": "HOW MANY? So many",
    "{{ problem.split(' ')[1].strip('?') }} {{ ' x ' | trim }}": "many x",
    "{{ scores.a + scores['b'] * 2 }} {{ (7 / 2) | round }} {{ 7 // 2 }} {{ 7 % 2 }}": (
        "6.0 4.0 3 1"
    ),
    "{% for k, v in scores.items() %}{{ k ~ '=' ~ v }};{% endfor %}": "a=1;b=2.5;",
    "{% set n = 2 %}{{ n * 3 }}{% for i in range(3) %}{{ i }}{% endfor %}": "6012",
    "{{ options | tojson }} {{ '<a>' | tojson }}": '["35°", "70°"] "<a>"',
    "{{ '{{ problem }}' }} {# nothing #}{% raw %}{% for %}{% endraw %}": "{{ problem }} {% for %}",
    "{{ subject in ['maths', 'physics'] }} {{ subject is string }}": "True True",
}


@pytest.mark.parametrize("source, text", CAN.items())
def test_a_template_says(source, text):
    check_template(source)
    assert fill_template(source, COLUMNS, "row 2") == text


def test_what_a_column_holds_is_text_and_no_template():
    assert (
        fill_template("{{ a }}", {"a": "{{ 7 * 7 }} {% for %}"}, "row 2") == "{{ 7 * 7 }} {% for %}"
    )


REFUSED_AT_ONCE = [
    *("{{ problem", "{% for %}", "{{ }}", "{{ a | nothing }}", "{% endif %}", "{{ 1 | format }}"),
    *("{% include 'a' %}", "{% import 'a' as a %}", "{% extends 'a' %}", "{% from 'a' import b %}"),
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block a %}{% endblock %}",
    "{% set a %}x{% endset %}",
    "{% set ns.a = 1 %}",
    "{% filter upper %}x{% endfilter %}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ {'a': problem} }}",
    "{% for x in [[options, options]] %}{{ x }}{% endfor %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "not " * 60 + "1 }}",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "x" * 10_001,
    "{{ " + "9" * 5000 + " }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x' | indent(1000000000) }}",
    "{{ options | batch(1000000000, 'x') }}",
    "{{ options | map('upper') }}",
]


@pytest.mark.parametrize("source", REFUSED_AT_ONCE, ids=lambda source: source[:40])
def test_a_template_with_what_it_may_not_have_is_refused_before_any_row(source):
    with pytest.raises(UserError, match="the prompt template is not valid") as caught:
        check_template(source)
    assert "\n" not in str(caught.value) and "correct --prompt-template" in str(caught.value)


REFUSED_AT_THE_ROW = {
    "{{ nothing }}": "'nothing' is undefined",
    "{{ scores.c }}": "has no attribute 'c'",
    "{% for x in nothing %}{% endfor %}": "'nothing' is undefined",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ ''['__class__'] }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ ''['__cla' ~ 'ss__'].mro() }}": "is unsafe",
    "{{ (1).real }}": "is unsafe",
    "{{ options.append(1) }}": "is unsafe",
    "{{ scores.pop('a') }}": "is unsafe",
    "{{ range.__globals__ }}": "is unsafe",
    "{{ cycler.__init__.__globals__ }}": "is unsafe",
    "{{ cycler('a') }}": "'cycler' is undefined",
    "{{ lipsum(1000000) }}": "'lipsum' is undefined",
    "{{ self.__init__ }}": "is unsafe",
    "{{ self._TemplateReference__context }}": "is unsafe",
    "{% for x in options %}{{ loop.__class__ }}{% endfor %}": "is unsafe",
    "{% for x in options %}{{ loop.cycle.__func__ }}{% endfor %}": "is unsafe",
    "{{ '{0.__class__}'.format(1) }}": "is unsafe",
    "{{ '{:1000000000}'.format(1) }}": "is unsafe",
    "{{ '%1000000000d' % 1 }}": "% is not for str and int",
    "{{ 'a' * 10000000000 }}": r"\* is not for str and int",
    "{{ [1] * 10000000000 }}": r"\* is not for list and int",
    "{{ 'a'.ljust(1000000000) }}": "is unsafe",
    "{{ 'a'.zfill(1000000000) }}": "is unsafe",
    "{{ 1e99 * 1e99 * 1e99 }}": "is too large",
    "{% set a = 9999999999 %}" + "{% set a = a * a %}" * 40 + "{{ a }}": "is too large",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 'a' + 1 }}": r"\+ is not for str and int",
    "{{ problem() }}": "not callable",
    "{% for i in range(10**9) %}{% endfor %}": None,
    "{% for i in range(1000000000) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% endfor %}": "loops turn more than 1000 times",
    "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}": "loops turn more",
    "{% for a in huge %}{% for b in huge %}{% endfor %}{% endfor %}": "loops turn more",
    "{{ huge }}{{ huge }}": "more than 100000 characters",
    "{{ huge ~ huge }}": "more than 100000 characters",
    "{{ huge + huge }}": "more than 100000 characters",
    "{{ huge | replace('x', huge) | length }}": "more than 100000 characters",
    "{{ huge | replace('', huge) | length }}": "more than 100000 characters",
    "{{ huge | join(huge) | length }}": "more than 100000 characters",
    "{% set a = 'abc' %}" + "{% set a = a ~ a %}" * 60: "more than 100000 characters",
    "{% for x in [1] %}{% set a = [1, 2] %}"
    + "{% set a = a + a %}" * 60
    + "{% endfor %}": "100000",
}


@pytest.mark.parametrize(
    "source, reason", REFUSED_AT_THE_ROW.items(), ids=lambda text: str(text)[:40]
)
def test_a_template_that_a_row_cannot_fill_in_names_it_and_takes_no_time(source, reason):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        fill_template(source, COLUMNS, "row 2 of a.csv")
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    if reason is not None:
        caught.match(reason)
        assert message.startswith("the prompt template cannot be filled in for row 2 of a.csv (")


def test_what_is_refused_for_its_size_is_never_made():
    """Under a limit on the memory of its process, each refusal is still one sentence."""
    sources = [s for s in [*REFUSED_AT_ONCE, *REFUSED_AT_THE_ROW] if "000" in s or "huge" in s]
    script = (
        "import resource\n"
        "from mr1_fast.errors import UserError\n"
        "from mr1_fast.tasks.prompt_template import fill_template\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 100 * 2**20,) * 2)\n"
        f"for source in {sources!r}:\n"
        "    try:\n"
        "        fill_template(source, {'huge': 'x' * 90_000, 'options': [1, 2]}, 'row 2')\n"
        "    except UserError as error:\n"
        "        assert not isinstance(error.__cause__, MemoryError), source\n"
        "    else:\n"
        "        raise AssertionError(source)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert len(sources) > 15
