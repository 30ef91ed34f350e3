"""The objective: how token weights are built, and log-probabilities without a logits tensor for the whole batch."""

import torch
from torch.utils.checkpoint import checkpoint

from .kernels.grpo_loss import GRPOLoss, grpo_loss_ref, token_logprobs_ref

__all__ = ["GRPOLoss", "grpo_loss_ref", "linear_token_logprobs", "spread", "token_weights"]

CHUNK_BYTES = 256 * 2**20
"""Budget for one chunk of fp32 logits; several such buffers live at once during the backward."""


def token_weights(loss_cu_seqlens: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """(N,) weights 1/(num_sequences·|o_i|): the mean over tokens of a completion, then over completions.

    `num_sequences` counts the completions of the whole optimizer step, so that losses of micro-batches add up.
    """
    lengths = loss_cu_seqlens.diff()
    return spread(1.0 / (num_sequences * lengths.clamp(min=1).float()), loss_cu_seqlens)


def spread(per_sequence: torch.Tensor, loss_cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(N,) per-token copy of a per-sequence tensor (S,)."""
    return per_sequence.repeat_interleave(loss_cu_seqlens.diff().long())


def linear_token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs_ref` of hidden (N, D) @ weightᵀ (V, D), with logits recomputed in the backward, chunk by chunk.

    At no time do logits of more than CHUNK_BYTES (in fp32) exist at once, times the few buffers that softmax needs.
    """
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))

    def chunk_logprobs(hidden_chunk: torch.Tensor, weight: torch.Tensor, targets_chunk: torch.Tensor):
        return token_logprobs_ref(hidden_chunk @ weight.T, targets_chunk, temperature)

    if len(hidden) <= rows:  # one chunk: storing its logits costs no more than recomputing them
        return chunk_logprobs(hidden, weight, targets)
    chunks = [
        checkpoint(chunk_logprobs, hidden[i : i + rows], weight, targets[i : i + rows], use_reentrant=False)
        for i in range(0, len(hidden), rows)
    ]
    logp, entropy = zip(*chunks, strict=True)
    return torch.cat(logp), torch.cat(entropy)
