"""Let a Hugging Face model hand hidden states and LM head to a function instead of making logits.

The LM head's weight is read inside the head's own forward, which runs inside the model's forward.
So every wrapper keeps working: FSDP2 has gathered the weight there, DDP sees what the model
returns, and autocast and PEFT act as they always do.
"""

import functools
from collections.abc import Callable
from types import MethodType

from torch import Tensor, nn

from . import warn_once
from .head_trial import HeadError, try_head

__all__ = ["HeadError", "HeadFunction", "add_head", "in_dtype_of"]

HeadFunction = Callable[[Tensor, Tensor, Tensor | None], object]
"""f(hidden (B, L, D), weight (V, D), bias (V,) or None): its result is what the model returns."""

CHANGES_LOGITS = (
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap",
    "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
"""Settings of Gemma, Cohere, Granite, Falcon-H1 and others that change logits after the LM head.

A function on the hidden states would miss that change.
"""


def add_head(model: nn.Module) -> None:
    """Let a transformers causal LM, text or vision, answer `model(..., head=f)` with f's result.

    - `hidden` (B, L, D) are the final hidden states of all positions; f selects the rows that it
      needs and projects only those. `weight` (V, D) and `bias` (V,) or None are those of the LM
      head.
    - f may hold tensors, such as advantages: DDP and FSDP, which cast the model's arguments to
      bf16, do not touch them.
    - f returns what is to have gradients as a tensor, or in tuples (GRPOLoss is one), lists or
      dicts, in which FSDP2 finds it.
    - A process whose batch has no row with loss must call the model all the same, with 0 rows.
    - Without `head` the model behaves as before, also in `generate`.

    Call this before PEFT, DDP or FSDP2 wrap the model. Raises HeadError if f's rows times the
    weight would not be the logits: the LM head is not a plain linear layer, it has an adapter
    (found when the model is called), or the model changes its hidden states before the LM head or
    its logits behind it, or adds a router loss of its own. This is seen on a batch of eight tokens,
    with one warning where the model cannot run yet, as its weights are sharded or on "meta".
    """
    linears = _head_and_copies(model.get_output_embeddings())
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise HeadError(
                f"the LM head is a {type(linear).__name__}: add_head needs a torch.nn.Linear "
                "without adapters"
            )
    config = model.config.get_text_config()
    changes = [name for name in CHANGES_LOGITS if getattr(config, name, None) not in (None, 1)]
    if getattr(config, "output_router_logits", False):
        changes.append("output_router_logits")
    if changes:
        raise HeadError(
            f"{type(model).__name__} has {', '.join(changes)}, which a loss on its LM head would "
            "miss"
        )
    if all(map(_is_whole, model.parameters())):
        try_head(model, linears, _install)
    else:
        warn_once(
            f"add_head could not try {type(model).__name__}, whose weights are sharded or on the "
            "meta device: add the head before, to learn whether it gives the model's logits"
        )
    _install(model, linears)


def _is_whole(weight: Tensor) -> bool:
    """Whether a weight is here: not on "meta", nor sharded by FSDP, DeepSpeed or a device mesh."""
    return bool(weight.numel()) and not weight.is_meta and not hasattr(weight, "device_mesh")


def _install(model: nn.Module, linears: list[nn.Module]) -> None:
    for linear in linears:
        linear.forward = MethodType(_linear_forward(_function(linear.forward)), linear)
    model.forward = MethodType(_model_forward(_function(model.forward), type(model).forward), model)


def in_dtype_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of an LM head in the dtype of `hidden`, as TRL and Liger project."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _head_and_copies(linear: nn.Module) -> list[nn.Module]:
    """The LM head, or its original and copies if PEFT trains it as a whole (modules_to_save)."""
    if hasattr(linear, "modules_to_save"):
        return [linear.original_module, *linear.modules_to_save.values()]
    return [linear]


def _linear_forward(plain: Callable) -> Callable:
    def forward(self: nn.Linear, hidden: Tensor, head: HeadFunction | None = None):
        return plain(self, hidden) if head is None else head(hidden, self.weight, self.bias)

    return forward


def _model_forward(plain: Callable, signature: Callable) -> Callable:
    @functools.wraps(signature)  # generate() reads the signature
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
    """The method as a function of `self`, so that a deep copy of the model calls its own."""
    return getattr(method, "__func__", None) or (
        lambda self, *args, **kwargs: method(*args, **kwargs)
    )
