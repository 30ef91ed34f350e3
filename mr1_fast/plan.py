"""Will it fit? `python -m mr1_fast.plan --vram 24 [any setting of mr1_fast.train]`: bytes by phase and component.

From the configuration alone: no weights, no GPU, no network. The worst case is planned: prompts and completions of full
length, the largest images, full packs.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from transformers import PretrainedConfig

from .command_line import parse_settings
from .config import TrainConfig, profile_defaults
from .errors import UserError, exit_on_user_error
from .evaluate import BATCH_SIZE
from .model.forward import base_model, lm_head_weight
from .model.known import find_model_config
from .model.load import Policy
from .phases import Moment, Step
from .room import EVALUATED, SAMPLED, TOKENS
from .workload import Workload, image_tokens, patches_of

USABLE = 23.6 / 24
"""GiB that CUDA offers of each GB of a card's name (an RTX 3090 or 4090 with 24 GB: 23.6 GiB)."""
COMPONENTS = (
    "weights",
    "remainder",
    "optimizer",
    "reference",
    "gradients",
    "KV cache",
    "activations",
    "loss head",
    "workspace",
)


@dataclass
class Plan:
    """Bytes by phase and component, at the moment of each phase that needs most."""

    phases: dict[str, Moment]
    """Bytes of each component, by phase: rollout, reference, update, and evaluation where the run has one."""
    cache_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that the KV cache holds at most, by phase: rollout, evaluation."""

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(map(self.total, self.phases))

    def excess(self, usable: float) -> float:
        """Bytes beyond `usable`, summed over phases; 0 where it fits."""
        return sum(max(0, self.total(phase) - usable) for phase in self.phases)

    def render(self, usable: float | None = None, measured: dict[str, float] | None = None) -> str:
        """The table; with `usable` bytes, the headroom; with `measured` bytes of tensors by phase, those beside it.

        What CUDA takes besides tensors is not measured: the planned workspace is added.
        """
        unit, size = ("GiB", 2**30) if self.peak >= 4 * 2**30 else ("MiB", 2**20)
        rows = [(unit, *self.phases)]
        for component in COMPONENTS:
            sizes = [moment.get(component, 0) for moment in self.phases.values()]
            if any(sizes):
                rows.append((component, *(f"{part / size:.2f}" for part in sizes)))
        rows.append(("total", *(f"{self.total(phase) / size:.2f}" for phase in self.phases)))
        lines = [f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
        lines.insert(-1, "-" * len(lines[0]))
        if measured:
            besides = {phase: moment.get("workspace", 0) for phase, moment in self.phases.items()}
            cells = (f"{(measured[p] + besides[p]) / size:.2f}" if p in measured else "–" for p in self.phases)
            lines.append(f"{'measured':<12}" + "".join(f"{cell:>12}" for cell in cells))
        if usable is not None:
            lines.append(
                f"peak {self.peak / size:.2f} {unit} of {usable / size:.2f} usable: "
                f"{abs(usable - self.peak) / size:.2f} {unit} {'to spare' if self.peak <= usable else 'too much'}"
            )
        return "\n".join(lines)


class RunMemory:
    """The plan of a run that is about to start, and on CUDA what its steps then took."""

    def __init__(self, policy: Policy, config: TrainConfig):
        weight, self.device = lm_head_weight(policy.model), policy.device
        self.config = replace(config, device=policy.device.type, dtype=str(weight.dtype).removeprefix("torch."))
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
        longest = self.config.max_prompt_tokens + self.config.num_generations * self.config.max_new_tokens
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
        anew = [f"{c} (in a new run)" if c.startswith(("--optimizer", "--lora", "--load")) else c for c in changes]
        return f"To make room: {'; '.join(anew)}."


def make_plan(
    config: TrainConfig, model_config: PretrainedConfig, workload: Workload | None = None, usable: float | None = None
) -> Plan:
    """Plan `config`'s steps for `workload` (default: the largest that the settings allow).

    The rollout's KV cache is what all samples need at once; with `usable` bytes in all, no more than is left beside
    weights and states, or than one group needs: then samples wait.
    """
    device, dtype = planned_device(config)
    step = Step(config, model_config, device, dtype)
    generations = 1 if config.algo == "sft" else config.num_generations
    work = workload or Workload.largest(config, generations, config.prompts_per_step)
    shapes = {}
    batches = work.packs(config.tokens_per_microbatch)
    if workload is None:
        batches += [batch for full in Workload.full_packs(config, generations) for batch in full]
    for index, batch in enumerate(batches):  # equal packs are planned once; the last of them finds gradients
        key = (batch.segments.cu_seqlens_k.tolist(), len(batch.targets), patches_of(batch).tolist())
        shapes[str(key)] = (batch, index > 0)
    resident = step.resident()

    moments: dict[str, list[Moment]] = {}
    sampled = {}
    if config.algo != "sft":
        sampled["rollout"] = work
    if config.eval_samples and workload is None:
        sampled["evaluation"] = Workload.largest(config, 1, min(BATCH_SIZE, config.eval_samples))
    cache_tokens = {phase: _cache_tokens(step, resident, each, usable) for phase, each in sampled.items()}
    if "rollout" in sampled:
        moments["rollout"] = step.rollout(work, cache_tokens["rollout"])
        if step.needs_reference or config.importance_cap:
            moments["reference"] = [m for batch, _ in shapes.values() for m in step.reference_pass(batch)]
    moments["update"] = [m for batch, earlier in shapes.values() for m in step.update(batch, earlier)]
    moments["update"].append(step.optimizer_step())
    if "evaluation" in sampled:
        moments["evaluation"] = step.rollout(sampled["evaluation"], cache_tokens["evaluation"])
    return Plan({phase: _largest(resident, each) for phase, each in moments.items()}, cache_tokens)


def _cache_tokens(step: Step, resident: Moment, work: Workload, usable: float | None) -> int:
    """Tokens of the KV cache with which the work's samples are drawn."""
    needed = step.layout(work, None).tokens
    if usable is None:
        return needed
    group = len(work.completions) // len(work.prompts)
    least = step.layout(Workload(work.prompts[:1], work.patches[:1], work.completions[:group]), None).tokens
    others = max(sum(moment.values()) - moment["KV cache"] for moment in step.rollout(work, needed))
    left = usable - sum(resident.values()) - others
    return int(min(needed, max(least, left / step.cache_bytes(1))))


