"""Held-out items before and after training: how accurate the model is, and the answers that the report shows."""

import json
from functools import partial
from pathlib import Path

from ..accuracy import evaluate, summarise
from ..config import TrainConfig
from ..errors import UserError
from ..files import write_json
from ..log import RunLog
from ..model.load import Policy
from ..plan.out_of_memory import EVALUATION_CACHE, MemoryLimits
from ..rollout.sampling import Sampling
from ..seeds import derive_seed
from ..tasks.data import configured_examples
from ..types import Example

MODES = ("greedy", "sampled")
"""How held-out items are answered."""
SHOWN = 12
"""Held-out items whose images and answers the report shows."""


def held_out_items(config: TrainConfig) -> list[Example]:
    """The items that a run evaluates; UserError with the way out where there are none."""
    if not config.eval_samples:
        return []
    try:
        return configured_examples(config, "test", config.eval_data).all(config.eval_samples)
    except UserError as error:
        raise UserError(
            f"{error} This is about held-out data: name some with --eval-data, or pass --eval-samples 0."
        ) from error


def record_evaluation(
    policy, config: TrainConfig, held_out: list[Example], log: RunLog, room: MemoryLimits, when: str
) -> None:
    """Evaluate greedily and by sampling, print it, and put it into evaluation.json under `when`."""
    if not held_out:
        return
    path = log.folder / "evaluation.json"
    result = {"task": config.task, "split": "test", "examples": []}
    if (
        when == "after" and path.exists()
    ):  # a run resumed with other --eval-samples may have no "before"
        result = json.loads(path.read_text())
    result[when] = {}
    for mode in MODES:
        records = answers(policy, config, held_out, mode, room)
        result[when][mode] = summary = summarise(records)
        if mode == "greedy":
            _record_shown(result["examples"], records, held_out, when, log.folder)
        low, high = summary["interval"]
        log.say(
            f"{when:>6}: {mode} accuracy {summary['accuracy']:.1%} (95% interval {low:.1%}–{high:.1%})"
        )
    write_json(path, result)


def answers(
    policy: Policy, config: TrainConfig, items: list[Example], mode: str, room: MemoryLimits
) -> list[dict]:
    """Records of `evaluate` on the items of config.task: `greedy`, or `sampled` at the training's temperature."""
    sampling = Sampling.of(config, temperature=0.0 if mode == "greedy" else config.temperature)
    work = partial(
        evaluate,
        policy,
        config.task,
        items,
        sampling,
        seed=derive_seed(config.seed, mode),
        prefill_tokens=config.tokens_per_microbatch,
    )
    return room.attempt(EVALUATION_CACHE, lambda tokens: work(cache_tokens=tokens))


def _record_shown(
    shown: list[dict], records: list[dict], held_out: list[Example], when: str, folder: Path
) -> None:
    """Keep question, images and answer of the first SHOWN items for the report."""
    for index, (record, example) in enumerate(zip(records[:SHOWN], held_out, strict=False)):
        if index == len(shown):
            paths = [f"images/test-{index}-{number}.png" for number in range(len(example.images))]
            (folder / "images").mkdir(exist_ok=True)
            for path, image in zip(paths, example.images, strict=True):
                image.save(folder / path)
            shown.append(
                {"problem": example.problem, "solution": example.solution, "images": paths}
            )
        shown[index][when] = {"text": record["outputs"][0], "correct": record["correct"][0]}


def print_table(folder: Path) -> None:
    """Print the before/after table of a finished run."""
    path = folder / "evaluation.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    if not {"before", "after"} <= result.keys():
        return
    print(f"\n{'accuracy on held-out ' + result['task']:<34}{'before':>8}{'after':>8}{'points':>8}")
    for mode in MODES:
        before, after = (result[when][mode]["accuracy"] for when in ("before", "after"))
        print(f"{mode:<34}{before:>8.1%}{after:>8.1%}{(after - before) * 100:>+8.1f}")
