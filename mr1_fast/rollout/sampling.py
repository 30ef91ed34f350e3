"""Which token comes next: sampling from logits, with the filters that the settings ask for."""

import torch
from torch import Tensor

from ..config import Sampling
from ..kernels.decode.operations import sample
from ..kernels.dispatch import statistics_dtype


def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    sampling: Sampling,
    banned: tuple[int, ...],
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits (R, V): (R,) int64, and its log-probability: (R,) fp32.

    uniform: (R,) fp32 in [0, 1), which decides the token.
    banned: tokens that are never drawn.
    seen: (R, V) bool, the tokens of the row's prompt and completion, for the repetition penalty.

    The log-probability is that of softmax(logits / temperature) over all tokens, without filters
    (at temperature 1 where sampling is greedy). A row with NaN gives token −1 and NaN.
    """
    if not sampling.filters:
        return sample(logits, uniform, sampling.temperature, banned)

    logits = logits.to(statistics_dtype(logits))
    filtered = _filtered(logits, sampling, banned, seen)
    token, _ = sample(filtered, uniform, sampling.temperature, banned)
    scaled = logits / (sampling.temperature or 1.0)
    chosen = scaled.gather(-1, token.clamp(min=0)[:, None]).squeeze(-1)
    return token, (chosen - scaled.logsumexp(-1)).float()


def _filtered(
    logits: Tensor, sampling: Sampling, banned: tuple[int, ...], seen: Tensor | None
) -> Tensor:
    """Set logits, not yet divided by the temperature, to −inf where a filter takes a token out.

    The filters follow in the order of transformers' warpers.
    """
    logits = logits.clone()
    for token in banned:  # one by one: a CUDA graph cannot hold an index that comes from the host
        logits[:, token].fill_(-torch.inf)
    if seen is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits

    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        outside = before >= sampling.top_p  # so the token that crosses top_p stays
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
        logits = logits.masked_fill(outside, -torch.inf)
    if sampling.min_p > 0:
        probabilities = (logits / sampling.temperature).softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
