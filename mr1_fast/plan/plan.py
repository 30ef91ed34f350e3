"""x"""

from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from ..config import EVALUATION_BATCH_SIZE, TrainConfig
from .phases import Moment, Step
from .workload import Workload, patches_of

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
            cells = (
                f"{(measured[p] + besides[p]) / size:.2f}" if p in measured else "–"
                for p in self.phases
            )
            lines.append(f"{'measured':<12}" + "".join(f"{cell:>12}" for cell in cells))
        if usable is not None:
            lines.append(
                f"peak {self.peak / size:.2f} {unit} of {usable / size:.2f} usable: "
                f"{abs(usable - self.peak) / size:.2f} {unit} {'to spare' if self.peak <= usable else 'too much'}"
            )
        return "\n".join(lines)


def make_plan(
    config: TrainConfig,
    model_config: PretrainedConfig,
    workload: Workload | None = None,
    usable: float | None = None,
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
    for index, batch in enumerate(
        batches
    ):  # equal packs are planned once; the last of them finds gradients
        key = (batch.segments.cu_seqlens_k.tolist(), len(batch.targets), patches_of(batch).tolist())
        shapes[str(key)] = (batch, index > 0)
    resident = step.resident()

    moments: dict[str, list[Moment]] = {}
    sampled = {}
    if config.algo != "sft":
        sampled["rollout"] = work
    if config.eval_samples and workload is None:
        sampled["evaluation"] = Workload.largest(
            config, 1, min(EVALUATION_BATCH_SIZE, config.eval_samples)
        )
    cache_tokens = {
        phase: _cache_tokens(step, resident, each, usable) for phase, each in sampled.items()
    }
    if "rollout" in sampled:
        moments["rollout"] = step.rollout(work, cache_tokens["rollout"])
        if step.needs_reference or config.importance_cap:
            moments["reference"] = [
                m for batch, _ in shapes.values() for m in step.reference_pass(batch)
            ]
    moments["update"] = [
        m for batch, earlier in shapes.values() for m in step.update(batch, earlier)
    ]
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
    least = step.layout(
        Workload(work.prompts[:1], work.patches[:1], work.completions[:group]), None
    ).tokens
    others = max(sum(moment.values()) - moment["KV cache"] for moment in step.rollout(work, needed))
    left = usable - sum(resident.values()) - others
    return int(min(needed, max(least, left / step.cache_bytes(1))))


def planned_device(config: TrainConfig) -> tuple[str, torch.dtype]:
    """What `auto` means for a plan, which is made for a card that need not be here."""
    device = "cuda" if config.device == "auto" else config.device.partition(":")[0]
    name = (
        ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    )
    return ("cuda" if device == "cuda" else "cpu"), getattr(torch, name)


def _largest(resident: Moment, moments: list[Moment]) -> Moment:
    largest = max(moments, key=lambda moment: sum(moment.values()))
    return {name: resident.get(name, 0) + largest.get(name, 0) for name in (*resident, *largest)}


def usable_bytes(vram: float) -> float:
    """Bytes that tensors and CUDA can have of a card of `vram` GB."""
    return vram * USABLE * 2**30