def planned_device(config: TrainConfig) -> tuple[str, torch.dtype]:
    """What `auto` means for a plan, which is made for a card that need not be here."""
    device = "cuda" if config.device == "auto" else config.device.partition(":")[0]
    name = ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    return ("cuda" if device == "cuda" else "cpu"), getattr(torch, name)


def _largest(resident: Moment, moments: list[Moment]) -> Moment:
    largest = max(moments, key=lambda moment: sum(moment.values()))
    return {name: resident.get(name, 0) + largest.get(name, 0) for name in (*resident, *largest)}


def usable_bytes(vram: float) -> float:
    """Bytes that tensors and CUDA can have of a card of `vram` GB."""
    return vram * USABLE * 2**30


def advice(config: TrainConfig, model_config: PretrainedConfig, vram: float) -> list[str]:
    """Up to three changes with which `config` fits, those that lose least first; each was planned anew.

    Empty where it fits as it is. Where three are not enough, a last line says so.
    """
    usable = usable_bytes(vram)
    before = make_plan(config, model_config, usable=usable)
    chosen: dict[str, dict] = {}
    current, excess = config, before.excess(usable)
    for name, values in _changes(config):
        if not excess:
            break
        for value in values:
            changed = replace(current, **value)
            remaining = make_plan(changed, model_config, usable=usable).excess(usable)
            if remaining > excess - 0.001 * usable:
                break  # it does not help
            current, excess, chosen[name] = changed, remaining, value
            if not excess:
                break
    for name in list(chosen) if not excess else []:  # a later change may have made an earlier one superfluous
        others = [value for other, value in chosen.items() if other != name]
        without = replace(config, **{setting: v for value in others for setting, v in value.items()})
        if not make_plan(without, model_config, usable=usable).excess(usable):
            del chosen[name]
    lines = [
        _saving(before, make_plan(replace(config, **value), model_config, usable=usable), value)
        for value in chosen.values()
    ]
    if excess:
        return [*lines[-3:], f"all that is known here leaves {excess / 2**30:.1f} GiB too much: take a larger card"]
    return [*lines[:3], f"and {len(lines) - 3} more: plan again with these"] if len(lines) > 3 else lines


