"""Compile every Triton kernel for GPUs that are not here, and show what each compilation needs.

    python benchmarks/compile_table.py

What is compiled is exactly what a launch would compile: the real launchers run on meta tensors,
with a stand-in for the driver that names the target. The loss has 65,536 × V logits, the optimizer
a weight of V × 1,536, decoding 64 rows. Registers, spills, shared memory and the width of memory
accesses are read from the machine code. Prints a Markdown table; the last line is one JSON
document. The exit status is 1 if a limit is exceeded.
"""

import contextlib
import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mr1_fast.kernels.adamw import step_triton
from mr1_fast.kernels.adamw.state import Scalars, State
from mr1_fast.kernels.decode import attention_triton, linear_triton, operations_triton
from mr1_fast.kernels.grpo import rows_triton
from mr1_fast.kernels.grpo.objective import Objective, RowResults

NVIDIA = [GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 120)]
TARGETS = [*NVIDIA, GPUTarget("hip", "gfx942", 64)]
"""Triton's names of A100, RTX 3090, RTX 4090, H100, RTX 5090 and MI300X, with threads per warp."""
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
"""Multiprocessors and MB of L2 of each target; MI300X: the L2 of one die."""
SHORT_ACCESSES = 2
"""16-bit accesses that a kernel may have: the target's logit is read alone."""
MORE_SHORT_ACCESSES = {"attend": 7, "linears": 12}
"""16-bit accesses of the kernels that need more.

Attention reads the new token's angles, key (twice) and value, and writes two values, a channel a
thread. Linear layers read biases, one or two columns a thread, or write the output of few rows.
"""
MODELS = ((12, 2, 1536, 8960, 151_936), (28, 4, 3584, 18_944, 152_064))
"""Heads, key heads, hidden size, MLP size and vocabulary of Qwen2-VL 2B and 7B."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    compiled = []
    run, active = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__.removeprefix("_").removesuffix("_kernel"), kernel))
        return kernel

    functions = [each for each in gc.get_objects() if issubclass(type(each), JITFunction)]
    driver.set_active(TargetDriver(target))
    JITFunction.run = compile_only
    try:
        for function in functions:
            function.device_caches.clear()  # the caches' key is the device number, not the target
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active
        for function in functions:
            function.device_caches.clear()


def launch_loss(
    dtype: torch.dtype, v: int, parts: int, device: str = "meta", n: int = 65_536
) -> None:
    """Launch the loss' kernels in every variant that compiles differently."""
    like = dict(device=device)
    logits = torch.empty(n, v, dtype=dtype, **like)
    targets = torch.empty(n, dtype=torch.int64, **like)
    rows = [torch.empty(n, **like) for _ in range(5)]
    scalar = torch.empty((), **like)
    results = RowResults.empty(logits)
    for surrogate in ("clip", "cispo", "sapo"):
        objective = Objective(
            *rows[:2],
            scalar,
            scalar,
            *rows[2:],
            surrogate=surrogate,
            bias_corrected_kl=surrogate == "clip",
        )
        for split in {1, parts}:
            rows_triton.row_grpo(logits, targets, objective, results, logits, split)
    plain = Objective(*rows[:2], scalar, scalar)
    rows_triton.row_grpo(logits, targets, plain, results, None, 1)
    statistics = rows_triton.row_logprobs(logits, targets, scalar)
    rows_triton.row_logprobs_backward(logits, targets, scalar, *statistics[1:], *rows[:2], logits)
    rows_triton.scale_(logits, scalar)


def launch_adamw(device: str = "meta", n: int = 151_936 * 1536) -> None:
    """Launch the optimizer's kernels for each kind of weight; gradients have the weight's dtype."""
    like = dict(device=device)
    scalars, factor = Scalars.at(1, 1e-6, (0.9, 0.98), 1e-8, 0.01), torch.empty((), **like)
    added = torch.empty(n, dtype=torch.bfloat16, **like)
    for dtype, remainder in (
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float32, False),
    ):
        weight = torch.empty(n, dtype=dtype, **like)
        state = State.zeros(weight, remainder)
        step_triton.adamw_(weight, weight, state, scalars, (1, 2), factor)
        step_triton.add_stochastic_(added, weight, (1, 2))


