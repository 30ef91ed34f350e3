"""What the loss functions accept: checked, with a ValueError that names the argument, and brought into one form."""

import torch
from torch import Tensor

from ..kernels.dispatch import statistics_dtype
from ..kernels.grpo.linear import CHUNK_BYTES
from ..kernels.grpo.objective import SURROGATES
from ..kernels.grpo.reference import spread

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def arguments_after_logits(
    rows, targets, advantages, token_weights, beta, temperature, old_logp, ref_logp, clip_low, clip_high, delta,
    surrogate, sapo_temperatures, ratio_level, cu_seqlens, is_weights, bias_corrected_kl,
) -> tuple:  # fmt: skip
    """The operators' arguments after the logits: checked, per token, contiguous, in the statistics' dtype."""
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate is {surrogate!r}: choose one of {', '.join(SURROGATES)}")
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"ratio_level is {ratio_level!r}: choose token or sequence")
    if delta is not None and surrogate != "clip":
        raise ValueError(
            f"delta bounds the ratio of surrogate 'clip', not of {surrogate!r}: leave it out"
        )
    if not min(sapo_temperatures) > 0:
        raise ValueError(f"sapo_temperatures is {sapo_temperatures}: expected two numbers > 0")
    # cispo's cap, 1 + clip_high, may be below 1: TRL and Liger give the cap itself, 0.2 unless it is set.
    bounds = {"clip_low": clip_low, "clip_high": clip_high} | (
        {} if delta is None else {"delta": delta}
    )
    for name, bound in bounds.items():
        least = -1 if surrogate == "cispo" and name == "clip_high" else 0
        if bound is None or not bound >= least:
            raise ValueError(f"{name} is {bound}: expected a number ≥ {least}")
    if ref_logp is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError(
            f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, rows)
    elif ratio_level == "sequence":
        raise ValueError(
            "ratio_level is 'sequence', but cu_seqlens is None: pass the (S+1,) bounds of the sequences"
        )

    def per_token(name: str, value: Tensor | None, per_sequence: bool = False) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor")
        sequences = (
            cu_seqlens is not None
            and per_sequence
            and value.ndim == 1
            and len(value) == len(cu_seqlens) - 1
        )
        if not sequences:
            _let_lengths_agree(value, rows)
        if not sequences and value.shape != (len(rows),):
            alternative = (
                f", or ({len(cu_seqlens) - 1},)" if cu_seqlens is not None and per_sequence else ""
            )
            alternative += (
                " (per-sequence values need cu_seqlens)"
                if cu_seqlens is None and per_sequence
                else ""
            )
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected ({len(rows)},){alternative}"
            )
        _check_device(name, value, rows)
        value = value.detach().to(statistics_dtype(rows))
        if value.shape != (len(rows),):
            value = spread(value, cu_seqlens, len(rows))
        return value.contiguous()

    return (
        targets.contiguous(),
        per_token("advantages", advantages, per_sequence=True),
        per_token("token_weights", token_weights),
        scalar("beta", beta, rows),
        scalar("temperature", temperature, rows),
        per_token("old_logp", old_logp),
        per_token("ref_logp", ref_logp),
        per_token("is_weights", is_weights, per_sequence=True),
        surrogate,
        [clip_low, clip_high, float("inf") if delta is None else delta, *sapo_temperatures],
        bias_corrected_kl,
    )


def check_logits(logits: Tensor, targets: Tensor, inplace: bool = False) -> Tensor:
    """The logits with unit column stride."""
    _check_plain("logits", logits)
    if logits.ndim != 2:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected (N, V), flatten batch and length first"
        )
    if logits.shape[1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected a vocabulary of at least 1"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(
            f"logits is {logits.dtype}: expected float32, bfloat16, float16 or float64"
        )
    _check_targets(targets, logits, logits.shape[1])
    unit_stride = logits.stride(1) == 1 or logits.shape[1] == 1
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        if logits.is_leaf:
            raise ValueError(
                f"inplace would overwrite logits of shape {tuple(logits.shape)}, which is a leaf that requires a "
                "gradient: pass the output of a layer, or inplace=False"
            )
        if not unit_stride:
            raise ValueError(
                f"inplace needs rows of unit stride, logits has strides {logits.stride()}: inplace=False"
            )
        if len(logits) > 1 and logits.stride(0) < logits.shape[1]:
            raise ValueError(
                f"inplace needs rows of their own, logits has strides {logits.stride()}: inplace=False"
            )
        if not torch.compiler.is_compiling() and _saved_by_producer(logits):
            raise ValueError(
                f"inplace would overwrite logits of shape {tuple(logits.shape)}, which {logits.grad_fn.name()} still "
                "needs for its own gradient: pass inplace=False"
            )
    return logits if unit_stride else logits.contiguous()


