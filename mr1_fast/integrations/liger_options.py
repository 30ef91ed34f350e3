"""Liger-Kernel's settings, averages and metrics, for its losses on hidden states and on logits."""

from importlib import import_module

import torch
from torch import Tensor

from ..loss import policy_loss_ref, token_weights
from . import warn_once
from .loss_options import AVERAGES, loss_options


def checked_options(
    loss_type, level, epsilon_low, epsilon_high, delta, sapo_positive, sapo_negative, corrected_kl
) -> dict:
    """Check Liger's settings and return them as keyword arguments of this package's loss."""
    if loss_type not in AVERAGES:
        raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(AVERAGES)}, vespo")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level is {level!r}: choose token or sequence")
    if level == "sequence" and loss_type in ("cispo", "sapo"):
        raise ValueError(
            f"Sequence-level importance sampling is not supported for loss_type={loss_type!r}, "
            "as in Liger-Kernel: use importance_sampling_level='token'"
        )
    check_positive(sapo_temperature_pos=sapo_positive, sapo_temperature_neg=sapo_negative)
    return loss_options(
        loss_type,
        level=level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta or None,
        sapo_temperatures=(sapo_positive, sapo_negative),
        bias_corrected_kl=corrected_kl,
    )


def check_positive(**settings: float) -> None:
    """Raise ValueError for a setting that is not above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: expected a number > 0")


def averaging_weights(mask: Tensor, loss_type, max_completion_length, num_items_in_batch) -> Tensor:
    """Return token weights (B, T) whose weighted sum of losses is the average of `loss_type`."""
    if loss_type == "luspo":
        return mask * mask.sum(-1, keepdim=True) / mask.numel()
    average, num_tokens = AVERAGES[loss_type], None
    if average == "dapo":
        num_tokens = _tokens_per_process(mask, num_items_in_batch)
    cu_seqlens = mask.shape[1] * torch.arange(len(mask) + 1, device=mask.device)
    weights = token_weights(
        cu_seqlens,
        average,
        num_tokens=num_tokens,
        max_completion_length=max_completion_length,
        mask=mask.flatten(),
    )
    return weights.view_as(mask)


def _tokens_per_process(mask: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """The divisor () of dapo and cispo: tokens of all processes per process, at least 1."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is None:
        tokens = mask.sum()
        if distributed:
            torch.distributed.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (tokens / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


def clipped_as_liger(
    ours: Tensor, logp: Tensor, advantages: Tensor, weights: Tensor, options: dict
) -> Tensor:
    """Return the tokens (N,) that Liger counts as clipped: `ours` without those `delta` bounds."""
    if options["delta"] is None:
        return ours
    without_delta = options | {"delta": None}
    _, _, clipped, _ = policy_loss_ref(logp, advantages, weights, beta=0.0, **without_delta)
    return clipped


def masked_means(mask: Tensor, kl: Tensor | None, clipped: Tensor) -> list[Tensor]:
    """Return Liger's metrics: means over unmasked tokens of the KL, if any, and of `clipped`."""
    total = mask.sum().clamp(min=1)
    return [value.sum() / total for value in (kl, clipped) if value is not None]


def has_kl(beta: float | Tensor) -> bool:
    """Tell whether there is a KL term: for a tensor always, as a look at it would synchronise."""
    return isinstance(beta, Tensor) or beta != 0


def of_liger(module: str, name: str):
    """Return Liger's own function or class, for vespo, which this package lacks; warn once."""
    try:
        own = getattr(import_module(f"liger_kernel.{module}"), name)
    except ImportError as error:
        raise ImportError(
            "loss_type 'vespo' needs Liger-Kernel itself: pip install liger-kernel, or choose "
            "another loss_type"
        ) from error
    warn_once("mr1_fast does not implement loss_type 'vespo': Liger-Kernel itself computes it")
    return own
