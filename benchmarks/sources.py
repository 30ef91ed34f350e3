"""What a benchmark's figures depend on: files of the package and launch settings, as one digest.

A result with another digest is that of other code, and is measured again by gpu_queue.py. The
scripts of the benchmarks are left out: their figures are not wrong because a column was added.
"""

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "mr1_fast" / "kernels" / "tuned.json"

LOGPROBS = (
    "mr1_fast/kernels/grpo/*_triton.py",
    "mr1_fast/kernels/launch.py",
)
LOSS = (*LOGPROBS, "mr1_fast/kernels/grpo/rows_cuda.py", "csrc/fused_grpo_cuda.cu", "csrc/*.h")
HEAD = (*LOSS, *(f"mr1_fast/kernels/grpo/{name}.py" for name in ("linear", "head", "chunks")))
ADAMW = ("mr1_fast/kernels/adamw/*.py", "mr1_fast/kernels/launch.py")
DECODE = (
    "mr1_fast/kernels/decode/*.py",
    "mr1_fast/kernels/four_bit/*.py",
    "mr1_fast/kernels/layers/norm_triton.py",
    "mr1_fast/kernels/overlap*.py",
    "mr1_fast/kernels/launch.py",
    "csrc/decode*",
)
LAYERS = ("mr1_fast/kernels/layers/*.py", "mr1_fast/kernels/launch.py")
MODEL = ("mr1_fast/model/*.py", "mr1_fast/model/families/*.py")
ROLLOUT = (*DECODE, *MODEL, "mr1_fast/rollout/*.py")
STEP = (
    *HEAD,
    *ADAMW,
    *LAYERS,
    *ROLLOUT,
    "mr1_fast/train.py",
    "mr1_fast/stages.py",
    "mr1_fast/packing.py",
    "mr1_fast/optim.py",
)
LOSS_SETTINGS = ("grpo", "logprobs")
DECODE_TILES = ("decode_[!o]*",)
DECODE_SETTINGS = ("decode_*",)
STEP_SETTINGS = (*LOSS_SETTINGS, *DECODE_SETTINGS, "linear", "adamw")


class Sources(NamedTuple):
    """What a benchmark depends on."""

    files: tuple[str, ...]
    """Patterns of files below the repository's root."""
    settings: tuple[str, ...] = ()
    """Patterns of the kernels whose entries in the table of launch settings it uses.

    None where it makes them.
    """


SOURCES = {
    "limits": Sources(()),  # of the machine alone
    "check": Sources((*HEAD, *ADAMW, *DECODE)),
    "sweep_grpo": Sources(LOSS),
    "sweep_grpo_cuda": Sources(LOSS),
    "sweep_logprobs": Sources(LOGPROBS),
    "sweep_adamw": Sources(ADAMW),
    "sweep_linear": Sources(HEAD),
    "sweep_decode": Sources(DECODE),
    "sweep_decode_overlap": Sources((*DECODE, "mr1_fast/rollout/*.py"), DECODE_TILES),
    "grpo_loss": Sources(LOSS, LOSS_SETTINGS),
    "native": Sources(("mr1_fast/kernels/grpo/rows_native.py", "csrc/*")),
    "linear_stages": Sources(HEAD, ("grpo",)),
    "linear_rows": Sources(HEAD, ("grpo",)),
    "linear_grpo_loss": Sources(HEAD, ("grpo", "linear")),
    "integrations": Sources((*HEAD, "mr1_fast/integrations/*.py"), (*LOSS_SETTINGS, "linear")),
    "adamw": Sources(ADAMW, ("adamw",)),
    "decode_step": Sources((*DECODE, "mr1_fast/rollout/*.py"), DECODE_SETTINGS),
    "decode_attention": Sources(("mr1_fast/kernels/decode/attention_native.py", "csrc/*")),
    "rollout": Sources(ROLLOUT, DECODE_SETTINGS),
    "layers": Sources((*LAYERS, *MODEL, "mr1_fast/plan/stand_ins.py", "mr1_fast/segments.py")),
    "train_step": Sources(STEP, STEP_SETTINGS),
    "profile_step": Sources((*STEP, "mr1_fast/plan/*.py"), STEP_SETTINGS),
    "memory": Sources((*STEP, "mr1_fast/plan/*.py"), STEP_SETTINGS),
    "distributed": Sources(
        (*STEP, "mr1_fast/distributed/*.py", "mr1_fast/whole_step.py"), STEP_SETTINGS
    ),
    "default_run": Sources(STEP, STEP_SETTINGS),
    "soak": Sources(("mr1_fast/**/*.py",)),
    "tests": Sources(("mr1_fast/**/*.py", "csrc/*", "tests/**/*.py"), STEP_SETTINGS),
}
"""The sources of each benchmark, by the name that its document has."""


def digest(benchmark: str, architecture: str | None, root: Path = ROOT, table: Path = TABLE) -> str:
    """Hash the contents of a benchmark's files and its launch settings on this architecture.

    `architecture` is named as by mr1_fast.kernels.tuned; None (a CPU): no settings count.
    """
    sources = SOURCES[benchmark]
    total = hashlib.sha256()
    paths = {path for pattern in sources.files for path in root.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    entries = json.loads(table.read_text()).get(architecture, {}) if sources.settings else {}
    used = {
        name: entry
        for name, entry in entries.items()
        if any(fnmatchcase(name, pattern) for pattern in sources.settings)
    }
    total.update(json.dumps(used, sort_keys=True).encode())
    return total.hexdigest()[:16]
