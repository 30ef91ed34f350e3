"""The optimizer, its learning rate, and one update over accumulated micro-batches."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from .config import OptimizerConfig
from .errors import UserError
from .model.load import Policy
from .types import PackedBatch

Objective = Callable[[Policy, PackedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; UserError where bitsandbytes is asked for and missing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = dict(lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("optimizer adamw8bit needs bitsandbytes: pip install 'mr1_fast[gpu]'.") from error
    return AdamW8bit(parameters, **settings)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step `step` (0 … total_steps−1): linear warm-up, then constant, linear or cosine decay."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * decay[config.lr_schedule]


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    objective: Objective,
    step: int,
    total_steps: int,
    config: OptimizerConfig,
) -> dict[str, float]:
    """One optimizer step on the summed loss of `batches`, whose token weights carry all normalisation.

    `objective(policy, batch)` returns the loss and per-row tensors to average over all rows. Gradients are
    clipped to `config.max_grad_norm`. A loss or gradient norm of inf or NaN leaves weights and optimizer state
    untouched, since one bad batch must not end a run. Returns the means, and loss, grad_norm, learning_rate, skipped.
    """
    loss, rows, sums = 0.0, 0, Counter()
    for batch in batches:
        batch_loss, per_row = objective(policy, batch.to(policy.device))
        batch_loss.backward()
        loss += batch_loss.item()
        rows += len(batch.targets)
        sums.update({name: value.float().sum().item() for name, value in per_row.items()})

    lr = learning_rate(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: total / max(1, rows) for name, total in sums.items()}
    return {"loss": loss, **means, "grad_norm": norm, "learning_rate": lr, "skipped": float(not finite)}
