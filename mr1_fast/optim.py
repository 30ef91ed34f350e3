"""The optimizer, its learning rate, and one update over accumulated micro-batches."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .config import OptimizerConfig
from .errors import UserError
from .kernels.adamw.optimizer import LowMemoryAdamW
from .kernels.adamw.step import add_stochastic_
from .model.policy import Policy
from .seeds import derive_seed
from .types import PackedBatch

Objective = Callable[[Policy, PackedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; UserError where bitsandbytes is asked for and missing.

    `seed` is that of stochastic rounding.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = dict(lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    kind = resolve_optimizer(config.optimizer, parameters)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if kind in ("adamw_exact", "adamw_stochastic"):
        return LowMemoryAdamW(parameters, **settings, remainder=kind == "adamw_exact", seed=seed)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer adamw8bit needs bitsandbytes: pip install 'mr1_fast[gpu]'."
        ) from error
    return AdamW8bit(parameters, **settings)


def resolve_optimizer(name: str, parameters: list[nn.Parameter]) -> str:
    """The optimizer that `auto` means for these parameters: 16-bit weights lose small updates unless kept exact."""
    if name != "auto":
        return name
    return "adamw_exact" if any(p.dtype == torch.bfloat16 for p in parameters) else "adamw"


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step `step` (0 … total_steps−1): linear warm-up, then constant, linear or cosine decay."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
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

    `objective(policy, batch)` returns the loss and per-row tensors to average over all rows, or, of those whose name
    ends in `_max`, to take the largest of. Gradients are
    clipped to `config.max_grad_norm`. A loss or gradient norm of inf or NaN leaves weights and optimizer state
    untouched, since one bad batch must not end a run. Running out of memory before the optimizer's step leaves them
    untouched, too. Returns the means, and loss, grad_norm, learning_rate, skipped.
    """
    optimizer.zero_grad(set_to_none=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss, rows, sums, peaks = 0.0, 0, Counter(), {}
    try:
        with unbiased_accumulation(parameters, derive_seed(getattr(optimizer, "seed", 0), step)):
            for batch in batches:
                batch_loss, per_row = objective(policy, batch.to(policy.device))
                batch_loss.backward()
                loss += batch_loss.item()
                rows += len(batch.targets)
                for name, value in per_row.items():
                    if name.endswith("_max"):
                        peaks.setdefault(name, []).append(value)
                    else:
                        sums[name] += value.float().sum().item()
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)  # room for a second attempt
        raise

    lr = learning_rate(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = gradient_norm(parameters)
    grad_norm = norm.item()
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        _step(optimizer, parameters, norm, config.max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    means = {name: total / max(1, rows) for name, total in sums.items()}
    largest = {
        name: torch.cat(values).max().item() if rows else 0.0 for name, values in peaks.items()
    }
    return {
        "loss": loss,
        **means,
        **largest,
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "skipped": float(not finite),
    }


@contextmanager
def unbiased_accumulation(parameters: list[nn.Parameter], seed: int) -> Iterator[None]:
    """Within, bf16 gradients of several backward passes add up by stochastic rounding.

    Rounding to nearest would drop every term below 1/512 of the sum so far; an fp32 sum would take twice the memory.
    """
    sums: dict[nn.Parameter, torch.Tensor] = {}
    seeds = itertools.count(seed)

    def add(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if parameter in sums:
            add_stochastic_(sums[parameter], gradient, seed=next(seeds))
        else:
            sums[parameter] = gradient

    handles = [
        p.register_post_accumulate_grad_hook(add) for p in parameters if p.dtype == torch.bfloat16
    ]
    try:
        yield
        for parameter, total in sums.items():
            parameter.grad = total
    finally:
        for handle in handles:
            handle.remove()


def gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients, fp32, 0-d; torch's get_total_norm would be in the gradients' own 16 bits."""
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        for p in parameters
        if p.grad is not None
    ]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    norm: torch.Tensor,
    max_norm: float,
):
    """Clip and step; ours clips within its one pass."""
    try:
        if isinstance(optimizer, LowMemoryAdamW):
            optimizer.step(grad_scale=(max_norm / (norm + 1e-6)).clamp(max=1.0))
        else:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            optimizer.step()
    except torch.OutOfMemoryError as error:  # some weights may have changed: no second attempt
        raise UserError(
            "out of memory within the optimizer's step; the last checkpoint is intact. Start a new run with "
            "--optimizer adamw_exact, whose state is allocated at start and whose step needs no more."
        ) from error
