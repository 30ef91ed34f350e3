"""Bad input ends a run with one sentence that names field and way out, and writes nothing."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mr1_fast.errors import Stopped, UserError, exit_on_user_error
from mr1_fast.evaluate import command as evaluate_command
from mr1_fast.evaluate.settings import parse as parse_evaluate

from .data.runs import run
from .data.scripts import run_script

LACKS = "the folder lacks a readable model, tokenizer or image processor"
ROW = {"image": "1.png", "problem": "How many?", "solution": "1"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """The Hub is a port of this machine at which nobody listens; the caches are empty."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data(folder, size=(56, 56), rows=(ROW, ROW, ROW, ROW), **columns):
    """A folder with one image, and JSON lines for training and testing that name it."""
    folder.mkdir()
    Image.new("RGB", size, "white").save(folder / "1.png")
    text = "".join(json.dumps(row | columns) + "\n" for row in rows)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def refused(argv, message):
    """Run, and return the sentence of the UserError."""
    with pytest.raises(UserError, match=message) as raised:
        run(argv)
    sentence = str(raised.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 800
    return sentence


REFUSED_BEFORE_THE_RUN = {
    "unknown task": (
        {"task": "chess"},
        "task is chess, but must be one of counting, geometry",
    ),
    "unknown algorithm": ({"algo": "ppo"}, "algo is ppo, but must be one of grpo-d, grpo, dr-grpo"),
    "unknown preset": (
        {"preset": "chess"},
        "preset is chess, but must be one of auto, counting, geometry",
    ),
    "unknown setting": ({"stepz": 3}, "unrecognized arguments: --stepz=3"),
    "bad device": (
        {"device": "gpu7"},
        "device is gpu7, which torch cannot use .*: try --device cpu",
    ),
    "absent device": (
        {"device": "cuda:77"},
        "device is cuda:77, which torch cannot use .*: try --device cpu",
    ),
    "no such folder": (
        {"model": "./nowhere"},
        "model ./nowhere cannot be loaded; it is no local folder",
    ),
    "name of the Hub": (
        {"model": "Qwen/Qwen2-VL-2B-Instruct"},
        "model Qwen/.* cannot be loaded; .*the hub did not",
    ),
    "data set of the Hub": (
        {"data": "owner/set"},
        "owner/set is neither a local path nor in the local cache.*pass a",
    ),
    "test set of the Hub": (
        {"eval_data": "owner/set"},
        "owner/set is neither a local path nor in the local cache",
    ),
    "no such file": (
        {"data": "nowhere.jsonl"},
        "nowhere.jsonl is missing: check the path of the data",
    ),
    "no such plugin": ({"plugin": "nowhere.py"}, r"nowhere.py does not exist"),
    "test set without its images": (
        {"eval_data": "geoqa"},
        "data geoqa needs image_root: the folder with geoqa_test",
    ),
    "difficulty": ({"difficulty": 0}, "difficulty is 0, but must be at least 1"),
    "no samples": ({"train_samples": 0}, "train_samples is 0, but must be at least 1"),
    "no such run": (
        {"resume": "nowhere"},
        "resume is nowhere, but there is no nowhere/config.yaml: name the folder of",
    ),
    "no adapters": ({"load_in_4bit": True}, "load_in_4bit is true, but .*: add --lora"),
    "no such reward": (
        {"extra_rewards": {"brief": 1.0}},
        "no reward named 'brief'; the known ones are accuracy, ",
    ),
}


@pytest.mark.parametrize(
    "settings, message", REFUSED_BEFORE_THE_RUN.values(), ids=REFUSED_BEFORE_THE_RUN
)
def test_a_wrong_setting_leaves_no_folder(settings, message, run_args, tmp_path):
    started = time.perf_counter()
    refused(run_args(tmp_path / "run", **settings), message)
    assert time.perf_counter() - started < 5, "transformers' own retries take half a minute"
    assert not (tmp_path / "run").exists()


PLUGINS = {
    "raises": ("raise OSError('no licence')", "fails with OSError: no licence"),
    "is no Python": ("def (:", "fails with SyntaxError"),
    "takes a name": (
        "from mr1_fast.rewards import reward\n@reward('format')\ndef f(c, e): ...",
        "already a reward",
    ),
}


@pytest.mark.parametrize("code, message", PLUGINS.values(), ids=PLUGINS)
def test_a_broken_plugin_leaves_no_folder(code, message, run_args, tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(code)
    with pytest.raises(UserError, match=f"The reward file {plugin} {message}|{message}") as raised:
        run(run_args(tmp_path / "run", plugin=plugin))
    assert str(plugin) in str(raised.value) and not (tmp_path / "run").exists()


ROWS = {
    "no rows": ([], "data is empty: give data with at least one row"),
    "wrong column": (
        [{"picture": "1.png", "problem": "?", "solution": "1"}],
        "no column 'image', .*found: picture",
    ),
    "no solution": ([{"image": "1.png", "problem": "?"}], "no column 'solution', 'answer'"),
    "missing image": (
        [ROW, ROW | {"image": "2.png"}],
        r"image file .*2.png \(row 2 of .*\) is missing: put it there",
    ),
    "damaged image": (
        [ROW | {"image": "broken.png"}],
        r"image file .*broken.png \(row 1 of .*\) cannot be decoded",
    ),
}


@pytest.mark.parametrize("rows, message", ROWS.values(), ids=ROWS)
def test_faulty_data_leaves_no_folder(rows, message, run_args, tmp_path):
    folder = data(tmp_path / "data", rows=rows)
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:60])
    refused(run_args(tmp_path / "run", data=str(folder)), message)
    assert not (tmp_path / "run").exists()


