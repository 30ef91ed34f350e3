"""Supervised fine-tuning: the completions are worked solutions instead of samples, the loss is their likelihood.

`python -m mr1_fast.sft` is `python -m mr1_fast.train --algo sft`. The built-in models get their supervised start here.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm

from .checkpoint import atomic_folder, derive_seed
from .config import TINY, ModelConfig, OptimizerConfig, TaskConfig, cache_folder
from .errors import UserError, exit_on_user_error
from .evaluate import evaluate, summarise
from .loss import linear_grpo_loss, token_weights
from .model.forward import lm_head_weight
from .model.load import Policy, make_policy
from .optim import make_optimizer, update
from .packing import MicroBatches
from .rollout.sampling import Sampling
from .tasks import format_answer, format_solution
from .tasks.data import load_examples
from .types import Example, PackedBatch
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
START = {"tiny": _TINY_START, "small": replace(_TINY_START, steps=2000, learning_rate=3e-4, warmup_fraction=0.05)}
"""How the supervised start of each built-in model is trained."""
START_ACCURACY = 0.4
"""Sampled accuracy on validation items at which the supervised start ends: enough for GRPO to find rewards."""


def solution_batches(
    policy: Policy, examples: list[Example], tokens_per_pack: int, target: str = "solution"
) -> MicroBatches:
    """Packed prompts with what is imitated, EOS included, and token weights of the mean over examples."""
    written = format_solution if target == "solution" else format_answer
    tokenizer = policy.processor.tokenizer
    targets = []
    for example in examples:
        ids = [*tokenizer(written(example)).input_ids, tokenizer.eos_token_id]
        if policy.processor.image_token_id in ids or policy.processor.video_token_id in ids:
            raise UserError(f"the solution of example {example.key!r} contains an image placeholder: remove it.")
        targets.append(torch.tensor(ids))
    batches = MicroBatches(policy.encode.many(examples), targets, tokens_per_pack)
    for batch in batches:
        batch.row_data["token_weights"] = token_weights(batch.loss_cu_seqlens, num_sequences=len(examples))
    return batches


def sft_loss(policy: Policy, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """−Σ token_weights · log p: the mean over tokens of an example, then over examples.

    It is the cispo surrogate with advantage 1 on policy: the same kernel, loss and gradients in one pass.
    """
    weights = batch.row_data["token_weights"]
    advantages = torch.ones_like(weights)
    head = lm_head_weight(policy.model)
    result = linear_grpo_loss(
        policy.hidden(batch), head, batch.targets, advantages, weights, beta=0.0, surrogate="cispo"
    )
    return result.loss, {"entropy": result.entropy}


def supervised_start(model: str, tasks: Sequence[TaskConfig], seed: int, enough: float = START_ACCURACY) -> Path:
    """Folder of a built-in model after a supervised start on the tasks together; made once, then read from the cache.

    It ends where sampled accuracy on validation items reaches `enough` in every task. The folder's name is a hash of
    what it depends on: versions, settings, tokenizer, model, and a look at what is drawn.
    """
    from .model.tiny import tiny_config, tiny_model, tiny_processor

    processor, settings = tiny_processor(), START[model]
    drawn = [e for task in tasks for e in load_examples(task.task, "drawn", "train", seed, task.difficulty).all(8)]
    looks = [(format_solution(e), [crc32(image.tobytes()) for image in e.images]) for e in drawn]
    vocabulary = processor.tokenizer.backend_tokenizer.to_str()
    versions = (__version__, torch.__version__, tiny_config(processor, model).to_json_string())
    names = "-".join(f"{task.task}-{task.difficulty}" for task in tasks)
    key = derive_seed(names, seed, vocabulary, looks, vars(settings), enough, versions)
    folder = cache_folder() / f"{model}-{names}-seed{seed}-{key:016x}"
    if not folder.exists():
        torch.manual_seed(derive_seed(seed, model))
        # The tiny model is the same wherever it is made; the small one would take a CPU an hour.
        where = ModelConfig(device="cpu" if model == "tiny" else "auto", dtype="float32", gradient_checkpointing=False)
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
    sources = [load_examples(task.task, "drawn", "train", stream, task.difficulty) for task in tasks]
    held_out = [load_examples(task.task, "drawn", "validation", seed, task.difficulty).all(128) for task in tasks]
    optimizer = make_optimizer(policy.model, settings)
    with tqdm(desc="supervised start", unit="step") as bar:
        for step in range(settings.steps):
            examples = [e for source in sources for e in source.take(step, settings.prompts_per_step // len(sources))]
            batches = solution_batches(policy, examples, settings.tokens_per_microbatch)
            metrics = update(policy, optimizer, batches, sft_loss, step, settings.steps, settings)
            bar.update()
            if step % 5 == 4:  # accuracy rises steeply near the end, so it is watched closely
                pairs, sampling = zip(tasks, held_out, strict=True), Sampling(TINY["max_new_tokens"])
                records = [evaluate(policy, task.task, items, sampling, seed=step) for task, items in pairs]
                accuracy = min(summarise(each)["accuracy"] for each in records)
                bar.set_postfix_str(f"loss {metrics['loss']:.3f} · sampled accuracy {accuracy:.3f}")
                if accuracy >= enough:
                    return
    tqdm.write(f"the supervised start ended at sampled accuracy {accuracy:.3f}, below {enough}")


def main() -> None:
    """`python -m mr1_fast.sft`."""
    from .command_line import parse_train_config
    from .train import run

    run(parse_train_config([*sys.argv[1:], "--algo", "sft"]))


if __name__ == "__main__":
    exit_on_user_error(main)
