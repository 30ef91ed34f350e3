"""The dataclasses that are passed from stage to stage.

    tasks ─Example▶ rollout ─Rollout▶ rewards ─(B,G)▶ advantages ─(B,G)▶ packing
          ─PackedBatch▶ model ─hidden (N,D)▶ loss

Letters used in every shape: B prompts, G completions per prompt, S completions in a pack, T packed
tokens, N rows that carry loss, I images, P image patches, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .segments import Segments


@dataclass
class Example:
    """One item of a task, drawn or loaded.

    >>> Example("How many items are there in the image?", (scene,), "3")  # doctest: +SKIP
    """

    problem: str
    """The question as the user would ask it, without the prompt suffix.

    Where it holds `<image>`, it does so once for each image, which is shown in that place."""
    images: tuple[Image.Image, ...]
    """RGB images, shown before the question unless it marks their places; may be empty."""
    solution: str
    """The bare text of the answer, for example `3` or `145°`, without answer tags."""
    thinking: str = ""
    """A worked solution for supervised training; empty if there is none."""
    key: str = ""
    """What identifies the item: its parameters if drawn, its row or image path if loaded."""
    source: str = ""
    """Where the item was loaded from, for messages: `row 38 of train.jsonl`; empty if drawn."""
    extra: dict[str, Any] = field(default_factory=dict)
    """All other columns of the row, by name, as the data has them; for rewards and templates."""

    @property
    def name(self) -> str:
        """What messages call the item: its row, or its key."""
        return self.source or f"example {self.key!r}"


@dataclass
class Prompt:
    """An Example of L tokens as the model sees it; its tensors are on the CPU.

    A prompt with one 84×84 image has 36 patches, merged 2×2 into 9 `<|image_pad|>` tokens.
    """

    input_ids: torch.Tensor
    """(L,) int64."""
    position_ids: torch.Tensor
    """(3, L) int64: temporal, height and width positions of M-RoPE."""
    next_position: int
    """The position of a completion's first token, in all three axes: the largest position + 1."""
    pixel_values: torch.Tensor | None = None
    """(P, 3·2·p·p) float32 patches of p × p pixels, of all the prompt's images, or None."""
    image_grid_thw: torch.Tensor | None = None
    """(I, 3) int64: patches along time, height and width of each image, or None."""
    num_image_tokens: int = 0
    """How many of the L tokens are image tokens; each is replaced by one merged image feature."""
    opening: str = ""
    """What the chat template has already written of the answer, such as the `<think>` of a model
    that always thinks. It is part of a completion's text, and none of its tokens."""


@dataclass
class Rollout:
    """B prompts and G sampled completions of each; completion i belongs to prompt i // G."""

    examples: list[Example]
    """B examples."""
    prompts: list[Prompt | None]
    """B prompts; None for one whose completions another process has sampled, and learns."""
    completions: list[torch.Tensor]
    """B·G int64 tensors of token ids, with EOS if it was sampled; a completion may be empty."""
    texts: list[str]
    """B·G decoded completions, without special tokens, each with its prompt's `opening` before."""
    reasons: list[str]
    """B·G reasons why a completion ended: `eos`, `stop` (one of the stop texts) or `length`."""
    logprobs: list[torch.Tensor]
    """B·G fp32 tensors: each sampled token's log-probability under softmax(logits / temperature).

    It is the one before filters such as top-k.
    """
    num_generations: int = 1
    """G."""

    @property
    def finished(self) -> list[bool]:
        """Whether each of the B·G completions ended before the limit on its length."""
        return [reason != "length" for reason in self.reasons]


@dataclass
class PackedBatch:
    """Groups laid end to end in one row of T tokens, without padding.

    A group is a prompt and some of its completions; there are S completions in all.

    Row n of the loss is packed token `loss_rows[n]`: its hidden state predicts `targets[n]`. Prompt
    and image tokens never reach the LM head, and a completion's last token is no input, since it
    predicts nothing.

    A prompt `p p i` (p text tokens, i an image token) with completions `a b c` and `d` packs to
    input_ids = p p i a b, loss_rows = 2 3 4 2, targets = a b c d, loss_cu_seqlens = 0 3 4.
    """

    input_ids: torch.Tensor
    """(T,) int64."""
    position_ids: torch.Tensor
    """(3, T) int64: positions restart with every prompt; a completion's continue its prompt's."""
    segments: Segments
    """Which tokens attend to which."""
    loss_rows: torch.Tensor
    """(N,) int64: packed tokens whose next token is a completion token.

    A prompt's last token is listed once for each of its completions.
    """
    targets: torch.Tensor
    """(N,) int64: the next token of each loss row."""
    loss_cu_seqlens: torch.Tensor
    """(S+1,) int32: rows loss_cu_seqlens[s] … loss_cu_seqlens[s+1] belong to completion s."""
    sequence_ids: list[int]
    """S indices: which completion of the rollout each one is."""
    pixel_values: torch.Tensor | None = None
    """(P, 3·2·p·p) float32 patches of p × p pixels, of the prompts' images, in order, or None."""
    image_grid_thw: torch.Tensor | None = None
    """(I, 3) int64: patches along time, height and width of each image, or None."""
    row_data: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values of each loss row, (N,) float32, by name.

    These are advantages, token_weights and rollout_logp, and where the loss needs them ref_logp,
    old_logp, is_weights and entropy_weights.
    """

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the same batch with every tensor on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        moved["segments"] = self.segments.to(device)
        moved["row_data"] = {
            name: value.to(device, non_blocking=True) for name, value in self.row_data.items()
        }
        return PackedBatch(**moved)