def launch_decode(dtype: torch.dtype, models=MODELS, device: str = "meta", rows: int = 64) -> None:
    """Launch the kernels of a decode step, except for its linear layers."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    for heads, kv_heads, hidden, mlp, v in models:
        q, new, angle = empty(rows, heads, 128), empty(rows, kv_heads, 128), empty(rows, 128)
        pool, spans = empty(2**16, kv_heads, 128), empty(rows, 4, dtype=torch.int32)
        attention_triton.attend(q, new, new, angle, angle, pool, pool, spans, 0.09)
        x = empty(rows, hidden)
        for delta in (x, None):
            operations_triton.add_rms_norm(x, delta, empty(hidden), 1e-6)
        operations_triton.silu_mul(empty(rows, mlp), empty(rows, mlp))
        for temperature in (1.0, 0.0):
            uniform = empty(rows, dtype=torch.float32)
            operations_triton.sample(empty(rows, v), uniform, temperature, (151_655, 151_656))


def launch_decode_linear(dtype: torch.dtype, arch, device: str = "meta") -> None:
    """Launch the fused linear layers of Qwen2-VL 2B with every tile for this target."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    weights = [empty(n, 1536) for n in (1536, 256, 256)]
    biases = [empty(len(weight)) for weight in weights]
    shared_memory = SHARED_LIMIT[arch] * 2**10
    with mock.patch.object(linear_triton, "_shared_memory", return_value=shared_memory):
        for rows in (32, 64, 128):
            x = empty(rows, 1536)
            linear_triton.linears(x, weights, biases)
            linear_triton.swiglu(x, empty(8960, 1536), empty(8960, 1536))


def parts_on(arch, v: int, dtype: torch.dtype) -> int:
    """Programs per row that `split_columns` chooses on this target."""
    multiprocessors, megabytes = MULTIPROCESSORS[arch]
    limits = multiprocessors, megabytes * 2**20
    logits = torch.empty(65_536, v, dtype=dtype, device="meta")
    with mock.patch.object(rows_triton, "_device_limits", return_value=limits):
        return triton.cdiv(v, rows_triton.split_columns(logits))


def examine(kernel, target: GPUTarget) -> dict:
    """Registers, spills, KB of shared memory, and 128-bit and 16-bit accesses of machine code."""
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
    }


def loss_table(
    dtypes: list[str], vocabularies: list[int], targets: list[GPUTarget] = TARGETS
) -> list[dict]:
    """One row per target, dtype, V and kernel of the loss."""
    rows = []
    for target in targets:
        for dtype in dtypes:
            for v in vocabularies:
                parts = parts_on(target.arch, v, DTYPES[dtype])
                with captured(target) as compiled:
                    launch_loss(DTYPES[dtype], v, parts)
                rows += _worst(compiled, target, {"dtype": dtype, "V": v, "parts": parts})
    return rows


def adamw_table(targets: list[GPUTarget] = TARGETS) -> list[dict]:
    """One row per target and kernel of the optimizer, over all kinds of weights."""
    rows = []
    for target in targets:
        with captured(target) as compiled:
            launch_adamw()
        rows += _worst(compiled, target, {"dtype": "both", "V": None, "parts": 1})
    return rows


def decode_table(dtypes: list[str], targets: list[GPUTarget] = NVIDIA, models=MODELS) -> list[dict]:
    """One row per target, dtype and kernel of a decode step, over the models."""
    rows = []
    for target in targets:
        for dtype in dtypes:
            with captured(target) as compiled:
                launch_decode(DTYPES[dtype], models)
                if dtype != "fp32":  # in fp32, PyTorch computes linear layers
                    launch_decode_linear(DTYPES[dtype], target.arch)
            rows += _worst(compiled, target, {"dtype": dtype, "V": None, "parts": 1})
    return rows


def _worst(compiled: list[tuple], target: GPUTarget, settings: dict) -> list[dict]:
    """One row per kernel, with the worst value of each figure over the kernel's variants."""
    worst: dict[str, dict] = {}
    choose = {"registers": max, "spills": max, "shared": max, "short": max, "wide": min}
    for name, kernel in compiled:
        figures = examine(kernel, target)
        row = worst.setdefault(name, {**figures, "variants": 0})
        row["variants"] += 1
        row |= {key: worse(row[key], figures[key]) for key, worse in choose.items()}
    label = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    rows = []
    for name, row in worst.items():
        fits = (
            row["spills"] == 0
            and row["shared"] <= SHARED_LIMIT[target.arch]
            and row["wide"] > 0
            and row["short"] <= MORE_SHORT_ACCESSES.get(name, SHORT_ACCESSES)
        )
        rows.append({"target": label, **settings, "kernel": name, **row, "fits": fits})
    return rows


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    rows = loss_table(list(DTYPES), [151_936]) + adamw_table() + decode_table(list(DTYPES))
    columns = ["target", "dtype", "parts", "kernel", "variants", "registers", "spills"]
    table = [
        [
            *(row[column] for column in columns),
            f"{row['shared']:.1f}",
            f"{row['wide']} / {row['short']}",
            "yes" if row["fits"] else "NO",
        ]
        for row in rows
    ]
    columns += ["shared KB", "128/16-bit accesses", "fits"]
    for cells in (columns, ["---"] * len(columns), *table):
        print(f"| {' | '.join(map(str, cells))} |")
    print(json.dumps({"benchmark": "compile_table", "triton": triton.__version__, "rows": rows}))
    sys.exit(not all(row["fits"] for row in rows))


if __name__ == "__main__":
    main()
