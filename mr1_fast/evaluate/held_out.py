"""Evaluations before, during and after training: accuracy and answers on held-out items."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..accuracy import evaluate, judged, summarise
from ..checkpoint import keep_only, load_weights, save_weights
from ..config import TrainConfig
from ..distributed import SINGLE, World
from ..divergence import named
from ..files import write_json
from ..model.policy import Policy
from ..plan.out_of_memory import EVALUATION_CACHE, PACK_TOKENS, MemoryLimits
from ..resuming import saved_steps
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


def record_evaluation(run: Run, when: str, step: int) -> None:
    """Evaluate a run's held-out items greedily and by sampling; print and record the accuracy.

    `when` is `before` or `after` training; the figures go to evaluation.json under that name. The
    greedy accuracy is that of `step` in the curve of `--eval-every`. Nothing is recorded of an
    evaluation that a signal has ended.
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
    if when == "after":
        result["final_step"] = step
    task, data = get_task(config.task), config.eval_data or config.data
    for mode in MODES:
        answered = _held_out_answers(run, mode, step)
        if answered is None:
            return
        records, seconds = answered
        if mode == "greedy" and config.eval_every and step not in run.progress.accuracies:
            _record_point(run, step, records, seconds)
        if not run.world.is_first:
            continue
        if mode == "greedy":
            _record_shown(result["examples"], records, run.held_out, when, run.log.folder)
        figures = {mode: summarise(records)}
        for other in other_judges(config.judge, data):
            by_other = summarise(judged(records, task.judge(other)))
            figures[f"{mode}, {NAMES[other]}"] = by_other
        for name, summary in figures.items():
            run.log.say(f"{when:>6}: {name} {accuracy_text(summary)}")
        result[when] |= figures
    if run.world.is_first:
        write_json(path, result)


def evaluate_if_due(run: Run, steps_done: int) -> None:
    """Evaluate the held-out items greedily on the way, if that is due, and record the accuracy.

    Nothing is recorded of an evaluation that a signal has ended: a resumed run makes it again.
    """
    if not run.evaluation_is_due(steps_done):
        return
    if answered := _held_out_answers(run, "greedy", steps_done):
        records, seconds = answered
        _record_point(run, steps_done, records, seconds)
        note = "" if run.progress.waiting else ", the best so far"
        accuracy = accuracy_text(summarise(records))
        run.log.say(f"step {steps_done}: greedy {accuracy}{note} ({seconds:.1f} s)")


def _record_point(run: Run, step: int, records: list[dict], seconds: float) -> None:
    """Record a point of the curve, and keep the weights if it is the best.

    The weights come first: what is recorded as the best is there, whenever the process is killed.
    """
    progress, summary = run.progress, summarise(records)
    progress.accuracies[step] = summary["accuracy"]
    if run.config.keep_best and progress.best() == step:
        run.require_numbers(step)
        save_weights(run.log.best, step, run.sharding)
    run.log.evaluation({"step": step, **summary, "seconds": round(seconds, 3)})
    if run.world.is_first:
        # A run that goes on from a checkpoint needs what was the best when that was saved.
        starts = [*saved_steps(run.log.checkpoints), step]
        keep_only(run.log.best, {progress.best(start) for start in starts})


def restore_best(run: Run, steps_done: int) -> int:
    """Bring the weights of the best evaluation back into the policy, under `--keep-best`.

    Returns the number of steps after which the policy is now as it was.
    """
    best = run.progress.best()
    if not run.config.keep_best or best is None:
        return steps_done
    if best != steps_done:
        load_weights(run.log.best, best, run.sharding)
    run.log.say(
        f"final/ is the model after step {best} of {steps_done}, "
        f"whose accuracy of {run.progress.accuracies[best]:.1%} is the highest"
    )
    return best


def _held_out_answers(run: Run, mode: str, step: int) -> tuple[list[dict], float] | None:
    """Answer a run's held-out items after `step` steps; returns their records and the seconds.

    The time limit takes note of the seconds. None, on every process, if a signal to any of them
    has ended it.
    """
    if run.signals.agree(run.world.most):
        return None
    started = time.perf_counter()
    where = f"in the evaluation after {step} steps"
    with run.sharding.whole_weights(), named(where):
        records = answers(
            run.policy,
            run.config,
            run.held_out,
            mode,
            run.limits,
            stopped=run.signals.is_told,
            world=run.world,
        )
    run.limits.agree()
    is_ended = run.signals.agree(run.world.most) > 0
    seconds = time.perf_counter() - started
    run.time_limit.note(f"{mode} evaluation", seconds)
    return None if is_ended else (records, seconds)


def answers(
    policy: Policy,
    config: TrainConfig,
    items: list[Example],
    mode: str,
    limits: MemoryLimits,
    stopped: Callable[[], bool] | None = None,
    world: World = SINGLE,
) -> list[dict]:
    """Answer items of `config.task`; returns the records of `accuracy.evaluate`.

    `mode` is `greedy`, or `sampled` at the temperature of training. The KV cache is made smaller if
    memory runs out; `stopped` and `world` are those of `evaluate`.
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
        stopped=stopped,
        world=world,
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
