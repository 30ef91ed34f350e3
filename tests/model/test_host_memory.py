"""The processes of a machine share one copy of the reference in host memory."""

import gc
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.model.host_memory import shared_copies
from mr1_fast.model.reference import Reference
from tests.data.gang import gang
from tests.data.models import tiny_policy
from tests.model.test_reference import TEMPERATURE, packs_of


def file_behind(tensor: torch.Tensor) -> tuple[int, str]:
    """The inode and the name of the file in whose mapping a tensor's memory is."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *name = line.split(maxsplit=5)
        first, end = (int(each, 16) for each in span.split("-"))
        if first <= address < end:
            return int(inode), "".join(name)
    raise AssertionError("nothing is mapped there")


def open_files() -> int:
    """How many such files this process has open; Python keeps that of a mapping."""
    links = [entry.path for entry in os.scandir("/proc/self/fd")]
    return sum("memfd:mr1" in os.readlink(link) for link in links if os.path.lexists(link))


def share_a_reference(world):
    """Two machines: processes 0 and 1 are on one, process 2 is on the other."""
    world = replace(world, local_rank=(0, 1, 0)[world.rank], local_size=(2, 2, 1)[world.rank])
    policy = tiny_policy(torch.bfloat16)
    several = packs_of(policy)
    reference = Reference(policy, "offload", world)
    start = [p.detach().clone() for p in policy.model.parameters()]
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.05 * (1 + world.rank))  # one process's training changes no other's reference
    logprobs = reference.logprobs(several, TEMPERATURE)
    with torch.no_grad():
        for p, value in zip(policy.model.parameters(), start, strict=True):
            p.copy_(value)
    expected = Reference(policy, "resident").logprobs(several, TEMPERATURE)
    assert all(torch.equal(a, b) for a, b in zip(logprobs, expected, strict=True))

    copies = list(reference.policy.model.parameters())
    assert all(p.is_contiguous() and p.data_ptr() % 256 == 0 for p in copies)
    files = {file_behind(p) for p in copies}
    world.barrier()
    if world.rank == 0:
        copies[-1].data.flatten()[0] = 7.5
    world.barrier()
    assert open_files() == 1
    return files, copies[-1].flatten()[0].item(), fail_without_room(world)


def fail_without_room(world) -> str:
    """Ask for more than the first process may have; the sentence that this process gets."""
    if world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, resource.RLIM_INFINITY))
    before = open_files()
    with pytest.raises(UserError) as raised:
        shared_copies([torch.zeros(2**12)], world)
    sentence = str(raised.value)
    del raised  # its frames hold what process 2 has mapped for itself
    gc.collect()
    assert open_files() == before
    return sentence


def test_processes_of_a_machine_share_one_reference_which_has_no_name():
    found = gang(3, share_a_reference)
    files, firsts, sentences = zip(*found, strict=True)
    assert all(len(each) == 1 and "deleted" in next(iter(each))[1] for each in files)
    assert files[0] == files[1] != files[2]
    assert firsts[0] == firsts[1] == 7.5 != firsts[2]
    assert len(set(sentences)) == 1
    assert "no room for 0.0 GiB (File too large)" in sentences[0]
    assert "--reference 8bit or resident" in sentences[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_that_is_shared_is_page_locked_for_cuda_as_long_as_it_is_used():
    from mr1_fast.model import host_memory

    tensor = torch.randn(2**10, device="cuda")
    pages = bytearray(2**12)
    array = (host_memory.ctypes.c_char * 2**12).from_buffer(pages)
    address = host_memory.ctypes.addressof(array)
    host_memory._page_lock(array)
    (host,) = host_memory._views(array, [0], [tensor])
    assert host.is_pinned() and torch.equal(host.copy_(tensor), tensor.cpu())
    host_memory._page_lock(array)  # a second time fails, and leaves no error to the next launch
    assert (tensor + 1).sum().isfinite()
    del host, array
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(address, 2**12, 0)) == 0
    assert int(runtime.cudaHostUnregister(address)) == 0
