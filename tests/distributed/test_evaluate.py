"""Items that processes share: the records, figures and files of one process."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO

import pytest

from mr1_fast.accuracy import evaluate
from mr1_fast.command_line import parse_train_config
from mr1_fast.distributed import SINGLE
from mr1_fast.errors import UserError
from mr1_fast.evaluate.command import evaluate_model
from mr1_fast.evaluate.settings import parse
from mr1_fast.preparing import prepare
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import load_examples
from tests.data.gang import gang
from tests.data.models import tiny_policy


def answer(world):
    """The records of 9 items in batches of 4, greedy and sampled, and of fewer than processes."""
    policy, judge = tiny_policy(), get_task("counting").judge("strict")
    items = load_examples("counting", "drawn", "test", 0).all(9)
    greedy = evaluate(policy, judge, items, Sampling(5, temperature=0.0), batch_size=4, world=world)
    sampled = evaluate(policy, judge, items, Sampling(5), 2, seed=7, batch_size=4, world=world)
    one = evaluate(policy, judge, items[:1], Sampling(5), 2, world=world)
    answered = []

    def stop_the_last_one():
        answered.append(1)
        return world.rank == world.size - 1

    stopped = evaluate(
        policy, judge, items, Sampling(5), batch_size=1, stopped=stop_the_last_one, world=world
    )
    return greedy, sampled, one, len(stopped), len(answered)


def test_records_are_those_of_one_process():
    alone = answer(SINGLE)
    greedy, sampled, one, *stopped = alone
    assert [len(greedy), len(sampled), len(one), *stopped] == [9, 9, 1, 1, 1]
    assert len({text for record in sampled for text in record["outputs"]}) > 9
    for size in (2, 3):
        found = gang(size, answer)
        assert [each[:3] for each in found] == [alone[:3]] * size
        # What all have answered is kept: a batch of one item for each of them.
        assert [each[3] for each in found] == [size] * size
        assert found[-1][4] == 1 < found[0][4]


def run_commands(world, commands):
    return [printed(argv) for argv in commands]


def printed(argv):
    said = StringIO()
    with redirect_stdout(said):
        evaluate_model(parse(argv))
    return said.getvalue()


def told_of_own_rows(world, command, model, folder):
    """Each process has a file of this name, as machines without a shared file system do."""
    os.chdir(folder / str(world.rank))
    argv = [f"--model={model}", "--data=rows.jsonl", "--device=cpu"]
    try:
        if command == "evaluate":
            printed([*argv, "--samples=2"])
        else:
            prepare(parse_train_config([*argv, "--eval-samples=0"]), world)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("command, name", [("evaluate", "data"), ("train", "training data")])
def test_processes_with_different_data_are_told_so(command, name, tiny_folder, tmp_path):
    for rank in (0, 1):
        (folder := tmp_path / str(rank)).mkdir()
        rows = [{"problem": f"{rank} + {n} = ?", "solution": str(rank + n)} for n in range(3)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = gang(2, told_of_own_rows, command, tiny_folder, tmp_path)
    assert told[0] == told[1] and told[0].startswith(f"the {name} is '3 rows (")
    assert told[0].endswith(": name the same files on all machines.")
    assert not list(tmp_path.rglob("*.json"))


def test_the_command_writes_the_files_of_one_process(tiny_folder, tmp_path):
    """Of greedy answers, and of sampled ones."""
    commands = {}
    for size in (1, 2):
        for name in ("greedy", "sampled"):
            folder = tmp_path / name / str(size)
            argv = [f"--model={tiny_folder}", "--samples=7", "--max-new-tokens=5", "--batch-size=3"]
            argv += ["--device=cpu", "--explain", f"--r1v-output={folder}/r1v.json"]
            if name == "sampled":
                argv += ["--num-generations=2", "--temperature=1", "--pass-at=[1,2]"]
            commands.setdefault(size, []).append([*argv, f"--output={folder}/evaluation.json"])
    first, other = gang(2, run_commands, commands[2])
    alone = run_commands(SINGLE, commands[1])
    assert other == ["", ""]
    for name, count, *said in zip(("greedy", "sampled"), (7, 14), alone, first, strict=True):
        files = {}
        for size, text in enumerate(said, 1):
            folder = tmp_path / name / str(size)
            assert "accuracy 0.0%" in text and text.count("wrong · ") == count
            result = json.loads((folder / "evaluation.json").read_text())
            assert result.pop("config")["samples"] == 7
            files[size] = result, (folder / "r1v.json").read_bytes()
            assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "r1v.json"]
        assert files[1] == files[2]
