"""A tiny text model that takes `head=`, a batch for it, and the loss in two forms: for one process and for two."""

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from mr1_fast import GRPOLoss, linear_grpo_loss, linear_token_logprobs, token_weights
from mr1_fast.integrations.head import HeadFunction, add_head
from mr1_fast.loss import policy_loss_ref

from .models import small_text_model

V = 97


def text_model(tied: bool = False) -> Qwen2ForCausalLM:
    """A small model with `head=`."""
    model = small_text_model(V, tie_word_embeddings=tied)
    add_head(model)
    return model


def batch(shape: tuple[int, int] = (4, 9), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """ids, targets, advantages, ref_logp, and a mask (B, L) of the positions whose next token has a loss."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) > 0.3
    mask[:, -1] = False
    ids = torch.randint(0, V, shape, generator=generator)
    return {
        "ids": ids,
        "targets": ids.roll(-1, dims=1),
        "advantages": torch.randn(shape, generator=generator).to(dtype),
        "ref_logp": (torch.rand(shape, generator=generator) * -3 - 3).to(dtype),
        "mask": mask,
    }


def loss_of(form: str, data: dict[str, Tensor], num_tokens: float) -> HeadFunction:
    """f for `head=`: the loss of the masked rows, each of weight 1/num_tokens, in one pass or in two."""
    mask = data["mask"]
    targets, advantages, ref_logp = (
        data[name][mask] for name in ("targets", "advantages", "ref_logp")
    )
    weights = token_weights(torch.tensor([0, len(targets)]), "dapo", num_tokens=num_tokens).to(
        advantages.dtype
    )
    objective = dict(beta=0.1, ref_logp=ref_logp)

    def one_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
        return linear_grpo_loss(
            hidden[mask], weight, targets, advantages, weights, bias=bias, **objective
        )

    def two_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
        logp, entropy = linear_token_logprobs(hidden[mask], weight, targets, bias=bias)
        per_token, *logged = policy_loss_ref(logp, advantages, weights, **objective)
        return GRPOLoss(per_token.sum(), logp.detach(), entropy.detach(), *logged)

    return {"one pass": one_pass, "two passes": two_pass}[form]
