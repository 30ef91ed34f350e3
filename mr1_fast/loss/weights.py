"""Token weights: every average over tokens and sequences, as one number per token."""

import torch
from torch import Tensor

from ..kernels.grpo.reference import spread
from .arguments import scalar
from .checks import readable

LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo")


def token_weights(
    cu_seqlens: Tensor,
    loss_type: str = "grpo",
    *,
    num_sequences: float | None = None,
    num_tokens: float | Tensor | None = None,
    max_completion_length: int | None = None,
    mask: Tensor | None = None,
    accumulation_steps: int = 1,
) -> Tensor:
    """Return (N,) fp32 weights that make Σ weight·loss the average which `loss_type` names.

    With S sequences, of which sequence i has |o_i| tokens that count:

    - grpo: 1/(S·|o_i|), the mean over sequences of the mean over tokens (DeepSeekMath, arXiv
      2402.03300)
    - dr_grpo: 1/(S·max_completion_length) (arXiv 2503.20783)
    - bnpo: 1/num_tokens of this batch; dapo: 1/num_tokens of the whole optimizer step (arXiv
      2503.14476)
    - luspo: 1/S, the mean over sequences of the sum over tokens

    `cu_seqlens` (S+1,): rows cu_seqlens[i] … cu_seqlens[i+1] are sequence i, which may be empty.
    `mask` (N,): the tokens that count; None: all. Losses of micro-batches add up when
    `num_sequences` (default: this batch's S) or `num_tokens` count the whole optimizer step;
    otherwise divide by `accumulation_steps`. DDP and FSDP average gradients over processes: there,
    these counts are those of all processes divided by the number of processes. Raises ValueError.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(LOSS_TYPES)}")
    if mask is None:
        mask = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    elif mask.ndim != 1 or (readable(cu_seqlens) and len(mask) != cu_seqlens[-1]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: expected (N,), a value for each of "
            "cu_seqlens[-1] tokens"
        )

    lengths = cu_seqlens.diff()
    sizes = lengths.float()
    if len(lengths):
        # On a GPU, checking the lengths would synchronise.
        sizes = torch.segment_reduce(
            mask.float(), "sum", lengths=lengths.long(), unsafe=mask.is_cuda
        )
    sequences = (len(lengths) if num_sequences is None else num_sequences) * accumulation_steps

    if loss_type == "grpo":
        per_sequence = 1 / (sequences * sizes.clamp(min=1))
    elif loss_type == "luspo":
        per_sequence = torch.full_like(sizes, 1 / max(1, sequences))
    elif loss_type == "dr_grpo":
        if not max_completion_length:
            raise ValueError(
                "dr_grpo divides by max_completion_length: pass the limit of the rollout"
            )
        per_sequence = torch.full_like(sizes, 1 / max(1, sequences * max_completion_length))
    else:
        if loss_type == "dapo" and (num_tokens is None or accumulation_steps != 1):
            raise ValueError(
                "dapo divides by num_tokens, the tokens of the whole optimizer step: pass that "
                "alone"
            )
        total = sizes.sum() if num_tokens is None else scalar("num_tokens", num_tokens, sizes)
        per_sequence = (1 / (total.clamp(min=1) * accumulation_steps)).expand(len(sizes))
    return torch.where(mask != 0, spread(per_sequence, cu_seqlens, len(mask)), 0.0)
