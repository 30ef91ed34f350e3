"""Supervised fine-tuning: the completions are worked solutions instead of samples, the loss is their likelihood.

`python -m mr1_fast.sft` is `python -m mr1_fast.train --algo sft`. The tiny model's supervised start is made here too.
"""

import sys
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
from .tasks import format_solution
from .tasks.data import load_examples
from .types import Example, PackedBatch
from .version import __version__

START = OptimizerConfig(
    steps=600,
    prompts_per_step=64,
    learning_rate=1e-3,
    lr_schedule="constant",
    warmup_fraction=50 / 600,
    weight_decay=0.01,
    tokens_per_microbatch=16_384,
)
START_ACCURACY = 0.4
"""Sampled accuracy on validation items at which the supervised start ends: enough for GRPO to find rewards."""


def solution_batches(policy: Policy, examples: list[Example], tokens_per_pack: int) -> MicroBatches:
    """Packed prompts with their worked solutions, EOS included, and token weights of the mean over examples."""
    tokenizer = policy.processor.tokenizer
    targets = []
    for example in examples:
        ids = [*tokenizer(format_solution(example)).input_ids, tokenizer.eos_token_id]
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


def tiny_start(config: TaskConfig, seed: int) -> Path:
    """Folder of the tiny model after its supervised start on `config.task`; made once, then read from the cache.

    Its name is a hash of what it depends on: versions, settings, tokenizer, model, and a look at what is drawn.
    """
    from .model.tiny import tiny_config, tiny_model, tiny_processor

    processor = tiny_processor()
    vocabulary = processor.tokenizer.backend_tokenizer.to_str()
    drawn = load_examples(config.task, "drawn", "train", seed, config.difficulty).all(8)
    looks = [(format_solution(e), [crc32(image.tobytes()) for image in e.images]) for e in drawn]
    settings = (__version__, torch.__version__, vars(START), START_ACCURACY, tiny_config(processor).to_json_string())
    key = derive_seed(config.task, config.difficulty, seed, vocabulary, looks, settings)
    folder = cache_folder() / f"tiny-{config.task}-{config.difficulty}-seed{seed}-{key:016x}"
    if not folder.exists():
        torch.manual_seed(derive_seed(seed, "tiny"))
        policy = make_policy(tiny_model(processor), processor, ModelConfig(device="cpu", gradient_checkpointing=False))
        _supervised_start(policy, config, seed)
        with atomic_folder(folder) as temporary:
            policy.model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
    return folder


def _supervised_start(policy: Policy, config: TaskConfig, seed: int) -> None:
    """Train until sampled accuracy on validation items reaches START_ACCURACY, or START.steps have passed."""
    source = load_examples(config.task, "drawn", "train", seed, config.difficulty)
    held_out = load_examples(config.task, "drawn", "validation", seed, config.difficulty).all(128)
    optimizer = make_optimizer(policy.model, START)
    with tqdm(desc="supervised start", unit="step") as bar:
        for step in range(START.steps):
            examples = source.take(step, START.prompts_per_step)
            batches = solution_batches(policy, examples, START.tokens_per_microbatch)
            metrics = update(policy, optimizer, batches, sft_loss, step, START.steps, START)
            bar.update()
            if step % 5 == 4:  # accuracy rises steeply near the end, so it is watched closely
                records = evaluate(policy, config.task, held_out, Sampling(TINY["max_new_tokens"]), seed=step)
                accuracy = summarise(records)["accuracy"]
                bar.set_postfix_str(f"loss {metrics['loss']:.3f} · sampled accuracy {accuracy:.3f}")
                if accuracy >= START_ACCURACY:
                    return
    tqdm.write(f"the supervised start ended at sampled accuracy {accuracy:.3f}, below {START_ACCURACY}")


def main() -> None:
    """`python -m mr1_fast.sft`."""
    from .train import run

    run([*sys.argv[1:], "--algo", "sft"])


if __name__ == "__main__":
    exit_on_user_error(main)
