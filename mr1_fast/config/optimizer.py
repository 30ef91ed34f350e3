"""Settings of the optimizer: how long training takes, and how fast it learns."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimizerConfig:
    """How long training takes, how much it handles at once, and how fast it learns."""

    steps: int = 500
    """Number of training steps, each with one batch of prompts."""
    prompts_per_step: int = 16
    """Prompts in the batch of a step; R1-V has 16 from 1 per GPU × 2 accumulated × 8 GPUs."""
    train_samples: int | None = None
    """Train on this many samples only, reshuffled in every epoch; the paper's few-shot counting
    uses 100."""
    tokens_per_microbatch: int | Literal["auto"] = "auto"
    """Most tokens in one forward and backward pass; gradients accumulate over as many passes as a
    batch needs. `auto` takes what fits into memory and is fastest by the memory plan, on a CPU
    4,096 or one prompt with its completion."""
    optimizer: Literal["auto", "adamw", "adamw_exact", "adamw_stochastic", "adamw8bit"] = "auto"
    """Optimizer: PyTorch's AdamW (adamw); AdamW with 8-bit states whose bf16 weights a 16-bit
    remainder makes exact in fp32 (adamw_exact) or are rounded stochastically (adamw_stochastic);
    bitsandbytes' AdamW8bit (adamw8bit). `auto` is adamw_exact if bf16 weights are trained, else
    adamw."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or decaying to 0 at the last step."""
    warmup_fraction: float = 0.0
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
