"""The optimizer, its learning rate, and one update from accumulated gradients."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .config import OptimizerConfig
from .errors import UserError
from .kernels.adamw.optimizer import LowMemoryAdamW
from .kernels.adamw.step import add_stochastic_
from .loss_scale import LossScale
from .metrics import RowMetric, RowMetrics
from .model.policy import Policy
from .seeds import derive_seed
from .types import PackedBatch

BatchLoss = Callable[[Policy, PackedBatch], tuple[torch.Tensor, dict[str, RowMetric]]]
"""Computes the loss of a batch, a 0-d tensor, and what its rows tell for metrics.jsonl."""


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """Make the AdamW that `config.optimizer` names, over the trainable parameters of `model`.

    `seed` is the seed of stochastic rounding. Raises UserError where bitsandbytes is asked for and
    missing.
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
    """Return the optimizer that `auto` means for these parameters.

    16-bit weights would lose small updates, so they get an optimizer that keeps them exact.
    """
    if name != "auto":
        return name
    return "adamw_exact" if any(p.dtype == torch.bfloat16 for p in parameters) else "adamw"


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step `step`, from 0 to total_steps − 1.

    A linear warm-up comes first, then a constant rate, or a linear or cosine decay to 0.
    """
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
    batches: Iterable[PackedBatch],
    batch_loss: BatchLoss,
    step: int,
    total_steps: int,
    config: OptimizerConfig,
    loss_scale: LossScale | None = None,
) -> dict[str, float]:
    """Take one optimizer step on the summed loss of `batches`; returns the step's metrics.

    The token weights of the batches carry all normalisation, so their losses add up. Gradients are
    clipped to `config.max_grad_norm`. A loss or gradient norm of inf or NaN leaves weights and
    optimizer state untouched, since one bad batch must not end a run; `skipped` then is 1. Running
    out of memory before the optimizer's own step leaves them untouched, too, so that the caller can
    try again.

    A float16 model needs a `loss_scale`. The batches are scaled by it, and what is returned is not.
    """
    optimizer.zero_grad(set_to_none=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss, row_metrics = 0.0, RowMetrics()
    try:
        with unbiased_accumulation(parameters, derive_seed(getattr(optimizer, "seed", 0), step)):
            for batch in batches:
                batch = batch.to(policy.device)
                if loss_scale:
                    batch = loss_scale.scaled(batch)
                part, metrics = batch_loss(policy, batch)
                part.backward()
                loss += part.item()
                row_metrics.add(metrics)
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)  # frees the memory that a second attempt needs
        raise

    rate = learning_rate(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate

    scale_metrics = {}
    if loss_scale:
        loss /= loss_scale.value
        loss_scale.unscale_(p.grad for p in parameters if p.grad is not None)
        scale_metrics = {"loss_scale": loss_scale.value}
    norm = gradient_norm(parameters)
    grad_norm = norm.item()
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        _step(optimizer, parameters, norm, config.max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    if loss_scale:
        loss_scale.observe(finite)
    return {
        "loss": loss,
        **row_metrics.result(),
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "skipped": float(not finite),
        **scale_metrics,
    }


@contextmanager
def unbiased_accumulation(parameters: list[nn.Parameter], seed: int) -> Iterator[None]:
    """Within this context, bf16 gradients of several backward passes add up by stochastic rounding.

    Rounding to nearest would drop every term below 1/512 of the sum so far, and a sum in fp32 would
    take twice the memory.
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
    """Return the 2-norm of all gradients, 0-d in fp32.

    torch's `get_total_norm` would compute it in the gradients' own 16 bits.
    """
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
) -> None:
    """Clip the gradients and step; LowMemoryAdamW clips within its one pass over them."""
    try:
        if isinstance(optimizer, LowMemoryAdamW):
            optimizer.step(grad_scale=(max_norm / (norm + 1e-6)).clamp(max=1.0))
        else:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            optimizer.step()
    except torch.OutOfMemoryError as error:
        # Some weights may have changed already, so it cannot be tried again.
        raise UserError(
            "out of memory within the optimizer's step; the last checkpoint is intact. Start a new "
            "run with --optimizer adamw_exact, which allocates its state at the start and needs no "
            "more memory to step."
        ) from error
