"""What `python -m mr1_fast.plan` prints."""

from ..model.families import pixels_per_token
from ..model.known import find_model_config
from .advice import advice
from .evaluations import describe_evaluations
from .plan import make_plan, usable_bytes
from .planned_run import planned_device
from .settings import PlanConfig


def print_plan(config: PlanConfig) -> None:
    """Print the plan of a run on a card of `config.vram` GB, and what to change if it does not fit.

    A CPU has no such limit. UserError if the model has no configuration that can be read here.
    """
    model_config = find_model_config(config.model)
    device, dtype = planned_device(config)
    dtype_name = str(dtype).removeprefix("torch.")
    largest = "prompts, images and" if pixels_per_token(model_config) else "prompts and"
    print(f"{config.model} on {device} in {dtype_name}, largest {largest} completions")
    if evaluations := describe_evaluations(config, config.eval_samples):
        print(evaluations)
    if device == "cpu":
        print(make_plan(config, model_config).render())
        return
    usable = usable_bytes(config.vram)
    print(make_plan(config, model_config, usable=usable).render(usable))
    changes = advice(config, model_config, usable)
    if changes:
        print("to make it fit:\n" + "\n".join(f"  {line}" for line in changes))
