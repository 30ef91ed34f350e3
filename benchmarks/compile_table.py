"""Compile every Triton kernel for GPUs that are not here, and show what each compilation needs.

    python benchmarks/compile_table.py

Compiled is exactly what a launch would compile: the real launchers run on meta tensors of 65,536 × V elements (the
optimizer's: on a weight of V × 1,536; those of decoding: on 64 rows), with a stand-in for the driver that names the
target. Then the machine code is read: registers, spills, the width of memory accesses, shared memory. Prints a Markdown
table; the last line is one JSON document. Ends with 1 if a limit is broken.
"""

import contextlib
import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mr1_fast.kernels.adamw import step_triton
from mr1_fast.kernels.adamw.state import Scalars, State
from mr1_fast.kernels.decode import (
    linear_triton as linear_triton,
)
from mr1_fast.kernels.decode import (
    operations_triton as operations_triton,
)
from mr1_fast.kernels.grpo import rows_triton
from mr1_fast.kernels.grpo.objective import Objective, RowResults

TARGETS = [("cuda", arch, 32) for arch in (80, 86, 89, 90, 120)] + [("hip", "gfx942", 64)]
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99, "gfx942": 64}
"""KB of shared memory that one program may use."""
MULTIPROCESSORS = {
    80: (108, 40),
    86: (82, 6),
    89: (128, 72),
    90: (132, 50),
    120: (170, 96),
    "gfx942": (304, 4),
}
"""Multiprocessors and MB of L2 of A100, RTX 3090, RTX 4090, H100, RTX 5090, MI300X (L2 of one die)."""
TARGET_GATHERS = 2
"""16-bit accesses that a kernel may have: it reads one logit alone, the target's."""
NEW_TOKEN_ACCESSES = 7
"""Those of attention in decoding, a channel a thread: the new token's angles, key (twice) and value, and two writes."""
BIAS_ACCESSES = 12
"""Those of linear layers in decoding: biases, a column or two a thread, or the output of few rows."""
SHORT_ACCESSES = {"attend": NEW_TOKEN_ACCESSES, "linears": BIAS_ACCESSES}
MODELS = ((12, 2, 1536, 8960, 151_936), (28, 4, 3584, 18_944, 152_064))
"""Heads, key heads, hidden width, MLP width and vocabulary of Qwen2-VL 2B and 7B."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TargetDriver:
    """What Triton asks of a driver while it compiles."""

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
def captured(backend: str, arch, warp_size: int):
    """Launches inside only compile, for the target; yields the list of (kernel name, compiled kernel)."""
    compiled = []
    run, active = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__.removeprefix("_").removesuffix("_kernel"), kernel))
        return kernel

    functions = [each for each in gc.get_objects() if issubclass(type(each), JITFunction)]
    driver.set_active(TargetDriver(GPUTarget(backend, arch, warp_size)))
    JITFunction.run = compile_only
    try:
        for function in functions:
            function.device_caches.clear()  # they are kept by device number, not by target
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active
        for function in functions:
            function.device_caches.clear()


def launch_everything(
    dtype: torch.dtype, v: int, parts: int, device: str = "meta", n: int = 65_536
) -> None:
    """Every kernel in every variant that compiles differently, on tensors without memory."""
    like = dict(device=device)
    logits = torch.empty(n, v, dtype=dtype, **like)
    targets = torch.empty(n, dtype=torch.int64, **like)
    rows = [torch.empty(n, **like) for _ in range(5)]
    scalar = torch.empty((), **like)
    for surrogate in ("clip", "cispo", "sapo"):
        for split in {1, parts}:
            objective = Objective(
                *rows[:2], scalar, scalar, *rows[2:], surrogate, bias_corrected_kl=surrogate == "clip"
            )
            rows_triton.row_grpo(
                logits, targets, objective, RowResults.empty(logits), logits, split
            )
    plain = Objective(*rows[:2], scalar, scalar)
    rows_triton.row_grpo(logits, targets, plain, RowResults.empty(logits), None, 1)
    statistics = rows_triton.row_logprobs(logits, targets, scalar)
    rows_triton.row_logprobs_backward(logits, targets, scalar, *statistics[1:], *rows[:2], logits)
    rows_triton.scale_(logits, scalar)


def launch_adamw(device: str = "meta", n: int = 151_936 * 1536) -> None:
    """The optimizer's kernels for each kind of weight, on tensors without memory; gradients have the weight's dtype."""
    like = dict(device=device)
    scalars = Scalars.at(1, 1e-6, (0.9, 0.98), 1e-8, 0.01)
    for dtype, remainder in (
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float32, False),
    ):
        weight = torch.empty(n, dtype=dtype, **like)
        step_triton.adamw_(
            weight, weight, State.zeros(weight, remainder), scalars, (1, 2), torch.empty((), **like)
        )
        step_triton.add_stochastic_(torch.empty(n, dtype=torch.bfloat16, **like), weight, (1, 2))


def launch_decode(dtype: torch.dtype, models=MODELS, device: str = "meta", rows: int = 64) -> None:
    """The kernels of a decode step."""
    for heads, kv_heads, hidden, mlp, v in models:
        empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        q, new, angle = empty(rows, heads, 128), empty(rows, kv_heads, 128), empty(rows, 128)
        pool, spans = empty(2**16, kv_heads, 128), empty(rows, 4, dtype=torch.int32)
        operations_triton.attend(q, new, new, angle, angle, pool, pool, spans, 0.09)
        x = empty(rows, hidden)
        for delta in (x, None):
            operations_triton.add_rms_norm(x, delta, empty(hidden), 1e-6)
        operations_triton.silu_mul(empty(rows, mlp), empty(rows, mlp))
        for temperature in (1.0, 0.0):
            uniform = empty(rows, dtype=torch.float32)
            operations_triton.sample(empty(rows, v), uniform, temperature, (151_655, 151_656))


def launch_decode_linear(dtype: torch.dtype, arch, device: str = "meta") -> None:
    """The fused linear layers of Qwen2-VL 2B, with every tile for the GPU that stands for this target."""
    original = linear_triton._shared_memory
    linear_triton._shared_memory = lambda device: SHARED_LIMIT[arch] * 2**10
    empty = lambda *shape: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    try:
        for rows in (32, 64, 128):
            x = empty(rows, 1536)
            weights, biases = zip(
                *((empty(n, 1536), empty(n)) for n in (1536, 256, 256)), strict=True
            )
            linear_triton.linears(x, weights, biases)
            linear_triton.swiglu(x, empty(8960, 1536), empty(8960, 1536))
    finally:
        linear_triton._shared_memory = original


def parts_on(arch, v: int, dtype: torch.dtype) -> int:
    """Programs per row that `split_columns` chooses on the GPU that stands for this target."""
    multiprocessors, megabytes = MULTIPROCESSORS[arch]
    original = rows_triton._device_limits
    rows_triton._device_limits = lambda device: (multiprocessors, megabytes * 2**20)
    try:
        return triton.cdiv(
            v, rows_triton.split_columns(torch.empty(65_536, v, dtype=dtype, device="meta"))
        )
    finally:
        rows_triton._device_limits = original


def examine(kernel, backend: str) -> dict:
    """Registers, spilled bytes, KB of shared memory, and global accesses by width, from the machine code."""
    if backend == "hip":
        text = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        return {
            "registers": number("vgpr_count"),
            "spills": number("vgpr_spill_count"),
            "shared": number("group_segment_fixed_size") / 1024,
            "wide": len(re.findall(r"(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)", text)),
            "short": len(
                re.findall(
                    r"(?:global|buffer)_(?:load|store)_(?:\w+_)?(?:ushort|short|u16|b16)", text
                )
            ),
        }
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
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code)) + stack + local
    wide = len(re.findall(r"\b(?:LDG|LDGSTS|STG)\.E(?:\.\w+)*\.128\b", code))
    short = len(re.findall(r"\b(?:LDG|LDGSTS|STG)\.E(?:\.\w+)*\.[US]16\b", code))
    shared = max(shared, kernel.metadata.shared) / 1024
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "wide": wide,
        "short": short,
    }


def table(dtypes: list[str], vocabularies: list[int], targets: list[tuple] = TARGETS) -> list[dict]:
    """One row per target, dtype, V and kernel; of a kernel's variants, the worst of each figure."""
    rows = []
    for backend, arch, warp_size in targets:
        for dtype in dtypes:
            for v in vocabularies:
                parts = parts_on(arch, v, DTYPES[dtype])
                with captured(backend, arch, warp_size) as compiled:
                    launch_everything(DTYPES[dtype], v, parts)
                rows += _worst(compiled, backend, arch, {"dtype": dtype, "V": v, "parts": parts})
    return rows


