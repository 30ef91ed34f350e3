"""The YAML at the head of a model card, by which the Hub finds and lists the model."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.repocard import metadata_load

from ..config import TrainConfig
from ..hub import HUB_TIMEOUT
from ..model.families import FAMILIES
from ..model.saved_adapter import ADAPTER_CONFIG, ADAPTER_FOLDER
from ..report.page import printable
from .papers import PAPERS
from .public import hub_name, public, public_name

LARGEST_CARD = 2**20
"""Bytes above which the card of a base model is not read."""


def metadata(config: TrainConfig, model: str, evaluation: dict, final: Path) -> str:
    """Return the metadata of the model in folder `final`, trained from `model`, as YAML."""
    base, data = hub_name(model), hub_name(config.data)
    adapter = adapter_place(final)
    alone = adapter is not None and not has_weights(final)
    relation = "adapter" if alone else "finetune"
    pipeline = "image-text-to-text" if reads_images(final) else "text-generation"
    card = ModelCardData(
        base_model=base,
        datasets=[data] if data else None,
        eval_results=_results(config, evaluation, pipeline) or None,
        library_name="peft" if alone else "transformers",
        model_name=_line(f"{public_name(model)}-{config.algo}-{public(config.task)}"),
        pipeline_tag=pipeline,
        tags=[*_tags(config), *(["peft", "lora"] if adapter is not None else [])],
        **({"base_model_relation": relation} if base else {}),
        **base_license(model),
    )
    fields = card.to_dict()
    fields.pop("model_name", None)  # it is there where nothing was evaluated
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def adapter_place(final: Path) -> str | None:
    """Return where `final` holds an adapter, as a path in it: "." for itself; None for nowhere."""
    found = [name for name in (ADAPTER_FOLDER, ".") if (final / name / ADAPTER_CONFIG).is_file()]
    return found[0] if found else None


def has_weights(final: Path) -> bool:
    """Say whether `final` holds the weights of a whole model."""
    return any(final.glob("model*.safetensors"))


def reads_images(final: Path) -> bool:
    """Say whether the model of `final` reads images: by its family, or by its processor's files."""
    config = final / "config.json"
    if config.is_file():
        family = FAMILIES.get(json.loads(config.read_text("utf-8")).get("model_type"))
        return family is None or family.vision is not None
    return any((final / f"{name}_config.json").is_file() for name in ("preprocessor", "processor"))


def base_license(model: str) -> dict[str, str]:
    """Return the license of the base model as its own card states it; nothing if it does not.

    A folder's card is its README.md. The Hub is asked once, and has HUB_TIMEOUT seconds.
    """
    card: dict[str, Any] = {}
    readme = Path(model) / "README.md"
    # Whatever is wrong with the card or the connection: the license is then not known.
    with suppress(Exception):
        if readme.is_file() and readme.stat().st_size <= LARGEST_CARD:
            card = metadata_load(readme) or {}
        elif name := hub_name(model):
            found = HfApi().model_info(name, timeout=HUB_TIMEOUT).card_data
            card = found.to_dict() if found else {}
    names = ("license", "license_name", "license_link")
    return {
        name: _line(card[name]) for name in names if isinstance(card.get(name), str) and card[name]
    }


def _tags(config: TrainConfig) -> list[str]:
    how = ["sft"] if config.algo == "sft" else ["grpo", config.algo]
    paper = PAPERS.get(config.algo)
    return [*dict.fromkeys(how), "mr1_fast", *([f"arxiv:{paper.arxiv}"] if paper else [])]


def _results(config: TrainConfig, evaluation: dict, pipeline: str) -> list[EvalResult]:
    """The accuracies after training, each with the mode and the judge in its name."""
    held_out = config.eval_data or config.data
    return [
        EvalResult(
            task_type=pipeline,
            task_name=_line(public(evaluation.get("task", config.task))),
            dataset_type=_line(hub_name(held_out) or "local"),
            dataset_name=_line(public_name(held_out)),
            dataset_split=_line(public(evaluation.get("split", "test"))),
            metric_type="accuracy",
            metric_value=round(float(result["accuracy"]), 4),
            metric_name=_line(f"accuracy, {mode}"),
        )
        for mode, result in (evaluation.get("after") or {}).items()
    ]


def _line(value: object) -> str:
    """One line of text without what a terminal would obey, of at most 200 characters."""
    return " ".join(printable(value)[0].split())[:200]
