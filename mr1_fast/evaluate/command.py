"""Accuracy of a model on items of a task, greedy or as pass@k: `python -m mr1_fast.evaluate`."""

from dataclasses import replace
from pathlib import Path

from ..accuracy import evaluate, judged, pass_at_k, summarise
from ..checkpoint import fingerprint
from ..data_check import check_data
from ..distributed.launch import join_world, leave_world, require_same
from ..errors import printable
from ..files import write_json
from ..model.device import resolve_device
from ..model.load import load_pretrained, make_policy
from ..rollout.sampling import Sampling
from ..start import with_start
from ..tasks import PromptFormat, get_task
from ..tasks.data import DataOptions, load_examples
from .explain import explanation
from .judges import NAMES, accuracy_text, other_judges
from .r1v import write_r1v_results
from .settings import EvaluateConfig


def evaluate_model(config: EvaluateConfig) -> None:
    """Answer the items, print the accuracy and write the figures with a record of each item.

    The processes that torchrun has started share the items, and the first one prints and writes.
    """
    world = join_world(resolve_device(config).type)
    require_same(world, vars(config), "start all of them with the same settings")
    task = get_task(config.task)
    prompt_format = PromptFormat.of(config)
    say = print if world.is_first else _say_nothing
    with world.in_turn():
        source = load_examples(
            config.task,
            config.data,
            config.split,
            config.seed,
            config.difficulty,
            image_root=config.image_root,
            options=replace(DataOptions.of(config), split=config.split),
        )
        check_data(source, config, config.samples, say)
    with world.in_turn():
        config = with_start(config)
        policy = make_policy(*load_pretrained(config), config, prompt_format)
    read = {"the data": source.fingerprint(), "the model": fingerprint(policy.model)}
    require_same(world, read, "name the same files on all machines")
    examples = source.all(config.samples)
    say(f"the first prompt:\n{printable(policy.encode.rendered(examples[0]))}\n")
    records = evaluate(
        policy,
        task.judge(config.judge),
        examples,
        Sampling.of(config),
        config.num_generations,
        config.seed,
        config.batch_size,
        show_progress=True,
        world=world,
    )
    if world.is_first:
        _report(config, records)
    leave_world()


def _report(config: EvaluateConfig, records: list[dict]) -> None:
    """Write the figures and the records of an evaluation, and print its accuracy."""
    task = get_task(config.task)
    summary = summarise(records)
    others = {
        name: summarise(judged(records, task.judge(name)))
        for name in other_judges(config.judge, config.data)
    }
    passes = {str(k): pass_at_k(records, k) for k in config.pass_at}
    result = {**summary, "judge": config.judge, "other_judges": others, "pass_at": passes}
    write_json(Path(config.output), {**result, "config": vars(config), "results": records})
    if config.r1v_output:
        write_r1v_results(Path(config.r1v_output), records, config.task)

    if config.explain:
        print("\n".join(map(explanation, records)))
    print(f"{accuracy_text(summary)}, {summary['count']} items, by {NAMES[config.judge]}")
    for name, other in others.items():
        print(f"{accuracy_text(other)}, the same outputs, by {NAMES[name]}")
    for k, value in passes.items():
        print(f"pass@{k} {value:.1%}")
    print(f"wrote {config.output}")


def _say_nothing(text: str) -> None:
    """Print nothing: the first process does."""
