"""Which token comes next: the settings of sampling, and the logits' filters."""

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.decode.operations import sample
from ..kernels.dispatch import statistics_dtype


@dataclass
class Sampling:
    """How completions are drawn; all filters are off by default, and none comes from a model's generation_config."""

    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Divides the logits, in the loss, too. 0 is greedy, which training cannot use."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this much probability."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies a negative one, of tokens that were there (Keskar et al., 2019)."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion, which keeps them; for example '["</answer>"]'."""

    @classmethod
    def of(cls, config: "Sampling", **changes) -> "Sampling":
        """The sampling settings among others, with changes."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)} | changes)

    def check_sampling(self) -> None:
        """Raise UserError for values that mean nothing."""
        for name, holds, must in (
            ("max_new_tokens", self.max_new_tokens >= 0, "must not be negative"),
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < math.inf,
                "must be 0 or from 0.001 on",
            ),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "must not be negative (0: off)"),
            ("min_p", 0 <= self.min_p < 1, "must lie in [0, 1)"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "must be greater than 0 (1: off)",
            ),
            (
                "stop",
                isinstance(self.stop, list) and all(self.stop),
                "must be a list of texts, none of them empty",
            ),
        ):
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}, but {must}.")

    @property
    def filters(self) -> bool:
        """Whether anything but the temperature changes what is drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1


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
