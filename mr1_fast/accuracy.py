"""Answering items with a policy, and how many of the answers are right."""

import math
from collections.abc import Callable, Iterator

from tqdm import tqdm

from .config import EVALUATION_BATCH_SIZE
from .distributed import SINGLE, World
from .distributed.world import in_order
from .model.policy import Policy
from .rewards import CompletionJudge
from .rollout.engine import PREFILL_TOKENS, Engine
from .rollout.sampling import Sampling
from .rollout.stream import Batch
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
    stopped: Callable[[], bool] | None = None,
    world: World = SINGLE,
) -> list[dict]:
    """Answer the examples; returns a record of each, in order.

    `stopped()` is asked after each batch: where it is true, the other batches are left out.
    The processes of a `world` share the items, and all return all records. The bar is the first
    one's, and counts its own items.

    A record has `key`, `question` and `ground_truth` of its example, and G = `num_generations`
    `outputs` (texts) with what `judged` adds. `cache_tokens` and `prefill_tokens` are those of
    Engine.stream.

    batch_size: prompts whose images are in memory at once as the model sees them. As many samples
    run at once as one batch has; the next batch begins beside the last samples of those before.
    """
    engine = Engine(policy.model, policy.processor, policy.encode, policy.layers)
    batches = list(shared_batches(examples, seed, batch_size, world))
    by_batch: list[list[dict]] = []
    with tqdm(
        desc=f"process 0 of {world.size}" if world.size > 1 else None,
        total=sum(len(batch.examples) for batch in batches),
        unit="item",
        disable=not show_progress or not world.is_first,
    ) as bar:
        for rollout in engine.stream(
            batches, num_generations, sampling, cache_tokens, prefill_tokens
        ):
            records = []
            for row, example in enumerate(rollout.examples):
                outputs = rollout.texts[row * num_generations : (row + 1) * num_generations]
                records.append(
                    {
                        "key": example.key,
                        "question": example.problem,
                        "ground_truth": example.solution,
                        "outputs": outputs,
                    }
                )
            by_batch.append(records)
            bar.update(len(rollout.examples))
            if stopped and stopped():
                break
    parts = world.gather([judged(records, judge) for records in by_batch])
    return [record for batch in zip(*parts, strict=False) for record in in_order(batch)]


def shared_batches(
    examples: list[Example], seed: int, batch_size: int, world: World = SINGLE
) -> Iterator[Batch]:
    """Cut items into batches, each with a seed of its own; yields this process's part of them.

    N processes share N batches at a time, so that each still samples as many items at once as a
    process alone, and every item has the random numbers that it has there.
    """
    for start in range(0, len(examples), batch_size * world.size):
        end = min(start + batch_size * world.size, len(examples))
        numbers = world.share(range(start, end))
        places = [number % batch_size for number in numbers]
        seeds = [
            derive_seed(seed, "evaluate", number - place)
            for number, place in zip(numbers, places, strict=True)
        ]
        mine = [examples[number] for number in numbers]
        yield Batch(mine, places=places, seeds=seeds)


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
