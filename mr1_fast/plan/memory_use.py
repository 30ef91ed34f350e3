"""Bytes in use at one time, by what they are used for."""

MemoryUse = dict[str, int]
"""Bytes by component (COMPONENTS) at one time; a component that is left out uses none."""

COMPONENTS = (
    "weights",
    "remainder",
    "optimizer",
    "reference",
    "gradients",
    "exchange",
    "KV cache",
    "activations",
    "loss head",
    "workspace",
)
"""What memory is used for, in the order of a plan's rows.

`remainder` is the bits that an exact bf16 weight has beyond its 16, `exchange` weights that are
gathered from other cards and gradients that are summed with theirs, `loss head` logits and what is
computed from them, `workspace` what CUDA and its libraries take besides tensors."""


def total(use: MemoryUse) -> int:
    """Bytes of all components."""
    return sum(use.values())


def added(first: MemoryUse, second: MemoryUse) -> MemoryUse:
    """Both uses at the same time."""
    return {name: first.get(name, 0) + second.get(name, 0) for name in (*first, *second)}
