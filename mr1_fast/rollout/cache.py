"""Keys and values of the tokens that decoding looks back on: one pool for each layer, in spans.

Row 0 of a pool is scratch. Then come spans for prompts, each read by all of a prompt's samples, and spans for samples,
each as long as a completion can be.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import UserError


@dataclass(frozen=True)
class Layout:
    """How a pool is cut into spans."""

    prompt_spans: int
    """Prompts that can be held at once."""
    prompt_tokens: int
    """Tokens of such a span."""
    sample_spans: int
    """Samples that can be decoded at once."""
    sample_tokens: int
    """Tokens of such a span."""

    @property
    def tokens(self) -> int:
        """Of the whole pool."""
        return 1 + self.prompt_spans * self.prompt_tokens + self.sample_spans * self.sample_tokens

    def prompt_start(self, span: int) -> int:
        """The first token of a prompt's span."""
        return 1 + span * self.prompt_tokens

    def sample_start(self, span: int) -> int:
        """The first token of a sample's span."""
        return 1 + self.prompt_spans * self.prompt_tokens + span * self.sample_tokens

    def covers(self, other: "Layout") -> bool:
        """Whether what needs `other` can do with this one."""
        return (
            self.prompt_spans >= other.prompt_spans
            and self.prompt_tokens >= other.prompt_tokens
            and self.sample_spans >= other.sample_spans
            and self.sample_tokens >= other.sample_tokens
        )

    @classmethod
    def fitting(
        cls,
        lengths: list[int],
        num_generations: int,
        max_new_tokens: int,
        most_samples: int,
        budget: int | None,
    ) -> "Layout":
        """Room for as many samples at once as `most_samples` and `budget` (tokens; None: no limit) allow.

        The prompts of that many samples are held twice over where there is room, so that a group with one long sample
        does not keep others out. UserError where not even one prompt with one sample fits.
        """
        longest, count = max(lengths), len(lengths)
        for samples in range(min(most_samples, count * num_generations), 0, -1):
            needed = -(-samples // num_generations)
            smallest = cls(min(count, needed), longest, samples, max_new_tokens)
            if budget is None or smallest.tokens <= budget:
                spare = count if budget is None else (budget - smallest.tokens) // longest
                return cls(
                    min(count, 2 * needed, smallest.prompt_spans + spare),
                    longest,
                    samples,
                    max_new_tokens,
                )
        raise UserError(
            f"the longest prompt has {longest} tokens and a completion may have max_new_tokens = {max_new_tokens}, but "
            f"the KV cache has room for {budget}: shorten the prompts (--max-pixels with --shrink-images true), or "
            "lower --max-new-tokens."
        )


def head_size(config: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_bytes(text_model: nn.Module) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = text_model.config
    return (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * head_size(config)
        * text_model.norm.weight.itemsize
    )


class Pool:
    """Keys and values of all layers: `keys[layer]` and `values[layer]` are (tokens, Hkv, d)."""

    def __init__(self, text_model: nn.Module, layout: Layout):
        config, like = text_model.config, text_model.norm.weight
        shape = (
            config.num_hidden_layers,
            layout.tokens,
            config.num_key_value_heads,
            head_size(config),
        )
        self.layout = layout
        self.keys, self.values = (
            torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2)
        )
        # What a row has not written it does not read, but 0 · NaN is NaN where a kernel masks by multiplying.
        self.keys.zero_(), self.values.zero_()


class PromptKeys:
    """What transformers' layers take for a cache: stores the keys and values of packed prompts in a pool's rows."""

    def __init__(self, pool: Pool, rows: Tensor):
        self.pool, self.rows = pool, rows

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (1, Hkv, T, d); returns them, as nothing came before."""
        self.pool.keys[layer].index_copy_(0, self.rows, keys[0].transpose(0, 1))
        self.pool.values[layer].index_copy_(0, self.rows, values[0].transpose(0, 1))
        return keys, values

    def get_seq_length(self, *args) -> int:
        """Tokens before these: none."""
        return 0
