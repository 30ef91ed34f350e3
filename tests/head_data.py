"""A tiny text model that takes `head=`, a batch for it, and the loss in two forms: for one process and for two."""

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mr1_fast import GRPOLoss, linear_grpo_loss, linear_token_logprobs, token_weights
from mr1_fast.integrations.head import HeadFunction, add_head
from mr1_fast.loss import policy_loss_ref

V = 97


def text_model(tied: bool = False) -> Qwen2ForCausalLM:
    """A Qwen2 of two layers with seeded weights, large enough that distributions are uneven, and `head=`."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=V, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
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
    targets, advantages, ref_logp = (data[name][mask] for name in ("targets", "advantages", "ref_logp"))
    weights = token_weights(torch.tensor([0, len(targets)]), "dapo", num_tokens=num_tokens).to(advantages.dtype)
    objective = dict(beta=0.1, ref_logp=ref_logp)

    def one_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
        return linear_grpo_loss(hidden[mask], weight, targets, advantages, weights, bias=bias, **objective)

    def two_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
        logp, entropy = linear_token_logprobs(hidden[mask], weight, targets, bias=bias)
        per_token, *logged = policy_loss_ref(logp, advantages, weights, **objective)
        return GRPOLoss(per_token.sum(), logp.detach(), entropy.detach(), *logged)

    return {"one pass": one_pass, "two passes": two_pass}[form]
