"""Accuracy of a model on items of a task, greedy or as pass@k: `python -m mr1_fast.evaluate`."""

from pathlib import Path

from ..accuracy import evaluate, pass_at_k, summarise
from ..files import write_json
from ..model.load import load_pretrained, make_policy
from ..rollout.sampling import Sampling
from ..start import with_start
from ..tasks import get_task
from ..tasks.data import load_examples
from .r1v import write_r1v_results
from .settings import EvaluateConfig


def evaluate_model(config: EvaluateConfig) -> None:
    """Answer the items, print the accuracy and write the figures with a record of each item."""
    get_task(config.task)
    examples = load_examples(
        config.task,
        config.data,
        config.split,
        config.seed,
        config.difficulty,
        image_root=config.image_root,
    ).all(config.samples)
    config = with_start(config)
    policy = make_policy(*load_pretrained(config), config)
    records = evaluate(
        policy,
        config.task,
        examples,
        Sampling.of(config),
        config.num_generations,
        config.seed,
        config.batch_size,
        show_progress=True,
    )

    summary = summarise(records)
    passes = {str(k): pass_at_k(records, k) for k in config.pass_at}
    result = {**summary, "pass_at": passes, "config": vars(config), "results": records}
    write_json(Path(config.output), result)
    if config.r1v_output:
        write_r1v_results(Path(config.r1v_output), records, config.task)

    low, high = summary["interval"]
    interval = f"95% interval {low:.1%}–{high:.1%}, {summary['count']} items"
    print(f"accuracy {summary['accuracy']:.1%} ({interval})")
    for k, value in passes.items():
        print(f"pass@{k} {value:.1%}")
    print(f"wrote {config.output}")
