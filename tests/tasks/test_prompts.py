"""The words of a prompt: the problem with its suffix, the system message, a user's template."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mr1_fast.config import TaskConfig
from mr1_fast.errors import UserError
from mr1_fast.tasks import PROMPT_SUFFIX, PromptFormat, format_problem
from mr1_fast.tasks.prompt_template import (
    MAX_NESTING,
    MAX_TEMPLATE,
    MAX_TEXT,
    MAX_TURNS,
    _Sandbox,
)
from mr1_fast.types import Example


def example(problem="How many?", **columns) -> Example:
    return Example(problem, (), "3", "five minus two", source="row 2 of a.csv", extra=columns)


def test_the_settings_make_the_format_and_by_default_it_is_r1v_s():
    assert PromptFormat.of(TaskConfig()) == PromptFormat(None, None, PROMPT_SUFFIX)
    assert format_problem(example()) == f"How many? {PROMPT_SUFFIX}"
    settings = TaskConfig(system_prompt="Count.", prompt_template="{{ problem }}", prompt_suffix="")
    assert PromptFormat.of(settings) == PromptFormat("Count.", "{{ problem }}", "")


@pytest.mark.parametrize(
    "suffix, text", [("", "How many?"), ("Be brief.", "How many? Be brief."), (" ", "How many?  ")]
)
def test_a_suffix_follows_after_a_space_and_an_empty_one_adds_nothing(suffix, text):
    assert PromptFormat(suffix=suffix).user_text(example()) == text


def test_the_system_message_is_the_setting_or_else_the_column_if_that_is_a_text():
    assert PromptFormat("Count.").system_text(example(system="Draw.")) == "Count."
    assert PromptFormat("").system_text(example(system="Draw.")) == ""
    assert PromptFormat().system_text(example(system="Draw.")) == "Draw."
    assert PromptFormat().system_text(example()) is None
    assert PromptFormat().system_text(example(system=["Draw."])) is None


def test_a_template_has_the_problem_and_all_other_columns_but_never_an_answer():
    written = PromptFormat(template="{{ problem }} One of {{ options }}.", suffix="not used")
    assert written.user_text(example(options="A, B")) == "How many? One of A, B."
    # The problem is what was loaded as such, whatever else a column is called.
    same_name = replace(example(), extra={"options": 2, "problem": "other"})
    assert written.user_text(same_name) == "How many? One of 2."
    for name in ("solution", "thinking"):
        with pytest.raises(UserError, match=rf"row 2 of a.csv \('{name}' is undefined\)"):
            PromptFormat(template=f"{{{{ {name} }}}}").user_text(example())


def test_a_template_that_no_row_can_fill_in_is_refused_at_once():
    with pytest.raises(UserError, match="the prompt template is not valid on line 1"):
        PromptFormat.of(TaskConfig(prompt_template="{{ problem"))


def test_the_page_says_what_is_there():
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert f"How many items are there? {PROMPT_SUFFIX}\n" in page
    template = re.search(r"--prompt-template \\\n  '(.*)'\n", page)[1]
    written = PromptFormat(template=template).user_text(example(options=["35°", "70°"]))
    assert written.startswith("How many? A. 35° B. 70° Think in <think> </think>")
    listed = re.search(r"the filters (.*), and all", page, re.DOTALL)[1]
    filters = set(re.findall(r"\w+", listed)) - {"and"}
    assert filters == set(_Sandbox().filters) - {"_turns"}
    for bound in (MAX_TEMPLATE, MAX_TEXT, MAX_TURNS, MAX_NESTING):
        assert f"{bound:,}" in page
