"""Print what this machine runs and what is missing for what: `python -m mr1_fast.env`.

The report is for bug reports, and for whoever wonders which extra to install.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from .command_line import begin

    begin()

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from .errors import exit_on_user_error, require_output
from .kernels import native
from .kernels.decode.linear import takes
from .kernels.decode.operations import attention_backend
from .kernels.grpo import rows_cuda
from .kernels.overlap import decode_overlap
from .kernels.tuned import architecture, read_table
from .model.attention import attention_kernel
from .peak_flops import describe_peak
from .torchrun import leave_to_first
from .version import __version__

REQUIRED = ("transformers", "tokenizers", "safetensors", "datasets", "math-verify")
"""Packages that mr1_fast cannot do without, whose versions are printed."""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that mr1_fast runs without, and what it is needed for."""

    name: str
    needed_for: str
    extra: str | None = None
    """The extra of mr1_fast that installs it; None: pip installs it by its own name."""

    def line(self) -> str:
        """Return the version, or what the package is needed for and how to install it."""
        found = _version(self.name)
        if found is not None:
            return found
        wanted = f"'mr1_fast[{self.extra}]'" if self.extra else self.name
        return f"missing, needed for {self.needed_for}: pip install {wanted}"


OPTIONAL = (
    OptionalPackage("peft", "--lora", "lora"),
    OptionalPackage("bitsandbytes", "--load-in-4bit and --optimizer adamw8bit", "gpu"),
    OptionalPackage("accelerate", "--load-in-4bit", "gpu"),
    OptionalPackage("flash-attn", "packed attention by its kernels instead of torch's"),
    OptionalPackage("torchvision", "transformers' AutoProcessor and pipelines"),
    OptionalPackage("trl", "mr1_fast.integrations.trl", "trl"),
    OptionalPackage("liger-kernel", "Liger's own loss, vespo", "trl"),
    OptionalPackage("tensorboard", "--loggers '[tensorboard]'", "loggers"),
    OptionalPackage("wandb", "--loggers '[wandb]'", "loggers"),
    OptionalPackage("trackio", "--loggers '[trackio]'", "trackio"),
    OptionalPackage("mlflow", "--loggers '[mlflow]'", "loggers"),
)
"""Packages that only some settings need."""


def lines() -> list[tuple[str, str]]:
    """Return the name and value of each line of the report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        ("mr1_fast", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("GPU", _gpu()),
        ("MFU", _mfu()),
        ("Triton kernels", _triton()),
        ("native CPU kernels", _native(native.status()[1])),
        ("native CUDA kernels", _native(rows_cuda.status()[1])),
        ("packed attention", attention_kernel(device, torch.bfloat16)),
        ("decode attention", attention_backend(torch.empty(0, device=device).bfloat16())),
        ("decode linears", _decode_linears(torch.empty(0, device=device).bfloat16())),
        *((name, _version(name) or f"missing: pip install {name}") for name in REQUIRED),
        *((package.name, package.line()) for package in OPTIONAL),
    ]


def _gpu() -> str:
    """Name, memory and compute capability of the first GPU, or "none"."""
    if not torch.cuda.is_available():
        return "none"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"


def _mfu() -> str:
    """Say which peak the model FLOP utilisation of a run on the first GPU is measured by."""
    if not torch.cuda.is_available():
        return "MFU is not reported: no peak is known of a CPU."
    return describe_peak(torch.cuda.get_device_name(0), "bfloat16")


def _decode_linears(like: torch.Tensor) -> str:
    """Say how a rollout computes linear layers, and whether its kernels overlap."""
    if not takes((), like):
        return "one product for layers on the same input; LoRA and 4 bits as in training"
    settings = read_table().get(architecture(like.device), {})
    tuned = sum(name.startswith("decode_") for name in settings)
    overlap = decode_overlap(like.device)
    return (
        "one kernel for 16 bits, 4 bits and LoRA; "
        f"{tuned} launch settings tuned for this GPU, dependent launch "
        f"{'on' if overlap.dependent else 'off'}, prefetch {overlap.prefetch_kib} KiB"
    )


def _triton() -> str:
    """Return Triton's version, or that a GPU needs it."""
    found = _version("triton")
    if found is None:
        return "missing, needed on a GPU: pip install triton"
    return f"triton {found}, used on a GPU"


def _native(status: str) -> str:
    """Add the way out to the status of a native library that was not built."""
    is_missing = status.startswith("not built")
    return f"{status}: with it in PATH, install mr1_fast again" if is_missing else status


def _version(package: str) -> str | None:
    """Return the version of an installed package, else None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Print the report as a table."""
    for name, value in lines():
        print(f"{name:<20} {value}")
    require_output()


if __name__ == "__main__":
    leave_to_first()
    exit_on_user_error(main)
