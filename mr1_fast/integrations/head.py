"""A Hugging Face model that hands hidden states and its LM head to a function, in place of making logits.

The head's weight is read inside the head's own forward, and that inside the model's. So whatever wraps the model holds:
FSDP2 has gathered the weight there, DDP sees the output, autocast and PEFT act as ever.
"""

import functools
from collections.abc import Callable
from types import MethodType

from torch import Tensor, nn

HeadFunction = Callable[[Tensor, Tensor, Tensor | None], object]
"""f(hidden (B, L, D), weight (V, D), bias (V,) or None): what the model is to return."""
AFTER_HEAD = (
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap",
    "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
"""Settings by which models change their logits once more (Gemma, Cohere, Granite, Falcon-H1, …): f would not see it."""


class HeadError(TypeError):
    """The model's logits are not its hidden states times the weight of a linear layer."""


def add_head(model: nn.Module) -> None:
    """Teach a transformers causal LM, text or vision, `model(..., head=f)`: it returns f(hidden, weight, bias).

    `hidden` (B, L, D) are the final hidden states of all positions: f picks the rows that it needs before it projects
    them. Tensors that f holds are not touched by DDP or FSDP, which would cast arguments of the model to bf16. What is
    to have gradients must be in what f returns: a tensor, or tuples (GRPOLoss), lists and dicts of them, where FSDP2
    finds it. A process whose batch has no row with loss calls the model all the same, with 0 rows. Without `head` the
    model does as before, `generate` included.

    Call this before PEFT, DDP or FSDP2 wrap the model. Raises HeadError where f's rows times the weight would not be
    the logits: an LM head that is not a plain linear layer, one with an adapter (at the call), a model that scales or
    caps its logits, or one that adds a router's loss of its own.
    """
    linears = _trained_copies(model.get_output_embeddings())
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise HeadError(
                f"the LM head is a {type(linear).__name__}: add_head needs a torch.nn.Linear without adapters"
            )
    config = model.config.get_text_config()
    changed = [name for name in AFTER_HEAD if getattr(config, name, None) not in (None, 1)]
    if getattr(config, "output_router_logits", False):
        changed.append("output_router_logits")
    if changed:
        raise HeadError(
            f"{type(model).__name__} has {', '.join(changed)}, which a loss on its LM head would pass over"
        )
    for linear in linears:
        linear.forward = MethodType(_linear_forward(_function(linear.forward)), linear)
    model.forward = MethodType(_model_forward(_function(model.forward), type(model).forward), model)


def in_dtype_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """An LM head in the dtype of the hidden states, in which TRL and Liger project."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _trained_copies(linear: nn.Module) -> list[nn.Module]:
    """The LM head; or, where PEFT trains it whole (modules_to_save), the original and its copies."""
    if hasattr(linear, "modules_to_save"):
        return [linear.original_module, *linear.modules_to_save.values()]
    return [linear]


def _linear_forward(plain: Callable) -> Callable:
    def forward(self: nn.Linear, hidden: Tensor, head: HeadFunction | None = None):
        return plain(self, hidden) if head is None else head(hidden, self.weight, self.bias)

    return forward


def _model_forward(plain: Callable, signature: Callable) -> Callable:
    @functools.wraps(signature)  # generate() reads it
    def forward(self: nn.Module, *args, head: HeadFunction | None = None, **kwargs):
        if head is None:
            return plain(self, *args, **kwargs)
        linear = self.get_output_embeddings()
        if not isinstance(linear, nn.Linear) and not hasattr(linear, "modules_to_save"):
            raise HeadError(
                f"the LM head became a {type(linear)}: leave it out of the adapter's target_modules"
            )
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return linear(hidden, head=head)

    return forward


def _function(method: Callable) -> Callable:
    """The method with `self` as an argument, so that a deep copy of the model calls its own."""
    return getattr(method, "__func__", None) or (
        lambda self, *args, **kwargs: method(*args, **kwargs)
    )