def test_supervised_training_without_solutions_leaves_no_folder(run_args, tmp_path):
    refused(
        run_args(tmp_path / "run", data=str(data(tmp_path / "data")), algo="sft"),
        "no column 'thinking'",
    )
    assert not (tmp_path / "run").exists()


def test_a_single_file_needs_held_out_data_too(run_args, tmp_path):
    path = data(tmp_path / "data") / "train.jsonl"
    (tmp_path / "data" / "test.jsonl").unlink()
    refused(
        run_args(tmp_path / "run", data=str(path)),
        "has only the split train: for test, pass other data",
    )
    run(run_args(tmp_path / "run", data=str(path), eval_samples=0))


SIZES = {
    "image too large": (
        {"max_pixels": 3000},
        r"4 rows of .* be used: an image of row 1 of .*/data has 56×56 pixels, more than max_pix",
    ),
    "prompt too long": (
        {"max_prompt_tokens": 20},
        r"4 rows of .* be used: the prompt of row 1 of .*/data has \d+ tokens, more than max_",
    ),
}


@pytest.mark.parametrize("settings, message", SIZES.values(), ids=SIZES)
def test_what_is_too_large_is_named_and_the_folder_may_be_used_again(
    settings, message, run_args, tmp_path
):
    folder = data(tmp_path / "data")
    for samples in (4, 0):  # found in evaluation, or in the first step
        arguments = run_args(tmp_path / "run", data=str(folder), eval_samples=samples, **settings)
        refused(arguments, message)
        left = (
            {path.name for path in (tmp_path / "run").iterdir()}
            if (tmp_path / "run").exists()
            else set()
        )
        assert left <= {"config.yaml"}
    run([*arguments, "--max-pixels=3136", "--max-prompt-tokens=1024"])


def test_a_large_image_may_be_shrunk(run_args, tmp_path):
    folder = data(tmp_path / "data", size=(280, 280))
    sizes = {"max_pixels": 10_000, "max_prompt_tokens": 60}
    refused(
        run_args(tmp_path / "run", data=str(folder), **sizes),
        "raise --max-pixels, or pass --shrink-images true",
    )
    run(run_args(tmp_path / "run", data=str(folder), shrink_images=True, **sizes))


def test_an_image_placeholder_in_a_solution_is_text(run_args, tmp_path):
    folder = data(tmp_path / "data", thinking="see <|image_pad|>")
    run(run_args(tmp_path / "run", data=str(folder), algo="sft"))


