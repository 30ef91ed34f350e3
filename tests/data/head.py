"""A tiny text model that accepts `head=`, a batch for it, and its loss in one pass and in two."""

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from mr1_fast import GRPOLoss, linear_grpo_loss, linear_token_logprobs, token_weights
from mr1_fast.integrations.head import HeadFunction, add_head
from mr1_fast.loss import policy_loss_ref

from .models import small_text_model

V = 97


def text_model(tied: bool = False) -> Qwen2ForCausalLM:
    """A small model to which `add_head` was applied."""
    model = small_text_model(V, tie_word_embeddings=tied)
    add_head(model)
    return model


def batch(shape: tuple[int, int] = (4, 9), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """ids, targets, advantages, ref_logp, and the mask of positions whose next token has a loss.

    All are (B, L).
    """
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
    """A function for `head=`: the loss of the rows in the mask, each of weight 1/num_tokens.

    `form` is "one pass" (linear_grpo_loss) or "two passes" (log-probs, then the loss in PyTorch).
    """
    mask = data["mask"]
    targets, advantages, ref_logp = (
        data[name][mask] for name in ("targets", "advantages", "ref_logp")
    )
    cu_seqlens = torch.tensor([0, len(targets)])
    weights = token_weights(cu_seqlens, "dapo", num_tokens=num_tokens).to(advantages.dtype)
    options = dict(beta=0.1, ref_logp=ref_logp)

    def one_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
        return linear_grpo_loss(
            hidden[mask], weight, targets, advantages, weights, bias=bias, **options
        )

    def two_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
        logp, entropy = linear_token_logprobs(hidden[mask], weight, targets, bias=bias)
        per_token, *logged = policy_loss_ref(logp, advantages, weights, **options)
        return GRPOLoss(per_token.sum(), logp.detach(), entropy.detach(), *logged)

    return {"one pass": one_pass, "two passes": two_pass}[form]