def _saved_by_producer(tensor: Tensor) -> bool:
    """Whether the operation that made this tensor keeps it for its backward, as exp or tanh do."""
    node = tensor.grad_fn
    for name in dir(node):
        if name.startswith("_saved_") and not name.startswith("_saved_raw"):
            saved = getattr(node, name, None)
            if (
                isinstance(saved, Tensor)
                and saved.data_ptr() == tensor.data_ptr()
                and tensor.numel()
            ):
                return True
    return False


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple:
    """hidden, weight and bias in the dtype that the products run in."""
    for name, value in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        _check_plain(name, value)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: expected (N, D), the packed rows that carry loss"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: expected (V, {hidden.shape[1]}) as hidden has"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is not None:
            _check_device(name, value, hidden)
    _check_targets(targets, hidden, weight.shape[0])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
    for name, value in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if value is not None and (value.dtype not in DTYPES or value.dtype != hidden.dtype):
            raise ValueError(
                f"{name} is {value.dtype}: expected float32, bfloat16, float16 or float64, as hidden is"
            )
    return hidden, weight, bias


def _let_lengths_agree(value: Tensor, rows: Tensor) -> None:
    """While compiling, state it: of rows that a mask picks, only the run knows the number, and comparing would fail."""
    if torch.compiler.is_compiling() and value.ndim == 1:
        torch._check(value.shape[0] == len(rows))


def _check_targets(targets: Tensor, rows: Tensor, v: int) -> None:
    _let_lengths_agree(targets, rows)
    if targets.shape != (len(rows),) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}: expected torch.int64 ({len(rows)},)"
        )
    _check_device("targets", targets, rows)
    readable = (
        targets.device.type == "cpu" and not torch.compiler.is_compiling()
    )  # elsewhere it would synchronise
    if readable and len(targets) and not (targets.min() >= 0 and targets.max() < v):
        bad = targets[(targets < 0) | (targets >= v)][0].item()
        raise ValueError(
            f"targets holds {bad}: expected values in [0, {v}); give masked tokens weight 0, not -100"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, rows: Tensor) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected integers (S+1,)"
        )
    _check_device("cu_seqlens", cu_seqlens, rows)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != len(rows) or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens is {ends}: expected 0, then increasing ends, the last being {len(rows)}"
            )


def _check_plain(name: str, value: Tensor | None) -> None:
    if hasattr(value, "device_mesh"):  # DTensor, without its import
        raise ValueError(
            f"{name} is a DTensor, of which this process holds a part: compute the loss inside the model's forward, "
            "where FSDP2 has gathered the weights (mr1_fast.integrations.head.add_head does)"
        )


def _check_device(name: str, value: Tensor, rows: Tensor) -> None:
    if value.device != rows.device:
        raise ValueError(
            f"{name} is on {value.device}: expected {rows.device}, where the logits or hidden states are"
        )


def scalar(name: str, value: float | Tensor, rows: Tensor) -> Tensor:
    """A 0-d tensor beside the rows, which kernels read at run time."""
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
        # The compiler makes a float that changes an input of the graph where it multiplies; in `full` it is a constant.
        return torch.ones((), dtype=dtype, device=rows.device) * value
    return torch.full((), value, dtype=dtype, device=rows.device)


def chunk_budget(chunk_bytes: int | None, hidden: Tensor) -> int:
    """Bytes of logits that may exist at a time; None: the default of the device."""
    if chunk_bytes is None:
        return CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: expected a number of bytes > 0")
    return chunk_bytes
