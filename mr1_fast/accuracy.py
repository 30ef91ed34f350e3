"""Answering items with a policy, and how many of the answers are right."""

import math

from tqdm import tqdm

from .config import EVALUATION_BATCH_SIZE
from .model.policy import Policy
from .rewards import CompletionJudge
from .rollout.engine import PREFILL_TOKENS, Engine
from .rollout.sampling import Sampling
from .seeds import derive_seed
from .types import Example


def evaluate(
    policy: Policy,
    judge: CompletionJudge,
    examples: list[Example],
    sampling: Sampling,
    num_generations: int = 1,
    seed: int = 0,
    batch_size: int = EVALUATION_BATCH_SIZE,
    cache_tokens: int | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    show_progress: bool = False,
) -> list[dict]:
    """Answer the examples; returns a record of each, in order.

    A record has `key`, `question` and `ground_truth` of its example, and G = `num_generations`
    `outputs` (texts) with what `judged` adds. `batch_size` prompts are held in memory at once;
    `cache_tokens` and `prefill_tokens` are those of Engine.generate.
    """
    engine = Engine(policy.model, policy.processor, policy.encode, policy.layers)
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
                records.append(
                    {
                        "key": example.key,
                        "question": example.problem,
                        "ground_truth": example.solution,
                        "outputs": outputs,
                    }
                )
            bar.update(len(chunk))
    return judged(records, judge)


def judged(records: list[dict], judge: CompletionJudge) -> list[dict]:
    """Return the records with a judge's verdicts on their outputs.

    `correct` has a bool for each output, and `why` the reason in words.
    """
    found = []
    for record in records:
        verdicts = [judge(output, record["ground_truth"]) for output in record["outputs"]]
        found.append(
            record
            | {
                "correct": [verdict.right for verdict in verdicts],
                "why": [verdict.why for verdict in verdicts],
            }
        )
    return found


def summarise(records: list[dict]) -> dict:
    """Return the accuracy of the first output of each record, with Wilson's 95% interval."""
    count, correct = len(records), sum(record["correct"][0] for record in records)
    interval = list(wilson_interval(correct, count))
    return {"accuracy": correct / count, "interval": interval, "correct": correct, "count": count}


def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion (E. B. Wilson, 1927); z = 1.96 gives 95%."""
    share, denominator = correct / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / denominator
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(records: list[dict], k: int) -> float:
    """Average the unbiased estimate 1 − C(n−c, k)/C(n, k) for n outputs of which c are right.

    Source: Chen et al., 2021, arXiv 2107.03374.
    """
    chances = []
    for record in records:
        n, c = len(record["correct"]), sum(record["correct"])
        chances.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return sum(chances) / len(chances)