def test_a_folder_in_use_is_left_alone(run_args, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all my work")
    refused(
        run_args(tmp_path / "run"),
        r"run is not empty: choose a new folder\.$",
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    refused(run_args(tmp_path / "run" / "thesis.txt"), "thesis.txt is no folder: choose another")
    refused(run_args(tmp_path / "run" / "thesis.txt" / "run"), "thesis.txt.* cannot be written")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "all my work"


def test_a_finished_run_is_not_overwritten(run_args, tmp_path):
    run(arguments := run_args(tmp_path / "run", eval_samples=0, save_every=0, steps=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused(arguments, "is not empty")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


MODELS = {
    "another family": (
        "config.json",
        '{"model_type": "bert"}',
        "has the model type bert, but mr1_fast trains Qwen2-VL, Qwen2.5-VL",
    ),
    "no configuration": ("config.json", None, "has no config.json that names a model_type: copy"),
    "configuration cut": ("config.json", '{"model_type": ', LACKS),
    "configuration of another size": (
        "config.json",
        ('"intermediate_size": 384', '"intermediate_size": 96'),
        LACKS,
    ),
    "no weights": ("model.safetensors", None, "model.safetensors"),
    "weights cut": ("model.safetensors", "cut", "has a damaged model.safetensors"),
    "a weight missing": ("model.safetensors", {}, "by its config.json, but its files hold 0"),
    "no tokenizer": ("tokenizer.json", None, LACKS),
    "tokenizer cut": ("tokenizer.json", '{"version": ', LACKS),
    "another tokenizer": (
        "tokenizer.json",
        ("<|image_pad|>", "<image>"),
        "tokenizer is not there, or not the model's",
    ),
    "no image processor": ("preprocessor_config.json", None, LACKS),
    "no chat template": ("chat_template.jinja", None, "has no chat template"),
}


@pytest.mark.parametrize("name, change, message", MODELS.values(), ids=MODELS)
def test_an_incomplete_model_folder_is_named(
    name, change, message, tiny_folder, run_args, tmp_path
):
    shutil.copytree(tiny_folder, folder := tmp_path / "model")
    if isinstance(change, tuple):
        change = (folder / name).read_text(encoding="utf-8").replace(*change)
    (folder / name).unlink()
    if isinstance(change, str):
        (folder / name).write_text(change, encoding="utf-8")
    elif change is not None:
        save_file(change, folder / name, metadata={"format": "pt"})
    assert str(folder) in refused(run_args(tmp_path / "run", model=str(folder)), message)
    assert not (tmp_path / "run").exists()


COMMANDS = {
    "unknown flag": (["-m", "mr1_fast.train", "--stepz", "3"], "unrecognized arguments: --stepz"),
    "no network": (["-m", "mr1_fast.train", "--model", "Qwen/Qwen2-VL-2B-Instruct"], "model Qwen/"),
    "missing image": (
        ["-m", "mr1_fast.train", "--algo", "sft", "--data", "data"],
        "1 row of data cannot be used: image file data/2.png (row 2 of data) is missing",
    ),
    "evaluation": (
        ["-m", "mr1_fast.evaluate", "--model", "TINY", "--data", "data", "--max-pixels=9"],
        "2 rows of data cannot be used: an image of row 1 of data has 56×56 pixels",
    ),
}


@pytest.mark.parametrize("command, message", COMMANDS.values(), ids=COMMANDS)
def test_a_command_ends_with_one_line_and_status_2(command, message, tiny_folder, tmp_path):
    data(tmp_path / "data", rows=[ROW, ROW | {"image": "2.png"}], thinking="1+0")
    if "evaluate" in command[1]:
        Image.new("RGB", (28, 28)).save(tmp_path / "data" / "2.png")
    command = [sys.executable, *(str(tiny_folder) if word == "TINY" else word for word in command)]
    quiet = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | quiet, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {message}") and last.endswith(".")
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {
        "data",
        "home",
    }  # no runs/, no evaluation.json


def test_an_evaluation_that_fails_writes_nothing(tiny_folder, monkeypatch, tmp_path):
    argv = [
        "--model",
        str(tiny_folder),
        "--data",
        str(data(tmp_path / "data")),
        "--max-prompt-tokens=9",
    ]
    monkeypatch.setattr(
        sys, "argv", ["evaluate", *argv, "--output", str(tmp_path / "out" / "evaluation.json")]
    )
    with pytest.raises(
        UserError, match=r"the prompt of row 1 of .* has .* raise --max-prompt-tokens"
    ):
        evaluate_command.evaluate_model(parse_evaluate(sys.argv[1:]))
    assert not (tmp_path / "out").exists()


def test_a_message_escapes_what_a_terminal_would_obey():
    error = UserError("no column \x1b[31m, \ud800 or é\n")
    assert str(error) == "no column \\x1b[31m, \\ud800 or é\n"


STOPS = {
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT)", 130, "stopped"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped"),
    "an error that follows": (
        "try: os.kill(os.getpid(), 15), time.sleep(9)\n    finally: os.close(999)",
        143,
        "stopped",
    ),
    "a message": ("raise Stopped(signal.SIGTERM, 'stopped: go on with X')", 143, "go on with X"),
}


@pytest.mark.parametrize("code, status, message", STOPS.values(), ids=STOPS)
def test_a_command_that_is_stopped_says_so_in_a_line(code, status, message, tmp_path):
    script = "import os, signal, time\nfrom mr1_fast.errors import Stopped, exit_on_user_error\n"
    script += f"def main():\n    {code}\n    time.sleep(9)\nexit_on_user_error(main)"
    done = run_script(tmp_path / "script.py", script)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (status, 2, "")
    assert message in done.stderr


# --- what the system refuses --------------------------------------------------------------------


def ending(error, capsys):
    """Let a command end with an error; returns its status and what it prints on stderr."""

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", errno.errorcode, ids=errno.errorcode.values())
def test_every_error_of_the_system_is_a_sentence_that_names_the_file(number, capsys):
    name = "/a folder/Größe\x1b[31m\n.json"
    for named, shown in (((name,), "/a folder/Größe\\x1b[31m\\n.json"), ((), "a file")):
        status, said = ending(OSError(number, os.strerror(number), *named), capsys)
        assert status == 2 and said.startswith(f"error: {shown} cannot be used (")
        assert os.strerror(number) in said and said.count("\n") == 1 and said.endswith(".\n")


def loop(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


REFUSED = {
    "nothing there": lambda folder: folder / "nowhere" / "file",
    "a folder": lambda folder: folder,
    "below a file": lambda folder: Path(__file__) / "file",
    "a long name": lambda folder: folder / ("x" * 300),
    "a loop of links": loop,
    "a device without a driver": lambda folder: Path("/proc/self/mem") / "x",
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_opened_is_named(make, tmp_path, capsys):
    path = make(tmp_path)
    with pytest.raises(OSError) as raised:
        path.open("wb")
    status, said = ending(raised.value, capsys)
    assert status == 2 and str(path)[:200] in said and len(said) < 600


NO_ROOM = {
    "Python": lambda: bytearray(2**62),
    "NumPy": lambda: np.zeros(2**50),
    "torch": lambda: torch.empty(2**52),
}


@pytest.mark.parametrize("ask", NO_ROOM.values(), ids=NO_ROOM)
def test_a_full_memory_is_a_sentence(ask, capsys):
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        ask()
    status, said = ending(raised.value, capsys)
    assert status == 2 and said.startswith("error: the memory of this machine is full: ")


def test_endless_nesting_is_a_sentence(capsys):
    with pytest.raises(RecursionError) as raised:
        json.loads("[" * 10**6)
    assert ending(raised.value, capsys)[1].startswith("error: something that was read is nested")


def test_a_fault_of_the_program_keeps_its_traceback():
    for error in (ValueError("a fault"), OSError("one of a library, without a number")):
        with pytest.raises(type(error)) as raised:
            exit_on_user_error(lambda error=error: (_ for _ in ()).throw(error))
        assert raised.value is error


def test_an_error_goes_whole_from_one_process_to_another():
    """torch collects what has been raised while all save, and raises it again."""
    for error in (UserError("a\\x1b " * 400), Stopped(15, "stopped: go on with X", at_once=True)):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_stop_behind_another_error_counts(capsys):
    """A stop within shutil.rmtree closes a folder twice, of which the second time fails."""

    def main():
        try:
            raise Stopped(15, "stopped: go on with --resume")
        except Stopped:
            try:
                os.close(-1)
            except OSError as error:
                raise UserError("the folder could not be saved: make room.") from error

    with pytest.raises(SystemExit) as end:
        exit_on_user_error(main)
    assert end.value.code == 143
    assert capsys.readouterr().err == "\nstopped: go on with --resume\n"


def test_a_stop_that_was_lost_on_the_way_counts(capsys):
    def main():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as end:
        exit_on_user_error(main)
    assert end.value.code == 143 and capsys.readouterr().err == "\nstopped\n"
