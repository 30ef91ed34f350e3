"""What the kernels of layers expect of strides: that the columns of a row lie side by side."""

from torch import Tensor


def is_adjacent(x: Tensor) -> bool:
    """Tell whether the last axis lies side by side in memory."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def adjacent(gradient: Tensor) -> Tensor:
    """Return an incoming gradient with adjacent columns; autograd may expand a single number."""
    return gradient if is_adjacent(gradient) else gradient.contiguous()


def require_adjacent(*tensors: Tensor | None) -> None:
    """Raise ValueError where the last axis of one of the tensors does not lie side by side."""
    for x in tensors:
        if x is not None and not is_adjacent(x):
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} has strides {x.stride()}, but its columns "
                "must be adjacent"
            )
