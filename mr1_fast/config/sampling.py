"""Settings of sampling: how completions are drawn."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UserError


@dataclass
class Sampling:
    """How completions are sampled; a model's own generation_config.json is ignored."""

    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Number that divides the logits, in sampling and in the loss; 0 is greedy, for evaluation."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with this probability; 1 is off."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is off."""
    min_p: float = 0.0
    """Draw only tokens with at least this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Number that makes tokens of the prompt and the completion less likely: it divides their
    positive logits and multiplies their negative ones (Keskar et al., 2019); 1 is off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion and stay in it, for example '["</answer>"]'."""

    @classmethod
    def of(cls, config: "Sampling", **changes: Any) -> "Sampling":
        """The sampling settings that `config` holds among its others, with `changes`."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)} | changes)

    def check_sampling(self) -> None:
        """Raise UserError for values with which nothing can be sampled."""
        usable_temperature = self.temperature == 0 or 1e-3 <= self.temperature < math.inf
        usable_penalty = 0 < self.repetition_penalty < math.inf
        usable_stop = isinstance(self.stop, list) and all(self.stop)
        for name, holds, must in (
            ("max_new_tokens", self.max_new_tokens >= 0, "must not be negative"),
            ("temperature", usable_temperature, "must be 0 or from 0.001 on"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "must not be negative (0: off)"),
            ("min_p", 0 <= self.min_p < 1, "must lie in [0, 1)"),
            ("repetition_penalty", usable_penalty, "must be greater than 0 (1: off)"),
            ("stop", usable_stop, "must be a list of texts, none of them empty"),
        ):
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}, but {must}.")

    @property
    def filters(self) -> bool:
        """Whether anything but the temperature changes which tokens are drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1
