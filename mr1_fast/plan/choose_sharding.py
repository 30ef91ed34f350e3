"""How a run is sharded where its settings leave that open, chosen before its model is loaded."""

from dataclasses import replace

from ..config import TrainConfig
from ..distributed import World
from ..model.device import resolve_device, resolve_dtype
from ..model.known import find_model_config
from .plan import make_plan, open_kinds
from .run_memory import usable_memory


def choose_sharding(config: TrainConfig, world: World) -> str:
    """Return none, optimizer or full, the same on every process, for `--sharding auto`.

    `make_plan` says which, for the memory of the card that has the least: none, unless optimizer
    leaves room to recompute less or in larger packs; full where neither fits. Where nothing can be
    planned it is optimizer, which every model can have. Collective.
    """
    device, dtype = resolve_device(config), str(resolve_dtype(config)).removeprefix("torch.")
    here = replace(config, device=device.type, dtype=dtype)
    kinds = open_kinds(here, world.size)
    if len(kinds) == 1:
        return kinds[0]
    usable = world.least(usable_memory(device, world.size))
    kind = "optimizer"
    if world.is_first:  # one plan for all: on another machine a name may not be found
        try:
            model_config = find_model_config(config.model)
            plan = make_plan(here, model_config, usable=usable, processes=world.size)
            kind = plan.sharded.kind
        except Exception:  # a model that we do not know; what is wrong with it loading says
            pass
    return world.of_first(kind)
