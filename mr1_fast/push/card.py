"""The model card of a run: final/README.md, and training.png beside it.

What settings, data and model names say may be hostile: it enters the card through `inline` or
`fence`, or as a value of its YAML. Nothing of the machine enters: see public.py.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..config import TrainConfig
from ..files import write_bytes, write_text
from ..model.saved_adapter import model_under
from ..report.markdown import inline
from ..report.page import printable
from ..report.records import read_evaluation, read_metrics
from ..setting_values import shown
from ..version import __version__
from .metadata import metadata
from .papers import OTHINK, PAPERS
from .picture import panels, training_picture
from .public import hub_name, public, public_name, public_settings
from .usage import usage

CARD, PICTURE = "README.md", "training.png"
"""Names of the card and of its picture in final/."""

LONGEST_VALUE = 500
"""The most characters of a setting that the card shows."""

_WAY_OUT = "make room there; the model itself is complete"

_MATTERING = (
    *("steps", "prompts_per_step", "num_generations", "updates_per_batch", "max_new_tokens"),
    *("temperature", "learning_rate", "lr_schedule", "loss_type", "surrogate", "advantage"),
    *("format_weight", "extra_rewards", "judge", "seed"),
)
_OF_SFT = ("steps", "prompts_per_step", "sft_target", "learning_rate", "lr_schedule", "seed")


def write_card(run: Path, config: TrainConfig) -> None:
    """Write the model card of the finished run in folder `run` into its final/.

    Reads metrics.jsonl and evaluation.json, as far as they exist. Raises UserError where one of
    them is damaged, or a file cannot be written.
    """
    final, model = run / "final", model_under(config.model)
    results = read_evaluation(run / "evaluation.json")
    columns = read_metrics(run / "metrics.jsonl")
    drawn = list(panels(columns).values())
    if drawn:
        write_bytes(final / PICTURE, training_picture(columns), _WAY_OUT)
    parts = (
        f"---\n{metadata(config, model, results, final)}---\n",
        f"# {inline(public_name(model))}, trained with {_algorithm(config)}\n",
        _about(config, model),
        f"## Accuracy\n\n{_accuracy(results)}",
        f"## Training\n\n{_training(config, results, len(columns['step']), drawn)}",
        f"## Use\n\n{usage(config, model, final)}",
        f"## Settings\n\n{_settings(config)}",
        f"## Versions\n\n{_versions()}",
        f"## Citation\n\n{_citation(config)}",
    )
    write_text(final / CARD, "\n".join(parts), _WAY_OUT)


def _algorithm(config: TrainConfig) -> str:
    return PAPERS[config.algo].algorithm if config.algo in PAPERS else "supervised fine-tuning"


def _about(config: TrainConfig, model: str) -> str:
    """From what, how, and on which data the model was trained, in a sentence or two."""
    if base := hub_name(model):
        base = f"[{inline(base)}](https://huggingface.co/{base})"
    else:
        base = f"`{_code(public_name(model))}`"
    if data := hub_name(config.data):
        data = f"[{inline(data)}](https://huggingface.co/datasets/{data})"
    elif config.data == "drawn":
        data = f"items that mr1_fast drew (difficulty {config.difficulty})"
    else:
        data = f"`{_code(public_name(config.data))}`"

    paper = PAPERS.get(config.algo)
    how = f"[{paper.algorithm}]({paper.url})" if paper else _algorithm(config)
    what = "All weights" if not config.lora else f"LoRA adapters of rank {config.lora_rank}"
    if config.lora and config.load_in_4bit:
        what += " over weights in 4 bits"
    elif not config.lora and config.freeze_vision:
        what = "The language model's weights"
    task = inline(public(config.task))
    earlier = "" if model == config.model else " Training went on from an earlier adapter of it."
    return (
        f"This model is {base}, post-trained with {how} on the task {task}, with {data}. {what} "
        f"were trained, with mr1_fast {__version__}.{earlier}\n"
    )


def _code(value: object) -> str:
    """Text for a code span: in one line, without the sign that ends it."""
    return " ".join(printable(value)[0].replace("`", "'").split())[:LONGEST_VALUE]


def _accuracy(evaluation: dict) -> str:
    """A table of the accuracies before and after training, with their intervals."""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    if not after:
        return "No held-out items were evaluated.\n"
    rows = ["| answers | before | after | difference |", "| --- | --- | --- | --- |"]
    for mode, result in after.items():
        cells = [inline(mode), "", f"**{_share(result)}**", ""]
        if mode in before:
            points = 100 * (result["accuracy"] - before[mode]["accuracy"])
            cells[1] = _share(before[mode])
            cells[3] = f"{points:+.1f} points".replace("-", "−")
        rows.append(f"| {' | '.join(cells)} |")
    count = max(int(result["count"]) for result in after.values())
    task, split = (inline(public(evaluation.get(name, "?"))) for name in ("task", "split"))
    note = (
        f"Share of {count:,} held-out items (task {task}, split {split}) that were answered right, "
        f"by the judge `{_code(evaluation.get('judge', 'strict'))}`. In brackets: Wilson's 95% "
        "intervals."
    )
    return "\n".join(rows) + f"\n\n{note}\n"


def _share(result: dict) -> str:
    low, high = result["interval"]
    return f"{result['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _training(config: TrainConfig, evaluation: dict, steps: int, drawn: list[str]) -> str:
    """How long and by which objective, with the picture, and a table of the main settings."""
    parts = [f"Trained for {steps:,} of {config.steps:,} steps.", _beta(config)]
    if config.keep_best and "final_step" in evaluation:
        parts.insert(1, f"The weights are those after step {evaluation['final_step']}, the best.")
    lines = [" ".join(filter(None, parts))]
    if drawn:
        lines.append(f"![{' and '.join(drawn)}, over the steps]({PICTURE})")
    names = _OF_SFT if config.algo == "sft" else _MATTERING
    settings = public_settings(config)
    return "\n\n".join([*lines, _table({name: settings[name] for name in names})]) + "\n"


def _beta(config: TrainConfig) -> str:
    """The path of the KL weight, in a sentence; "" for supervised fine-tuning."""
    if config.algo == "sft":
        return ""
    low, high = config.beta_min, config.beta_max
    if config.beta_shape == "constant":
        return f"The KL weight β is {config.beta:g} throughout." if config.beta else "No KL term."
    if config.beta_shape == "grpo-d":
        return (
            f"The KL weight β falls from {(low + high) / 2:g} to {low:g} over the first "
            f"{config.explore_fraction:.0%} of the steps, and then rises to {high:g}."
        )
    return f"The KL weight β takes the path `{config.beta_shape}` between {low:g} and {high:g}."


def _settings(config: TrainConfig) -> str:
    """A table of all settings, folded until the reader opens it."""
    table = _table(public_settings(config))
    return f"<details>\n<summary>All settings of the run</summary>\n\n{table}\n\n</details>\n"


def _table(values: dict) -> str:
    rows = [
        f"| {name} | {inline(shown(value)[:LONGEST_VALUE])} |" for name, value in values.items()
    ]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _versions() -> str:
    """The versions of what the run was made with, in a line."""
    found = [f"mr1_fast {__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) + "\n"


def _citation(config: TrainConfig) -> str:
    papers = dict.fromkeys([OTHINK, PAPERS.get(config.algo, OTHINK)])
    entries = "\n\n".join(paper.bibtex() for paper in papers)
    return f"```bibtex\n{entries}\n```\n"
