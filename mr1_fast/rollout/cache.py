"""Keys and values of the tokens that decoding attends to: one pool for each layer, cut into spans.

Token 0 of a pool is scratch. Then come the spans for prompts, each read by all of its prompt's
samples, and the spans for samples, each as long as a completion can be.
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
    """Number of spans for prompts: prompts that can be held at once."""
    prompt_tokens: int
    """Tokens of a prompt's span."""
    sample_spans: int
    """Number of spans for samples: samples that can be decoded at once."""
    sample_tokens: int
    """Tokens of a sample's span."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole pool."""
        return 1 + self.prompt_spans * self.prompt_tokens + self.sample_spans * self.sample_tokens

    def prompt_start(self, span: int) -> int:
        """Compute the first token of a prompt's span (a number, or an array of numbers)."""
        return 1 + span * self.prompt_tokens

    def sample_start(self, span: int) -> int:
        """Compute the first token of a sample's span (a number, or an array of numbers)."""
        return 1 + self.prompt_spans * self.prompt_tokens + span * self.sample_tokens

    def covers(self, other: "Layout") -> bool:
        """Tell whether this layout has at least the spans of `other`, and spans as long."""
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
        more: bool = False,
    ) -> "Layout":
        """Lay out as many samples at once as `most_samples` and `budget` allow.

        lengths: tokens of each prompt.
        budget: most tokens of the pool; None for no limit.
        more: whether other prompts follow these.

        Where there is room, twice as many prompts are held as that many samples need, so that a
        group with one long sample does not keep others out. Raises UserError where not even one
        prompt with one sample fits.
        """
        longest, count = max(lengths), len(lengths)
        for samples in range(min(most_samples, count * num_generations), 0, -1):
            needed = -(-samples // num_generations)
            smallest = cls(needed, longest, samples, max_new_tokens)
            if budget is None or smallest.tokens <= budget:
                held = needed * min(2, num_generations)  # a group of one keeps nothing out
                prompts = held if more else min(count, held)
                if budget is not None:
                    prompts = min(prompts, needed + (budget - smallest.tokens) // longest)
                return cls(prompts, longest, samples, max_new_tokens)
        raise UserError(
            f"the longest prompt has {longest} tokens and a completion may have "
            f"max_new_tokens = {max_new_tokens}, but the KV cache has room for {budget}: shorten "
            "the prompts (--max-pixels with --shrink-images true), or lower --max-new-tokens."
        )


def head_size(config: PretrainedConfig) -> int:
    """Read the channels of an attention head from a text model's configuration.

    All heads together may be wider than the hidden states, as in Qwen3 4B.
    """
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_bytes(text_model: nn.Module) -> int:
    """Compute the bytes of one token's keys and values in all layers."""
    config = text_model.config
    elements = config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    return 2 * elements * text_model.norm.weight.itemsize


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
        # No row reads what was not written, but 0 · NaN is NaN where a kernel masks by multiplying.
        self.keys.zero_()
        self.values.zero_()


class PromptKeys:
    """Stands for a cache in transformers' layers, and stores the keys and values of packed prompts.

    rows: (T,) int64, the tokens of the pool that the T packed tokens are stored in.
    """

    def __init__(self, pool: Pool, rows: Tensor):
        self.pool, self.rows = pool, rows

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (1, Hkv, T, d), and return them, since no tokens came before."""
        self.pool.keys[layer].index_copy_(0, self.rows, keys[0].transpose(0, 1))
        self.pool.values[layer].index_copy_(0, self.rows, values[0].transpose(0, 1))
        return keys, values

    def get_seq_length(self, *args) -> int:
        """Return the number of tokens that came before, 0."""
        return 0
