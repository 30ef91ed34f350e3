"""The memory plan of a run: bytes of each phase at its peak, by component."""

from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig

from ..config import EVALUATION_BATCH_SIZE, TrainConfig
from ..types import PackedBatch
from .choice import MARGIN, Choice, choose_recomputed, pack_sizes, work
from .memory_use import COMPONENTS, MemoryUse, added, total
from .planned_run import PlannedRun, planned_device, planned_run
from .reference import has_pass_before_update, reference_pass
from .resident import resident
from .rollout import Samples, cache_tokens_for, rollout
from .sharded import KINDS, ONE_CARD, Sharded
from .update import PackUpdate, optimizer_step
from .wires import Wires, step_wires
from .workload import Workload, patches_of

GIB, MIB = 2**30, 2**20
USABLE = 23.6 / 24
"""GiB that CUDA offers for each GB in a card's name: 23.6 GiB of an RTX 3090 or 4090 with 24 GB."""


@dataclass
class Plan:
    """Bytes on the device at the peak of each phase."""

    phases: dict[str, MemoryUse]
    """Bytes by component, by phase: rollout, reference, update, evaluation; those the run has."""
    cache_tokens: dict[str, int] = field(default_factory=dict)
    """Most tokens that the KV cache holds, by phase: rollout and evaluation."""
    choice: Choice | None = None
    """The size of packs, and which layers are run again; None in a plan without phases."""
    work: float = 0.0
    """The update's work, by which plans of the same step compare (choice.py)."""
    samples: dict[str, Samples] = field(default_factory=dict)
    """How many samples are decoded at once, by phase as above."""
    sharded: Sharded = ONE_CARD
    """Over how many processes the run is spread, and how; the bytes are one process's."""
    wires: Wires = field(default_factory=Wires)
    """Bytes that its card sends in a step."""

    def total(self, phase: str) -> int:
        """Bytes at the peak of a phase."""
        return total(self.phases[phase])

    @property
    def peak(self) -> int:
        """Bytes at the peak of the run."""
        return max(map(self.total, self.phases))

    def excess(self, usable: float) -> float:
        """Bytes by which phases exceed `usable` bytes, summed over phases; 0 if the run fits."""
        return sum(max(0, self.total(phase) - usable) for phase in self.phases)

    def render(self, usable: float | None = None, measured: dict[str, float] | None = None) -> str:
        """The plan as a table of components by phase.

        A last line says what was chosen, and with `usable` bytes, the one before it how much is to
        spare. Lines before those say where samples wait for room in the KV cache, if all fits.

        With `measured` peaks of tensors in bytes, by phase, a row shows them beside the plan: what
        CUDA takes besides tensors is not among them, so the planned workspace is added.
        """
        unit, size = ("GiB", GIB) if self.peak >= 4 * GIB else ("MiB", MIB)
        rows = [_row(unit, self.phases)]
        for component in COMPONENTS:
            parts = [use.get(component, 0) for use in self.phases.values()]
            if any(parts):
                rows.append(_row(component, (f"{part / size:.2f}" for part in parts)))
        rows.append("-" * len(rows[0]))
        rows.append(_row("total", (f"{self.total(phase) / size:.2f}" for phase in self.phases)))

        if measured:
            cells = (
                f"{(measured[phase] + use.get('workspace', 0)) / size:.2f}"
                if phase in measured
                else "–"
                for phase, use in self.phases.items()
            )
            rows.append(_row("measured", cells))
        fits = usable is None or self.peak <= usable
        if fits:
            rows += [f"{phase}: {each}" for phase, each in self.samples.items() if each.wait]
        if usable is not None:
            difference = f"{abs(usable - self.peak) / size:.2f} {unit}"
            rows.append(
                f"peak {self.peak / size:.2f} {unit} of {usable / size:.2f} usable: "
                f"{difference} {'to spare' if fits else 'too much'}"
            )
        rows.append(str(self.choice))
        if self.sharded.processes > 1 and usable is not None:
            rows.append(f"each card sends {self.wires.total / size:.2f} {unit} per step")
        return "\n".join(rows)


def _row(name: str, cells) -> str:
    return f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells)


def make_plan(
    config: TrainConfig,
    model_config: PretrainedConfig,
    workload: Workload | None = None,
    usable: float | None = None,
    processes: int = 1,
) -> Plan:
    """Plan the steps of `config` on `workload`; by default on the largest that the settings allow.

    The KV cache holds what all samples need at once. With `usable` bytes in all it holds no more
    than is left beside everything else and a margin, and samples wait; but never less than one
    sample needs. What the settings leave to be chosen (`auto`) fits into the usable bytes with the
    same margin, if anything does.

    Of several processes, each on a card of its own, the plan is that of the fullest; `workload` is
    its own. `--sharding auto` is none or optimizer: of those with which the run fits, the one whose
    update has less work, and none where both have the same. It is full only where neither fits, and
    the kind that exceeds least where full does not fit either.
    """
    limit = None if usable is None else (1 - MARGIN) * usable
    kinds, plans = open_kinds(config, processes), []
    for together in (set(kinds) - {"full"}, set(kinds) & {"full"}):
        runs = [
            planned_run(replace(config, sharding=kind), model_config, processes)
            for kind in kinds
            if kind in together
        ]
        found = [_plan_kind(run, workload, usable, limit) for run in runs]
        fitting = [plan for plan in found if _fits(plan, usable, limit)]
        if fitting:
            return min(fitting, key=lambda plan: plan.work)
        plans += found
    return min(plans, key=lambda plan: plan.excess(usable))


