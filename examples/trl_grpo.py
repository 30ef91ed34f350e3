"""TRL's GRPOTrainer on a VLM, as it is and with the loss of mr1_fast: same losses, faster updates.

    python examples/trl_grpo.py [tiny-qwen3vl]          # needs: pip install 'trl>=1.16'

All that changes is the class, and a callback for β(s). The model is the built-in tiny Qwen2-VL, or
another built-in model with images, with random weights and a vocabulary of 32,000, so that the LM
head costs its usual share. The reward is the mean of the token ids modulo 7.
"""

import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from mr1_fast.model.tiny import tiny_config, tiny_processor
from mr1_fast.tasks import TASKS, format_problem

try:
    from trl import GRPOConfig, GRPOTrainer

    from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer
except ImportError as error:
    sys.exit(f"this example needs TRL: pip install 'trl>=1.16' ({error})")

STEPS = 6
MODEL = sys.argv[1] if len(sys.argv) > 1 else "tiny"


class Timed:
    """A mixin for a trainer that notes the seconds of each update: forward, loss and backward."""

    def compute_loss(self, *args, **kwargs):
        self.began = time.perf_counter()
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seconds = [*getattr(self, "seconds", []), time.perf_counter() - self.began]
        return loss


def train(trainer_class: type, folder: str) -> tuple[list[tuple[float, float]], float]:
    """Train; return loss and gradient norm of each step, and the seconds of the fastest update."""
    processor = tiny_processor(MODEL)
    config = tiny_config(processor, MODEL)
    config.text_config.vocab_size = 32_000
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    examples = [TASKS["counting"].draw("train", 0, index, 1) for index in range(STEPS)]
    prompts = [[{"role": "user", "content": format_problem(example)}] for example in examples]
    images = [list(example.images) for example in examples]
    data = Dataset.from_dict({"prompt": prompts, "images": images})
    settings = GRPOConfig(
        output_dir=folder,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=32,
        max_steps=STEPS,
        learning_rate=1e-3,
    )

    def reward(completion_ids, **_) -> list[float]:
        return [sum(i % 7 for i in ids) / len(ids) for ids in completion_ids]

    timed = type(trainer_class.__name__, (Timed, trainer_class), {})
    trainer = timed(
        model,
        reward_funcs=reward,
        args=settings,
        train_dataset=data,
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.04, beta_max=0.1))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logged], min(trainer.seconds)


if __name__ == "__main__":
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        steps, seconds = train(GRPOTrainer, folder)
        our_steps, our_seconds = train(FusedGRPOTrainer, folder)
    print("step | GRPOTrainer: loss, gradient norm | FusedGRPOTrainer: loss, gradient norm")
    for step, (theirs, ours) in enumerate(zip(steps, our_steps, strict=True)):
        print("{:4d} | {:18.3e} {:12.6f} | {:23.3e} {:12.6f}".format(step, *theirs, *ours))
    print(
        f"update: {1000 * seconds:.0f} ms, {1000 * our_seconds:.0f} ms: "
        f"{seconds / our_seconds:.1f} times as fast"
    )
