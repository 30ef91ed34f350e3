"""Checkpoints: resuming continues bit for bit, and what goes wrong leaves no half of one."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch

from mr1_fast.checkpoint import KEEP, fingerprint, load_checkpoint, save_checkpoint
from mr1_fast.config import OptimizerConfig
from mr1_fast.distributed.pieces import load_pieces
from mr1_fast.distributed.sharding import Sharding
from mr1_fast.errors import UserError
from mr1_fast.integrity import SEAL
from mr1_fast.kl_schedule import TargetKL
from mr1_fast.loss_scale import LARGEST
from mr1_fast.model.tiny import tiny_model
from mr1_fast.optim import make_optimizer
from mr1_fast.seeds import derive_seed, seed_step

from .data.old_checkpoint import save_old_checkpoint
from .data.runs import assert_same_run, interrupt, metrics, run

START = "0123456789abcdef"


def content(folder):
    """Every file below the folder, as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def a_step(model, optimizer, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def flat(state):
    """Tensors and numbers of an optimizer's state, by their path."""
    if not isinstance(state, dict):
        return {"": state}
    return {
        f"{name}/{rest}": value
        for name, inner in state.items()
        for rest, value in flat(inner).items()
    }


@pytest.fixture(scope="module")
def finished(run_args, tmp_path_factory):
    """A finished run of 8 steps, whose second to last checkpoint is that of step 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(run_args(folder, steps=8, save_every=3, num_generations=2))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-000006",
        "step-000008",
    }
    return folder


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of that run as if it had been killed after step 7 was logged."""
    return interrupt(finished, tmp_path / "interrupted")


@pytest.mark.parametrize("version", ["of now", "of an earlier version"])
@pytest.mark.parametrize("name", ["adamw", "adamw_exact", "adamw8bit"])
def test_weights_and_optimizer_state_come_back_bit_for_bit(
    name, version, model, processor, tmp_path
):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    optimizer = make_optimizer(model, config := OptimizerConfig(optimizer=name, learning_rate=1e-3))
    a_step(model, optimizer, 1), a_step(model, optimizer, 2)
    if version == "of now":
        path = save_checkpoint(tmp_path / "checkpoints", 7, Sharding(model), optimizer, START)
    else:
        path = save_old_checkpoint(tmp_path / "checkpoints", 7, model, optimizer, START)
    assert {file.name for file in path.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
    }

    other = tiny_model(processor)
    loaded = make_optimizer(other, config)
    assert load_checkpoint(tmp_path / "checkpoints", Sharding(other), loaded, START) == 7
    for step in (3, 4):  # and they stay equal
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
        left, right = flat(optimizer.state_dict()["state"]), flat(loaded.state_dict()["state"])
        assert left.keys() == right.keys() and len(left) > 200
        for key, value in left.items():
            assert (
                torch.equal(value, right[key])
                if isinstance(value, torch.Tensor)
                else value == right[key]
            ), key
        a_step(model, optimizer, step), a_step(other, loaded, step)


def test_states_that_are_there_are_read_in_place(model, tmp_path, monkeypatch):
    """Else all processes of a machine together would need many times their memory."""
    optimizer = make_optimizer(model, OptimizerConfig(optimizer="adamw_exact"))
    a_step(model, optimizer, 1)
    save_checkpoint(tmp_path, 7, Sharding(model), optimizer, START)
    filled = []

    def load_and_note(pieces, *others):
        filled.extend(piece.tensor.data_ptr() for piece in pieces.values())
        load_pieces(pieces, *others)

    monkeypatch.setattr("mr1_fast.distributed.saved_state.load_pieces", load_and_note)
    load_checkpoint(tmp_path, Sharding(model), optimizer, START)
    states = flat(optimizer.state_dict()["state"]).values()
    assert sorted(filled) == sorted(state.data_ptr() for state in states)


@pytest.mark.parametrize(
    "settings",
    [
        dict(
            updates_per_batch=2, lr_schedule="cosine", warmup_fraction=0.3, beta_shape="target-kl"
        ),
        dict(lora=True, optimizer="adamw8bit"),
    ],
    ids=["two updates, cosine, target KL", "lora, 8 bits"],
)
def test_a_killed_run_goes_on_in_another_process_as_if_nothing_had_happened(
    settings, run_args, tmp_path
):
    settings = dict(steps=16, save_every=2, **settings)
    run(run_args(tmp_path / "whole", **settings))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "mr1_fast.train", *run_args(folder, **settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (folder / "checkpoints" / "step-000004").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9 and not (folder / "final").exists()
    assert 4 <= len(metrics(folder)) < 16
    run(["--resume", str(folder)])
    assert_same_run(folder, tmp_path / "whole")
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_run_in_float16_goes_on_with_its_loss_scale(run_args, tmp_path):
    settings = dict(dtype="float16", lora=True, save_every=2, max_grad_norm=0.5)
    run(run_args(whole := tmp_path / "whole", **settings))
    steps = metrics(whole)
    assert len(steps) == 3 and all(math.isfinite(x) for step in steps for x in step.values())
    assert all(step["skipped"] == 0 and step["loss_scale"] == LARGEST for step in steps)
    assert all(step["grad_norm"] > 0 for step in steps)

    folder = interrupt(whole, tmp_path / "interrupted")
    run(["--resume", str(folder)])
    assert_same_run(folder, whole)
    name = "checkpoints/step-000003/state.json"
    state = json.loads((folder / name).read_text())
    assert state["parts"]["loss_scale"] == {"value": LARGEST, "good_steps": 3}
    assert state == json.loads((whole / name).read_text())


def test_only_float16_has_a_loss_scale(finished):
    assert all("loss_scale" not in step for step in metrics(finished))
    for path in (finished / "checkpoints").glob("*/state.json"):
        assert json.loads(path.read_text())["parts"].keys() == {"kl_schedule", "divergence"}


def test_resuming_repeats_what_came_after_the_checkpoint(interrupted, finished):
    """A killed run: steps 6 and 7 are in the log, with half a line and half a checkpoint."""
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rew')
    with (interrupted / "completions.jsonl").open("a") as file:
        file.write('{"step": 8, "key": "0:red')
    partial = interrupted / "checkpoints" / ".step-000008.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    run(["--resume", str(interrupted)])
    assert_same_run(interrupted, finished)
    assert not partial.exists() and (interrupted / "report.html").exists()


def test_auto_goes_on_from_the_one_before_a_damaged_checkpoint(interrupted, finished, capsys):
    """Named by its folder it is refused; under `auto` the run ends as if nothing had happened."""
    newer = interrupted / "checkpoints" / "step-000007"
    shutil.copytree(interrupted / "checkpoints" / "step-000006", newer)
    before = content(interrupted)
    with pytest.raises(
        UserError, match=r"step-000007 is damaged \(state.json is that of step 6\): delete it to"
    ):
        run(["--resume", str(interrupted)])
    assert content(interrupted) == before
    run(["--resume=auto", "--output", str(interrupted)])
    damage = f"checkpoint {newer} is damaged (state.json is that of step 6)"
    assert damage in capsys.readouterr().out
    assert_same_run(interrupted, finished)
    assert {path.name for path in (interrupted / "checkpoints").iterdir()} == {
        "step-000006",
        "step-000008",
    }


def test_a_finished_run_is_only_evaluated_again(finished, tmp_path):
    shutil.copytree(finished, folder := tmp_path / "again")
    run(["--resume", str(folder)])
    assert_same_run(folder, finished)


@pytest.mark.parametrize("samples", [0, 4])
def test_more_steps_can_be_asked_for(samples, interrupted):
    """Evaluation may be turned off or on too; then there is no accuracy before or after."""
    if samples:
        (interrupted / "evaluation.json").unlink()
    run(["--resume", str(interrupted), "--steps", "9", f"--eval-samples={samples}"])
    assert ("after" in json.loads((interrupted / "evaluation.json").read_text())) == bool(samples)
    assert [record["step"] for record in metrics(interrupted)] == list(range(9))
    assert {path.name for path in (interrupted / "checkpoints").iterdir()} == {
        "step-000006",
        "step-000009",
    }


def test_the_newest_are_kept(model, tmp_path):
    optimizer = make_optimizer(model, OptimizerConfig())
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, step, Sharding(model), optimizer, START)
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]
        and KEEP == 2
    )


