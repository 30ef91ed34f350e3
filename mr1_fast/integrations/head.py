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


def add_head(model: nn.Module) -> None:
    """Teach a transformers causal LM, text or vision, `model(..., head=f)`: it returns f(hidden, weight, bias).

    `hidden` (B, L, D) are the final hidden states of all positions: f picks the rows that it needs before it projects
    them. Tensors that f holds are not touched by DDP or FSDP, which would cast arguments of the model to bf16. Without
    `head` the model does as before. Call this before PEFT, DDP or FSDP2 wrap the model. Raises TypeError where the LM
    head is not a plain linear layer, as an adapter in it would be passed over.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise TypeError(f"the LM head is a {type(linear).__name__}: add_head needs a torch.nn.Linear without adapters")
    plain_linear, plain_model = linear.forward, model.forward

    def linear_forward(self, hidden: Tensor, head: HeadFunction | None = None):
        return plain_linear(hidden) if head is None else head(hidden, self.weight, self.bias)

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def model_forward(self, *args, head: HeadFunction | None = None, **kwargs):
        if head is None:
            return plain_model(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return self.get_output_embeddings()(hidden, head=head)

    linear.forward, model.forward = MethodType(linear_forward, linear), MethodType(model_forward, model)
