"""The registry: names of rewards, and files with a user's own."""

import re

import pytest

from mr1_fast.errors import UserError
from mr1_fast.rewards import load_plugin, reward, score

from ..data.hostile import example


def test_names_are_unique_and_an_unknown_one_lists_the_known(registry):
    with pytest.raises(ValueError, match="'format'"):
        reward("format")(lambda completion, item: 0.0)
    with pytest.raises(UserError, match=r"'acuracy'.*accuracy, format"):
        score(["a"], [example("3")], {"acuracy": 1.0})


def test_a_plugin_file_registers_its_rewards(registry, tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(
        "from mr1_fast.rewards import reward\n@reward('two')\ndef two(completion, item): return 2"
    )
    for _ in range(2):  # a second time does nothing
        load_plugin(str(path))
    assert score(["a"], [example("3")], {"two": 1.0}).total.tolist() == [[2.0]]


def test_a_failing_or_missing_plugin_names_the_file_and_registers_nothing(registry, tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(UserError, match=re.escape(f"{path} does not exist")):
        load_plugin(path)
    for text in (
        "def (",
        "import no_such_module",
        "1 / 0",
        "raise SystemExit",
        "reward('format')(print)",
    ):
        path.write_text(
            f"from mr1_fast.rewards import reward\nreward('half')(lambda c, e: 0.5)\n{text}"
        )
        with pytest.raises(UserError, match=re.escape(f"{path} fails")):
            load_plugin(path)
        assert "half" not in registry
