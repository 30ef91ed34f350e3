"""Translate loss settings and padded batches of TRL and Liger into arguments of `mr1_fast.loss`.

Both libraries use the same names for their losses, so their modules share this translation.
"""

from torch import Tensor, nn

AVERAGES = {
    "grpo": "grpo",
    "sapo": "grpo",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "cispo": "dapo",
    "luspo": "luspo",
}
"""A trainer's loss_type → the loss_type of `token_weights` that averages over tokens as it does.

The trainers' "vespo" is missing: `mr1_fast.loss` cannot express its surrogate.
"""


def loss_options(
    loss_type: str,
    *,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    sapo_temperatures: tuple[float, float],
    bias_corrected_kl: bool,
) -> dict:
    """Return a trainer's settings as keyword arguments of `linear_grpo_loss` and `policy_loss_ref`.

    `level` is "token" or "sequence". For cispo, `epsilon_high` is the cap of the ratio itself; for
    other losses the cap is 1 + epsilon_high. `delta` bounds the ratio of clipped losses and is
    dropped for others.
    """
    surrogate = loss_type if loss_type in ("cispo", "sapo") else "clip"
    return {
        "surrogate": surrogate,
        "clip_low": epsilon_low,
        "clip_high": epsilon_high - 1 if surrogate == "cispo" else epsilon_high,
        "delta": delta if surrogate == "clip" else None,
        "sapo_temperatures": sapo_temperatures,
        "ratio_level": level,
        "bias_corrected_kl": bias_corrected_kl,
    }


def rows_with_loss(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat positions (N,) at which mask (B, T) is not 0, and their cu_seqlens (B+1,).

    On a GPU this synchronises, because the host must know N.
    """
    counts = mask != 0
    rows = counts.flatten().nonzero().squeeze(-1)
    return rows, nn.functional.pad(counts.sum(-1).cumsum(0), (1, 0))


def per_token(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """Return `value`, detached, in the shape of mask (B, T).

    A value per sequence, (B,) or (B, 1), is repeated over T. Raises ValueError, which calls the
    value `name`, for any other shape.
    """
    b, length = mask.shape
    if value.shape not in ((b,), (b, 1), (b, length)):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected ({b},), ({b}, 1) or ({b}, {length})"
        )
    return (value if value.ndim == 2 else value[:, None]).detach().expand(b, length)
