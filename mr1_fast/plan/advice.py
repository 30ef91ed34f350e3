"""Which settings to change so that a run fits: changes are planned, those that lose least first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from ..config import TrainConfig
from ..model.families import pixels_per_token
from .plan import GIB, Plan, make_plan, open_kinds
from .planned_run import planned_device
from .sharded import KINDS
from .workload import image_tokens

MOST_LINES = 3
"""Changes that are named at most."""
LEAST_GAIN = 0.001
"""Share of the usable memory that a change must save to count as a help."""
LEAST_IMAGE_TOKENS, LEAST_GENERATIONS, LEAST_COMPLETION = 64, 4, 64
"""Smallest values that are proposed: image tokens, completions of a prompt, and their tokens."""

Values = dict[str, bool | int | str]
"""New values of some settings, by name."""


@dataclass
class Change:
    """A setting, or a few that belong together, with values to try one after the other."""

    name: str
    values: list[Values]


def advice(
    config: TrainConfig, model_config: PretrainedConfig, usable: float, processes: int = 1
) -> list[str]:
    """Up to three changes with which `config` fits into `usable` bytes, one a line.

    Empty if it fits as it is. If three are not enough, or nothing is, a last line says so. Of
    several processes, each has so many bytes on a card of its own.
    """

    def plan(*changes: Values) -> Plan:
        changed = replace(config, **{name: v for change in changes for name, v in change.items()})
        return make_plan(changed, model_config, usable=usable, processes=processes)

    before = plan()
    excess = before.excess(usable)
    chosen: dict[str, Values] = {}
    for change in _changes(config, model_config, before):
        for value in change.values:
            if not excess:
                break
            remaining = plan(*chosen.values(), value).excess(usable)
            if remaining > excess - LEAST_GAIN * usable:
                break  # it does not help
            excess, chosen[change.name] = remaining, value

    if not excess:
        # A later change may have made an earlier one superfluous.
        for name in list(chosen):
            others = [value for other, value in chosen.items() if other != name]
            if not plan(*others).excess(usable):
                del chosen[name]

    lines = [saving(before, plan(value), value, usable) for value in chosen.values()]
    if excess:
        too_much = f"all that is known here leaves {excess / GIB:.1f} GiB too much"
        return [*lines[-MOST_LINES:], f"{too_much}: take a larger card"]
    if len(lines) > MOST_LINES:
        more = len(lines) - MOST_LINES
        return [*lines[:MOST_LINES], f"and {more} more: plan again with these"]
    return lines


def _changes(config: TrainConfig, model_config: PretrainedConfig, before: Plan) -> Iterator[Change]:
    """The changes that are tried, in the order of what a user loses by them."""
    processes = before.sharded.processes
    _, dtype = planned_device(config)
    trains_bf16 = dtype == torch.bfloat16 and not config.lora
    longest = config.max_prompt_tokens + config.max_new_tokens
    pixels = pixels_per_token(model_config)

    # The same numbers, or nearly, in more time.
    if processes > 1 and config.sharding != "auto":
        kinds = open_kinds(replace(config, sharding="auto"), processes)
        leaner = [kind for kind in kinds if KINDS.index(kind) > KINDS.index(config.sharding)]
        yield Change("sharding", [{"sharding": kind} for kind in leaner])
    if config.recompute == "none":
        yield Change("recompute", [{"recompute": "auto"}])
    if trains_bf16 and config.optimizer == "adamw":
        yield Change("exact", [{"optimizer": "adamw_exact"}])
    if config.reference != "offload" and not config.lora and before.sharded.kind != "full":
        yield Change("reference", [{"reference": "offload"}])
    if config.eval_samples:  # mr1_fast.evaluate does it apart, with a --batch-size
        yield Change("evaluation", [{"eval_samples": 0}])
    if config.tokens_per_microbatch != "auto":
        yield _halved("tokens_per_microbatch", config.tokens_per_microbatch, longest)
    if not config.offload_checkpoints:
        yield Change("checkpoints", [{"offload_checkpoints": True}])
    if trains_bf16 and config.optimizer in ("auto", "adamw", "adamw_exact"):
        yield Change("stochastic", [{"optimizer": "adamw_stochastic"}])

    # Another run, which learns less from a step, or another model.
    if pixels and not (config.lora or config.freeze_vision):
        yield Change("vision", [{"freeze_vision": True}])
    yield _halved("prompts_per_step", config.prompts_per_step, processes)
    if pixels:
        sizes = _halves(config.max_pixels, LEAST_IMAGE_TOKENS * pixels)
        yield Change("images", [_smaller_images(config, model_config, most) for most in sizes])
    if config.algo != "sft":
        yield _halved("num_generations", config.num_generations, LEAST_GENERATIONS)
    if not config.lora:
        yield Change("lora", [{"lora": True}, {"lora": True, "load_in_4bit": True}])
    elif not config.load_in_4bit:
        yield Change("4 bits", [{"load_in_4bit": True}])
    yield _halved("max_new_tokens", config.max_new_tokens, LEAST_COMPLETION)


def _halved(name: str, value: int, least: int) -> Change:
    """A setting with half its value, a quarter, and so on down to `least`."""
    return Change(name, [{name: half} for half in _halves(value, least)])


def _halves(value: int, least: int) -> list[int]:
    """value/2, value/4, … and `least` at the end; empty if `value` is no larger than that."""
    halves = []
    while value > least:
        value = max(least, value // 2)
        halves.append(value)
    return halves


def _smaller_images(config: TrainConfig, model_config: PretrainedConfig, pixels: int) -> Values:
    """Images of at most `pixels` pixels, and prompts shorter by as many image tokens."""
    smaller = replace(config, max_pixels=pixels)
    saved = image_tokens(config, model_config) - image_tokens(smaller, model_config)
    prompt = config.max_prompt_tokens - saved
    return {"max_pixels": pixels, "max_prompt_tokens": prompt, "shrink_images": True}


def saving(before: Plan, after: Plan, change: Values, usable: float) -> str:
    """A change as flags, and bytes before and after it in the phase that was the peak.

    If it saves nothing there, in the one in which it saves most. Only phases that take too much
    are shown: in others `auto` may use what the change has freed.
    """
    saved = {
        phase: before.total(phase) - (after.total(phase) if phase in after.phases else 0)
        for phase in before.phases
        if before.total(phase) > usable
    }
    phase = max(saved, key=before.total)
    if round(saved[phase] / GIB, 1) <= 0:
        phase = max(saved, key=lambda phase: (round(saved[phase] / GIB, 1), before.total(phase)))
    was, becomes = before.total(phase) / GIB, (before.total(phase) - saved[phase]) / GIB
    flags = " ".join(
        f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in change.items()
    )
    return f"{flags}: {phase} {was:.1f} → {becomes:.1f} GiB"
