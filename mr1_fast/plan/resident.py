"""Bytes that are on the device between all phases: weights, optimizer state and reference."""

from collections import Counter

import torch

from ..kernels.adamw.state import State
from ..model.reference import frozen_parameters
from ..optim import resolve_optimizer
from .memory_use import MemoryUse
from .planned_run import PlannedRun

CUDA_WORKSPACE = 2**30 * 6 // 10
"""Bytes that a CUDA process takes besides tensors: the context and loaded kernels (0.3 to 0.5 GiB),
and the work space of cuBLAS."""
NCCL_BUFFERS = 2**30 * 7 // 10
"""Bytes that NCCL takes beside that where there are several processes. 544 to 688 MB were reported
for A100s with NVLink (NVIDIA/nccl#964); cards on PCIe have fewer channels."""
EIGHT_BIT_BLOCK = 256
"""Elements that share an fp32 scale in the states of bitsandbytes' AdamW8bit."""
EIGHT_BIT_LEAST = 4096
"""Elements of a parameter below which bitsandbytes keeps its states in fp32."""


def resident(run: PlannedRun) -> MemoryUse:
    """Bytes of weights, optimizer state and reference, which every phase finds on the device."""
    use = {
        "weights": run.sharded.weights(run.policy),
        **optimizer_state(run),
        "reference": resident_reference(run),
    }
    if run.device == "cuda":
        use["workspace"] = workspace(run.sharded.processes)
    return use


def workspace(processes: int) -> int:
    """Return the bytes that one of several CUDA processes takes besides tensors."""
    return CUDA_WORKSPACE + NCCL_BUFFERS * (processes > 1)


def optimizer_state(run: PlannedRun) -> MemoryUse:
    """Bytes of the optimizer's states, and of the remainders of exact bf16 weights.

    Which optimizer `auto` is says `resolve_optimizer` of optim.py; the states of ours are made by
    kernels/adamw/state.py, here without data.
    """
    kind = resolve_optimizer(run.config.optimizer, run.policy.trained)
    optimizer = remainder = 0
    # A model has hundreds of parameters, and few sizes of them.
    sizes = Counter((run.sharded.updated(p), p.dtype) for p in run.policy.trained)
    for (elements, dtype), count in sizes.items():
        part = torch.empty(elements, dtype=dtype, device="meta")
        if kind == "adamw":
            optimizer += count * 2 * part.nbytes  # two means, each in the weights' dtype
        elif kind == "adamw8bit":
            optimizer += count * _eight_bit_bytes(elements)
        else:
            state = State.zeros(part, remainder=kind == "adamw_exact")
            rest = 0 if state.remainder is None else state.remainder.nbytes
            optimizer += count * (sum(x.nbytes for x in state if x is not None) - rest)
            remainder += count * rest
    return {"optimizer": optimizer, "remainder": remainder}


def _eight_bit_bytes(elements: int) -> int:
    """Bytes of both states of one parameter in bitsandbytes' AdamW8bit."""
    if elements < EIGHT_BIT_LEAST:
        return 2 * 4 * elements
    return 2 * (elements + 4 * -(-elements // EIGHT_BIT_BLOCK))


def resident_reference(run: PlannedRun) -> int:
    """Bytes that the reference keeps on the device between its passes; 0 if it is streamed.

    With adapters the reference is the policy without them, and keeps nothing. Parameters that are
    not trained are the policy's own, unless they are in parts.
    """
    config = run.config
    if not config.needs_reference or config.lora:
        return 0
    if config.reference == "offload" and run.device == "cuda":
        return 0
    frozen = frozen_parameters(run.policy.model).values()
    shared = [p for p in frozen if not run.sharded.splits(p)]
    return run.sharded_reference.weights(run.reference) - sum(p.nbytes for p in shared)
