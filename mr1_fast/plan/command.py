"""What `python -m mr1_fast.plan` prints."""

from ..errors import require_output
from ..model.families import pixels_per_token
from ..model.known import find_model_config
from .advice import advice
from .evaluations import describe_evaluations
from .plan import make_plan, usable_bytes
from .planned_run import planned_device
from .settings import PlanConfig


def print_plan(config: PlanConfig) -> None:
    """Print the plan of a run on a card of `config.vram` GB, and what to change if it does not fit.

    A CPU has no such limit. UserError if the model has no configuration that can be read here, or
    for what --sharding full excludes.
    """
    model_config = find_model_config(config.model)
    device, dtype = planned_device(config)
    dtype_name = str(dtype).removeprefix("torch.")
    largest = "prompts, images and" if pixels_per_token(model_config) else "prompts and"
    place = device if config.gpus == 1 else f"{config.gpus} × {device}"
    print(f"{config.model} on {place} in {dtype_name}, largest {largest} completions")
    if evaluations := describe_evaluations(config, config.eval_samples):
        print(evaluations)
    usable = None if device == "cpu" else usable_bytes(config.vram)
    plan = make_plan(config, model_config, usable=usable, processes=config.gpus)
    if config.gpus > 1:
        print(f"bytes per card, of the fullest of {config.gpus} (sharding {plan.sharded.kind})")
    print(plan.render(usable))
    changes = [] if usable is None else advice(config, model_config, usable, config.gpus)
    if changes:
        print("to make it fit:\n" + "\n".join(f"  {line}" for line in changes))
    require_output()
