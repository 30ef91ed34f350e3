"""Accuracy of a model on held-out items: `python -m mr1_fast.evaluate`, greedy or pass@k."""

import sys
from pathlib import Path

from ..accuracy import evaluate, pass_at_k, summarise
from ..config import BUILT_IN, parse_config
from ..files import write_json
from ..model.load import load_pretrained, make_policy
from ..rollout.sampling import Sampling
from ..tasks import get_task
from ..tasks.data import load_examples
from .r1v import write_r1v_results
from .settings import EvaluateConfig, _profile


def main() -> None:
    """`python -m mr1_fast.evaluate`."""
    config = parse_config(
        EvaluateConfig, sys.argv[1:], prog="python -m mr1_fast.evaluate", profile=_profile
    )
    config.check()
    get_task(config.task)
    examples = load_examples(
        config.task,
        config.data,
        config.split,
        config.seed,
        config.difficulty,
        image_root=config.image_root,
    ).all(config.samples)
    if config.model in BUILT_IN:
        from ..start import supervised_start

        config.model = str(supervised_start(config.model, [config], config.seed))
    policy = make_policy(*load_pretrained(config), config)
    generations, size = config.num_generations, config.batch_size
    records = evaluate(
        policy,
        config.task,
        examples,
        Sampling.of(config),
        generations,
        config.seed,
        size,
        show_progress=True,
    )
    summary = summarise(records)
    passes = {str(k): pass_at_k(records, k) for k in config.pass_at}
    write_json(
        Path(config.output),
        {**summary, "pass_at": passes, "config": vars(config), "results": records},
    )
    if config.r1v_output:
        write_r1v_results(Path(config.r1v_output), records, config.task)
    low, high = summary["interval"]
    print(
        f"accuracy {summary['accuracy']:.1%} (95% interval {low:.1%}–{high:.1%}, {summary['count']} items)"
    )
    for k, value in passes.items():
        print(f"pass@{k} {value:.1%}")
    print(f"wrote {config.output}")
