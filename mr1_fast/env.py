"""Print versions and which kernels are active, for bug reports: `python -m mr1_fast.env`."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .kernels import native
from .kernels.decode.linear import takes
from .kernels.decode.operations import attention_backend
from .kernels.grpo import rows_cuda
from .kernels.overlap import decode_overlap
from .kernels.tuned import architecture, read_table
from .model.attention import attention_kernel
from .peak_flops import describe_peak
from .version import __version__

PACKAGES = (
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "math-verify",
    "peft",
    "bitsandbytes",
    "flash-attn",
)
"""Packages whose versions are printed."""


def lines() -> list[tuple[str, str]]:
    """Return the name and value of each line of the report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        ("mr1_fast", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("GPU", _gpu()),
        ("MFU", _mfu()),
        ("Triton kernels", f"triton {_version('triton')}, used on a GPU"),
        ("native CPU kernels", native.status()[1]),
        ("native CUDA kernels", rows_cuda.status()[1]),
        ("packed attention", attention_kernel(device, torch.bfloat16)),
        ("decode attention", attention_backend(torch.empty(0, device=device).bfloat16())),
        ("decode linears", _decode_linears(torch.empty(0, device=device).bfloat16())),
        *((name, _version(name)) for name in PACKAGES),
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Print the report as a table."""
    for name, value in lines():
        print(f"{name:<20} {value}")


if __name__ == "__main__":
    main()
