"""The dataclasses that pass between stages.

    tasks ─Example▶ rollout ─Rollout▶ rewards ─(B,G)▶ advantages ─(B,G)▶ packing ─PackedBatch▶ model ─hidden (N,D)▶ loss

Letters used in every shape: B prompts, G completions per prompt, S completions in a pack, T packed tokens,
N rows that carry loss, I images, P image patches, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from PIL import Image

from .segments import Segments


@dataclass
class Example:
    """One task item, as drawn or as loaded.

    >>> Example(problem="How many items are there in the image?", images=(scene,), solution="3")  # doctest: +SKIP
    """

    problem: str
    """The question as the user would ask it, without the prompt suffix."""
    images: tuple[Image.Image, ...]
    """RGB images, shown before the question; may be empty."""
    solution: str
    """The bare answer text, for example `3` or `145°` (no answer tags)."""
    thinking: str = ""
    """A worked solution for supervised training; empty where there is none."""
    key: str = ""
    """What identifies the item: its parameters if drawn, its row or image path if loaded."""


@dataclass
class Prompt:
    """An Example as the model sees it, on the CPU; L is its length in tokens.

    A prompt with one 84×84 image has 36 patches, merged 2×2 into 9 `<|image_pad|>` tokens.
    """

    input_ids: torch.Tensor
    """(L,) int64."""
    position_ids: torch.Tensor
    """(3, L) int64: temporal, height and width positions of M-RoPE."""
    next_position: int
    """Where a completion continues, in all three axes: the largest position + 1."""
    pixel_values: torch.Tensor | None = None
    """(P, 3·2·14·14) float32 patches of all the prompt's images, or None."""
    image_grid_thw: torch.Tensor | None = None
    """(I, 3) int64: patches along time, height and width of each image, or None."""
    num_image_tokens: int = 0
    """How many of the L tokens are image tokens; each takes one merged image feature."""


@dataclass
class Rollout:
    """B prompts and G sampled completions of each; completion i belongs to prompt i // G."""

    examples: list[Example]
    """B examples."""
    prompts: list[Prompt]
    """B prompts."""
    completions: list[torch.Tensor]
    """B·G int64 tensors of token ids, EOS included where it was sampled; may be empty."""
    texts: list[str]
    """B·G decoded completions, without special tokens."""
    reasons: list[str]
    """B·G: why each ended: `eos`, `stop` (one of the stop texts) or `length`."""
    logprobs: list[torch.Tensor]
    """B·G fp32: log-probability of each token as sampled, under softmax(logits / temperature) without filters."""
    num_generations: int = 1
    """G."""

    @property
    def finished(self) -> list[bool]:
        """B·G: whether the completion ended by itself."""
        return [reason != "length" for reason in self.reasons]


@dataclass
class PackedBatch:
    """Groups laid end to end in one row of T tokens, without padding: a prompt once, then S completions in all.

    Row n of the loss is packed token `loss_rows[n]`: its hidden state predicts `targets[n]`. Prompt and image
    tokens never reach the LM head, and a completion's last token is no input, since it predicts nothing.

    A prompt `p p i` (p text, i image token) with completions `a b c` and `d` packs to input_ids = p p i a b,
    loss_rows = 2 3 4 2, targets = a b c d, loss_cu_seqlens = 0 3 4.
    """

    input_ids: torch.Tensor
    """(T,) int64."""
    position_ids: torch.Tensor
    """(3, T) int64; restarts with every prompt, and every completion continues from its prompt."""
    segments: Segments
    """Which tokens attend to which."""
    loss_rows: torch.Tensor
    """(N,) int64: packed positions whose next token is a completion token; a prompt's last one for each completion."""
    targets: torch.Tensor
    """(N,) int64: those next tokens."""
    loss_cu_seqlens: torch.Tensor
    """(S+1,) int32: rows loss_cu_seqlens[s] … loss_cu_seqlens[s+1] belong to completion s."""
    sequence_ids: list[int]
    """S: which completion of the rollout each one is."""
    pixel_values: torch.Tensor | None = None
    """(P, 3·2·14·14) float32 patches of the prompts' images, in order, or None."""
    image_grid_thw: torch.Tensor | None = None
    """(I, 3) int64, or None."""
    row_data: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per-row float32 tensors (N,): advantages, token_weights, rollout_logp, and ref_logp, old_logp, is_weights."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        moved["segments"] = self.segments.to(device)
        moved["row_data"] = {
            name: value.to(device, non_blocking=True) for name, value in self.row_data.items()
        }
        return PackedBatch(**moved)
