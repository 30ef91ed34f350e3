"""x"""

from dataclasses import replace

import torch

from ..config import TrainConfig
from ..model.forward import base_model, lm_head_weight
from ..model.policy import Policy
from .advice import advice
from .out_of_memory import EVALUATED, SAMPLED, TOKENS
from .plan import Plan, make_plan, usable_bytes


class RunMemory:
    """The plan of a run that is about to start, and on CUDA what its steps then took."""

    def __init__(self, policy: Policy, config: TrainConfig):
        weight, self.device = lm_head_weight(policy.model), policy.device
        self.config = replace(
            config, device=policy.device.type, dtype=str(weight.dtype).removeprefix("torch.")
        )
        self.model_config = base_model(policy.model).config
        self.plan, self.problem = Plan({}), ""
        self.measured: dict[str, float] = {}
        try:
            self.plan = make_plan(self.config, self.model_config, usable=self.usable)
        except Exception as error:  # a plan informs: a model that it does not understand can be trained all the same
            self.problem = f"no memory plan could be made ({type(error).__name__}: {error})"

    @property
    def usable(self) -> float | None:
        """Bytes of the card; None for a CPU."""
        if self.config.device != "cuda":
            return None
        whole = torch.cuda.get_device_properties(self.device).total_memory
        return whole * torch.cuda.get_per_process_memory_fraction(self.device)

    def amounts(self) -> dict[str, int]:
        """What the run does at once, for its Room; without a plan, the KV cache has what a step's samples need."""
        longest = (
            self.config.max_prompt_tokens + self.config.num_generations * self.config.max_new_tokens
        )
        needed = 1 + self.config.prompts_per_step * longest
        caches = {SAMPLED: "rollout", EVALUATED: "evaluation"}
        tokens = {name: self.plan.cache_tokens.get(phase, needed) for name, phase in caches.items()}
        return {TOKENS: self.config.tokens_per_microbatch, **tokens}

    def record(self, metrics: dict[str, float]) -> None:
        """Keep the largest of the peaks that a step has measured."""
        for phase in self.plan.phases:
            peak = metrics.get(f"peak_gib_{phase}", 0) * 2**30
            if peak:
                self.measured[phase] = max(peak, self.measured.get(phase, 0))

    def render(self) -> str:
        """The plan, and what was measured so far beside it."""
        return self.problem or self.plan.render(self.usable, self.measured)

    def advise(self) -> str:
        """What to change after memory ran out; where the plan had thought that it fits, a tenth less is aimed at."""
        room = min(self.usable or self.plan.peak, 0.9 * self.plan.peak) if self.plan.phases else 0
        try:
            changes = advice(self.config, self.model_config, room / usable_bytes(1.0))
        except Exception:  # as above: what was the matter must not be hidden by a plan that fails
            changes = []
        changes = changes or ["lower --tokens-per-microbatch, --prompts-per-step or --max-pixels"]
        # What a checkpoint holds cannot be changed on the way.
        anew = [
            f"{c} (in a new run)" if c.startswith(("--optimizer", "--lora", "--load")) else c
            for c in changes
        ]
        return f"To make room: {'; '.join(anew)}."
