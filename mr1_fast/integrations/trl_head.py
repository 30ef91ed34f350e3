"""Log-probabilities and loss inside the LM head of a model that TRL's GRPOTrainer calls."""

import contextlib
import functools
from types import MethodType

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from ..loss import linear_token_logprobs
from .head import add_head, in_dtype_of


def add_label_head(model: nn.Module, temperature: float, fp32: bool) -> None:
    """Answer TRL's `model(..., labels=labels, fused_lm_head=True)` with our log-probs; add `head`.

    `fp32` projects in fp32, as TRL does with cast_lm_head_to_fp32. Raises HeadError, as `add_head`
    does.
    """
    add_head(model)
    with_head = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, head=None, **kwargs
    ):
        if head is not None:
            return with_head(*args, head=head, **kwargs)
        if not fused_lm_head:
            return with_head(*args, **kwargs | ({} if labels is None else {"labels": labels}))
        targets = labels[:, 1:]
        rows = (targets != -100).flatten().nonzero().squeeze(-1)

        def label_logprobs(
            hidden: Tensor, weight: Tensor, bias: Tensor | None
        ) -> FusedCausalLMOutput:
            hidden = predicting(hidden, rows, targets.shape[1])
            with in_one_dtype(hidden, weight, bias, fp32) as (hidden, weight, bias):
                logp, entropy = linear_token_logprobs(
                    hidden, weight, targets.flatten()[rows], temperature, bias
                )
            logp, entropy = (padded(each, rows, targets.shape) for each in (logp, entropy))
            return FusedCausalLMOutput(log_probs=logp, entropy=entropy, label_mask=targets != -100)

        return with_head(*args, head=label_logprobs, **kwargs)

    model.forward = MethodType(forward, model)


def predicting(hidden: Tensor, rows: Tensor, length: int) -> Tensor:
    """The hidden states (N, D), of (B, L, D), from which the tokens at `rows` are predicted.

    `rows` are flat positions among the last `length` tokens of each sequence.
    """
    before = hidden.shape[1] - length
    return hidden.flatten(0, 1).index_select(0, rows + rows // length * before + before - 1)


def padded(values: Tensor, rows: Tensor, shape: torch.Size, others: Tensor | None = None) -> Tensor:
    """A (B, T) tensor: `values` (N,) at flat positions `rows`, elsewhere `others` (B, T) or 0."""
    base = values.new_zeros(shape) if others is None else others.detach().to(values.dtype)
    return base.flatten().index_copy(0, rows, values).view(shape)


@contextlib.contextmanager
def in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp32: bool):
    """Yield hidden states and LM head in one dtype; with `fp32` in fp32 and without autocast."""
    with torch.autocast(hidden.device.type, enabled=False) if fp32 else contextlib.nullcontext():
        hidden = hidden.float() if fp32 else hidden
        yield hidden, *in_dtype_of(hidden, weight, bias)
