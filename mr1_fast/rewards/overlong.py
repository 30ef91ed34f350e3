"""The penalty of completions that come close to the limit on their length, or reach it."""


def overlong_rewards(lengths: list[int], max_new_tokens: int, share: float) -> list[float]:
    """Return a number from 0 to −1 for each completion, of these lengths in tokens.

    It falls linearly over the last `share` > 0 of the `max_new_tokens` that a completion may have
    (soft overlong punishment, DAPO, arXiv 2503.14476, equation 13):

        min(0, max(−1, ((L_max − L_cache) − |y|) / L_cache))

    with L_max = max_new_tokens and L_cache = share · L_max.

    >>> overlong_rewards([8, 9, 10], max_new_tokens=10, share=0.2)
    [0.0, -0.5, -1.0]
    """
    margin = share * max_new_tokens
    # As (L_max − |y|) / L_cache − 1, so that the limit itself gives −1 without a rounding.
    return [min(0.0, max(-1.0, (max_new_tokens - n) / margin - 1)) for n in lengths]
