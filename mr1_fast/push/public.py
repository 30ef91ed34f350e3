"""What of a run's settings may be public: no path beyond its last part, and no token."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import TrainConfig

_NAMES, _FILES = ("model", "data", "eval_data"), ("image_root", "plugin")
"""Settings that name something on the Hub or a local path, and those that are a path."""

_OF_THE_MACHINE = ("output", "resume", "open", "loggers", "push_to_hub")
"""Settings that say nothing about the model."""

_OF_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".py", ".zip", ".tar")
"""Ends of names that have the form of one on the Hub, but are files."""

_TOKEN = re.compile(r"\bhf_\w{8,}")

_FILE_ADDRESS = re.compile(r"file://\S*/")

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")

# An absolute path within a text. A tag such as </answer> and an address are none.
_PATH = re.compile(r"(?<![\w<:/.])~?/(?:[\w.@+-]+/)+([\w.@+-]*)")


def public_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that say how the model was made, with nothing private in them."""
    settings = {}
    for name, value in vars(config).items():
        if name in _OF_THE_MACHINE:
            continue
        if name == "extra_rewards":
            value = {last_part(reward): weight for reward, weight in value.items()}
        elif value is not None and name in _NAMES + _FILES:
            value = public_name(value) if name in _NAMES else last_part(value)
        settings[name] = public(value)
    return settings


def public_name(name: str) -> str:
    """Return a model or data by its name on the Hub, or else by the last part of its path."""
    return hub_name(name) or last_part(name)


def last_part(path: str) -> str:
    """Return the last part of a path or an address, of any system, whether it exists or not."""
    if "://" in path:
        path = re.split(r"[?#]", _CREDENTIALS.sub("", path))[0]
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return public(parts[-1]) if parts else ""


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
    value = _CREDENTIALS.sub("", _FILE_ADDRESS.sub("", value))
    return _TOKEN.sub("hf_…", _PATH.sub(r"\1", value))


def hub_name(name: str) -> str | None:
    """Return `name`, of a model or of data, if it is OWNER/NAME on the Hub and nothing local."""
    if "/" not in name or name.lower().endswith(_OF_FILES) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
