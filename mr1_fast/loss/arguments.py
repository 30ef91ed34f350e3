"""Checks of what the public loss functions are given, and the form that the operators take.

Every check raises a ValueError that names the argument and what is expected. What a GPU holds is
not looked at, since reading it would synchronise.
"""

import math

import torch
from torch import Tensor

from ..kernels.dispatch import statistics_dtype
from ..kernels.grpo.chunks import CHUNK_BYTES
from ..kernels.grpo.objective import SURROGATES, Objective
from ..kernels.grpo.reference import spread
from .checks import check_device, check_no_dtensor, check_tensor, let_lengths_agree, readable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# --- the objective ------------------------------------------------------------------------------


def check_objective(
    objective: Objective, rows: Tensor, ratio_level: str, cu_seqlens: Tensor | None
) -> Objective:
    """Return the objective in the form that the operators take.

    As a caller gives it, `beta` and `temperature` may be floats, `delta` may be None, and
    advantages and is_weights may be per sequence (S,), with `cu_seqlens` (S+1,). The one returned
    has contiguous tensors (N,) and 0-d tensors, without gradients, in the dtype of statistics, on
    the device of `rows`, the N logits or hidden states.
    """
    _check_surrogate(objective)
    _check_ratio_level(ratio_level, cu_seqlens)
    beta, ref_logp = objective.beta, objective.ref_logp
    if ref_logp is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError(
            f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, rows)
    return objective._replace(
        advantages=_per_token_or_sequence("advantages", objective.advantages, rows, cu_seqlens),
        token_weights=per_token("token_weights", objective.token_weights, rows),
        beta=scalar("beta", beta, rows),
        temperature=scalar("temperature", objective.temperature, rows),
        old_logp=per_token("old_logp", objective.old_logp, rows),
        ref_logp=per_token("ref_logp", ref_logp, rows),
        is_weights=_per_token_or_sequence("is_weights", objective.is_weights, rows, cu_seqlens),
        delta=math.inf if objective.delta is None else objective.delta,
    )


def _check_surrogate(objective: Objective) -> None:
    """Check the surrogate's name and its constants."""
    surrogate, delta = objective.surrogate, objective.delta
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate is {surrogate!r}: choose one of {', '.join(SURROGATES)}")
    if delta is not None and surrogate != "clip":
        raise ValueError(
            f"delta bounds the ratio of surrogate 'clip', not of {surrogate!r}: leave it out"
        )
    temperatures = (objective.tau_positive, objective.tau_negative)
    if not min(temperatures) > 0:
        raise ValueError(f"sapo_temperatures is {temperatures}: expected two numbers > 0")

    # cispo's cap, 1 + clip_high, may be below 1: TRL and Liger give the cap itself, 0.2 unless it
    # is set.
    _check_bound("clip_low", objective.clip_low, least=0)
    _check_bound("clip_high", objective.clip_high, least=-1 if surrogate == "cispo" else 0)
    if delta is not None:
        _check_bound("delta", delta, least=0)


def _check_bound(name: str, bound: float, least: int) -> None:
    if bound is None or not bound >= least:
        raise ValueError(f"{name} is {bound}: expected a number ≥ {least}")


def _check_ratio_level(ratio_level: str, cu_seqlens: Tensor | None) -> None:
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"ratio_level is {ratio_level!r}: choose token or sequence")
    if ratio_level == "sequence" and cu_seqlens is None:
        raise ValueError(
            "ratio_level is 'sequence', but cu_seqlens is None: pass the (S+1,) bounds of the "
            "sequences"
        )


def per_token(name: str, value: Tensor | None, rows: Tensor, hint: str = "") -> Tensor | None:
    """Return a value per token (N,) in the dtype of statistics.

    `hint` ends the message about a wrong shape.
    """
    if value is None:
        return None
    check_tensor(name, value)
    let_lengths_agree(value, rows)
    if value.shape != (len(rows),):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({len(rows)},){hint}")
    check_device(name, value, rows)
    return value.detach().to(statistics_dtype(rows)).contiguous()


def _per_token_or_sequence(
    name: str, value: Tensor | None, rows: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Return a value per token (N,), or per sequence (S,) with cu_seqlens, per token."""
    if value is None or cu_seqlens is None:
        return per_token(name, value, rows, " (per-sequence values need cu_seqlens)")
    check_tensor(name, value)
    per_sequence = value.ndim == 1 and len(value) == len(cu_seqlens) - 1
    if per_sequence and len(value) != len(rows):
        check_device(name, value, rows)
        value = value.detach().to(statistics_dtype(rows))
        return spread(value, cu_seqlens, len(rows)).contiguous()
    let_lengths_agree(value, rows)
    if value.shape != (len(rows),):
        # Only here may the text be made: to a compiler, a number in a text is a constant.
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected ({len(rows)},), or "
            f"({len(cu_seqlens) - 1},)"
        )
    return per_token(name, value, rows)


# --- logits and hidden states -------------------------------------------------------------------


def check_logits(logits: Tensor, targets: Tensor, inplace: bool = False) -> Tensor:
    """Return the logits (N, V) with unit column stride."""
    checked, _ = check_weighted_logits(logits, targets, None)
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        _check_inplace(logits)
    return checked


def check_weighted_logits(
    logits: Tensor, targets: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the logits (N, V) with unit column stride, and the weights (N,) for the operator.

    The targets of rows of weight 0 may be any numbers.
    """
    _check_matrix(logits)
    token_weights = per_token("token_weights", token_weights, logits)
    _check_targets(targets, logits, logits.shape[1], token_weights)
    return logits if _has_unit_stride(logits) else logits.contiguous(), token_weights


def _check_matrix(logits: Tensor) -> None:
    check_no_dtensor("logits", logits)
    if logits.ndim != 2:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected (N, V), flatten batch and length "
            "first"
        )
    if logits.shape[1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected a vocabulary of at least 1"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(
            f"logits is {logits.dtype}: expected float32, bfloat16, float16 or float64"
        )


