"""`python -m mr1_fast.plan`."""

import logging
import sys
import warnings

from ..command_line import parse_settings
from ..config import profile_defaults
from ..model.known import find_model_config
from .advice import advice
from .plan import make_plan, planned_device, usable_bytes
from .settings import PlanConfig


def main() -> None:
    """`python -m mr1_fast.plan`."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # says that a CPU lacks kernels, which a plan needs not
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # peft asks transformers for a property with an old name
    config = parse_settings(
        PlanConfig, sys.argv[1:], prog="python -m mr1_fast.plan", profile=profile_defaults
    )
    model_config = find_model_config(config.model)
    device, dtype = planned_device(config)
    print(
        f"{config.model} on {device} in {dtype}, largest prompts, images and completions".replace(
            "torch.", ""
        )
    )
    usable = usable_bytes(config.vram)
    print(make_plan(config, model_config, usable=usable).render(usable))
    changes = advice(config, model_config, config.vram)
    if changes:
        print("to make it fit:\n" + "\n".join(f"  {line}" for line in changes))
