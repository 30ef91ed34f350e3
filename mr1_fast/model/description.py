"""Reading a model's configuration, which says whether it can be trained, before anything else."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from .families import check_layers, check_supported


def read_description(name: str | Path, shown: str | None = None) -> PretrainedConfig:
    """Read the configuration of a model in a local folder or on the hub.

    shown: what messages call the model, by default `name`. Raises UserError for a model that cannot
    be trained, also where transformers does not know its type, and ValueError or OSError where no
    configuration can be read.
    """
    settings, _ = PretrainedConfig.get_config_dict(name)
    if not isinstance(settings.get("model_type"), str):
        raise ValueError("its config.json names no model_type")
    check_supported(shown or str(name), settings)
    config = AutoConfig.from_pretrained(name)
    check_layers(shown or str(name), config)
    return config