def _has_unit_stride(logits: Tensor) -> bool:
    return logits.stride(1) == 1 or logits.shape[1] == 1


def _check_inplace(logits: Tensor) -> None:
    """Check that the gradient of logits that require one may overwrite them."""
    if logits.is_leaf:
        raise ValueError(
            f"inplace would overwrite logits of shape {tuple(logits.shape)}, which is a leaf that "
            "requires a gradient: pass the output of a layer, or inplace=False"
        )
    strides = f"logits has strides {logits.stride()}: inplace=False"
    if not _has_unit_stride(logits):
        raise ValueError(f"inplace needs rows of unit stride, {strides}")
    if len(logits) > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"inplace needs rows of their own, {strides}")
    if not torch.compiler.is_compiling() and _saved_by_producer(logits):
        raise ValueError(
            f"inplace would overwrite logits of shape {tuple(logits.shape)}, which "
            f"{logits.grad_fn.name()} still needs for its own gradient: pass inplace=False"
        )


def _saved_by_producer(tensor: Tensor) -> bool:
    """Tell whether the operation that made this tensor keeps it for its backward, as exp does."""
    node = tensor.grad_fn
    for name in dir(node):
        if not name.startswith("_saved_") or name.startswith("_saved_raw"):
            continue
        saved = getattr(node, name, None)
        same = isinstance(saved, Tensor) and saved.data_ptr() == tensor.data_ptr()
        if same and tensor.numel():
            return True
    return False


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden (N, D), weight (V, D) and bias (V,) in the dtype that the products run in."""
    for name, value in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        check_no_dtensor(name, value)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: expected (N, D), the packed rows that carry "
            "loss"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: expected (V, {hidden.shape[1]}) as hidden has"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is not None:
            check_device(name, value, hidden)
    _check_targets(targets, hidden, weight.shape[0])

    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if value is not None and (value.dtype not in DTYPES or value.dtype != hidden.dtype):
            raise ValueError(
                f"{name} is {value.dtype}: expected float32, bfloat16, float16 or float64, as "
                "hidden is"
            )
    return hidden, weight, bias


def check_weight_grad(weight_grad: Tensor | None, weight: Tensor, in_one_pass: bool) -> None:
    """Check the tensor to which the gradient of `weight`, as check_linear returns it, is added.

    `in_one_pass`: the forward makes the gradient.
    """
    if weight_grad is None:
        return
    check_tensor("weight_grad", weight_grad)
    check_no_dtensor("weight_grad", weight_grad)
    check_device("weight_grad", weight_grad, weight)
    dtypes, shape = (weight.dtype, statistics_dtype(weight)), tuple(weight.shape)
    if weight_grad.dtype not in dtypes or weight_grad.shape != weight.shape:
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)}: expected "
            f"{' or '.join(dict.fromkeys(map(str, dtypes)))} {shape}"
        )
    if weight_grad.requires_grad:
        raise ValueError("weight_grad requires a gradient itself: pass weight.grad, or zeros")
    if not weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight_grad is given, but weight requires no gradient: leave it out")
    if not in_one_pass:
        raise ValueError(
            "weight_grad needs ratio_level='token' and no entropy_weights: leave it out"
        )


def _check_targets(
    targets: Tensor, rows: Tensor, v: int, token_weights: Tensor | None = None
) -> None:
    let_lengths_agree(targets, rows)
    if targets.shape != (len(rows),) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}: expected torch.int64 "
            f"({len(rows)},)"
        )
    check_device("targets", targets, rows)
    if not readable(targets):
        return
    if token_weights is not None:
        targets = targets[token_weights != 0]
    if not len(targets):
        return
    if not (targets.min() >= 0 and targets.max() < v):
        bad = targets[(targets < 0) | (targets >= v)][0].item()
        raise ValueError(
            f"targets holds {bad}: expected values in [0, {v}); give masked tokens weight 0, not "
            "-100"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, rows: Tensor) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected integers (S+1,)"
        )
    check_device("cu_seqlens", cu_seqlens, rows)
    if not readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != len(rows) or ends != sorted(ends):
        raise ValueError(
            f"cu_seqlens is {ends}: expected 0, then increasing ends, the last being {len(rows)}"
        )


# --- numbers ------------------------------------------------------------------------------------


def scalar(name: str, value: float | Tensor, rows: Tensor) -> Tensor:
    """Return a float or a tensor of one element as a 0-d tensor on the device of the rows."""
    dtype = statistics_dtype(rows)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected a float or a 0-d tensor"
            )
        return value.detach().reshape(()).to(rows.device, dtype)
    if name == "temperature" and not value > 0:
        raise ValueError(f"temperature is {value}: expected a number > 0")
    if torch.compiler.is_compiling():
        # A float that changes becomes an input of the graph where it is multiplied, but a constant
        # in `full`.
        return torch.ones((), dtype=dtype, device=rows.device) * value
    return torch.full((), value, dtype=dtype, device=rows.device)


def chunk_budget(chunk_bytes: int | None, hidden: Tensor) -> int:
    """Return the bytes of logits that may exist at a time; None: the default of the device."""
    if chunk_bytes is None:
        return CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: expected a number of bytes > 0")
    return chunk_bytes
