"""Checkpoints of several processes: whichever of them had saved what, and whatever ends one."""

import os
import resource
import shutil
import signal

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mr1_fast.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from mr1_fast.config import OptimizerConfig
from mr1_fast.distributed import SINGLE
from mr1_fast.distributed.sharding import Part, Sharding
from mr1_fast.errors import UserError
from mr1_fast.optim import make_optimizer
from mr1_fast.resuming import saved_steps
from tests.data.gang import gang
from tests.data.old_checkpoint import save_old_checkpoint

OPTIMIZERS = ("adamw", "adamw_exact", "adamw_stochastic", "adamw8bit")
START = "0123456789abcdef"


class Weights(nn.Module):
    """Parameters that parts cut in every way: rows of whole blocks, parts of blocks, no block."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"wide": (50, 512), "odd": (5000,), "small": (77,), "frozen": (4, 4)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values, requires_grad=name != "frozen"))


class Blocks(Sharding):
    """Each process updates some blocks of 256 elements of every parameter."""

    def _parts(self):
        parts = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                flat, blocks = parameter.detach().view(-1), -(-parameter.numel() // 256)
                each = -(-blocks // self.world.size) * 256
                first = min(self.world.rank * each, len(flat))
                weight = nn.Parameter(flat[first : first + each])
                parts.append(Part(name, weight, first, parameter.shape))
        return parts


class Rows(Sharding):
    """FSDP2 has cut the matrix, of which each process updates its rows, and all of the rest."""

    def __init__(self, model, world):
        mesh = init_device_mesh("cpu", (world.size,))
        whole = {p for p in model.parameters() if p.dim() == 1 or not p.requires_grad}
        fully_shard(model, mesh=mesh, ignored_params=whole)
        super().__init__(model, world)

    def _parts(self):
        parts = []
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                rows = -(-parameter.shape[0] // self.world.size) * self.world.rank
                local = nn.Parameter(parameter.detach().to_local())
                parts.append(Part(name, local, rows * parameter.shape[1], parameter.shape))
            elif parameter.requires_grad:
                parts.append(Part(name, parameter, 0, parameter.shape))
        return parts


KINDS = {"none": Sharding, "optimizer": Blocks, "full": Rows}


def made(world, name, kind="none"):
    """The sharding of fresh weights, and their optimizer."""
    fp32 = name in ("adamw", "adamw8bit")
    sharding = KINDS[kind](Weights(torch.float32 if fp32 else torch.bfloat16), world)
    config = OptimizerConfig(optimizer=name, learning_rate=1e-3)
    return sharding, make_optimizer(sharding.model, config, 7, sharding.parts)


def take_steps(sharding, optimizer, steps):
    """Steps with the same gradients whoever has which part; then all have all weights again."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        shapes = [p.shape for p in Weights(torch.float32).parameters() if p.requires_grad]
        gradients = [torch.randn(shape, generator=generator).view(-1) for shape in shapes]
        for part, gradient in zip(sharding.parts, gradients, strict=True):
            n = part.weight.numel()
            own = gradient[part.first : part.first + n].view_as(part.weight)
            part.weight.grad = own.to(part.weight.dtype) if n else None
        optimizer.step()
    parameters = dict(sharding.model.named_parameters())
    for part in sharding.parts:
        updated = sharding.world.gather((part.first, part.weight.detach().view(-1)))
        if not isinstance(weight := parameters[part.name].detach(), DTensor):
            for first, elements in updated:
                weight.view(-1)[first : first + len(elements)] = elements


def content(sharding, optimizer):
    """All weights and states of a process alone, by name."""
    weights = {name: p.detach().clone() for name, p in sharding.model.named_parameters()}
    for part in sharding.parts:
        for name, value in optimizer.state[part.weight].items():
            weights[f"{part.name}.{name}"] = torch.as_tensor(value).clone()
    return weights


