"""Liger-Kernel's GRPO functions on logits; `liger.py` says how they differ from its own."""

import torch
from torch import Tensor, nn

from ..kernels.grpo.operators import InplaceTokenLogprobs
from ..loss import policy_loss_ref, token_logprobs
from ..loss.arguments import check_weighted_logits, scalar
from .liger_options import (
    averaging_weights,
    checked_options,
    clipped_as_liger,
    has_kl,
    masked_means,
    of_liger,
)
from .loss_options import per_token


def triton_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9,
    beta=0.04, eps_low=0.2, eps_high=0.4, inplace=True, loss_type="dapo",
    max_completion_length=None, importance_sampling_level="token", reduce=False,
    sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vllm_is_ratio=None, delta=None,
    use_bias_correction_kl=False, num_items_in_batch=None, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
    vespo_k_neg=3.0, vespo_lambda_neg=2.0,
):  # fmt: skip
    """Compute Liger's GRPO loss on logits (B, L+1, V), whose last position is ignored.

    With `reduce=False`, return three (B, L) fp32 tensors that are 0 where masked: the loss of each
    token before averaging, its KL (None if β = 0), and is_clipped. With `reduce=True`, return the
    loss and the list [kl_mean if β ≠ 0, clip_ratio]. Only the loss has a gradient; a tensor β
    counts as ≠ 0.

    - completion_ids, completion_mask, old_logp, ref_logp (B, L)
    - advantages, vllm_is_ratio (B,), (B, 1) or (B, L)
    - eps_high: for cispo the cap of the ratio itself, for other losses the cap is 1 + eps_high
    - delta: None and 0 mean no bound; max_completion_length: None means L
    - completion_mask: the logits of masked positions are not read, and their ids may be any numbers
    - inplace: the backward overwrites the logits with their gradient, so no second tensor of their
      size exists. The forward leaves them unchanged. A slice of longer logits is used as it is, and
      what surrounds it stays unchanged; with inplace=False it is copied. Autograd raises if another
      operation still needs the logits, also for a second backward. If the logits are a leaf, they
      share memory with their gradient. torch.compile plans memory itself, so inplace has no effect
      there.

    Raises ValueError for wrong shapes or settings.
    """
    if loss_type == "vespo":
        return of_liger("transformers.grpo_loss", "triton_grpo_loss")(**locals())
    if delta and loss_type in ("cispo", "sapo"):
        raise ValueError(f"delta is {delta}, but {loss_type} has no such bound: leave it out")
    options = checked_options(
        loss_type, importance_sampling_level, eps_low, eps_high, delta, sapo_temperature_pos,
        sapo_temperature_neg, use_bias_correction_kl,
    )  # fmt: skip
    with_kl = has_kl(beta)
    if with_kl and ref_logp is None:
        raise ValueError(
            f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0"
        )
    mask = (torch.ones_like(completion_ids) if completion_mask is None else completion_mask).float()
    logp = _logprobs(logits, completion_ids, mask, temperature, inplace)

    def flat(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else per_token(name, value, mask).flatten().to(logp.dtype)

    length = mask.shape[1]
    options |= {
        "old_logp": flat("old_logp", old_logp),
        "is_weights": flat("vllm_is_ratio", vllm_is_ratio),
        "cu_seqlens": length * torch.arange(len(mask) + 1, device=mask.device),
    }
    weights = mask
    if reduce:
        weights = averaging_weights(
            mask, loss_type, max_completion_length or length, num_items_in_batch
        )
    advantages, weights = flat("advantages", advantages), weights.flatten()
    ref_logp = flat("ref_logp", ref_logp) if with_kl else None
    loss, kl, clipped, _ = policy_loss_ref(
        logp.flatten(), advantages, weights, beta=beta, ref_logp=ref_logp, **options
    )
    kl = kl if with_kl else None
    is_clipped = clipped_as_liger(
        clipped, logp.detach().flatten(), advantages, weights, options
    ).float()
    if reduce:
        return loss.sum(), masked_means(mask, kl, is_clipped)
    return tuple(None if value is None else value.view_as(mask) for value in (loss, kl, is_clipped))


@torch.no_grad()
def fused_selective_log_softmax(logits, input_ids, temperature=0.9, mask=None) -> Tensor:
    """Return fp32 log-probs (B, L) of the last L of `input_ids`, without a gradient.

    They are taken under logits (B, L+1, V) / temperature, whose last position is ignored, and are 0
    where the last L of `mask` are 0: there, no logits are read. The logits may be a slice of longer
    ones.
    """
    length = logits.shape[1] - 1
    ids = input_ids[:, input_ids.shape[1] - length :]
    mask = torch.ones_like(ids) if mask is None else mask[:, mask.shape[1] - length :]
    return _logprobs(logits, ids, mask.float(), temperature, inplace=True)


def _logprobs(
    logits: Tensor, ids: Tensor, mask: Tensor, temperature: float | Tensor, inplace: bool
) -> Tensor:
    """Log-probs (B, L) of ids (B, L) under logits (B, L+1, V), 0 where mask (B, L) is 0.

    Logits of masked positions, and of the last position, are not read.
    """
    rows_agree = logits.ndim == 3 and ids.shape == (len(logits), logits.shape[1] - 1)
    if not rows_agree or mask.shape != ids.shape:
        raise ValueError(
            f"logits, completion ids and mask have shapes {tuple(logits.shape)}, "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}: expected (B, L+1, V), (B, L) and (B, L)"
        )
    targets, weights = (nn.functional.pad(each, (0, 1)) for each in (ids.long(), mask))
    if not inplace or torch.compiler.is_compiling():
        rows = logits.flatten(0, 1), targets.flatten(), temperature, weights.flatten()
        return token_logprobs(*rows)[0].view_as(targets)[:, :-1]
    if _rows_overlap(logits):
        logits = logits.contiguous()
    for sequence in zip(logits.detach(), targets, weights, strict=True):
        check_weighted_logits(*sequence)
    temperature = scalar("temperature", temperature, logits)
    return InplaceTokenLogprobs.apply(logits, targets, temperature, weights)[:, :-1]


def _rows_overlap(logits: Tensor) -> bool:
    """Whether rows of logits (B, R, V) share memory, or their columns are not adjacent."""
    dimensions = [(logits.stride(i), logits.shape[i]) for i in (0, 1)]
    (near_stride, near_size), (far_stride, _) = sorted(dimensions)
    return (
        logits.stride(2) != 1
        or near_stride < logits.shape[2]
        or far_stride < near_stride * near_size
    )
