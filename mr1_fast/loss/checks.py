"""What every check of an argument asks of a tensor: its type, its device, its length."""

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Tell whether values may be looked at: a GPU would synchronise, and a compiler has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def let_lengths_agree(value: Tensor, rows: Tensor) -> None:
    """State to a compiler that a value has as many entries as there are rows.

    Where a mask picks the rows, their number is known only when the graph runs, and comparing it
    would fail.
    """
    if torch.compiler.is_compiling() and value.ndim == 1:
        torch._check(value.shape[0] == len(rows))


def check_tensor(name: str, value: Tensor) -> None:
    """Raise ValueError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor")


def check_no_dtensor(name: str, value: Tensor | None) -> None:
    """Raise ValueError for a part of a sharded tensor."""
    if hasattr(value, "device_mesh"):  # told apart without importing DTensor
        raise ValueError(
            f"{name} is a DTensor, of which this process holds a part: compute the loss inside the "
            "model's forward, where FSDP2 has gathered the weights "
            "(mr1_fast.integrations.head.add_head does)"
        )


def check_device(name: str, value: Tensor, rows: Tensor) -> None:
    """Raise ValueError for a tensor that is not where the rows are."""
    if value.device != rows.device:
        raise ValueError(
            f"{name} is on {value.device}: expected {rows.device}, where the logits or hidden "
            "states are"
        )
