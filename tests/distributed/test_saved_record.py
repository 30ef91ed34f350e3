"""Damage of a checkpoint: at any byte of any of its files, it is found before anything changes."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mr1_fast.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from mr1_fast.config import OptimizerConfig
from mr1_fast.distributed.sharding import Sharding
from mr1_fast.errors import UserError
from mr1_fast.integrity import checksum, sealed
from mr1_fast.kl_schedule import TargetKL
from mr1_fast.optim import make_optimizer
from mr1_fast.resuming import saved_steps
from tests.data.gang import gang
from tests.data.old_checkpoint import save_old_checkpoint

START = "0123456789abcdef"
DEEP = "[" * 100_000
LONG = "9" * 5_000


class Run:
    """Small weights, their optimizer and a β after a step, or before any."""

    def __init__(self, optimizer="adamw", steps=0):
        torch.manual_seed(steps)
        self.model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3))
        if optimizer == "adamw_exact":
            self.model.bfloat16()
        self.optimizer = make_optimizer(self.model, OptimizerConfig(optimizer=optimizer))
        for _ in range(steps):
            for parameter in self.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
        self.beta = TargetKL(0.04, 0.1, 0.01)
        self.beta.load({"beta": 0.05 + steps / 100})

    def save(self, folder, step, previous=None):
        parts = {"kl_schedule": self.beta}
        return save_checkpoint(
            folder, step, Sharding(self.model), self.optimizer, START, parts, previous=previous
        )

    def load(self, folder, fall_back=None):
        return load_checkpoint(
            folder,
            Sharding(self.model),
            self.optimizer,
            START,
            {"kl_schedule": self.beta},
            fall_back=fall_back,
        )

    def content(self):
        """All that a checkpoint could change."""
        found = {name: value.clone() for name, value in self.model.state_dict().items()}
        for index, p in enumerate(self.model.parameters()):
            for name, value in self.optimizer.state.get(p, {}).items():
                found[f"{index}.{name}"] = torch.as_tensor(value).clone()
        return found | {"beta": torch.tensor(self.beta(1))}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_damaged(run, folder, before):
    """The newest checkpoint is refused in a sentence with its way out, and nothing has changed."""
    with pytest.raises(UserError, match=r"step-000002 is damaged \(.*step-000001\.$") as told:
        run.load(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 700
    assert_same(run.content(), before)
    return str(told.value)


# --- at random places ---------------------------------------------------------------------------


def flipped(data, draw):
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]


def zeroed(data, draw):
    at = draw.randrange(len(data)) // 4096 * 4096
    return data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :]


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def longer(data, draw):
    return data + draw.randbytes(draw.randrange(1, 9))


def moved(data, draw):
    at, size = draw.randrange(len(data)), draw.randrange(1, 64)
    return data[:at] + data[at + size :] + data[at : at + size]


KINDS = (flipped, zeroed, cut, longer, moved)


def damage_everywhere(folder, places, seed, optimizer):
    """Damage files of a checkpoint at random places; every one must be found."""
    Run(optimizer, steps=1).save(folder / "run", 1)
    newest = Run(optimizer, steps=2).save(folder / "run", 2)
    save_weights(folder / "best", 2, Sharding(Run(optimizer, steps=2).model))
    run, draw = Run(optimizer), random.Random(seed)
    before, files = run.content(), sorted([*newest.iterdir(), *(folder / "best").rglob("*.*")])
    assert len(files) == 5
    for number in range(places):
        path, kind = draw.choice(files), KINDS[number % len(KINDS)]
        data = path.read_bytes()
        while (broken := kind(data, draw)) == data:
            pass
        path.write_bytes(broken)
        if path.parent == newest:
            assert_damaged(run, folder / "run", before)
        else:
            with pytest.raises(UserError, match=r"cannot be read \(.*resume without --keep-best"):
                load_weights(folder / "best", 2, Sharding(run.model))
            assert_same(run.content(), before)
        path.write_bytes(data)
    assert run.load(folder / "run") == 2
    load_weights(folder / "best", 2, Sharding(run.model))
    assert_same(run.content(), Run(optimizer, steps=2).content())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_exact"])
def test_no_damage_at_a_random_place_is_accepted(optimizer, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed of the places: {seed}")  # pytest shows it where the test fails
    damage_everywhere(tmp_path, 250, seed, optimizer)


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_exact", "adamw8bit"])
def test_no_damage_at_many_random_places_is_accepted(optimizer, tmp_path):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    damage_everywhere(tmp_path, 5_000, 1, optimizer)


def test_no_byte_of_the_record_can_be_another(tmp_path):
    """Every byte, also the blanks: half of all that are flipped leave JSON as it was."""
    Run(steps=1).save(tmp_path, 1)
    path = Run(steps=2).save(tmp_path, 2) / "state.json"
    run, data, draw = Run(), path.read_bytes(), random.Random(0)
    before = run.content()
    for at in range(0, len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        assert_damaged(run, tmp_path, before)


# --- other content, with checksums that hold ----------------------------------------------------


def seal(path, change):
    """Change the record of a checkpoint, and give it the checksums that suit."""
    record = json.loads((path / "state.json").read_text())
    del record["checksum"]
    for name in record["files"]:
        if (path / name).exists():
            record["files"][name] = checksum(path / name)
    (path / "state.json").write_text(sealed(change(record) or record))


def setting(*keys, value):
    """A change of one entry of a record, or of one within it."""

    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def without(key):
    return lambda record: {name: value for name, value in record.items() if name != key}


RECORDS = {
    **{f"without {key}": without(key) for key in ("step", "start", "optimizer", "files")},
    "no numbers of the optimizer": without("optimizer_numbers"),
    **{
        f"step {value!r}": setting("step", value=value)
        for value in (None, "2", 2.0, True, -2, [2], 3, 10**400, {})
    },
    **{
        f"{name} {value!r}": setting(name, value=value)
        for name in ("start", "optimizer", "optimizer_numbers", "parts", "files")
        for value in (None, 1, [], [[]], {"a": None}, {"a": {"b": []}}, True)
    },
    "a file elsewhere": lambda record: record["files"].update({"../a": {"bytes": 0, "crc32": ""}}),
    **{
        f"β {value!r}": setting("parts", "kl_schedule", "beta", value=value)
        for value in (None, "0.05", [0.05], float("nan"), float("inf"), -1.0, True, {}, 10**400)
    },
    "a number of the optimizer": setting("optimizer_numbers", "0.weight.step", value=1),
    "a number of nothing": setting("optimizer_numbers", "step", value=1),
    "no files": setting("files", value={}),
    "a size that is text": lambda record: record["files"]["weights.safetensors"].update(bytes="1"),
    "a checksum that is none": lambda record: record["files"]["weights.safetensors"].update(
        crc32=1
    ),
}
"""Changes of a record; the few that a run may have are not here."""


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_no_record_of_another_form_is_used(change, tmp_path):
    Run(steps=1).save(tmp_path, 1)
    newest = Run(steps=2).save(tmp_path, 2)
    run = Run()
    seal(newest, lambda record: None)
    kept = (newest / "state.json").read_text()
    seal(newest, change)
    assert (newest / "state.json").read_text() != kept
    assert_damaged(run, tmp_path, run.content())


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "1", '"a"', "{}", DEEP, LONG, f'{{"step": {LONG}}}', "{" * 99, "\0"]
)
def test_no_other_text_is_a_record(text, tmp_path):
    Run(steps=1).save(tmp_path, 1)
    newest = Run(steps=2).save(tmp_path, 2)
    run = Run()
    (newest / "state.json").write_text(text)
    assert_damaged(run, tmp_path, run.content())


def renamed(tensors):
    return {f"{name}.": value for name, value in tensors.items()}


def one_less(tensors):
    return dict(list(tensors.items())[1:])


def one_more(tensors):
    return {**tensors, "other.exp_avg": torch.zeros(3)}


def other_shape(tensors):
    return {**tensors, (name := min(tensors)): tensors[name].reshape(-1)[:-1].clone()}


def another_shape(tensors):
    return {name: torch.cat([value.reshape(-1)] * 2) for name, value in tensors.items()}


def other_dtype(tensors):
    return {name: value.double() for name, value in tensors.items()}


def integers(tensors):
    return {name: value.long() for name, value in tensors.items()}


CHANGES = (renamed, one_less, one_more, other_shape, another_shape, other_dtype, integers)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["weights", "optimizer"])
@pytest.mark.parametrize("version", ["of now", "of an earlier version"])
def test_tensors_that_do_not_fit_change_nothing(version, kind, change, tmp_path):
    """Checksums hold here, or there are none, as in earlier versions."""
    Run(steps=1).save(tmp_path, 1)
    state = Run(steps=2)
    if version == "of now":
        newest = state.save(tmp_path, 2)
    else:
        newest = save_old_checkpoint(tmp_path, 2, state.model, state.optimizer, START)
    path, run = newest / f"{kind}.safetensors", Run()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(change(load_file(path)), path, header)
    if version == "of now":
        seal(newest, lambda record: None)
    before = run.content()
    if kind == "weights" and change in (renamed, one_less, one_more):
        with pytest.raises(UserError, match="step-000002 was made from another model"):
            run.load(tmp_path)
        assert_same(run.content(), before)
    else:
        assert_damaged(run, tmp_path, before)


@pytest.mark.parametrize("pieces", ["[]", "{", "{}", '{"0.weight": 1}', DEEP, "null"])
def test_no_other_header_is_used(pieces, tmp_path):
    """The header says where rows belong; its checksum holds here."""
    Run(steps=1).save(tmp_path, 1)
    newest = Run(steps=2).save(tmp_path, 2)
    run, path = Run(), newest / "weights.safetensors"
    tensors = load_file(path)
    if pieces == "{}":  # some rows belong further down
        offsets = {"0.weight": {"saved_offsets": [1, 0]}}
        pieces = json.dumps(offsets)
    save_file(tensors, path, {"format": "pt", "DCP_SHARDING_INFO": pieces})
    seal(newest, lambda record: None)
    assert_damaged(run, tmp_path, run.content())


# --- files --------------------------------------------------------------------------------------


REFUSALS = [(errno.ESTALE, False), (errno.EACCES, False), (errno.EMFILE, False), (errno.EIO, True)]


@pytest.mark.parametrize("number, is_damage", REFUSALS)
def test_a_file_that_cannot_be_read_at_the_moment_is_not_damaged(
    number, is_damage, tmp_path, monkeypatch
):
    """Taken for damaged, it would be left for the checkpoint before it, and then removed."""
    Run(steps=1).save(tmp_path, 1)
    Run(steps=2).save(tmp_path, 2)
    own_open, said = Path.open, []

    def fails(path, *arguments, **options):
        if path.name == "weights.safetensors" and path.parent.name == "step-000002":
            raise OSError(number, os.strerror(number), str(path))
        return own_open(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        if is_damage:
            assert Run().load(tmp_path, said.append) == 1 and len(said) == 1
        else:
            with pytest.raises(
                UserError, match=r"weights.safetensors cannot be read \(.*try again"
            ):
                Run().load(tmp_path, said.append)
            assert not said
    (tmp_path / "step-000002" / "notes.txt").write_text("of the user")
    assert Run().load(tmp_path, said.append) == 2


def test_each_file_must_be_there_and_no_other(tmp_path):
    Run(steps=1).save(tmp_path, 1)
    newest = Run(steps=2).save(tmp_path, 2)
    run = Run()
    before = run.content()
    for path in list(newest.iterdir()):
        data = path.read_bytes()
        path.unlink()
        assert f"({path.name} is missing)" in assert_damaged(run, tmp_path, before)
        path.mkdir()
        assert path.name in assert_damaged(run, tmp_path, before)
        path.rmdir()
        path.write_bytes(b"")
        assert path.name in assert_damaged(run, tmp_path, before)
        path.write_bytes(data)
    (newest / "weights-00001-of-00002.safetensors").write_bytes(b"")
    assert "is no file of it" in assert_damaged(run, tmp_path, before)
    (newest / "weights-00001-of-00002.safetensors").unlink()
    (newest / ".nfs0001").write_bytes(b"")  # a file system's own
    assert run.load(tmp_path) == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    for step in (1, 2):
        Run(steps=step).save(tmp_path, step)
    run, said = Run(), []
    (tmp_path / "step-000002" / "weights.safetensors").write_bytes(b"")
    assert run.load(tmp_path, said.append) == 1
    (sentence,) = said
    assert sentence.startswith(f"checkpoint {tmp_path}/step-000002 is damaged (weights.safetensors")
    assert sentence.endswith("): the run goes on from step-000001.")
    assert_same(run.content(), Run(steps=1).content())
    assert saved_steps(tmp_path) == [1, 2]  # until it is in the way
    Run(steps=2).save(tmp_path, 2)
    assert run.load(tmp_path) == 2 and saved_steps(tmp_path) == [1, 2]
    assert_same(run.content(), Run(steps=2).content())


def test_where_all_are_damaged_the_way_out_is_another_run(tmp_path):
    for step in (1, 2):
        (Run(steps=step).save(tmp_path, step) / "state.json").write_text("")
    run, said = Run(), []
    before = run.content()
    with pytest.raises(UserError, match=r"step-000001 is damaged .*start the run anew, with a new"):
        run.load(tmp_path, said.append)
    assert len(said) == 1 and "step-000002 is damaged" in said[0]
    assert_same(run.content(), before)


@pytest.mark.parametrize("step", [5, 6, 7, 8, 9])
def test_a_save_removes_the_damaged_ones_after_which_it_comes(step, tmp_path):
    """They would count among the newest, and the last sound ones be removed as the oldest."""
    for number in (2, 4):
        Run(steps=1).save(tmp_path, number)
    for number in (6, 8):
        shutil.copytree(tmp_path / "step-000004", tmp_path / f"step-{number:06d}")
    run, said = Run(), []
    assert run.load(tmp_path, said.append) == 4 and len(said) == 2
    run.save(tmp_path, step, previous=4)
    assert saved_steps(tmp_path) == [4, step] and run.load(tmp_path) == step


def test_steps_are_numbers_and_not_text(tmp_path):
    """After step 999,999 the newest was the first to be removed, and the oldest was resumed."""
    for step in (999_998, 999_999, 1_000_000, 1_000_001, 10_000_000):
        Run(steps=1).save(tmp_path, step)
    assert saved_steps(tmp_path) == [1_000_001, 10_000_000]
    assert Run().load(tmp_path) == 10_000_000
    for name in (
        "step-",
        "step-7",
        "step-00000٣",
        "step-000003.old",
        "step--00001",
        "step-0000004",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000099").write_text("")
    assert saved_steps(tmp_path) == [1_000_001, 10_000_000]


# --- several processes --------------------------------------------------------------------------


def all_take_the_same(world, folder):
    """What each of several processes takes and says where a file of the newest is damaged."""
    torch.manual_seed(1)
    model = nn.Linear(40, 30)
    optimizer = make_optimizer(model, OptimizerConfig())
    sharding = Sharding(model, world)
    for step in (1, 2, 3):
        for p in model.parameters():
            p.grad = torch.full_like(p, step)
        optimizer.step()
        save_checkpoint(folder, step, sharding, optimizer, START)
    if world.is_first:
        path = next((folder / "step-000003").glob("optimizer*2-of-00002*"))
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    world.barrier()
    said = []
    done = load_checkpoint(folder, sharding, optimizer, START, fall_back=said.append)
    weights = model.weight.detach().clone()
    save_checkpoint(folder, 3, sharding, optimizer, START)
    return done, said, weights, load_checkpoint(folder, sharding, optimizer, START)


def test_all_processes_take_the_same_checkpoint(tmp_path):
    (done, said, weights, again), second = gang(2, all_take_the_same, tmp_path)
    assert (done, again, len(said)) == (2, 3, 1) and "00002-of-00002" in said[0]
    assert second[:2] == (done, said) and torch.equal(second[2], weights)
    assert not list(tmp_path.glob(".*"))
