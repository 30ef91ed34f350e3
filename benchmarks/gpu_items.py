"""What gpu_queue.py runs, in order: the most valuable first, as time on a GPU is short.

1. The environment, while settings are compiled and csrc/ is built in the background.
2. Every launch setting against fp64, with the race check: a figure of a wrong kernel is worthless.
3. The limits, and the loss' sweep.
4. Decoding: sweeps, whose winners the later items use, a step's operations, whole rollouts.
5. The other sweeps, and the figures of the kernels that have targets of their own.
6. The tests that use a GPU. What they would find in the kernels above, 2 has found already, and
   their minutes would have cost those figures; the parts that follow 2 has not checked.
7. Training steps and memory; then what takes longest.

Seconds are what an item should take on an H100 with 16 cores, its start included.
"""

from importlib.util import find_spec
from typing import NamedTuple


class Item(NamedTuple):
    """A command and what is known about it."""

    name: str
    """Of its result, and on the command line."""
    program: tuple[str, ...]
    """`python` is the queue's own."""
    arguments: tuple[str, ...]
    """`{results}` is the folder of results."""
    seconds: int
    """Expected on a GPU."""
    sources: str | None = None
    """The key in sources.SOURCES of what its result depends on; None: it runs in any case."""
    tiny: tuple[str, ...] | None = ()
    """Arguments with which the queue is tried on a CPU; None: it needs a GPU."""
    needs: str | None = None
    """A program without which it is skipped."""
    after: tuple[str, ...] = ()
    """Background items that it waits for."""


def script(name: str, seconds: int, *arguments: str, file: str | None = None, **fields) -> Item:
    """An item of a script of this folder: by default of the benchmark that it has the name of."""
    program = "python", f"benchmarks/{file or f'bench_{name}'}.py"
    return Item(name, program, arguments, seconds, **{"sources": name, **fields})


def module(name: str, seconds: int, *arguments: str, **fields) -> Item:
    """An item of `python -m` with the first argument."""
    what, *rest = arguments
    return Item(name, ("python", "-m", what), tuple(rest), seconds, **fields)


TINY_SWEEP = ("--quick", "--seconds=0", "--repeats=1")
DECODE_FAMILIES = (
    "decode_attend",
    *(f"decode_{operation}{kind}" for kind in ("", "_lora", "_four_bit", "_four_bit_lora")
      for operation in ("linears", "swiglu", "parts")),
)  # fmt: skip


def sweep(kernel: str, seconds: int, limit: int) -> Item:
    """An item of a kernel's sweep, which times for at most `limit` seconds."""
    tiny = kernel, *TINY_SWEEP
    arguments = kernel, f"--seconds={limit}"
    more = dict(file="sweep", tiny=tiny, after=("compile",))
    return script(f"sweep_{kernel}", seconds, *arguments, **more)


def rollout(part: str, seconds: int) -> Item:
    """An item of one part of the rollout's benchmark, so that one that fails costs no other."""
    tiny = "--parts", part, "--quick", "--rounds=1"
    more = dict(file="bench_rollout", sources="rollout", tiny=tiny)
    return script(f"rollout_{part}", seconds, "--parts", part, **more)


def memory(name: str, seconds: int, *arguments: str, tiny: tuple[str, ...] | None = None) -> Item:
    """An item of two training steps under the memory cap of a card."""
    more = dict(file="bench_memory", sources="memory", tiny=tiny)
    return script(f"memory_{name}", seconds, *arguments, **more)


BACKGROUND = (
    Item("build", ("python", "setup.py"), ("-q", "build_ext", "--inplace"), 60,
         tiny=None, needs="nvcc"),
    script("compile", 90, "--compile", file="sweep", sources=None,
           tiny=("--compile", "--quick", "grpo", "adamw")),
)  # fmt: skip
"""What runs beside the first items."""

SMALL_LOSS = ("--tokens=8", "--vocab=64", "--rounds=1", "--quick")
GPU_TESTS = ("tests/triton", "tests/kernels", "tests/loss", "tests/rollout",
             "tests/plan/test_steps.py", "tests/model/test_device.py")  # fmt: skip
"""The tests that run on a GPU where there is one."""
WORKERS = ("-n", "8") if find_spec("xdist") else ()
TRAFFIC = ("--clock-control", "none", "--kernel-name", "regex:grpo", "--metrics",
           "dram__bytes_read.sum,dram__bytes_write.sum", "python",
           "benchmarks/bench_grpo_loss.py", "--tokens=2048", "--peak=ours, in place")  # fmt: skip

