"""How sweep.py checks launches: sizes, outputs between canaries, errors in their bounds."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import print_table
from torch import Tensor

CANARY, MARGIN = 0x5A, 4096
"""Byte around every output, and how many of them on each side."""
DEFAULT = "default"
"""Stands for the setting that a launcher takes where the table has no entry."""

Variant = tuple | str


class Size(NamedTuple):
    """Rows and columns of the inputs (of AdamW: rows · columns elements), and the hidden size."""

    rows: int
    columns: int
    width: int = 0

    def __str__(self) -> str:
        return " × ".join(f"{each:,}" for each in self if each)


class Launch(NamedTuple):
    """A kernel on some inputs, with outputs of its own."""

    call: Callable[[tuple | None], object]
    """Launch with a setting; None: the default."""
    restore: Callable[[], object]
    """Undo what the last call wrote, and fill outputs with NaN."""
    errors: Callable[[], dict[str, Tensor]]
    """The largest error of each output of the last call, in units of its bound, 0-d."""


class Guards:
    """Outputs inside larger buffers, by which a write beyond them shows."""

    def __init__(self):
        self.buffers: list[Tensor] = []

    def like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of this shape, dtype and device, with a margin on both sides."""
        size = tensor.numel() * tensor.element_size()
        buffer = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=tensor.device)
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].view(tensor.dtype).view(tensor.shape)

    def broken(self) -> Tensor:
        """inf if a byte of any margin has changed, else 0."""
        margins = [part for b in self.buffers for part in (b[:MARGIN], b[-MARGIN:])]
        changed = (torch.cat(margins) != CANARY).any()
        return torch.where(changed, torch.inf, 0.0)


def largest(error: Tensor, bound: float) -> Tensor:
    """The largest error in units of its bound; inf for NaN."""
    return (error.double().abs() / bound).nan_to_num(torch.inf, torch.inf).max()


def relative(ours: Tensor, exact: Tensor) -> Tensor:
    """Errors relative to their own exact values, or to 1e-7 of the largest."""
    return (ours.double() - exact).abs() / (exact.abs() + 1e-7 * exact.abs().max())


# --- correctness ----------------------------------------------------------------------------------


def label(variant: Variant) -> str:
    """The fields of a setting as one word each."""
    if isinstance(variant, str):
        return variant
    return ", ".join(f"{name} {value}" for name, value in variant._asdict().items())


def setting(variant: Variant) -> Variant | None:
    """What the launcher gets."""
    return None if variant == DEFAULT else variant


def lacks_resources(error: Exception) -> bool:
    """Whether an error says that the GPU is too small for a setting."""
    return "out of resource" in str(error).lower()


class Checked(NamedTuple):
    """What a check has found of a kernel."""

    right: list[Variant]
    worst: dict[str, dict[str, float]]
    """Variant → output → largest error in units of its bound."""
    wrong: dict[str, str]
    """Variant → why it is wrong."""
    too_large: dict[str, str]
    """Variant → why it does not run on this GPU."""
    rounds: int
    """How often fresh data was compared."""


def check(
    kernel, sizes: list[Size], repeats: int, dtype: torch.dtype, device: str, seconds: float = 60
) -> Checked:
    """Compare every variant with fp64 on fresh data.

    The first size comes last: up to `repeats` times, as `seconds` allow.
    """
    variants = [DEFAULT, *kernel.variants()]
    worst: dict[Variant, dict[str, Tensor]] = {variant: {} for variant in variants}
    wrong, too_large = {}, {}
    rounds = [(size, seed) for size in sizes[1:] for seed in range(2)]
    rounds += [(sizes[0], seed) for seed in range(repeats)]
    done, stop = 0, time.monotonic() + seconds
    for size, seed in rounds:
        if done > len(sizes) * 2 and time.monotonic() > stop:
            break
        done += 1
        inputs = kernel.inputs(size, dtype, device, seed)
        for mode in kernel.modes:
            launch = kernel.prepare(inputs, mode)
            for variant in variants:
                if label(variant) in wrong or label(variant) in too_large:
                    continue
                try:
                    launch.restore()
                    launch.call(setting(variant))
                    errors = launch.errors()
                except Exception as error:
                    reason = f"{mode}, {size}: {error}".splitlines()[0]
                    (too_large if lacks_resources(error) else wrong)[label(variant)] = reason
                    print(f"{kernel.name}: {label(variant)}: {reason}", flush=True)
                    continue
                for name, error in errors.items():
                    key = f"{mode}: {name}"
                    worst[variant][key] = torch.maximum(worst[variant].get(key, error), error)
    found = {
        label(variant): {key: error.item() for key, error in errors.items()}
        for variant, errors in worst.items()
    }
    for name, errors in found.items():
        bad = [f"{key} {error:.3g} of its bound" for key, error in errors.items() if not error <= 1]
        if bad and name not in wrong:
            wrong[name] = ", ".join(bad)
    right = [v for v in variants if label(v) not in wrong and label(v) not in too_large]
    return Checked(right, found, wrong, too_large, done)


def show_checked(name: str, checked: Checked) -> None:
    """Print the largest error of each variant, and what is left out."""
    table = []
    for variant, errors in checked.worst.items():
        worst = max(errors, key=errors.get, default=None)
        verdict = "wrong" if variant in checked.wrong else "right"
        verdict = "too large" if variant in checked.too_large else verdict
        figure = worst and f"{errors[worst]:.2g} ({worst})"
        table.append([variant, verdict, figure])
    print_table(f"{name} against fp64", ["variant", "verdict", "largest error / bound"], table)
    for variant, reason in checked.wrong.items():
        print(f"{name}: {variant} is wrong: {reason}")