def open_kinds(config: TrainConfig, processes: int) -> tuple[str, ...]:
    """The kinds of sharding that the settings leave open, in the order of KINDS.

    Weights in 4 bits are not sharded, and neither is a reference but on the device in the model's
    dtype. A CPU has no limit that would ask for it.
    """
    if processes == 1:
        return ("none",)
    if config.sharding != "auto":
        return (config.sharding,)
    device, _ = planned_device(config)
    if device == "cpu":
        return KINDS[:1]
    has_other_reference = config.needs_reference and not config.lora
    whole = config.load_in_4bit or (has_other_reference and config.reference != "resident")
    return KINDS[:2] if whole else KINDS


def _fits(plan: Plan, usable: float | None, limit: float | None) -> bool:
    """Whether the update leaves its margin, and no phase exceeds what is usable."""
    return limit is None or (plan.total("update") <= limit and not plan.excess(usable))


def _plan_kind(
    run: PlannedRun, workload: Workload | None, usable: float | None, limit: float | None
) -> Plan:
    """Plan a run whose kind of sharding is known, with packs of the best size."""
    config, plans = run.config, []
    for sizes in pack_sizes(config, run.device):
        settings = [replace(config, tokens_per_microbatch=size) for size in sizes]
        found = [_plan(replace(run, config=each), workload, limit) for each in settings]
        fitting = [plan for plan in found if _fits(plan, usable, limit)]
        if fitting:
            return min(fitting, key=lambda plan: plan.work)
        plans += found
    return min(plans, key=lambda plan: (plan.excess(usable), plan.total("update")))


def _plan(run: PlannedRun, workload: Workload | None, limit: float | None) -> Plan:
    """Plan a run whose packs have a size.

    Results of layers, and samples' keys and values, are kept within `limit` bytes in all.
    """
    config = run.config
    always = resident(run)
    room = None if limit is None else limit - total(always)
    generations = 1 if config.algo == "sft" else config.num_generations
    sizes = config, run.model_config, generations
    step = workload or Workload.largest(*sizes, config.prompts_per_step)
    batches = step.packs(config.tokens_per_microbatch)
    # In the worst case also the packs that groups of other lengths could fill.
    full = [] if workload else Workload.full_packs(*sizes)
    packs = _distinct([*batches, *(batch for packs in full for batch in packs)])

    uses: dict[str, list[MemoryUse]] = {}
    cache_tokens: dict[str, int] = {}
    samples: dict[str, Samples] = {}

    def plan_rollout(phase: str, work: Workload) -> None:
        cache_tokens[phase] = cache_tokens_for(run, work, room)
        samples[phase] = Samples.of(work, cache_tokens[phase])
        uses[phase] = rollout(run, work, cache_tokens[phase])

    if config.algo != "sft":
        plan_rollout("rollout", step)
        if has_pass_before_update(run):
            uses["reference"] = reference_pass(run, batches, [pack.batch for pack in packs])

    updates = [PackUpdate.of(run, pack.batch, pack.is_first) for pack in packs]
    recomputed = choose_recomputed(config, run.policy, updates, room)
    uses["update"] = [use for update in updates for use in update.uses(recomputed)]
    uses["update"] += optimizer_step(run)

    if config.eval_samples and workload is None:
        count = min(EVALUATION_BATCH_SIZE, config.eval_samples)
        plan_rollout("evaluation", Workload.largest(config, run.model_config, 1, count))
    phases = {phase: added(always, max(each, key=total)) for phase, each in uses.items()}
    choice = Choice(config.tokens_per_microbatch, recomputed, run.policy.layers)
    load = work(run.policy, batches, recomputed)
    wires = step_wires(run, len(batches))
    return Plan(phases, cache_tokens, choice, load, samples, run.sharded, wires)


@dataclass
class _Pack:
    """One of several packs of equal shapes."""

    batch: PackedBatch
    is_first: bool
    """Whether the only such pack is the step's first, which finds no gradients."""


def _distinct(batches: list[PackedBatch]) -> list[_Pack]:
    """Each shape of packs once, since equal packs need the same."""
    packs: dict[str, _Pack] = {}
    for index, batch in enumerate(batches):
        keys, images = batch.segments.cu_seqlens_k.tolist(), patches_of(batch).tolist()
        packs[str((keys, len(batch.targets), images))] = _Pack(batch, index == 0)
    return list(packs.values())


def usable_bytes(vram: float) -> float:
    """Bytes that tensors and CUDA can have of a card with `vram` GB in its name."""
    return vram * USABLE * GIB
