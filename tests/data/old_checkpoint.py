"""Checkpoints as they were written before several processes could: one file each of weights and of
the optimizer's tensors, which have the numbers of their parameters, and no checksums."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def save_old_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, start: str
) -> Path:
    """Write `folder/step-…` of these weights and states, as version 0.1 did."""
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    tensors, numbers = {}, {}
    for name, value in _flatten(optimizer.state_dict()["state"]).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value.to("cpu", copy=True).contiguous()
        else:
            numbers[name] = value
    record = {
        "step": step,
        "start": start,
        "optimizer": type(optimizer).__name__,
        "optimizer_numbers": numbers,
        "parts": {},
    }
    weights = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(weights, path / "weights.safetensors")
    save_file(tensors, path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps(record, indent=1))
    return path


def _flatten(state: dict, prefix: str = "") -> dict[str, object]:
    """Turn {0: {"step": 1, "inner": {"max": 2}}} into {"0.step": 1, "0.inner.max": 2}."""
    flat: dict[str, object] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
