"""Somebody else's run folder runs no Python that the user has not named or run before."""

import json
import shlex

import pytest

from mr1_fast.command_line import parse_train_config
from mr1_fast.config import RewardConfig
from mr1_fast.errors import UserError
from mr1_fast.own_python import KNOWN, MOST_KNOWN, python_of, remember_python
from mr1_fast.preparing import check_settings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of a user who has run nothing."""
    monkeypatch.setenv("MR1_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def run(tmp_path):
    """A run's folder from elsewhere; called with the settings of its config.yaml."""
    folder = tmp_path / "theirs"
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "evil.py").write_text("import os; os.mkdir('RAN')\ndef f(c, e): return 0.0\n")

    def made(**settings):
        lines = {"device": "cpu", **settings, "loggers": []}.items()
        text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines)
        (folder / "config.yaml").write_text(text)
        return folder

    return made


NAMED = {
    "a plugin": ({"plugin": "theirs/evil.py"}, "plugin"),
    "a file": ({"extra_rewards": {"theirs/evil.py:f": 1.0}}, "extra_rewards"),
    "a file, plainly": ({"extra_rewards": {"evil.py:f": 1.0, "format": 1.0}}, "extra_rewards"),
    "a module": ({"extra_rewards": {"theirs.evil:f": 0.5}}, "extra_rewards"),
    "of the library": ({"extra_rewards": {"os:system": 1.0}}, "extra_rewards"),
}


@pytest.mark.parametrize("settings, name", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("auto", [True, False])
def test_it_must_be_named_by_who_resumes(run, tmp_path, settings, name, auto):
    folder = run(**settings)
    argv = [f"--output={folder}", "--resume=auto"] if auto else [f"--resume={folder}"]
    with pytest.raises(UserError, match=f"has the {name} .* if you trust it, add --") as told:
        parse_train_config(argv)
    assert not (tmp_path / "RAN").exists() and len(str(told.value)) < 600

    flags = shlex.split(str(told.value).rpartition("add ")[2].removesuffix("."))
    parse_train_config([*argv, *flags])
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    parse_train_config([*argv, "--config", "mine.yaml"])
    with pytest.raises(UserError):
        parse_train_config([*argv, "--steps=3"])


def test_what_the_user_has_run_is_known_from_every_folder(run, tmp_path, monkeypatch, plugin):
    folder = run(plugin=str(plugin))
    with pytest.raises(UserError, match="that you have not run before"):
        parse_train_config([f"--resume={folder}"])
    check_settings(parse_train_config([f"--plugin={plugin}", "--device=cpu"]))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert parse_train_config([f"--resume={folder}"]).plugin == str(plugin)
    run(plugin=str(plugin), extra_rewards={"os:system": 1.0})
    with pytest.raises(UserError, match="os:system"):
        parse_train_config([f"--resume={folder}"])


def test_a_run_without_python_needs_no_leave(run):
    parse_train_config([f"--resume={run(extra_rewards={'format': 0.5})}"])


@pytest.mark.parametrize("content", ["", "{}", "[", "[1, null]", "\0", "[" * 10**5])
def test_a_damaged_list_knows_nothing_and_is_made_anew(cache, content):
    cache.mkdir()
    (cache / KNOWN).write_text(content)
    config = RewardConfig(plugin="a.py")
    remember_python(config)
    assert json.loads((cache / KNOWN).read_text()) == list(python_of(config))


def test_the_list_is_bounded_and_a_cache_that_cannot_be_written_ends_nothing(cache):
    for start in range(0, MOST_KNOWN + 50, 50):
        names = {f"m:f{i}": 1.0 for i in range(start, start + 50)}
        remember_python(RewardConfig(extra_rewards=names))
    known = json.loads((cache / KNOWN).read_text())
    assert len(known) == MOST_KNOWN and known[-1] == f"m:f{MOST_KNOWN + 49}"
    (cache / KNOWN).unlink()
    cache.rmdir()
    cache.write_text("a file")
    remember_python(RewardConfig(plugin="a.py"))
