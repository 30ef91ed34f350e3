"""TRL's GRPOTrainer for bench_train_step.py: its loss on given completions, and its whole steps.

A trainer is made as its users make one. For the update alone it takes our two models, since a
second pair would not fit, and a batch built from the given completions instead of the one that
`_generate_and_score_completions` returns. Reference log-probs and loss are TRL's own methods.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, nn


def make_trainer(model, processor, dataset, reward, fused: bool = False, **settings):
    """A GRPOTrainer with the loss and KL of our runs; `settings` are further ones of GRPOConfig.

    With `fused` it is the trainer of mr1_fast.integrations.trl.
    """
    from trl import GRPOConfig, GRPOTrainer

    if fused:
        from mr1_fast.integrations.trl import FusedGRPOTrainer as GRPOTrainer

    config = GRPOConfig(
        report_to="none",
        loss_type="grpo",
        use_bias_correction_kl=False,  # its default multiplies the KL by the ratio
        bf16=False,  # no autocast: the models have the dtype that they compute in
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        **settings,
    )
    return GRPOTrainer(
        model, reward_funcs=reward, args=config, train_dataset=dataset, processing_class=processor
    )


def trl_update(
    model: nn.Module,
    reference: nn.Module,
    processor,
    inputs: dict[str, Tensor],
    prompt_length: int,
    advantages: Tensor,
    beta: float,
    fused: bool = False,
) -> Callable[[], Tensor]:
    """Return a function that computes reference log-probs and the loss of `inputs`, on policy.

    - inputs: prompts and completions, as Group.padded makes them; prompts have `prompt_length`
      tokens
    - advantages (B,): one a row
    """
    from datasets import Dataset

    count, device = len(advantages), inputs["input_ids"].device
    own = {each: each.__dict__.get("forward") for each in (model, reference)}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # The trainer would load the reference from the model's folder.
        load = "trl.trainer.grpo_trainer.create_model_from_path"
        stack.enter_context(mock.patch(load, return_value=reference))
        trainer = make_trainer(
            model,
            processor,
            Dataset.from_dict({"prompt": [[{"role": "user", "content": "?"}]]}),
            lambda completions, **kwargs: [0.0] * len(completions),
            fused=fused,
            output_dir=folder,
            use_cpu=device.type == "cpu",
            beta=beta,
            gradient_checkpointing=True,
            per_device_train_batch_size=count,
            num_generations=count,
        )
    trainer.current_gradient_accumulation_steps = 1  # its training loop sets it
    patched = {each: each.forward for each in own}
    for each, forward in own.items():  # other cases call the models' own forward
        del each.forward
        if forward is not None:
            each.forward = forward
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1] - prompt_length
    parts = {
        "prompt_ids": ids[:, :prompt_length].contiguous(),
        "prompt_mask": mask[:, :prompt_length].contiguous(),
        "completion_ids": ids[:, prompt_length:].contiguous(),
        "completion_mask": mask[:, prompt_length:].contiguous(),
    }
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    images = {name: inputs[name] for name in names} | {"num_images": [1] * count}

    def compute_loss() -> Tensor:
        with ExitStack() as stack:
            for each, forward in patched.items():
                stack.enter_context(mock.patch.object(each, "forward", forward))
            with torch.no_grad():
                ref_logp, *_ = trainer._get_per_token_logps_and_entropies(
                    trainer.ref_model, ids, mask, length, batch_size=count, **images
                )
            scores = {"advantages": advantages.to(device), "ref_per_token_logps": ref_logp}
            return trainer._compute_loss(model, {**parts, **images, **scores})

    return compute_loss


def trl_step_seconds(
    config, processor, examples: list, beta: float, between: Callable[[int], None]
) -> dict:
    """Train from `config.model`; return median seconds of a step and mean tokens of a completion.

    The first step does not count. `between(step)` is called after each step, and is not timed.
    """
    from datasets import Dataset
    from transformers import TrainerCallback

    from mr1_fast.rewards import score
    from mr1_fast.tasks import format_problem

    def reward(completions, index, **kwargs):
        group = config.num_generations
        texts = [completion[0]["content"] for completion in completions]
        weights = {"accuracy": 1.0, "format": config.format_weight}
        scores = score(texts, [examples[i] for i in index[::group]], weights)
        return scores.total.flatten().tolist()

    rows = {
        "prompt": [[{"role": "user", "content": format_problem(example)}] for example in examples],
        "images": [list(example.images) for example in examples],
        "index": list(range(len(examples))),
    }
    taken, cpu, lengths = [], [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments, **kwargs):
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - self.start)
            cpu.append(time.process_time() - self.cpu_start)
            lengths.append(trainer._metrics["train"]["completions/mean_length"][-1])
            between(len(taken) - 1)
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            config.model,
            processor,
            Dataset.from_dict(rows),
            reward,
            output_dir=folder,
            use_cpu=config.device == "cpu",
            beta=beta,
            gradient_checkpointing=config.recompute != "none",
            per_device_train_batch_size=config.prompts_per_step * config.num_generations,
            num_generations=config.num_generations,
            max_completion_length=config.max_new_tokens,
            max_steps=config.steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=0.98,
        )
        trainer.add_callback(Clock())
        trainer.train()
    seconds, cpu_seconds = (statistics.median(each[1:]) for each in (taken, cpu))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "completion_length": statistics.mean(lengths[1:]),
    }
