"""A run's memory: its plan before it starts, and beside it what its steps then take on CUDA."""

from dataclasses import replace

import torch

from ..config import TrainConfig
from ..distributed import SINGLE, World
from ..identity import FIXED
from ..model.families import base_model, family_of
from ..model.forward import lm_head_weight, trained_layers
from ..model.policy import Policy
from .advice import advice
from .choice import Choice
from .meta_model import Recomputed
from .out_of_memory import EVALUATION_CACHE, PACK_TOKENS, ROLLOUT_CACHE
from .plan import GIB, Plan, make_plan
from .resident import workspace

LOWER = "lower --tokens-per-microbatch, or in a new run --prompts-per-step or {}"
"""Advice where no plan could be made, or none of its changes helps; a last setting is to name."""
NEW_RUN = tuple(f"--{name.replace('_', '-')}" for name in FIXED)
"""Flags that no run can go on with."""


class RunMemory:
    """The plan of a run that is about to start, and the peaks that its steps have measured.

    `plan` has no phases, and `problem` says why, for a model that cannot be planned: a plan
    informs, and such a model can be trained all the same.

    `choice` is what the run does where its settings leave it open, on all processes alike. `kind`
    is how they are sharded, none, optimizer or full.
    """

    def __init__(
        self, policy: Policy, config: TrainConfig, world: World = SINGLE, kind: str = "none"
    ):
        weight, self.device = lm_head_weight(policy.model), policy.device
        dtype = str(weight.dtype).removeprefix("torch.")
        self.config = replace(config, device=policy.device.type, dtype=dtype, sharding=kind)
        self.world = world
        is_cuda = policy.device.type == "cuda"
        self.usable = world.least(usable_memory(policy.device, world.size)) if is_cuda else None
        """Bytes that each process may use of its card; None for a CPU."""
        self.model_config = base_model(policy.model).config
        self.plan, self.problem = Plan({}), ""
        self.measured: dict[str, float] = {}
        try:
            self.plan = make_plan(
                self.config, self.model_config, usable=self.usable, processes=world.size
            )
            self.choice = self.plan.choice
        except Exception as error:  # whatever a model that we do not know may raise
            self.problem = f"no memory plan could be made ({type(error).__name__}: {error})"
            layers = Recomputed(*trained_layers(policy.model))
            self.choice = Choice.without_plan(config, layers, is_cuda)

    def amounts(self) -> dict[str, int]:
        """Tokens that the run computes on or holds at once, by the names that MemoryLimits uses.

        Without a plan the KV cache has the tokens that all samples of a step need.
        """
        config = self.config
        longest_group = config.max_prompt_tokens + config.num_generations * config.max_new_tokens
        needed = 1 + -(-config.prompts_per_step // self.world.size) * longest_group
        planned = self.plan.cache_tokens
        return {
            PACK_TOKENS: self.choice.tokens,
            ROLLOUT_CACHE: planned.get("rollout", needed),
            EVALUATION_CACHE: planned.get("evaluation", needed),
        }

    def record(self, metrics: dict[str, float]) -> None:
        """Take a step's measured peaks, `peak_gib_<phase>`, and keep the largest of each phase."""
        for phase in self.plan.phases:
            peak = metrics.get(f"peak_gib_{phase}", 0) * GIB
            if peak:
                self.measured[phase] = max(peak, self.measured.get(phase, 0))

    def render(self) -> str:
        """The plan as a table, with the peaks measured so far."""
        if self.problem:
            return f"{self.problem}\n{self.choice}"
        return self.plan.render(self.usable, self.measured)

    def advise(self) -> str:
        """A sentence that says what to change after the run was out of memory.

        A plan that fits was too low: then the advice aims at a tenth less than was planned.
        """
        changes = []
        if self.plan.phases:
            aim = min(self.usable or self.plan.peak, 0.9 * self.plan.peak)
            # What `auto` has planned was too much, so it is no advice to plan it once more.
            config = replace(self.config, tokens_per_microbatch=self.choice.tokens)
            if config.recompute == "auto":
                config.recompute = "all"
            try:
                changes = advice(config, self.model_config, aim, self.world.size)
            except Exception:  # an error here would hide the one that is being reported
                changes = []
        marked = [
            f"{change} (in a new run)" if change.startswith(NEW_RUN) else change
            for change in changes or [self._lower()]
        ]
        return f"To make room: {'; '.join(marked)}."

    def _lower(self) -> str:
        has_images = family_of(self.model_config).vision is not None
        return LOWER.format("--max-pixels" if has_images else "--max-new-tokens")


def usable_memory(device: torch.device, processes: int = 1) -> float:
    """Bytes of a card that a process may use: its share, but not what others use now.

    A screen or another process may hold some, which `auto` would otherwise count as free.
    `processes` is how many train together, each on its card.
    """
    free, whole = torch.cuda.mem_get_info(device)
    share = whole * torch.cuda.get_per_process_memory_fraction(device)
    own = torch.cuda.memory_reserved(device) + workspace(processes)
    return min(share, free + own)
