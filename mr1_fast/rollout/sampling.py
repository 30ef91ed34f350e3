"""Which token comes next: sampling from logits, with the filters that the settings ask for."""

import torch
from torch import Tensor

from ..config import Sampling
from ..kernels.decode.operations import sample
from ..kernels.dispatch import statistics_dtype


def draw(
    logits: Tensor,
    uniform: Tensor,
    sampling: Sampling,
    banned: tuple[int, ...],
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token (R,) int64 and its log-probability (R,) fp32 for each row of `logits` (R, V).

    `uniform` (R,) in [0, 1) chooses the token; `banned` are never drawn; `seen` (R, V) bool are tokens of the row's
    prompt and completion, for the repetition penalty. The log-probability is of softmax(logits / temperature) over all
    tokens, without filters (temperature 1 where greedy). A row with NaN gives token −1 and NaN.
    """
    if not sampling.filters:
        return sample(logits, uniform, sampling.temperature, banned)
    logits = logits.to(statistics_dtype(logits))
    token, _ = sample(
        _filtered(logits, sampling, banned, seen), uniform, sampling.temperature, banned
    )
    scaled = logits / (sampling.temperature or 1.0)
    chosen = scaled.gather(-1, token.clamp(min=0)[:, None]).squeeze(-1)
    return token, (chosen - scaled.logsumexp(-1)).float()


def _filtered(
    logits: Tensor, sampling: Sampling, banned: tuple[int, ...], seen: Tensor | None
) -> Tensor:
    """Logits before the temperature, −inf where a filter takes a token out; in the order of transformers' warpers."""
    logits = logits.clone()
    for token in banned:  # a graph cannot hold an index from the host
        logits[:, token].fill_(-torch.inf)
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    if sampling.temperature == 0:
        return logits
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
        outside = (
            ordered.cumsum(-1) - ordered >= sampling.top_p
        )  # the token that crosses top_p stays
        logits = logits.masked_fill(
            torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf
        )
    if sampling.min_p > 0:
        probabilities = (logits / sampling.temperature).softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
