"""What of a run's settings may be public: no path beyond its last part, and no token."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import TrainConfig

_OF_THE_MACHINE = ("output", "resume", "open", "loggers", "push_to_hub")
"""Settings that say nothing about the model."""

_TOKEN = re.compile(r"\bhf_\w{8,}")

# An absolute path within a text. A tag such as </answer> and an address are none.
_PATH = re.compile(r"(?<![\w<:/.])~?/(?:[\w.@+-]+/)+([\w.@+-]*)")


def public_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that say how the model was made, with nothing private in them."""
    return {
        name: public(value) for name, value in vars(config).items() if name not in _OF_THE_MACHINE
    }


def public(value: Any) -> Any:
    """Return a setting's value with each local path cut to its last part, and without tokens."""
    if isinstance(value, dict):
        return {public(name): public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value

    # A reward is named as file.py:function.
    is_path = value.startswith(("/", "~/")) and "\n" not in value and " " not in value
    if is_path or os.path.exists(value.partition(":")[0]):
        value = Path(value).name
    return _TOKEN.sub("hf_…", _PATH.sub(r"\1", value))


def hub_name(name: str) -> str | None:
    """Return `name`, of a model or of data, if it is OWNER/NAME on the Hub and nothing local."""
    if "/" not in name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