def assert_equal(left, right):
    assert left.keys() == right.keys() and len(left) >= 4 + 3 * 3
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def saved_by_two(world, folder):
    """Save steps of their own, and what a process alone has saved in an earlier version."""
    for name in OPTIMIZERS:
        sharding, optimizer = made(world, name, "optimizer")
        take_steps(sharding, optimizer, range(3))
        save_checkpoint(folder / "two" / name, 3, sharding, optimizer, START)
    passed_on(world, folder / "old", folder / "from old", "optimizer", 0)


def passed_on(world, source, target, kind, steps):
    """Load checkpoints, take further steps, and save again."""
    for name in OPTIMIZERS:
        sharding, optimizer = made(world, name, kind)
        done = load_checkpoint(source / name, sharding, optimizer, START)
        take_steps(sharding, optimizer, range(done, done + steps))
        save_checkpoint(target / name, done + steps, sharding, optimizer, START)
        save_weights(target / name / "best", 1, sharding)


def test_any_number_of_processes_goes_on_with_any_sharding(tmp_path):
    """2 processes with parts → 1 → 3 with FSDP2 → 2 with all → 1, the same bits as 1 throughout."""
    pytest.importorskip("bitsandbytes")
    for name in OPTIMIZERS:
        sharding, optimizer = made(SINGLE, name)
        take_steps(sharding, optimizer, range(3))
        save_old_checkpoint(tmp_path / "old" / name, 3, sharding.model, optimizer, START)
    gang(2, saved_by_two, tmp_path)
    passed_on(SINGLE, tmp_path / "two", tmp_path / "one", "none", 1)
    gang(3, passed_on, tmp_path / "one", tmp_path / "three", "full", 1)
    gang(2, passed_on, tmp_path / "three", tmp_path / "again", "none", 1)
    for name in OPTIMIZERS:
        expected = made(SINGLE, name)
        take_steps(*expected, range(3))
        for folder, step in {"from old": 3, "two": 3, "one": 4, "three": 5, "again": 6}.items():
            take_steps(*expected, range(max(step - 1, 3), step) if folder != "two" else ())
            sharding, optimizer = made(SINGLE, name)
            assert load_checkpoint(tmp_path / folder / name, sharding, optimizer, START) == step
            assert_equal(content(sharding, optimizer), content(*expected))
            if folder != "two":
                fresh, _ = made(SINGLE, name)
                load_weights(tmp_path / folder / name / "best", 1, fresh)
                for key, weight in fresh.model.named_parameters():
                    assert torch.equal(weight, dict(sharding.model.named_parameters())[key])

    folder = tmp_path / "three" / "adamw" / "step-000005"
    assert {path.name for path in folder.iterdir()} == {
        "state.json",
        *(
            f"{kind}-0000{n}-of-00003.safetensors"
            for kind in ("weights", "optimizer")
            for n in (1, 2, 3)
        ),
    }
    # torch's own reader knows these files, and no process has written twice what all have.
    read = {"wide": torch.zeros(50, 512)}
    load(
        read,
        storage_reader=HuggingFaceStorageReader(str(tmp_path / "three/adamw/best/step-000001")),
    )
    sharding, _ = made(SINGLE, "adamw")
    load_weights(tmp_path / "three" / "adamw" / "best", 1, sharding)
    assert torch.equal(read["wide"], sharding.model.wide)
    one = sum(p.stat().st_size for p in (tmp_path / "one" / "adamw" / "step-000004").iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.1 * one


# --- what goes wrong ----------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def swap(path, other):
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


DAMAGES = {
    "weights-00002-of-00002.safetensors is not what was written": lambda new, old: flip(
        new / "weights-00002-of-00002.safetensors"
    ),
    "optimizer-00001-of-00002.safetensors is missing": lambda new, old: (
        new / "optimizer-00001-of-00002.safetensors"
    ).unlink(),
    "optimizer-00002-of-00002.safetensors has 100 bytes instead of": lambda new, old: os.truncate(
        new / "optimizer-00002-of-00002.safetensors", 100
    ),
    "weights-00001-of-00002.safetensors is not what was written": lambda new, old: swap(
        new / "weights-00001-of-00002.safetensors", old / "weights-00001-of-00002.safetensors"
    ),
    "state.json is that of step 1": lambda new, old: swap(new / "state.json", old / "state.json"),
}


def damaged(world, folder):
    """What each process says of each damage, and whether its weights are as before."""
    sharding, optimizer = made(world, "adamw_exact", "optimizer")
    for step in (1, 2):
        take_steps(sharding, optimizer, [step])
        save_checkpoint(folder / "whole", step, sharding, optimizer, START)
    said = []
    for number, damage in enumerate(DAMAGES.values()):
        copy = folder / str(number)
        if world.is_first:
            shutil.copytree(folder / "whole", copy)
            damage(copy / "step-000002", copy / "step-000001")
        world.barrier()
        fresh, its_optimizer = made(world, "adamw_exact", "optimizer")
        before = content(fresh, its_optimizer)
        with pytest.raises(UserError) as told:
            load_checkpoint(copy, fresh, its_optimizer, START)
        assert_equal(content(fresh, its_optimizer), before)
        said.append(str(told.value))
        if world.is_first:
            shutil.rmtree(copy / "step-000002")
        world.barrier()
        if "state.json" not in said[-1] and "00001-of-00002.safetensors is not" not in said[-1]:
            assert load_checkpoint(copy, fresh, its_optimizer, START) == 1
    return said


def test_a_damaged_shard_is_named_by_all_processes(tmp_path):
    first, second = gang(2, damaged, tmp_path)
    assert first == second and len(first) == len(DAMAGES)
    for said, finding in zip(first, DAMAGES, strict=True):
        assert f"step-000002 is damaged ({finding}" in said
        assert said.endswith("delete it to resume from step-000001.") and "\n" not in said


def full_disk(world, folder, of_whom):
    """What each process says where the operating system refuses a file of one of them."""
    sharding, optimizer = made(world, "adamw_exact", "optimizer")
    save_checkpoint(folder, 1, sharding, optimizer, START)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    for limit in (10_000, 60_000):  # neither weights nor states fit; weights do
        if world.rank == of_whom:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        with pytest.raises(UserError) as told:
            save_checkpoint(folder, 2, sharding, optimizer, START)
        said.append(str(told.value))
        if world.is_first:
            assert [path.name for path in folder.iterdir()] == ["step-000001"]
        world.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    save_checkpoint(folder, 2, sharding, optimizer, START)
    return said


def full_disks(world, folder):
    return [full_disk(world, folder / str(of_whom), of_whom) for of_whom in (0, 1)]


def test_a_full_disk_of_one_process_leaves_nothing_of_a_checkpoint(tmp_path):
    first, second = gang(2, full_disks, tmp_path)
    assert first == second
    for of_whom, sentences in enumerate(first):
        for said in sentences:
            assert said.startswith(f"{tmp_path}/{of_whom}/step-000002 could not be saved (")
            assert "File too large" in said and said.endswith("with --resume.")
        assert saved_steps(tmp_path / str(of_whom)) == [1, 2]


def killed_inside_a_save(world, folder, whom):
    sharding, optimizer = made(world, "adamw_exact", "optimizer")
    take_steps(sharding, optimizer, [1])
    save_checkpoint(folder, 1, sharding, optimizer, START)
    take_steps(sharding, optimizer, [2])
    if world.rank == whom:  # its file is written then, and not yet on the disk
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(folder, 2, sharding, optimizer, START)


@pytest.mark.parametrize("whom", [0, 1])
def test_a_process_that_is_killed_inside_a_save_leaves_the_one_before(whom, tmp_path):
    with pytest.raises(AssertionError, match=r"process \d died|Connection|gloo"):
        gang(2, killed_inside_a_save, tmp_path, whom)
    assert saved_steps(tmp_path) == [1]
    (tmp_path / ".step-000002.partial").mkdir(exist_ok=True)  # is left where the first one died
    sharding, optimizer = made(SINGLE, "adamw_exact")
    assert load_checkpoint(tmp_path, sharding, optimizer, START) == 1
    expected = made(SINGLE, "adamw_exact")
    take_steps(*expected, [1])
    assert_equal(content(sharding, optimizer), content(*expected))
    save_checkpoint(tmp_path, 2, sharding, optimizer, START)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
