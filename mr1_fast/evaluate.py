"""Accuracy of a model on held-out items: `python -m mr1_fast.evaluate`, greedy or pass@k."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .atomic import write_atomically
from .checkpoint import derive_seed
from .command_line import parse_settings
from .config import BUILT_IN, TINY, ModelConfig, TaskConfig
from .errors import UserError, exit_on_user_error
from .model.load import Policy, load_pretrained, make_policy
from .r1v import write_r1v_results
from .rollout.engine import PREFILL_TOKENS, Engine
from .rollout.sampling import Sampling
from .tasks import get_task
from .tasks.data import load_examples
from .types import Example

BATCH_SIZE = 64
"""Items whose prompts are held at once unless told otherwise."""


@dataclass
class EvaluateConfig(Sampling, TaskConfig, ModelConfig):
    """All settings of `python -m mr1_fast.evaluate`."""

    temperature: float = 0.0
    """0 is greedy, as in the paper; sampling needs more than 0."""
    split: str = "test"
    """Which split of the data: train, validation or test."""
    samples: int = 200
    """How many items."""
    num_generations: int = 1
    """Completions per item, for pass@k (needs --temperature above 0)."""
    pass_at: list[int] = field(default_factory=lambda: [1])
    """The k of each pass@k to report; none above num_generations."""
    batch_size: int = BATCH_SIZE
    """Items whose prompts are held at once."""
    seed: int = 0
    """Seed of drawn items and of sampling."""
    output: str = "evaluation.json"
    """Where the figures and the record of each item go."""
    r1v_output: str | None = None
    """A second file, in the layout of R1-V's evaluation scripts, for whatever reads those."""

    def check(self) -> None:
        """Raise UserError for values that no evaluation could mean."""
        for name in ("samples", "num_generations", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        self.check_sampling()
        if self.num_generations > 1 and self.temperature == 0:
            raise UserError("num_generations is above 1, but greedy samples are all alike: set --temperature 1.")
        if not self.pass_at or not all(1 <= k <= self.num_generations for k in self.pass_at):
            raise UserError(f"pass_at is {self.pass_at}, but each k must lie in 1 … num_generations.")


def evaluate(
    policy: Policy,
    task: str,
    examples: list[Example],
    sampling: Sampling,
    num_generations: int = 1,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    cache_tokens: int | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    show_progress: bool = False,
) -> list[dict]:
    """One record an example: key, question, ground_truth, outputs (texts) and correct (bools), G each.

    `batch_size` prompts are held at once; `cache_tokens` and `prefill_tokens` are Engine.generate's.
    """
    is_correct = get_task(task).is_correct
    engine = Engine(policy.model, policy.processor, policy.encode)
    records = []
    with tqdm(total=len(examples), unit="item", disable=not show_progress) as bar:
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            rollout = engine.generate(
                chunk,
                num_generations,
                sampling,
                seed=derive_seed(seed, "evaluate", start),
                cache_tokens=cache_tokens,
                prefill_tokens=prefill_tokens,
            )
            for row, example in enumerate(chunk):
                outputs = rollout.texts[row * num_generations : (row + 1) * num_generations]
                verdicts = [is_correct(output, example.solution) for output in outputs]
                record = {"key": example.key, "question": example.problem, "ground_truth": example.solution}
                records.append({**record, "outputs": outputs, "correct": verdicts})
            bar.update(len(chunk))
    return records


def summarise(records: list[dict]) -> dict:
    """Accuracy of the first output of each record, with Wilson's 95% interval."""
    count, correct = len(records), sum(record["correct"][0] for record in records)
    interval = list(wilson_interval(correct, count))
    return {"accuracy": correct / count, "interval": interval, "correct": correct, "count": count}


def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion (E. B. Wilson, 1927); z = 1.96 gives 95%."""
    share, denominator = correct / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / denominator
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(records: list[dict], k: int) -> float:
    """The unbiased estimate 1 − C(n−c, k)/C(n, k) of n outputs with c right, averaged (Chen et al., 2021)."""
    chances = []
    for record in records:
        n, c = len(record["correct"]), sum(record["correct"])
        chances.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return sum(chances) / len(chances)


def write_json(path: Path, value: dict) -> None:
    """Write all of the JSON file or nothing; UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value, indent=1, ensure_ascii=True))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another with --output.") from error


def main() -> None:
    """`python -m mr1_fast.evaluate`."""
    config = parse_settings(EvaluateConfig, sys.argv[1:], prog="python -m mr1_fast.evaluate", profile=_profile)
    get_task(config.task)
    examples = load_examples(
        config.task, config.data, config.split, config.seed, config.difficulty, image_root=config.image_root
    ).all(config.samples)
    if config.model in BUILT_IN:
        from .sft import supervised_start

        config.model = str(supervised_start(config.model, [config], config.seed))
    policy = make_policy(*load_pretrained(config), config)
    generations, size = config.num_generations, config.batch_size
    records = evaluate(
        policy, config.task, examples, Sampling.of(config), generations, config.seed, size, show_progress=True
    )
    summary = summarise(records)
    passes = {str(k): pass_at_k(records, k) for k in config.pass_at}
    write_json(Path(config.output), {**summary, "pass_at": passes, "config": vars(config), "results": records})
    if config.r1v_output:
        write_r1v_results(Path(config.r1v_output), records, config.task)
    low, high = summary["interval"]
    print(f"accuracy {summary['accuracy']:.1%} (95% interval {low:.1%}–{high:.1%}, {summary['count']} items)")
    for k, value in passes.items():
        print(f"pass@{k} {value:.1%}")
    print(f"wrote {config.output}")


def _profile(parsed) -> dict:
    return {"max_new_tokens": TINY["max_new_tokens"]} if parsed.model in BUILT_IN else {}


if __name__ == "__main__":
    exit_on_user_error(main)
