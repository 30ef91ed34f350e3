"""How much of the card a step uses: model TFLOP/s, and model FLOP utilisation (MFU)."""

import torch

from .model.families import base_model
from .model.flop_count import Trained, count_flop
from .model.forward import lm_head_weight
from .packing import MicroBatches
from .peak_flops import TERA, peak_flops
from .run import Run


def utilisation(run: Run, batches: MicroBatches | None, laps: dict[str, float]) -> dict[str, float]:
    """Return TFLOP/s of the stages `reference` and `update`, and on a known card the MFU of both.

    `batches` are the packs that both stages computed here, on the CPU; `laps` has the seconds of
    each stage by its name in metrics.jsonl. Of several processes all have the same figures, which
    are the averages of their cards. Nothing here waits for the device.
    """
    if batches is None:
        return {}
    device, dtype = run.policy.device, lm_head_weight(run.policy.model).dtype
    flop = stage_flop(run, batches)
    each = [total / run.world.size for total in run.world.sums(list(flop.values()))]
    return speeds(dict(zip(flop, each, strict=True)), laps, device_peak(device, dtype))


def stage_flop(run: Run, batches: MicroBatches) -> dict[str, int]:
    """Count the model FLOP that the stages `reference` and `update` of a step have computed."""
    model, config = run.policy.model, run.config
    sizes, trained = base_model(model).config, Trained.of(model)
    passes = [count_flop(sizes, batch, trained) for batch in batches]
    forward = sum(each.forward for each in passes)
    backward = sum(each.backward for each in passes)

    reference = 0
    if run.reference is not None:  # it has no adapters, also where the policy has some
        reference += sum(count_flop(sizes, batch).forward for batch in batches)
    if config.needs_own_logprobs:
        reference += forward
    return {"reference": reference, "update": config.updates_per_batch * (forward + backward)}


def speeds(flop: dict[str, float], laps: dict[str, float], peak: float | None) -> dict[str, float]:
    """Divide each stage's FLOP by its seconds, and by the peak FLOP/s where there is one.

    A stage that computed nothing has no metric.
    """
    metrics = {}
    for stage, amount in flop.items():
        if not amount:
            continue
        per_second = amount / laps[f"seconds_{stage}"]
        metrics[f"tflops_{stage}"] = per_second / TERA
        if peak is not None:
            metrics[f"mfu_{stage}"] = per_second / peak
    return metrics


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device in a dtype; None for a CPU, and where it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
