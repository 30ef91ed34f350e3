"""TRL's and Liger's names for a GRPO objective, which are the same, in the terms of this package."""

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
