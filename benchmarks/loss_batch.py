"""Inputs of the loss that all benchmarks of it share, and R1-V's own loss in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from mr1_fast.loss import token_logprobs

BETA, CLIP, SEQUENCES = 0.04, 0.2, 4


class Batch(NamedTuple):
    """Logits and the loss' other inputs, for S sequences of equal length: all averages agree."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    advantages: Tensor  # (S,)
    old_logp: Tensor  # (N,)
    ref_logp: Tensor  # (N,)

    @classmethod
    def random(cls, tokens: int, vocab: int, dtype: torch.dtype, device: str) -> "Batch":
        """A batch with normal logits of standard deviation 2."""
        torch.manual_seed(0)
        logits = torch.empty(tokens, vocab, dtype=dtype, device=device).normal_(std=2.0)
        targets = torch.randint(vocab, (tokens,), device=device)
        return cls.near(logits, targets, token_logprobs(logits, targets)[0])

    @classmethod
    def near(cls, logits: Tensor, targets: Tensor, logp: Tensor) -> "Batch":
        """A batch whose old and reference log-probs are near `logp`; some ratios are clipped."""
        if len(targets) % SEQUENCES:
            raise SystemExit(f"--tokens is {len(targets)}: expected a multiple of {SEQUENCES}")
        around = [logp + 0.15 * torch.randn_like(logp) for _ in range(2)]
        return cls(logits, targets, torch.linspace(-1, 2, SEQUENCES, device=logp.device), *around)

    def per_sequence(self, tensor: Tensor) -> Tensor:
        """The tensor (N, …) as (S, L, …)."""
        return tensor.view(SEQUENCES, -1, *tensor.shape[1:])

    @property
    def loss_arguments(self) -> dict:
        """The arguments of `grpo_loss` after logits and targets."""
        n = len(self.targets)
        return dict(
            advantages=self.advantages.repeat_interleave(n // SEQUENCES, output_size=n),
            token_weights=torch.full_like(self.old_logp, 1 / n),
            beta=BETA,
            old_logp=self.old_logp,
            ref_logp=self.ref_logp,
        )


def eager_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The loss as R1-V's grpo_trainer.py computes it, with PPO's clip for the old log-probs.

    Its `_get_per_token_logps` loops over sequences and takes log_softmax in the dtype of the
    logits. Behind it come k3 and the masked mean of each sequence.
    """
    rows = []
    for sequence, ids in zip(
        batch.per_sequence(logits), batch.per_sequence(batch.targets), strict=True
    ):
        rows.append(torch.gather(sequence.log_softmax(dim=-1), 1, ids.unsqueeze(1)).squeeze(1))
    logp = torch.stack(rows)
    old, ref = batch.per_sequence(batch.old_logp), batch.per_sequence(batch.ref_logp)
    ratio, advantages = torch.exp(logp - old), batch.advantages.unsqueeze(1)
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    policy = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    mask = torch.ones_like(old)
    return ((-(policy - BETA * kl) * mask).sum(1) / mask.sum(1)).mean()