def adamw_table(targets: list[tuple] = TARGETS) -> list[dict]:
    """One row per target and kernel of the optimizer, over weights in bf16, with and without remainder, and fp32."""
    rows = []
    for backend, arch, warp_size in targets:
        with captured(backend, arch, warp_size) as compiled:
            launch_adamw()
        rows += _worst(compiled, backend, arch, {"dtype": "both", "V": None, "parts": 1})
    return rows


def decode_table(
    dtypes: list[str], targets: list[tuple] = TARGETS[:-1], models=MODELS
) -> list[dict]:
    """One row per NVIDIA target, dtype and kernel of a decode step, over the models."""
    rows = []
    for backend, arch, warp_size in targets:
        for dtype in dtypes:
            with captured(backend, arch, warp_size) as compiled:
                launch_decode(DTYPES[dtype], models)
                if dtype != "fp32":  # whose linear layers are PyTorch's
                    launch_decode_linear(DTYPES[dtype], arch)
            rows += _worst(compiled, backend, arch, {"dtype": dtype, "V": None, "parts": 1})
    return rows


def _worst(compiled: list[tuple], backend: str, arch, settings: dict) -> list[dict]:
    """One row per kernel: of its variants, the worst of each figure."""
    worst: dict[str, dict] = {}
    choose = {"registers": max, "spills": max, "shared": max, "short": max, "wide": min}
    for name, kernel in compiled:
        figures = examine(kernel, backend)
        row = worst.setdefault(name, {**figures, "variants": 0})
        row["variants"] += 1
        row |= {key: worse(row[key], figures[key]) for key, worse in choose.items()}
    label = f"sm_{arch}" if backend == "cuda" else arch
    return [
        {"target": label, **settings, "kernel": name, **row,
         "fits": row["spills"] == 0 and row["shared"] <= SHARED_LIMIT[arch]
         and row["wide"] > 0 and row["short"] <= SHORT_ACCESSES.get(name, TARGET_GATHERS)}
        for name, row in worst.items()
    ]  # fmt: skip


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    rows = table(list(DTYPES), [151_936]) + adamw_table() + decode_table(list(DTYPES))
    print(
        "| target | dtype | parts | kernel | variants | registers | spills | shared KB | 128/16-bit access | fits |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['target']} | {row['dtype']} | {row['parts']} | {row['kernel']} | {row['variants']} | "
            f"{row['registers']} | {row['spills']} | {row['shared']:.1f} | {row['wide']} / {row['short']} | "
            f"{'yes' if row['fits'] else 'NO'} |"
        )
    print(json.dumps({"benchmark": "compile_table", "triton": triton.__version__, "rows": rows}))
    sys.exit(not all(row["fits"] for row in rows))


if __name__ == "__main__":
    main()
