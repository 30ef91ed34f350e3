"""Settings of the algorithm."""

from dataclasses import dataclass
from typing import Literal

from .objective import Algorithm


@dataclass
class AlgorithmConfig:
    """How the policy learns from its rewards."""

    algo: Algorithm = "grpo-d"
    """Algorithm: GRPO with the schedule of β (grpo-d), GRPO with a constant β (grpo), Dr. GRPO,
    DAPO, GSPO, CISPO, or supervised fine-tuning (sft). Each is a set of defaults for the settings
    of the objective and of β, which docs/objectives.md lists."""
    preset: Literal["auto", "counting", "geometry"] = "auto"
    """Task whose β_min, β_max, w/t, β and α of the paper are the defaults; `auto` is the task that
    is trained."""
    sft_target: Literal["solution", "answer"] = "solution"
    """What supervised fine-tuning imitates: the reasoning with the answer, or the answer alone,
    which suits data without a column `thinking`."""
    num_generations: int = 8
    """Completions sampled for each prompt: the group size G."""
    updates_per_batch: int = 1
    """Optimizer steps on each batch of completions: μ in the GRPO paper."""
    importance_cap: float = 0.0
    """Largest importance weight π/π_rollout of a token, which corrects for the difference between
    the kernels and rounding of training and rollout (2 is usual); 0 is off, since the difference is
    small (the metric `rollout_gap_mean`) and the weights cost a forward pass."""
    reference: Literal["resident", "offload", "8bit"] = "resident"
    """Where the reference model of the KL is kept when all weights are trained: on the device
    (resident), in host memory, once for all processes of a machine, from which layers are copied
    ahead of their use (offload), or on the device in 8 bits. With --lora the reference is the
    policy without its adapters and takes no memory."""
