"""Compile Triton kernels for GPUs that are not here, and read what the machine code needs."""

import contextlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class TargetDriver:
    """The part of a GPU's driver that Triton uses while it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def captured(target: GPUTarget):
    """Let launches inside only compile for the target; yield a list of (name, compiled kernel)."""
    compiled, launched = [], {}
    run, active = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        if id(self) not in launched:
            self.device_caches.clear()  # the caches' key is the device number, not the target
            launched[id(self)] = self
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__.removeprefix("_").removesuffix("_kernel"), kernel))
        return kernel

    driver.set_active(TargetDriver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active
        for function in launched.values():
            function.device_caches.clear()


@cache
def examine(kernel, target: GPUTarget) -> dict:
    """What the machine code of a kernel needs.

    Registers, spills, KB of shared memory, 128-bit and 16-bit accesses, and two counts of
    instructions: `total`, and those of the longest `loop`.
    """
    return examine_amd(kernel) if target.backend == "hip" else examine_nvidia(kernel)


def examine_amd(kernel) -> dict:
    """`examine` for AMD's assembly."""
    text = kernel.asm["amdgcn"]
    access = r"(?:global|buffer)_(?:load|store)_"

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "shared": number("group_segment_fixed_size") / 1024,
        "wide": len(re.findall(access + r"(?:dwordx4|b128)", text)),
        "short": len(re.findall(access + r"(?:\w+_)?(?:ushort|short|u16|b16)", text)),
        "total": None,
        "loop": None,
    }


def examine_nvidia(kernel) -> dict:
    """`examine` for NVIDIA's machine code; spills are instructions and bytes of local memory."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack, shared, local = (
        int(re.search(rf"\b{name}:(\d+)", usage).group(1))
        for name in ("REG", "STACK", "SHARED", "LOCAL")
    )
    access = r"\b(?:LDG|LDGSTS|STG)\.E(?:\.\w+)*"
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)) + stack + local,
        "shared": max(shared, kernel.metadata.shared) / 1024,
        "wide": len(re.findall(access + r"\.128\b", code)),
        "short": len(re.findall(access + r"\.[US]16\b", code)),
        **count_instructions(code),
    }


def count_instructions(code: str) -> dict[str, int]:
    """Count the instructions of nvdisasm's listing: all, and those of the longest loop.

    A loop is what lies between a label and a branch back to it.
    """
    labels: dict[str, int] = {}
    total = longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = total
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            total += 1
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction.group(1))
            if branch and branch.group(1) in labels:
                longest = max(longest, total - labels[branch.group(1)])
    return {"total": total, "loop": longest}


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
