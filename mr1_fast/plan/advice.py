"""x"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from ..config import TrainConfig
from .plan import Plan, make_plan, planned_device, usable_bytes
from .workload import image_tokens


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
    for name in (
        list(chosen) if not excess else []
    ):  # a later change may have made an earlier one superfluous
        others = [value for other, value in chosen.items() if other != name]
        without = replace(
            config, **{setting: v for value in others for setting, v in value.items()}
        )
        if not make_plan(without, model_config, usable=usable).excess(usable):
            del chosen[name]
    lines = [
        _saving(before, make_plan(replace(config, **value), model_config, usable=usable), value)
        for value in chosen.values()
    ]
    if excess:
        return [
            *lines[-3:],
            f"all that is known here leaves {excess / 2**30:.1f} GiB too much: take a larger card",
        ]
    return (
        [*lines[:3], f"and {len(lines) - 3} more: plan again with these"]
        if len(lines) > 3
        else lines
    )


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
        yield (
            "evaluation",
            [{"eval_samples": 0}],
        )  # mr1_fast.evaluate does it apart, with a --batch-size
    budgets = _halves(config.tokens_per_microbatch, longest)
    yield "micro-batch", [{"tokens_per_microbatch": tokens} for tokens in budgets]
    if config.gradient_checkpointing and not config.offload_checkpoints:
        yield "checkpoints", [{"offload_checkpoints": True}]
    if trains_bf16 and config.optimizer in ("auto", "adamw", "adamw_exact"):
        yield "stochastic", [{"optimizer": "adamw_stochastic"}]
    yield "prompts", [{"prompts_per_step": count} for count in _halves(config.prompts_per_step, 1)]
    yield (
        "images",
        [_smaller_images(config, pixels) for pixels in _halves(config.max_pixels, 28 * 28 * 64)],
    )
    if config.algo != "sft":
        yield (
            "generations",
            [{"num_generations": count} for count in _halves(config.num_generations, 4)],
        )
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
    before, after = (
        image_tokens(replace(config, max_pixels=value)) for value in (config.max_pixels, pixels)
    )
    prompt = config.max_prompt_tokens - before + after
    return {"max_pixels": pixels, "max_prompt_tokens": prompt, "shrink_images": True}


def _saving(before: Plan, after: Plan, change: dict) -> str:
    """The change as flags, and the phase in which it saves most by itself."""
    flags = " ".join(
        f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in change.items()
    )
    saved = {
        phase: before.total(phase) - (after.total(phase) if phase in after.phases else 0)
        for phase in before.phases
    }
    phase = max(saved, key=lambda phase: (round(saved[phase] / 2**30, 1), before.total(phase)))
    return f"{flags}: {phase} {before.total(phase) / 2**30:.1f} → {(before.total(phase) - saved[phase]) / 2**30:.1f} GiB"
