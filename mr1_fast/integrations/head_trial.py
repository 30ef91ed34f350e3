"""Find out, on one small batch, whether a model's logits are its hidden states times its LM head.

Many models do something in between: BERT's line transforms the hidden states first, others scale,
cap, mask or cut the logits. Reading a configuration does not tell; running the model does.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import shortened

SHAPE = (2, 4)
"""Sequences and tokens of the batch."""


class HeadError(TypeError):
    """The model's logits are not its hidden states times the weight of a linear layer."""


def try_head(model: nn.Module, linears: list[nn.Module], install: Callable) -> None:
    """Raise HeadError unless the LM head gets the last hidden states and its output is the logits.

    `install(model, linears)` makes the model accept `head=`; `linears` are the LM head and its
    copies. Any other failure of the model on a batch of token ids is a HeadError as well. The model
    is left as it was.
    """
    ids = _token_ids(model)
    try:
        seen = _run(model, linears, install, ids, autocast=False)
    except Exception as error:
        # Weights of several dtypes, and some attention kernels, need autocast.
        try:
            seen = _run(model, linears, install, ids, autocast=True)
        except Exception:
            raise HeadError(
                f"{type(model).__name__} cannot be tried on a batch of token ids: "
                f"{type(error).__name__}: {shortened(str(error), 200)}"
            ) from error

    hidden, states, made, logits = seen
    name = type(model).__name__
    if states is None or states.shape != hidden.shape or not _close(states, hidden):
        raise HeadError(
            f"{name} changes its last hidden states before its LM head, which a loss on its LM "
            "head would miss"
        )
    if logits.shape != made.shape or not torch.equal(logits.float(), made.float()):
        raise HeadError(
            f"{name} changes its logits after its LM head, which a loss on its LM head would miss"
        )


def _run(
    model: nn.Module, linears: list[nn.Module], install: Callable, ids: Tensor, autocast: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Run the model with `head=` and without.

    Return the hidden states that `head` gets; those that the LM head gets, and what it makes of
    them, both None if it is not called; and the logits.
    """
    seen: dict[str, Tensor] = {}

    def note_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        seen["hidden"] = hidden

    def known_logits(hidden: Tensor, *_, **__) -> Tensor:
        # Numbers that are exact in every dtype: no change of them can hide in rounding.
        count = hidden[..., 0].numel() * len(linears[0].weight)
        numbers = torch.arange(count, device=hidden.device)
        seen["states"] = hidden
        seen["made"] = (numbers % 127 - 63).to(hidden.dtype).view(*hidden.shape[:-1], -1)
        return seen["made"].clone()

    kind = ids.device.type
    with _left_as_it_was(model), torch.no_grad(), torch.autocast(kind, torch.bfloat16, autocast):
        install(model, linears)
        model.eval()
        model.forward(input_ids=ids, head=note_hidden)
        for linear in linears:
            linear.forward = known_logits
        logits = model.forward(input_ids=ids, use_cache=False).logits
    return seen["hidden"], seen.get("states"), seen.get("made"), logits


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two runs of one computation gave (nearly) the same finite numbers."""
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= 1e-2 * b.abs().max())


def _token_ids(model: nn.Module) -> Tensor:
    """Ids of plain tokens, none of which stands for an image, padding or the end."""
    embeddings = model.get_input_embeddings().weight
    special = set(_numbers_of_tokens(model.config.to_dict()))
    plain = [i for i in range(min(len(embeddings), 4096)) if i not in special] or [0]
    count = SHAPE[0] * SHAPE[1]
    chosen = [plain[i * len(plain) // count] for i in range(count)]
    return torch.tensor(chosen, device=embeddings.device).view(SHAPE)


def _numbers_of_tokens(config: dict) -> Iterator[int]:
    """Every whole number of a configuration under a name with "token" in it."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers_of_tokens(value)
        elif "token" in str(name):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if isinstance(each, int))


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Run without hooks and on copies of the buffers; restore every module and the RNG state."""
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for module in modules:
                for name in vars(module).keys() & {"_forward_hooks", "_forward_pre_hooks"}:
                    setattr(module, name, type(getattr(module, name))())
                module._buffers = {
                    name: None if buffer is None else buffer.clone()
                    for name, buffer in module._buffers.items()
                }
            yield
        finally:
            for module, attributes in zip(modules, before, strict=True):
                vars(module).clear()
                vars(module).update(attributes)
