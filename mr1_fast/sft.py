"""Supervised fine-tuning, `--algo sft`: the loss is the likelihood of worked solutions."""

import torch

from .loss import linear_grpo_loss, token_weights
from .metrics import Mean, RowMetric
from .model.forward import lm_head_weight
from .model.policy import Policy
from .packing import MicroBatches
from .tasks import format_answer, format_solution
from .types import Example, PackedBatch, Prompt


def solution_batches(
    policy: Policy,
    examples: list[Example],
    tokens_per_pack: int,
    target: str = "solution",
    prompts: list[Prompt] | None = None,
    num_examples: int | None = None,
) -> MicroBatches:
    """Pack prompts with the completions to imitate, and put the weights of their mean on the rows.

    `target` is `solution` (reasoning and answer) or `answer`; EOS ends each completion. What the
    prompt has already written of an answer, such as `<think>`, is not repeated, and what it leaves
    open is closed. Special tokens that a solution contains are text. `prompts` are the examples as
    `policy.encode` gives them, where they have been encoded. `num_examples` is over how many the
    mean goes, where these are a part of them.
    """
    written = format_solution if target == "solution" else format_answer
    end = policy.processor.tokenizer.eos_token_id
    prompts = policy.encode.many(examples) if prompts is None else prompts
    targets = []
    for example, prompt in zip(examples, prompts, strict=True):
        completion = _after(prompt.opening, written(example))
        targets.append(torch.tensor([*policy.encode.text_ids(completion), end]))
    batches = MicroBatches(prompts, targets, tokens_per_pack)
    for batch in batches:
        batch.row_data["token_weights"] = token_weights(
            batch.loss_cu_seqlens, num_sequences=num_examples or len(examples)
        )
    return batches


def _after(opening: str, completion: str) -> str:
    """Return what is left to write of a completion after a prompt's opening of it.

    An answer alone would stand within the thinking that an opening begins, so that ends first.
    """
    if opening.rfind("<think>") <= opening.rfind("</think>"):
        return completion.removeprefix(opening.strip())
    thinks = completion.startswith("<think>")
    return completion.removeprefix("<think>") if thinks else f"</think>{completion}"


def sft_loss(policy: Policy, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, RowMetric]]:
    """Compute the loss −Σ token_weights · log p of one batch.

    The weights make it the mean over the tokens of an example, then over examples. On policy and
    with an advantage of 1 that is the cispo surrogate, so the kernel of GRPO gives loss and
    gradients in one pass.
    """
    weights = batch.row_data["token_weights"]
    advantages = torch.ones_like(weights)
    head = lm_head_weight(policy.model)
    result = linear_grpo_loss(
        policy.hidden(batch), head, batch.targets, advantages, weights, beta=0.0, surrogate="cispo"
    )
    return result.loss, {"entropy": Mean(result.entropy)}
