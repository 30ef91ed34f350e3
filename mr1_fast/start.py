"""The supervised start of the built-in models, and the policy that a run starts from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import torch
from tqdm import tqdm

from .accuracy import evaluate, summarise
from .config import (
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    cache_folder,
)
from .files import atomic_folder, discard_folder
from .integrity import folder_finding, seal_folder
from .locks import one_at_a_time
from .model.load import load_pretrained, load_processor, make_policy
from .model.policy import Policy
from .model.processor import Processor
from .model.prompt import PromptWriter
from .model.tiny import tiny_config, tiny_model, tiny_processor
from .optim import make_optimizer, update
from .profiles import BUILT_IN, answer_tokens, model_defaults
from .rollout.sampling import Sampling
from .seeds import derive_seed
from .sft import sft_loss, solution_batches
from .tasks import PromptFormat, format_solution, get_task
from .tasks.data import load_examples
from .version import __version__

Config = TypeVar("Config", bound=ModelConfig)
"""Settings of a command, which have those of a model and a task, and `seed`."""

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
    **dict.fromkeys(BUILT_IN, _TINY_START),
    "small": replace(_TINY_START, steps=2000, learning_rate=3e-4, warmup_fraction=0.05),
    "tiny-qwen3vl": replace(_TINY_START, prompts_per_step=16),
    "tiny-text": replace(
        _TINY_START,
        steps=1200,
        prompts_per_step=32,
        learning_rate=2e-3,
        warmup_fraction=75 / 1200,
    ),
}
"""How the supervised start of each built-in model is trained."""
START_ACCURACY = 0.2
"""Sampled accuracy on validation items at which the supervised start ends.

It is high enough for GRPO to find rewards; after 40%, greedy answers have little left to learn."""
CHANGE_CACHE = "set MR1_FAST_CACHE to a folder that can be written and has room"
"""The way out where a start cannot be kept."""
CHECK_EVERY = 320
"""Prompts between two looks at the accuracy, which rises steeply near the end."""


def supervised_start(
    model: str, tasks: Sequence[TaskConfig], seed: int, enough: float = START_ACCURACY
) -> Path:
    """Return the folder of a built-in model after a supervised start on the tasks together.

    The start ends where the sampled accuracy on validation items reaches `enough` in every task. It
    is made once and kept in the cache; the folder's name holds a hash of all that it depends on. A
    damaged one is made again.
    """
    processor = tiny_processor(model)
    folder = _start_folder(model, tasks, seed, enough, processor)
    if not folder.exists() or folder_finding(folder, unsealed=True):
        with one_at_a_time(folder, CHANGE_CACHE):
            if folder.exists() and (damage := folder_finding(folder, unsealed=True)):
                tqdm.write(f"supervised start {folder} is damaged ({damage}): it is made again.")
                discard_folder(folder)
            if not folder.exists():
                _make_start(folder, processor, model, tasks, seed, enough)
    return folder


def _make_start(
    folder: Path,
    processor: Processor,
    model: str,
    tasks: Sequence[TaskConfig],
    seed: int,
    enough: float,
) -> None:
    """Train a built-in model from its random weights, and write it to `folder`."""
    torch.manual_seed(derive_seed(seed, model))
    # The tiny models are the same wherever they are made; the small one would take a CPU an hour.
    device = "auto" if model == "small" else "cpu"
    where = ModelConfig(device=device, dtype="float32", recompute="none")
    # The folder comes first, so that one which cannot be written costs no training.
    with atomic_folder(folder, CHANGE_CACHE, first_wins=True) as temporary:
        policy = make_policy(tiny_model(processor, model), processor, where)
        _train_start(policy, tasks, seed, START[model], enough)
        policy.model.save_pretrained(temporary)
        processor.save_pretrained(temporary, policy.model.config.model_type)
        seal_folder(temporary)


def _start_folder(
    model: str, tasks: Sequence[TaskConfig], seed: int, enough: float, processor: Processor
) -> Path:
    """Name the folder after all that the start depends on, with a look at what the tasks draw."""
    looks = []
    for task in tasks:
        for example in load_examples(task.task, "drawn", "train", seed, task.difficulty).all(8):
            checksums = [crc32(image.tobytes()) for image in example.images]
            looks.append((format_solution(example), checksums))
    vocabulary = processor.tokenizer.backend_tokenizer.to_str()
    versions = (__version__, torch.__version__, tiny_config(processor, model).to_json_string())
    names = "-".join(f"{task.task}-{task.difficulty}" for task in tasks)
    key = derive_seed(names, seed, vocabulary, looks, vars(START[model]), enough, versions)
    return cache_folder() / f"{model}-{names}-seed{seed}-{key:016x}"


def _train_start(
    policy: Policy, tasks: Sequence[TaskConfig], seed: int, settings: OptimizerConfig, enough: float
) -> None:
    """Train on equal shares of the tasks until each has a sampled accuracy of `enough`.

    Training ends with the steps of `settings` at the latest.
    """
    # A stream of its own, since a run's items must be new to the model.
    stream = derive_seed(seed, "start")
    sources, held_out = [], []
    for task in tasks:
        sources.append(load_examples(task.task, "drawn", "train", stream, task.difficulty))
        validation = load_examples(task.task, "drawn", "validation", seed, task.difficulty)
        held_out.append(validation.all(128))

    optimizer = make_optimizer(policy.model, settings)
    sampling = Sampling(max(answer_tokens(task.task, task.difficulty) for task in tasks))
    share = settings.prompts_per_step // len(sources)
    steps_apart = max(1, CHECK_EVERY // settings.prompts_per_step)
    with tqdm(desc="supervised start", unit="step") as bar:
        for step in range(settings.steps):
            examples = [example for source in sources for example in source.take(step, share)]
            batches = solution_batches(policy, examples, settings.tokens_per_microbatch)
            metrics = update(policy, optimizer, batches, sft_loss, step, settings.steps, settings)
            bar.update()
            done = step + 1
            if done % steps_apart and done < settings.steps:
                continue

            accuracies = []
            for task, items in zip(tasks, held_out, strict=True):
                judge = get_task(task.task).judge("strict")
                records = evaluate(policy, judge, items, sampling, seed=step)
                accuracies.append(summarise(records)["accuracy"])
            accuracy = min(accuracies)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f} · sampled accuracy {accuracy:.3f}")
            if accuracy >= enough:
                return
    tqdm.write(f"the supervised start ended at sampled accuracy {accuracy:.3f}, below {enough}")


def with_start(config: Config) -> Config:
    """Return the settings with a built-in model's name replaced by the folder of its start."""
    if config.model not in BUILT_IN:
        return config
    # A task without drawn items has none to start on; the default teaches the form of an answer.
    default = model_defaults(config.model, TaskConfig.task, TaskConfig.difficulty)["task"]
    task = config if get_task(config.task).draw else TaskConfig(task=default)
    return replace(config, model=str(supervised_start(config.model, [task], config.seed)))


def load_writer(config: Config) -> PromptWriter:
    """Load what writes the prompts of a run, without the weights of its model."""
    is_built_in = config.model in BUILT_IN
    processor = tiny_processor(config.model) if is_built_in else load_processor(config)
    limits = (config.max_prompt_tokens, config.max_pixels, config.shrink_images)
    return PromptWriter(processor, *limits, PromptFormat.of(config))


def load_policy(config: Config) -> Policy:
    """Load the policy that a run starts from, a built-in one after its supervised start."""
    prompt_format = PromptFormat.of(config)
    config = with_start(config)
    torch.manual_seed(derive_seed(config.seed, "adapters"))
    return make_policy(*load_pretrained(config), config, prompt_format)
