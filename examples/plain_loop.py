"""GRPO-D in a plain PyTorch loop: a loss on whole logits and ours, on the same model and batches.

    python examples/plain_loop.py

The model is the built-in tiny Qwen2-VL with random weights and a vocabulary of 32,000; completions
are cut to random lengths, and the reward is their share of even token ids. About 15 seconds on one
thread of a CPU.
"""

import copy
import statistics
import time

import torch
from torch.nn.functional import pad
from transformers import Qwen2VLForConditionalGeneration

from mr1_fast import DynamicKL, linear_grpo_loss, linear_token_logprobs, token_weights
from mr1_fast.advantages import group_advantages
from mr1_fast.integrations.head import add_head
from mr1_fast.model.tiny import tiny_config, tiny_processor
from mr1_fast.tasks import TASKS, format_problem

GROUP, LENGTH, STEPS = 8, 48, 7


def sample(model, processor, step: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Sample GROUP completions of one prompt, B = GROUP.

    Return the model's inputs, a mask (B, L − 1) of the sampled tokens in ids[:, 1:], and advantages
    (B,).
    """
    example = TASKS["counting"].draw("train", 0, step, 1)
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": format_problem(example)}],
    }
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    images = list(example.images) * GROUP
    inputs = dict(processor(text=[text] * GROUP, images=images, return_tensors="pt"))
    ids = model.generate(
        **inputs,
        do_sample=True,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        suppress_tokens=[processor.image_token_id, processor.video_token_id],
    )

    # What follows a completion changes nothing, so the attention mask need not hide it.
    position = torch.arange(1 - (ids.shape[1] - LENGTH), LENGTH)
    mask = (position >= 0) & (position < torch.randint(LENGTH // 4, LENGTH + 1, (GROUP, 1)))
    inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, LENGTH))
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    rewards = ((ids[:, 1:] % 2 == 0) & mask).sum(1) / mask.sum(1)
    return inputs, mask, group_advantages(rewards[None])[0]


def whole_logits_loss(model, inputs, mask, advantages, ref_logp, beta) -> torch.Tensor:
    """The textbook's loss: logits of every position, prompts too, log-softmax, and autograd."""
    logp = model(**inputs).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    difference = torch.zeros_like(logp).masked_scatter(mask, ref_logp) - logp
    k3 = difference.exp() - difference - 1
    per_token = -(logp - logp.detach()).exp() * advantages[:, None] + beta * k3
    return (torch.where(mask, per_token, 0.0).sum(1) / mask.sum(1)).mean()


def our_loss(model, inputs, mask, advantages, ref_logp, beta) -> torch.Tensor:
    """Our loss: only sampled tokens reach the LM head, and one pass gives loss and gradients."""
    targets = inputs["input_ids"][:, 1:][mask]
    cu_seqlens = pad(mask.sum(1).cumsum(0), (1, 0))
    weights = token_weights(cu_seqlens, "grpo")

    def loss(hidden, weight, bias):
        return linear_grpo_loss(
            hidden[:, :-1][mask],
            weight,
            targets,
            advantages,
            weights,
            beta=beta,
            ref_logp=ref_logp,
            cu_seqlens=cu_seqlens,
        )

    result = model(**inputs, head=loss)
    return result.loss  # .logp, .entropy, .kl and .clipped hold what to log of each token


def main() -> None:
    """Take a few optimizer steps on our gradients, and time both losses at each of them."""
    # Threads that wait for a core which others use would time the machine, not the losses.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = tiny_processor()
    config = tiny_config(processor)
    config.text_config.vocab_size = 32_000
    model = Qwen2VLForConditionalGeneration(config)
    add_head(model)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    beta = DynamicKL(0.04, 0.1, total_steps=STEPS)
    milliseconds = {whole_logits_loss: [], our_loss: []}
    print(
        "step      β | loss: whole logits          ours | largest relative difference of gradients"
    )
    for step in range(STEPS):
        inputs, mask, advantages = sample(model, processor, step)
        targets = inputs["input_ids"][:, 1:][mask]
        rows = reference(**inputs, head=lambda hidden, weight, bias: hidden)[:, :-1][mask]
        ref_logp, _ = linear_token_logprobs(rows, reference.lm_head.weight, targets)
        values, gradients = [], []
        for loss_function, times in milliseconds.items():
            optimizer.zero_grad()
            start = time.perf_counter()
            loss = loss_function(model, inputs, mask, advantages, ref_logp, beta(step))
            loss.backward()
            times.append(1000 * (time.perf_counter() - start))
            values.append(loss.item())
            gradients.append([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        off = max(
            ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients, strict=True)
        )
        print(f"{step:4d} {beta(step):6.3f} | {values[0]:18.8f} {values[1]:13.8f} | {off:.1e}")
    # The first step is a warm-up.
    whole, ours = (statistics.median(times[1:]) for times in milliseconds.values())
    print(
        f"update, model included: whole logits {whole:.0f} ms, ours {ours:.0f} ms, "
        f"{whole / ours:.1f} times as fast"
    )


if __name__ == "__main__":
    main()
