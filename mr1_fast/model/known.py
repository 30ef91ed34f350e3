"""Finding a model's configuration by its name, without its weights."""

import os
import re
from difflib import get_close_matches
from itertools import groupby

from transformers import PretrainedConfig

from ..config.model import BUILT_IN, model_name
from ..errors import UserError
from ..hub import model_access
from .description import check_weights, read_description
from .device import first_line
from .families import FAMILIES
from .saved_adapter import adapter_base
from .tiny import tiny_config, tiny_processor

VARIANT = re.compile(r"-(base|instruct|thinking)(-2507)?$", re.IGNORECASE)
"""What follows the size in the names of models that have the same sizes."""


def find_model_config(name: str) -> PretrainedConfig:
    """Return the configuration behind `--model`: a built-in one, a local folder's, or the hub's.

    Raises UserError if there is none that can be read, or if its family cannot be trained.
    """
    name = model_name(name)
    if name in BUILT_IN:
        return tiny_config(tiny_processor(name), name)
    if published := published_config(name):
        return published
    if base := adapter_base(name):
        return find_model_config(base)
    try:
        with model_access(name):
            config = read_description(name)
            check_weights(name, config)
            return config
    except UserError:
        raise
    except Exception as error:  # no network, no such name, or a damaged config.json
        reason = first_line(error)
        if os.path.isdir(name):
            raise UserError(
                f"model {name} has a config.json that cannot be read ({reason}): copy the original "
                "config.json of the model into the folder."
            ) from error
        near = closest_name(name)
        raise UserError(
            f"model {name} has no configuration that can be read here ({reason}): "
            f"{f'did you mean {near}? Else ' if near else ''}check the name and the network, pass "
            f"a local folder, or plan for one that is built in ({known_names()})."
        ) from error


def published_config(name: str) -> PretrainedConfig | None:
    """Return the configuration of a published model that is known here by its name, or None.

    As on the hub, capital and small letters are the same.
    """
    wanted = VARIANT.sub("", name).lower()
    for family in FAMILIES.values():
        for known, settings in family.sizes.items():
            if known.lower() == wanted:
                return family.config(settings)
    return None


def closest_name(name: str) -> str | None:
    """Return the name of a built-in configuration that is almost this one; None if none is."""
    names = {known.lower(): known for known in (*BUILT_IN, *_published_names())}
    near = get_close_matches(VARIANT.sub("", name).lower(), names, n=1, cutoff=0.75)
    return names[near[0]] if near else None


def known_names() -> str:
    """Return the names of all models whose configurations are built in, as a short list."""
    series = groupby(_published_names(), key=lambda known: known.rpartition("-")[0])
    published = (
        f"{begin}-{{{','.join(known.rpartition('-')[2] for known in sizes)}}}"
        for begin, sizes in series
    )
    return ", ".join((*BUILT_IN, *published))


def _published_names() -> list[str]:
    """Return the names of the published models that are known here, without their variants."""
    return [known for family in FAMILIES.values() for known in family.sizes]