ITEMS = (
    module("env", 15, "mr1_fast.env", sources="limits"),
    script("check", 100, "--check", "--seconds=40", file="sweep", after=("build", "compile"),
           # Decode's kernels are tried by the item of their sweep.
           tiny=("--check", "--quick", "--repeats=1", "grpo", "logprobs", "adamw", "linear")),
    script("limits", 15, tiny=("--megabytes=1", "--size=32", "--rounds=2")),
    sweep("grpo", 50, 25),
    script("sweep_decode", 150, *DECODE_FAMILIES, "--seconds=1.5", file="sweep",
           tiny=("decode_linears_32", "decode_parts_32", *TINY_SWEEP), after=("compile",)),
    sweep("decode_overlap", 90, 10),
    script("decode_step", 90),
    rollout("long", 130),
    rollout("long_qwen3vl", 130),
    rollout("qlora", 90),
    rollout("lora", 80),
    sweep("linear", 70, 45),
    sweep("logprobs", 35, 12),
    sweep("adamw", 35, 12),
    sweep("grpo_cuda", 45, 20),
    script("grpo_loss", 60, tiny=SMALL_LOSS),
    script("linear_grpo_loss", 120, tiny=(*SMALL_LOSS, "--peak-tokens=8", "--hidden=16")),
    script("adamw", 40, "--plot={results}/adamw.png",
           tiny=("--steps=2", "--elements=512", "--rounds=1", "--plot={results}/adamw.png")),
    script("linear_stages", 60, "--stages", "--hidden", "1536", "4096",
           file="bench_linear_grpo_loss",
           tiny=("--stages", *SMALL_LOSS, "--hidden=16", "--dtype=bfloat16")),
    script("linear_rows", 100, "--hidden", "1536", "4096", "--rows", "1024", "1664", "2048", "2816",
           file="bench_linear_grpo_loss",
           tiny=("--rows", "4", *SMALL_LOSS, "--hidden=16", "--dtype=bfloat16")),
    # The bytes that the loss really moves: one read and one write of 2,048 rows are 622 MB each.
    Item("loss_traffic", ("ncu",), TRAFFIC, 40, "grpo_loss", tiny=None, needs="ncu"),
    module("tests", 150, "pytest", "-m", "not slow", *WORKERS, *GPU_TESTS, sources="tests",
           tiny=("-p", "no:cacheprovider", "tests/kernels/test_tuned.py")),
    script("layers", 200, tiny=("--quick", "--rounds=1")),
    rollout("prefix", 30),
    rollout("stream", 40),
    rollout("tail", 60),
    script("train_step", 150, tiny=("--parts", "curve", "step", "--quick", "--rounds=1")),
    script("integrations", 90, tiny=("--completions=2", "--length=8", "--hidden=16", "--vocab=64",
                                     "--rounds=1", "--quick")),
    memory("2b", 120, "2b_full", tiny=("tiny",)),
    memory("qwen3vl_2b", 120, "qwen3vl_2b_full", tiny=("tiny-qwen3vl",)),
    memory("qwen3vl_4b", 150, "qwen3vl_4b_lora"),
    memory("2b_80", 120, "2b_full", "--vram", "80"),
    script("profile_2b", 120, "2b_full", file="profile_step", sources="profile_step",
           tiny=("tiny",)),
    script("trl_2b", 180, "--parts", "update", "--layers", "28", file="bench_train_step",
           sources="train_step", tiny=("--parts", "update", "--quick", "--rounds=1")),
    memory("7b", 180, "7b_qlora"),
    memory("qwen3vl_8b", 200, "qwen3vl_8b_qlora"),
    memory("qwen3vl_2b_16", 90, "qwen3vl_2b_lora"),
    memory("qwen2_5vl_3b", 150, "qwen2_5vl_3b_full"),
    memory("qwen2_5vl_7b", 180, "qwen2_5vl_7b_qlora"),
    script("default_run", 200, "--seeds", "0",
           tiny=("--quick", "--seeds", "0", "--steps", "1", "--eval-samples", "2",
                 "--prompts-per-step", "2", "--max-new-tokens", "8")),
    # The paper's comparison with 17M parameters and five seeds; what is cut off goes on later.
    module("experiment", 3600, "mr1_fast.experiment", "--preset", "small", "--output",
           "{results}/experiment_small", sources="default_run", tiny=None),
)  # fmt: skip
