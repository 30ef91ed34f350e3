"""Evaluations before and after training: accuracy and answers on held-out items."""

import json
from functools import partial
from pathlib import Path

from ..accuracy import evaluate, judged, summarise
from ..config import TrainConfig
from ..files import write_json
from ..model.policy import Policy
from ..plan.out_of_memory import EVALUATION_CACHE, PACK_TOKENS, MemoryLimits
from ..rollout.sampling import Sampling
from ..run import Run
from ..seeds import derive_seed
from ..tasks import get_task
from ..types import Example
from .judges import NAMES, accuracy_text, other_judges

MODES = ("greedy", "sampled")
"""How held-out items are answered."""
SHOWN = 12
"""Held-out items whose images and answers the report shows."""


def record_evaluation(run: Run, when: str) -> None:
    """Evaluate a run's held-out items greedily and by sampling; print and record the accuracy.

    `when` is `before` or `after` training; the figures go to evaluation.json under that name.
    """
    if not run.held_out:
        return
    path = run.log.folder / "evaluation.json"
    config = run.config
    split = config.eval_split or ("held-out" if config.eval_data else "test")
    result = {"task": config.task, "split": split, "judge": config.judge, "examples": []}
    # A run that was resumed with other --eval-samples may have no figures from before.
    if when == "after" and path.exists():
        result = json.loads(path.read_text())
    result[when] = {}
    task, data = get_task(config.task), config.eval_data or config.data
    for mode in MODES:
        records = answers(run.policy, config, run.held_out, mode, run.limits)
        if mode == "greedy":
            _record_shown(result["examples"], records, run.held_out, when, run.log.folder)
        figures = {mode: summarise(records)}
        for other in other_judges(config.judge, data):
            by_other = summarise(judged(records, task.judge(other)))
            figures[f"{mode}, {NAMES[other]}"] = by_other
        for name, summary in figures.items():
            run.log.say(f"{when:>6}: {name} {accuracy_text(summary)}")
        result[when] |= figures
    write_json(path, result)


def answers(
    policy: Policy, config: TrainConfig, items: list[Example], mode: str, limits: MemoryLimits
) -> list[dict]:
    """Answer items of `config.task`; returns the records of `accuracy.evaluate`.

    `mode` is `greedy`, or `sampled` at the temperature of training. The KV cache is made smaller if
    memory runs out.
    """
    temperature = 0.0 if mode == "greedy" else config.temperature
    work = partial(
        evaluate,
        policy,
        get_task(config.task).judge(config.judge),
        items,
        Sampling.of(config, temperature=temperature),
        seed=derive_seed(config.seed, mode),
        prefill_tokens=limits.amounts[PACK_TOKENS],
    )
    return limits.attempt(EVALUATION_CACHE, lambda tokens: work(cache_tokens=tokens))


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
            question = {"problem": example.problem, "solution": example.solution}
            shown.append({**question, "images": paths})
        shown[index][when] = {
            "text": record["outputs"][0],
            "correct": record["correct"][0],
            "why": record["why"][0],
        }


def print_table(folder: Path) -> None:
    """Print the table of accuracy before and after of the finished run in `folder`."""
    path = folder / "evaluation.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    if not {"before", "after"} <= result.keys():
        return
    title = f"accuracy on held-out {result['task']}"
    print(f"\n{title:<34}{'before':>8}{'after':>8}{'points':>8}")
    # A run that was resumed with another judge has not the same figures before and after.
    for mode in [mode for mode in result["before"] if mode in result["after"]]:
        before, after = (result[when][mode]["accuracy"] for when in ("before", "after"))
        print(f"{mode:<34}{before:>8.1%}{after:>8.1%}{(after - before) * 100:>+8.1f}")
