"""Finding rewards: names, a user's file, dotted paths and functions of a file."""

import os
import re
import sys

import pytest

from mr1_fast.errors import UserError
from mr1_fast.rewards import load_plugin, require_rewards, reward, score

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


MINE = """
from dataclasses import dataclass

LIMIT = 3
LOADED = []
LOADED.append(1)

def brief(completion, example):
    return len(completion) < LIMIT

async def shout(completions, note, **columns):
    return [note[i] == text.upper() for i, text in enumerate(completions)]

@dataclass
class Longer:
    limit: int
    def __call__(self, completion, example):
        return len(completion) > self.limit

longer = Longer(2)
alone = lambda completion: 1.0
"""


@pytest.fixture
def folder(registry, tmp_path, monkeypatch):
    """The current folder, with rewards in a file and in a package; nothing stays imported."""
    modules, path = dict(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("")
    (tmp_path / "my_pkg" / "rewards.py").write_text(MINE)
    yield tmp_path
    for name in set(sys.modules) - set(modules):
        if "my_" in name or "mine" in name:
            del sys.modules[name]
    sys.path[:] = path


def test_functions_are_found_in_a_file_and_by_a_dotted_path(folder):
    names = ["mine.py:brief", f"{folder}/mine.py:shout", "./mine.py:longer"]
    names += ["my_pkg.rewards:brief", "my_pkg.rewards:shout", "my_pkg.rewards:longer"]
    require_rewards(names)
    item = example("3")
    item.extra["note"] = "AB"
    scores = score(["ab", "abc"], [item], dict.fromkeys(names, 1.0))
    assert list(scores.parts) == names
    assert list(scores.parts.values()) == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]] * 2
    loaded = sys.modules[f"mr1_fast_plugin:{folder / 'mine.py'}"].LOADED
    assert loaded == [1]  # the file was run once


def test_a_plugin_and_a_function_of_the_same_file_are_one_module(folder):
    load_plugin("mine.py")
    module = sys.modules[f"mr1_fast_plugin:{folder / 'mine.py'}"]
    module.LIMIT = 1
    assert score(["ab"], [example("3")], {"mine.py:brief": 1.0}).total.item() == 0.0


def test_a_dotted_path_is_found_in_the_current_folder_by_every_command(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    require_rewards(["my_pkg.rewards:brief"])


MISSING = {
    "none.py:brief": "The reward file {folder}/none.py does not exist.",
    "mine.py:none": "'mine.py:none' is not there: mine.py has no function 'none', but brief, shou",
    "mine.py:LIMIT": "has no function 'LIMIT', but",
    "mine.py:Longer": r"'mine.py:Longer' \(function Longer\) is a class",
    "mine.py:alone": r"'mine.py:alone' .*takes \(completion\), but a reward function takes",
    "mine.py:": "'mine.py:' is incomplete: write package.module:function or file.py:function.",
    ":brief": "':brief' is incomplete",
    "mine.py": "no reward named 'mine.py'; .* as package.module:function or file.py:function",
    "folder/:brief": "The reward file {folder}/folder does not exist.",
    "my_pkg.none:brief": "cannot be imported: there is no module my_pkg.none",
    "my_none.rewards:brief": "cannot be imported: there is no module my_none; a file is named as",
    "my_pkg.rewards:none": "my_pkg.rewards has no function 'none', but",
    "my_pkg.rewards.brief:brief": r"cannot be imported: my_pkg.rewards.brief|no module my_pkg",
    "my_pkg:rewards": "my_pkg has no function 'rewards', but none at all.",
    "my broken:f": "there is no module my broken",
    "my_pkg..rewards:brief": "cannot be imported: there is no module|cannot be imported",
    ".rewards:brief": "cannot be imported",
    "my_pkg.broken:brief": "cannot be imported: my_pkg.broken fails with SyntaxError",
    "my_pkg.needs:brief": r"my_pkg.needs fails with ModuleNotFoundError: No module named 'no_such'",
    "my_pkg.leaves:brief": "my_pkg.leaves fails with SystemExit: enough",
    "my_pkg.half:brief": "my_pkg.half fails with ZeroDivisionError",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_cannot_be_found_is_one_sentence(folder, registry, name):
    package = folder / "my_pkg"
    (package / "broken.py").write_text("def (")
    (package / "needs.py").write_text("import no_such")
    (package / "leaves.py").write_text("raise SystemExit('enough')")
    (package / "half.py").write_text(
        "from mr1_fast.rewards import reward\nreward('half')(lambda c, e: 0.5)\n1 / 0"
    )
    with pytest.raises(UserError, match=MISSING[name].format(folder=folder)) as raised:
        require_rewards([name])
    assert "\n" not in str(raised.value) and "half" not in registry