def test_a_checkpoint_of_another_model_is_refused(interrupted, processor, tiny_folder, tmp_path):
    torch.manual_seed(1)
    tiny_model(processor).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other", "qwen2_vl")
    config = interrupted / "config.yaml"
    text = config.read_text().replace(f"model: {tiny_folder}", f"model: {tmp_path / 'other'}")
    config.write_text(text)
    before = content(interrupted)
    for _ in range(2):  # the second time without settings in it, as in earlier versions
        with pytest.raises(UserError, match="step-000006 was made from another model") as error:
            run(["--resume", str(interrupted)])
        assert "\n" not in str(error.value)
        assert content(interrupted) == before
        forget_identity(interrupted)
        before = content(interrupted)


def forget_identity(folder):
    """Leave the settings out of the records of checkpoints, as earlier versions did."""
    for path in (folder / "checkpoints").glob("*/state.json"):
        record = json.loads(path.read_text())
        for name in ("identity", SEAL):
            record.pop(name, None)
        path.write_text(json.dumps(record))


def test_other_trained_weights_of_the_same_model_are_refused(model, tmp_path):
    def sharded(frozen):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return Sharding(model), make_optimizer(model, OptimizerConfig())

    first, second, *_ = [name for name, _ in model.named_parameters()]
    sharding, optimizer = sharded({first})
    a_step(model, optimizer, 0)
    save_checkpoint(tmp_path, 3, sharding, optimizer, START)
    before = content(tmp_path)
    for frozen in ({}, {second}, {first, second}):
        with pytest.raises(UserError, match="step-000003 was made from another model"):
            load_checkpoint(tmp_path, *sharded(frozen), START)
    assert content(tmp_path) == before
    assert load_checkpoint(tmp_path, *sharded({first}), START) == 3