def _changes(config: TrainConfig) -> Iterator[tuple[str, list[dict]]]:
    """Name, and settings to try one after the other; ordered by what a user loses."""
    trains_bf16 = planned_device(config)[1] == torch.bfloat16 and not config.lora
    longest = config.max_prompt_tokens + config.max_new_tokens
    if not config.gradient_checkpointing:
        yield "checkpointing", [{"gradient_checkpointing": True}]
    if trains_bf16 and config.optimizer == "adamw":
        yield "exact", [{"optimizer": "adamw_exact"}]
    if config.reference != "offload" and not config.lora:
        yield "reference", [{"reference": "offload"}]
    if config.eval_samples:
        yield "evaluation", [{"eval_samples": 0}]  # mr1_fast.evaluate does it apart, with a --batch-size
    budgets = _halves(config.tokens_per_microbatch, longest)
    yield "micro-batch", [{"tokens_per_microbatch": tokens} for tokens in budgets]
    if config.gradient_checkpointing and not config.offload_checkpoints:
        yield "checkpoints", [{"offload_checkpoints": True}]
    if trains_bf16 and config.optimizer in ("auto", "adamw", "adamw_exact"):
        yield "stochastic", [{"optimizer": "adamw_stochastic"}]
    yield "prompts", [{"prompts_per_step": count} for count in _halves(config.prompts_per_step, 1)]
    yield "images", [_smaller_images(config, pixels) for pixels in _halves(config.max_pixels, 28 * 28 * 64)]
    if config.algo != "sft":
        yield "generations", [{"num_generations": count} for count in _halves(config.num_generations, 4)]
    if not config.lora:
        yield "lora", [{"lora": True}, {"lora": True, "load_in_4bit": True}]
    elif not config.load_in_4bit:
        yield "4 bits", [{"load_in_4bit": True}]
    yield "answers", [{"max_new_tokens": count} for count in _halves(config.max_new_tokens, 64)]


def _halves(value: int, least: int) -> list[int]:
    """value/2, value/4, …, and `least` where that is the smallest."""
    halves = []
    while value > least:
        value = max(least, value // 2)
        halves.append(value)
    return halves


def _smaller_images(config: TrainConfig, pixels: int) -> dict:
    """Fewer pixels, and the prompts shorter by as many image tokens."""
    before, after = (image_tokens(replace(config, max_pixels=value)) for value in (config.max_pixels, pixels))
    prompt = config.max_prompt_tokens - before + after
    return {"max_pixels": pixels, "max_prompt_tokens": prompt, "shrink_images": True}


def _saving(before: Plan, after: Plan, change: dict) -> str:
    """The change as flags, and the phase in which it saves most by itself."""
    flags = " ".join(f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in change.items())
    saved = {
        phase: before.total(phase) - (after.total(phase) if phase in after.phases else 0) for phase in before.phases
    }
    phase = max(saved, key=lambda phase: (round(saved[phase] / 2**30, 1), before.total(phase)))
    return (
        f"{flags}: {phase} {before.total(phase) / 2**30:.1f} → {(before.total(phase) - saved[phase]) / 2**30:.1f} GiB"
    )


@dataclass
class PlanConfig(TrainConfig):
    """All settings of `python -m mr1_fast.train`, and the card."""

    vram: float = 24.0
    """Memory of the GPU, in the GB of its name; of 24 GB, 23.6 GiB can be used."""

    def check(self) -> None:
        """Raise UserError for values that no run could mean."""
        super().check()
        if self.vram <= 0:
            raise UserError(f"vram is {self.vram}, but must be greater than 0.")


def main() -> None:
    """`python -m mr1_fast.plan`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says that a CPU lacks kernels, which a plan needs not
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property with an old name
    config = parse_settings(PlanConfig, sys.argv[1:], prog="python -m mr1_fast.plan", profile=profile_defaults)
    model_config = find_model_config(config.model)
    device, dtype = planned_device(config)
    print(f"{config.model} on {device} in {dtype}, largest prompts, images and completions".replace("torch.", ""))
    usable = usable_bytes(config.vram)
    print(make_plan(config, model_config, usable=usable).render(usable))
    changes = advice(config, model_config, config.vram)
    if changes:
        print("to make it fit:\n" + "\n".join(f"  {line}" for line in changes))


if __name__ == "__main__":
    exit_on_user_error(main)
