"""The optimizer, its learning rate, and one update from accumulated gradients."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .config import OptimizerConfig
from .distributed.sharding import Part, Sharding, local
from .errors import UserError
from .kernels.adamw.optimizer import LowMemoryAdamW
from .kernels.adamw.state import BLOCK
from .kernels.adamw.step import add_stochastic_
from .loss_scale import LossScale
from .metrics import RowMetric, RowMetrics
from .model.policy import Policy
from .seeds import derive_seed
from .types import PackedBatch

BatchLoss = Callable[[Policy, PackedBatch], tuple[torch.Tensor, dict[str, RowMetric]]]
"""Computes the loss of a batch, a 0-d tensor, and what its rows tell for metrics.jsonl."""


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, seed: int = 0, parts: Sequence[Part] | None = None
) -> torch.optim.Optimizer:
    """Make the AdamW that `config.optimizer` names, over the trainable parameters of `model`.

    `seed` is the seed of stochastic rounding, and `parts` what this process updates of them, where
    that is not everything. Raises UserError where bitsandbytes is asked for and missing.
    """
    parts = Sharding(model).parts if parts is None else parts
    parameters = [part.weight for part in parts]
    settings = dict(lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    kind = resolve_optimizer(config.optimizer, parameters)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if kind in ("adamw_exact", "adamw_stochastic"):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        numbers = {name: number for number, name in enumerate(trained)}
        places = [(numbers[part.name], part.first) for part in parts]
        exact = kind == "adamw_exact"
        return LowMemoryAdamW(parameters, **settings, remainder=exact, seed=seed, places=places)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer adamw8bit needs bitsandbytes: pip install 'mr1_fast[gpu]'."
        ) from error
    optimizer = AdamW8bit(parameters, **settings)
    _decide_by_whole_parameters(optimizer, parts)
    return optimizer


def _decide_by_whole_parameters(optimizer: torch.optim.Optimizer, parts: Sequence[Part]) -> None:
    """Let bitsandbytes keep 32-bit states of small parameters, and not of small parts of others.

    The states of a parameter then have one dtype, whatever parts it is in.
    """
    own_config, smallest = optimizer.get_config, optimizer.args.min_8bit_size

    def get_config(group_number: int, number: int, group: dict) -> dict:
        is_small = parts[number].whole.numel() < smallest
        limit = math.inf if is_small else 0
        return {**own_config(group_number, number, group), "min_8bit_size": limit}

    optimizer.get_config = get_config


def resolve_optimizer(name: str, parameters: list[nn.Parameter]) -> str:
    """Return the optimizer that `auto` means for these parameters.

    16-bit weights would lose small updates, so they get an optimizer that keeps them exact.
    """
    if name != "auto":
        return name
    return "adamw_exact" if any(p.dtype == torch.bfloat16 for p in parameters) else "adamw"


def state_block(model: nn.Module, config: OptimizerConfig) -> int:
    """Return how many elements of a parameter have states with one scale, so that cuts between
    processes must not part them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return 1 if resolve_optimizer(config.optimizer, trained) == "adamw" else BLOCK


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
    batches: Sequence[PackedBatch],
    batch_loss: BatchLoss,
    step: int,
    total_steps: int,
    config: OptimizerConfig,
    loss_scale: LossScale | None = None,
    sharding: Sharding | None = None,
) -> dict[str, float]:
    """Take one optimizer step on the summed loss of `batches`; returns the step's metrics.

    The token weights of the batches carry all normalisation, so their losses add up, over the
    processes of a run as well. Gradients are clipped to `config.max_grad_norm`. A loss or gradient
    norm of inf or NaN leaves weights and optimizer state untouched, since one bad batch must not
    end a run; `skipped` then is 1. Running out of memory before the optimizer's own step leaves
    them untouched, too, so that the caller can try again.

    A float16 model needs a `loss_scale`. The batches are scaled by it, and what is returned is not.

    `sharding` is how the weights are spread over processes; None for a process alone.
    """
    sharding = sharding or Sharding(policy.model)
    seed = derive_seed(getattr(optimizer, "seed", 0), step)
    optimizer.zero_grad(set_to_none=True)
    loss, row_metrics = accumulate(policy, sharding, batches, batch_loss, seed, loss_scale)

    rate = learning_rate(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    # All processes act together from here on, and weights change.
    with _without_second_attempt(optimizer):
        (loss,) = sharding.world.sums([loss])
        sharding.sum_gradients(seed)
        scale_metrics = {}
        if loss_scale:
            loss /= loss_scale.value
            gradients = (part.weight.grad for part in sharding.parts)
            loss_scale.unscale_(gradient for gradient in gradients if gradient is not None)
            scale_metrics = {"loss_scale": loss_scale.value}
        norm = sharding.gradient_norm()
        grad_norm = norm.item()
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        if finite:
            _step(optimizer, [part.weight for part in sharding.parts], norm, config.max_grad_norm)
            sharding.share_weights()
        measured = row_metrics.result(sharding.world)

    _drop_gradients(sharding.parameters)
    optimizer.zero_grad(set_to_none=True)
    if loss_scale:
        loss_scale.observe(finite)
    return {
        "loss": loss,
        **measured,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "skipped": float(not finite),
        **scale_metrics,
    }


def accumulate(
    policy: Policy,
    sharding: Sharding,
    batches: Sequence[PackedBatch],
    batch_loss: BatchLoss,
    seed: int,
    loss_scale: LossScale | None,
) -> tuple[float, RowMetrics]:
    """Run this process's packs forward and backward; returns their summed loss and row metrics.

    Gradients add up in the model's parameters. Running out of memory leaves none behind.
    """
    # The first process rounds as one alone does.
    rank = sharding.world.rank
    seed = derive_seed(seed, "process", rank) if rank else seed
    loss, row_metrics = 0.0, RowMetrics()
    try:
        with unbiased_accumulation(sharding.parameters, seed):
            for batch in sharding.aligned(batches):
                batch = batch.to(policy.device)
                if loss_scale:
                    batch = loss_scale.scaled(batch)
                part, metrics = sharding.within(partial(batch_loss, policy, batch))
                part.backward()
                loss += part.item()
                row_metrics.add(metrics)
    except torch.OutOfMemoryError:
        _drop_gradients(sharding.parameters)  # whose memory a second attempt needs
        raise
    return loss, row_metrics


def _drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


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
            add_stochastic_(local(sums[parameter]), local(gradient), seed=next(seeds))
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


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    norm: torch.Tensor,
    max_norm: float,
) -> None:
    """Clip the gradients and step; LowMemoryAdamW clips within its one pass over them."""
    if isinstance(optimizer, LowMemoryAdamW):
        optimizer.step(grad_scale=(max_norm / (norm + 1e-6)).clamp(max=1.0))
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        optimizer.step()


@contextmanager
def _without_second_attempt(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Turn OutOfMemoryError into UserError: some gradients or weights may have changed already."""
    make_room = (
        "Start a new run with --optimizer adamw_exact, which allocates its state at the start and "
        "needs no more memory to step."
    )
    if isinstance(optimizer, LowMemoryAdamW):
        make_room = "Go on from there with --resume and lower --tokens-per-microbatch."
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory within the optimizer's step; the last checkpoint is intact. {make_room}"
        ) from error