def test_an_optimizer_of_another_kind_is_refused(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    optimizer = make_optimizer(model, OptimizerConfig())
    save_checkpoint(tmp_path, 6, Sharding(model), optimizer, START)
    other = make_optimizer(model, OptimizerConfig(optimizer="adamw8bit"))
    with pytest.raises(
        UserError, match="step-000006 was made with optimizer AdamW: resume with the --optimizer"
    ):
        load_checkpoint(tmp_path, Sharding(model), other, START)


DAMAGES = {
    "weights cut": ("weights.safetensors", lambda data: data[: len(data) // 2]),
    "optimizer cut": ("optimizer.safetensors", lambda data: data[:-1]),
    "weights empty": ("weights.safetensors", lambda data: b""),
    "no JSON": ("state.json", lambda data: data[:-5]),
    "no text": ("state.json", lambda data: b"\xff" + data),
    "no step": ("state.json", lambda data: b"{}"),
    "β no number": ("state.json", lambda data: data.replace(b"0.0735", b'"0.0735"')),
    "β not finite": ("state.json", lambda data: data.replace(b"0.0735", b"NaN")),
    "β missing": ("state.json", lambda data: data.replace(b'"beta"', b'"gamma"')),
    "no numbers of parts": ("state.json", lambda data: data.replace(b'"parts": {', b'"parts": [{')),
    "weights missing": ("weights.safetensors", None),
    "state missing": ("state.json", None),
}


@pytest.mark.parametrize("name, damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named(name, damage, model, tmp_path):
    optimizer = make_optimizer(model, OptimizerConfig())
    a_step(model, optimizer, 0)
    parts = {"kl_schedule": target_kl(0.0735)}
    save_checkpoint(tmp_path, 1, Sharding(model), optimizer, START, parts)
    newest = save_checkpoint(tmp_path, 2, Sharding(model), optimizer, START, parts)
    data = (newest / name).read_bytes()
    (newest / name).unlink() if damage is None else (newest / name).write_bytes(damage(data))
    with pytest.raises(
        UserError, match=r"step-000002 is damaged .*: delete it to resume from step-000001\.$"
    ) as told:
        load_checkpoint(tmp_path, Sharding(model), optimizer, START, parts)
    assert "\n" not in str(told.value)
    shutil.rmtree(newest)
    assert load_checkpoint(tmp_path, Sharding(model), optimizer, START, parts) == 1


def target_kl(beta):
    """A controller of β that some steps have brought to this value."""
    schedule = TargetKL(0.04, 0.1, target=0.01)
    schedule.load({"beta": beta})
    return schedule


def test_numbers_of_further_parts_come_back_bit_for_bit(model, tmp_path):
    optimizer, beta = make_optimizer(model, OptimizerConfig()), 0.04 + 0.1 / 3
    kept, fresh, other = target_kl(beta), TargetKL(0.04, 0.1, 0.01), TargetKL(0.04, 0.1, 0.01)
    save_checkpoint(tmp_path, 1, Sharding(model), optimizer, START, {"kl_schedule": kept})
    parts = {"kl_schedule": fresh, "of a later version": other}
    assert load_checkpoint(tmp_path, Sharding(model), optimizer, START, parts) == 1
    assert (fresh(1), other(1)) == (beta, 0.07)
    # With another path of β, what is there is not of use.
    assert load_checkpoint(tmp_path, Sharding(model), optimizer, START) == 1


def test_a_checkpoint_of_an_earlier_version_has_no_further_parts(model, tmp_path):
    optimizer, schedule = make_optimizer(model, OptimizerConfig()), target_kl(0.05)
    path = save_checkpoint(
        tmp_path, 1, Sharding(model), optimizer, START, {"kl_schedule": target_kl(0.06)}
    )
    record = json.loads((path / "state.json").read_text())
    for name in ("parts", "identity", SEAL):
        del record[name]
    (path / "state.json").write_text(json.dumps(record))
    assert (
        load_checkpoint(tmp_path, Sharding(model), optimizer, START, {"kl_schedule": schedule}) == 1
    )
    assert schedule(1) == 0.05


def test_without_a_checkpoint_there_is_nothing_to_load(model, tmp_path):
    optimizer = make_optimizer(model, OptimizerConfig())
    with pytest.raises(UserError, match=r"there is no checkpoint in .*: start the run anew"):
        load_checkpoint(tmp_path, Sharding(model), optimizer, START)


@pytest.mark.parametrize("limit", [1_000_000, 5_000_000], ids=["weights", "optimizer"])
def test_a_disk_that_fills_up_while_saving(limit, interrupted, finished):
    """The operating system refuses a larger file at the first save of the resumed run."""
    before = content(interrupted / "checkpoints")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(UserError) as told:
            run(["--resume", str(interrupted), "--eval-samples=0"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    message = str(told.value)
    assert message.startswith(f"{interrupted}/checkpoints/step-000008 could not be saved (")
    assert message.endswith("from the last checkpoint with --resume.") and "\n" not in message
    assert content(interrupted / "checkpoints") == before
    assert {path.name for path in (interrupted / "checkpoints").iterdir()} == {"step-000006"}
    run(["--resume", str(interrupted), "--eval-samples=4"])  # there is room again
    assert_same_run(interrupted, finished)


def test_a_small_disk_is_full(run_args, tmp_path):
    """Here the log itself finds no room, or the first checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(UserError, match=r"step-000001 could not be saved .*make room") as told:
            run(run_args(disk / "run", save_every=1))
        assert "\n" not in str(told.value) and not list((disk / "run" / "checkpoints").iterdir())
        shutil.rmtree(disk / "run")
        (disk / "rest").write_bytes(b"0" * (shutil.disk_usage(disk).free - 5 * 4096))
        with pytest.raises(
            UserError, match=r"jsonl cannot be written \(No space left on device\): make room there"
        ):
            run(run_args(disk / "second", steps=100, eval_samples=0, save_every=0))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_seeds_depend_on_every_part():
    seeds = {
        derive_seed(*parts)
        for parts in [(0, "step", 1), (1, "step", 1), (0, "step", 2), (0, "rollout", 1), (0,)]
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "step", 1) == derive_seed(0, "step", 1)
    seed_step(0, 5)
    first = torch.rand(3)
    seed_step(0, 6)
    assert not torch.equal(first, torch.rand(3))
    seed_step(0, 5)
    assert torch.equal(first, torch.rand(3))


def test_a_fingerprint_tells_models_apart(model, processor):
    print_ = fingerprint(model)
    assert print_ == fingerprint(model)
    assert print_ != fingerprint(tiny_model(processor)) and print_ != fingerprint(model.bfloat16())
    zeros = torch.nn.Linear(2, 2)  # zeros are the same in every dtype
    torch.nn.init.zeros_(zeros.weight), torch.nn.init.zeros_(zeros.bias)
    prints = {fingerprint(zeros.to(d)) for d in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(prints) == 3
