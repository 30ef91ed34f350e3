"""A GRPO objective and a padded batch as TRL and Liger give them, alike, in the terms of this package."""

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
"""loss_type → the average of `token_weights` that it takes. Their "vespo" is what our loss does not express."""


def objective_options(
    loss_type: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    sapo_temperatures: tuple[float, float],
    bias_corrected_kl: bool,
) -> dict:
    """Keyword arguments of `linear_grpo_loss` and `policy_loss_ref`. `epsilon_high` is cispo's cap itself."""
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


def packed_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places (N,) of mask (B, T) that carry loss, counted row by row, and their cu_seqlens (B+1,). Waits for a GPU."""
    counts = mask != 0
    return counts.flatten().nonzero().squeeze(-1), nn.functional.pad(
        counts.sum(-1).cumsum(0), (1, 0)
    )


def per_token(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """(B, T), as mask is, of values per sequence, (B,) or (B, 1), or per token. Raises ValueError."""
    b, length = mask.shape
    if value.shape not in ((b,), (b, 1), (b, length)):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected ({b},), ({b}, 1) or ({b}, {length})"
        )
    return (value if value.ndim == 2 else value[:, None]).detach().expand(b, length)
