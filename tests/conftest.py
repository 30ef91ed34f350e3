"""Fixtures that several test files share: a tiny model, and the arguments of a short run."""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from mr1_fast.model.tiny import tiny_model, tiny_processor

# With a second thread, each of a tiny model's small operations waits for a core that another
# process may be using: runs took 20 times as long.
torch.set_num_threads(1)

PLUGIN = """
from mr1_fast.rewards import reward


@reward("letters")
def letters(completion, example):
    return sum(map(str.isalpha, completion)) / (1 + len(completion))
"""


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="also run the tests that take minutes each"
    )


def pytest_collection_modifyitems(config, items):
    """Begin with the slow tests: of two processes, none is left with them at the end."""
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Keep what was imported out of garbage collections, which took half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def stop_signals():
    """A command that has ended leaves its handlers, since its process ends as well."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MR1_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        if sys.dont_write_bytecode:
            # Otherwise each process that tests start compiles all it imports: for a training
            # that is more than half of its start. The folder is one for all processes of xdist.
            among_workers = "PYTEST_XDIST_WORKER" in os.environ
            folder = tmp_path_factory.getbasetemp()
            folder = folder.parent if among_workers else folder
            patch.setenv("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same random numbers, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processor():
    """The tiny model's processor."""
    return tiny_processor()


@pytest.fixture
def model(processor):
    """A fresh tiny Qwen2VLForConditionalGeneration."""
    torch.manual_seed(0)
    return tiny_model(processor)


@pytest.fixture(scope="session")
def tiny_folder(processor, tmp_path_factory):
    """Folder of a fresh tiny model: `--model` with it needs no supervised start."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder, "qwen2_vl")
    return folder


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """File of a reward for letters, which gives a fresh model a signal to learn from."""
    path = tmp_path_factory.mktemp("plugin") / "letters.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="session")
def run_args(tiny_folder, plugin):
    """`run_args(folder, **settings)`: arguments of three steps with a reward for letters.

    Settings replace the small ones given here.
    """
    small = dict(
        model=tiny_folder,
        device="cpu",
        steps=3,
        prompts_per_step=2,
        num_generations=3,
        max_new_tokens=6,
        eval_samples=4,
        learning_rate=1e-3,
        plugin=plugin,
        extra_rewards={"letters": 1.0},
    )

    def arguments(folder: Path, **settings) -> list[str]:
        values = {"output": folder, **small, **settings}
        return [
            f"--{name}={value if isinstance(value, str | Path) else json.dumps(value)}"
            for name, value in values.items()
        ]

    return arguments
