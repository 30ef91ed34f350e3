"""Plain generation: a prompt is encoded once, its keys and values are repeated for its G samples, then decoded.

A loop of our own rather than transformers' `generate` for three reasons: the vision tower and the prompt run once
per group; positions are passed in, so no `rope_deltas` stay on the model; and nothing is inherited from a model
folder's generation_config.json (Qwen2-VL's has top_k = 1 and a repetition penalty, which would bias GRPO).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from ..model.forward import base_model, embed
from ..model.processor import ImageTextProcessor
from ..types import Example, Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


def roll_out(
    model: nn.Module,
    processor: ImageTextProcessor,
    examples: list[Example],
    prompts: list[Prompt],
    num_generations: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    prompts_at_once: int | None = None,
) -> Rollout:
    """Sample G = `num_generations` completions of each of B prompts, `prompts_at_once` (default: all) at a time.

    `generator` must live on the model's device.
    """
    eos = processor.tokenizer.eos_token_id
    completions = []
    for start in range(0, len(prompts), prompts_at_once or len(prompts)):
        some = prompts[start : start + (prompts_at_once or len(prompts))]
        completions += generate(model, some, num_generations, sampling, eos, generator)
    return Rollout(
        examples=examples,
        prompts=prompts,
        completions=completions,
        texts=processor.tokenizer.batch_decode(completions, skip_special_tokens=True),
        finished=[bool(len(ids) and ids[-1] == eos) for ids in completions],
        num_generations=num_generations,
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[Prompt],
    num_generations: int,
    sampling: Sampling,
    eos_token_id: int,
    generator: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """B·G completions, group-major, as int64 CPU tensors of token ids that include EOS where one was sampled."""
    if not prompts or sampling.max_new_tokens < 1:
        return [torch.zeros(0, dtype=torch.int64) for _ in range(len(prompts) * num_generations)]
    was_training = model.training
    model.eval()
    try:
        tokens = _decode(model, prompts, num_generations, sampling, eos_token_id, generator)
    finally:
        model.train(was_training)
    completions = []
    for row in tokens.cpu():
        ends = (row == eos_token_id).nonzero()
        completions.append(row[: ends[0, 0] + 1] if len(ends) else row)
    return completions


def _decode(model, prompts, num_generations, sampling, eos_token_id, generator) -> torch.Tensor:
    """(B·G, max_new_tokens) sampled ids; what follows a row's first EOS is meaningless."""
    base = base_model(model)
    cache = DynamicCache(config=base.config.get_text_config())
    hidden, mask = _prefill(model, prompts, cache)
    cache.batch_repeat_interleave(num_generations)
    hidden, mask = (x.repeat_interleave(num_generations, dim=0) for x in (hidden, mask))
    positions = torch.tensor([p.next_position for p in prompts], device=hidden.device)
    positions = positions.repeat_interleave(num_generations)
    # A sampled placeholder would ask the next forward for an image feature that does not exist.
    banned = [base.config.image_token_id, base.config.video_token_id]

    rows = torch.arange(len(hidden), device=hidden.device)  # what each row of the batch is
    running = torch.ones_like(rows, dtype=torch.bool)
    tokens = torch.full((len(rows), sampling.max_new_tokens), eos_token_id, device=hidden.device)
    for step in range(sampling.max_new_tokens):
        logits = base.lm_head(hidden).float()
        logits[:, banned] = -torch.inf
        token = _sample(logits, sampling, generator)
        tokens[rows, step] = token
        running &= token != eos_token_id
        count = int(running.sum())
        if count == 0 or step + 1 == sampling.max_new_tokens:
            break
        if 2 * count <= len(rows):  # half of them have ended: go on with the others alone
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, running, mask, positions, token = (x[keep] for x in (rows, running, mask, positions, token))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = base.model.language_model(
            inputs_embeds=base.model.get_input_embeddings()(token).unsqueeze(1),
            position_ids=(positions + step).expand(3, -1).unsqueeze(-1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return tokens


def _prefill(model, prompts: list[Prompt], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Run B prompts, padded on the left, into the cache; return last hidden states (B, D) and the mask (B, L)."""
    base = base_model(model)
    device = base.lm_head.weight.device
    length = max(len(p.input_ids) for p in prompts)
    input_ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    position_ids = torch.zeros(3, len(prompts), length, dtype=torch.int64)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        input_ids[row, start:] = prompt.input_ids
        position_ids[:, row, start:] = prompt.position_ids
        mask[row, start:] = 1
    pictured = [p for p in prompts if p.num_image_tokens]
    input_ids, position_ids, mask = (x.to(device) for x in (input_ids, position_ids, mask))
    embeddings = embed(
        model,
        input_ids,
        torch.cat([p.pixel_values for p in pictured]).to(device) if pictured else None,
        torch.cat([p.image_grid_thw for p in pictured]).to(device) if pictured else None,
    )
    output = base.model.language_model(
        inputs_embeds=embeddings,
        position_ids=position_ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state[:, -1], mask


def _sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One token id per row of (B·G, V) logits."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0  # keep the token that crosses top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    # The inverse of the distribution function: a random number a row, where multinomial draws one a token.
    sums = probs.cumsum(dim=-1)
    threshold = torch.rand(len(probs), 1, generator=generator, device=probs.device) * sums[:, -1:]
    token = torch.searchsorted(sums, threshold, right=True).clamp(max=probs.shape[-1] - 1)
    # A token of probability 0 raises no sum, but on CUDA sums are rounded in an order that lets them fall a little.
    impossible = probs.gather(-1, token) == 0
    return torch.where(impossible, probs.argmax(dim=-1, keepdim=True), token).squeeze(-1)
