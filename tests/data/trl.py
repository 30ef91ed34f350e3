"""TRL's trainers, batches for their loss, and a comparison of two trainers."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

PROMPT, COMPLETION, B = 7, 6, 6


def reward(completion_ids, **kwargs):
    return [float(len(set(ids)) + ids[0] % 3) for ids in completion_ids]


def make_trainer(cls, model, processor, folder, **settings):
    """A trainer of class `cls` on the CPU; `settings` are those of GRPOConfig."""
    defaults = {
        "max_completion_length": COMPLETION,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "bf16": False,
        "save_strategy": "no",
    }
    config = GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **defaults | settings,
    )
    prompts = [[{"role": "user", "content": text}] for text in ("how many", "items")] * 4
    data = Dataset.from_dict({"prompt": prompts})
    return cls(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        eval_dataset=data.select([0, 1]),
        processing_class=processor,
    )


def text_prompts() -> dict:
    """Prompts of unequal lengths, of any tokens."""
    mask = (torch.arange(PROMPT) >= torch.tensor([0, 2, 5, 0, 6, 1])[:, None]).long()
    ids = torch.randint(3, 300, (B, PROMPT), generator=torch.Generator().manual_seed(1))
    return {"prompt_ids": torch.where(mask == 1, ids, 0), "prompt_mask": mask}


def image_prompts(processor) -> dict:
    """Prompts of unequal lengths with 0 to 3 images, as GRPOTrainer hands them to the model."""
    from PIL import Image

    sizes = [(56, 56), (84, 56), (56, 112)]
    texts = ["how many items", "count", "how many of the items are there"]
    counts = [1, 2, 0, 1, 3, 1]
    images = [
        Image.effect_noise(sizes[i % 3], 40 + 10 * i).convert("RGB") for i in range(sum(counts))
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [
        f"<|im_start|>user\n{picture * n}{texts[i % 3]}<|im_end|>\n" for i, n in enumerate(counts)
    ]
    inputs = processor(
        text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"
    )
    keys = torch.zeros(B, COMPLETION, dtype=torch.int64)
    return {
        "prompt_ids": inputs["input_ids"],
        "prompt_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], keys], 1),
        "num_images": counts,
    }


def batch(seed: int, prompts: dict, lengths=(6, 0, 3, 6, 1, 4), **switches) -> dict:
    """A batch for `_compute_loss`: two groups, one without variance; one completion is empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    mask = (torch.arange(COMPLETION) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 300, mask.shape, generator=generator)
    if switches.get("zero_variance", True):
        advantages = torch.cat([normal(3), torch.zeros(3)])
    else:
        advantages = normal(B)
    inputs = prompts | {
        "completion_ids": torch.where(mask == 1, ids, 0),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum() + 5,
        "ref_per_token_logps": (normal(B, COMPLETION) - 6) * mask,
    }
    if switches.get("off_policy"):
        inputs["old_per_token_logps"] = (normal(B, COMPLETION) - 6) * mask
    if switches.get("tools"):
        inputs["tool_mask"] = torch.randint(0, 2, mask.shape, generator=generator)
    if switches.get("token_advantages"):
        inputs["advantages"] = normal(B, COMPLETION)
    if width := switches.get("is_width"):
        inputs["importance_sampling_ratio"] = normal(B, width, scale=0.3).exp()
    return inputs


def set_up(trainer, **settings):
    """Set the attributes that GRPOTrainer reads in `_compute_loss`; "args.x" is its argument x."""
    defaults = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "beta": 0.1,
        "use_vllm": False,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "_entropy_bonus_enabled": False,
        "vllm_importance_sampling_correction": True,
        "args.delta": None,
        "args.use_bias_correction_kl": False,
    }
    for name, value in (defaults | settings).items():
        holder = trainer.args if name.startswith("args.") else trainer
        setattr(holder, name.removeprefix("args."), value)
    trainer._metrics["train"].clear()


def run(trainer, inputs: dict, **settings):
    """Loss, gradients and metrics of a batch."""
    set_up(trainer, **settings)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients, metrics


def assert_same(ours_run, their_run, tolerance: float = 1e-5):
    (loss, gradients, metrics), (their_loss, their_gradients, their_metrics) = ours_run, their_run
    assert gradients.keys() == their_gradients.keys() and metrics.keys() == their_metrics.keys()
    # The loss' terms are of the size of the advantages, and on policy they cancel to nothing.
    assert abs(loss - their_loss) <= tolerance * max(0.05, abs(their_loss)), (loss, their_loss)
    largest = max(g.abs().max() for g in their_gradients.values())
    assert largest > 1e-4, "nothing is compared"
    for name, right in their_gradients.items():
        # A gradient that is 0 but for rounding, as that of a key's bias, is compared with the
        # largest.
        scale = max(right.abs().max(), 1e-2 * largest)
        assert (gradients[name] - right).abs().max() <= tolerance * scale, name
    for name, right in their_metrics.items():
        assert metrics[name] == pytest.approx(right, rel=1e-4, abs=1e-5, nan_ok=True), name
