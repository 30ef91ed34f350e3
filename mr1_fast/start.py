"""The supervised start of the built-in models, and the policy that a run starts from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm

from .accuracy import evaluate, summarise
from .config import (
    BUILT_IN,
    TINY,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    cache_folder,
)
from .files import atomic_folder
from .model.load import load_pretrained, make_policy
from .model.policy import Policy
from .optim import make_optimizer, update
from .rollout.sampling import Sampling
from .seeds import derive_seed
from .sft import sft_loss, solution_batches
from .tasks import format_solution
from .tasks.data import load_examples
from .version import __version__

_TINY_START = OptimizerConfig(
    steps=600,
    prompts_per_step=64,
    learning_rate=1e-3,
    lr_schedule="constant",
    warmup_fraction=50 / 600,
    weight_decay=0.01,
    tokens_per_microbatch=16_384,
)


START = {
    "tiny": _TINY_START,
    "small": replace(_TINY_START, steps=2000, learning_rate=3e-4, warmup_fraction=0.05),
}
"""How the supervised start of each built-in model is trained."""


START_ACCURACY = 0.4
"""Sampled accuracy on validation items at which the supervised start ends: enough for GRPO to find rewards."""


def supervised_start(
    model: str, tasks: Sequence[TaskConfig], seed: int, enough: float = START_ACCURACY
) -> Path:
    """Folder of a built-in model after a supervised start on the tasks together; made once, then read from the cache.

    It ends where sampled accuracy on validation items reaches `enough` in every task. The folder's name is a hash of
    what it depends on: versions, settings, tokenizer, model, and a look at what is drawn.
    """
    from .model.tiny import tiny_config, tiny_model, tiny_processor

    processor, settings = tiny_processor(), START[model]
    drawn = [
        e
        for task in tasks
        for e in load_examples(task.task, "drawn", "train", seed, task.difficulty).all(8)
    ]
    looks = [(format_solution(e), [crc32(image.tobytes()) for image in e.images]) for e in drawn]
    vocabulary = processor.tokenizer.backend_tokenizer.to_str()
    versions = (__version__, torch.__version__, tiny_config(processor, model).to_json_string())
    names = "-".join(f"{task.task}-{task.difficulty}" for task in tasks)
    key = derive_seed(names, seed, vocabulary, looks, vars(settings), enough, versions)
    folder = cache_folder() / f"{model}-{names}-seed{seed}-{key:016x}"
    if not folder.exists():
        torch.manual_seed(derive_seed(seed, model))
        # The tiny model is the same wherever it is made; the small one would take a CPU an hour.
        where = ModelConfig(
            device="cpu" if model == "tiny" else "auto",
            dtype="float32",
            gradient_checkpointing=False,
        )
        policy = make_policy(tiny_model(processor, model), processor, where)
        _supervised_start(policy, tasks, seed, settings, enough)
        with atomic_folder(folder) as temporary:
            policy.model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
    return folder


def _supervised_start(
    policy: Policy, tasks: Sequence[TaskConfig], seed: int, settings: OptimizerConfig, enough: float
) -> None:
    """Train on equal shares of the tasks until the least sampled accuracy of any is `enough`, or the steps are over."""
    stream = derive_seed(seed, "start")  # of its own: what a run trains on must be new to it
    sources = [
        load_examples(task.task, "drawn", "train", stream, task.difficulty) for task in tasks
    ]
    held_out = [
        load_examples(task.task, "drawn", "validation", seed, task.difficulty).all(128)
        for task in tasks
    ]
    optimizer = make_optimizer(policy.model, settings)
    with tqdm(desc="supervised start", unit="step") as bar:
        for step in range(settings.steps):
            examples = [
                e
                for source in sources
                for e in source.take(step, settings.prompts_per_step // len(sources))
            ]
            batches = solution_batches(policy, examples, settings.tokens_per_microbatch)
            metrics = update(policy, optimizer, batches, sft_loss, step, settings.steps, settings)
            bar.update()
            if step % 5 == 4:  # accuracy rises steeply near the end, so it is watched closely
                pairs, sampling = (
                    zip(tasks, held_out, strict=True),
                    Sampling(TINY["max_new_tokens"]),
                )
                records = [
                    evaluate(policy, task.task, items, sampling, seed=step) for task, items in pairs
                ]
                accuracy = min(summarise(each)["accuracy"] for each in records)
                bar.set_postfix_str(f"loss {metrics['loss']:.3f} · sampled accuracy {accuracy:.3f}")
                if accuracy >= enough:
                    return
    tqdm.write(f"the supervised start ended at sampled accuracy {accuracy:.3f}, below {enough}")


def load_policy(config: TrainConfig) -> Policy:
    """The starting policy; a built-in one is loaded from its cached supervised start."""
    if config.model in BUILT_IN:
        config = replace(config, model=str(supervised_start(config.model, [config], config.seed)))
    torch.manual_seed(derive_seed(config.seed, "adapters"))
    return make_policy(*load_pretrained(config), config)
