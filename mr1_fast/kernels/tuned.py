"""Launch settings by architecture, where a sweep on a GPU has found which are fastest.

`benchmarks/sweep.py` writes them to tuned.json. A kernel offers its candidates as `VARIANTS`, named
tuples of one type, and its launcher asks `tuned` for the one to use. Where an architecture or a
kernel has no entry, the launcher's own choice by arithmetic stands.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

TABLE = Path(__file__).with_name("tuned.json")
"""Architecture → kernel → fields of the kernel's setting."""

Setting = TypeVar("Setting", bound=NamedTuple)


@lru_cache
def architecture(device: torch.device) -> str | None:
    """Name the architecture of a GPU, such as sm_90 or gfx942; None for any other device."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache
def read_table() -> dict[str, dict[str, dict]]:
    """Read tuned.json; `read_table.cache_clear()` makes the next call read it again."""
    return json.loads(TABLE.read_text())


def tuned(kernel: str, device: torch.device, default: Setting) -> Setting:
    """Return the kernel's setting for the architecture of `device`; `default` where none is known.

    Raises ValueError if the table's entry does not have the fields of `default`.
    """
    entry = read_table().get(architecture(device), {}).get(kernel)
    if entry is None:
        return default
    if set(entry) != set(default._fields):
        raise ValueError(
            f"{TABLE.name}: {kernel} on {architecture(device)} has {sorted(entry)}, expected "
            f"{sorted(default._fields)}: remove it, or run benchmarks/sweep.py {kernel}"
        )
    return type(default)(**entry)
