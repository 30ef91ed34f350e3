"""Sequences of different lengths laid end to end, without padding, in packs of a token budget."""

from collections.abc import Iterator

import torch

from .errors import UserError
from .types import PackedBatch, Prompt


def packs(prompts: list[Prompt], completions: list[torch.Tensor], tokens_per_pack: int) -> Iterator[PackedBatch]:
    """Pack B prompts and their B·G completions, in order, into batches of at most `tokens_per_pack` tokens.

    A sequence is a prompt and one completion; completion i belongs to prompt i // G. Every completion lands in
    exactly one pack. UserError where one sequence exceeds the budget.
    """
    group: list[int] = []
    tokens = 0
    for index, completion in enumerate(completions):
        length = len(prompts[_owner(index, prompts, completions)].input_ids) + len(completion)
        if length > tokens_per_pack:
            raise UserError(
                f"a prompt with its completion has {length} tokens, more than tokens_per_microbatch = "
                f"{tokens_per_pack}: raise --tokens-per-microbatch to at least {length}."
            )
        if tokens + length > tokens_per_pack:
            yield pack(prompts, completions, group)
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield pack(prompts, completions, group)


def pack(prompts: list[Prompt], completions: list[torch.Tensor], sequence_ids: list[int]) -> PackedBatch:
    """One PackedBatch of the named completions, each behind its own prompt; a prompt's images are stored once."""
    owners = [_owner(index, prompts, completions) for index in sequence_ids]
    pictured = [owner for owner in dict.fromkeys(owners) if prompts[owner].num_image_tokens]
    feature_starts = torch.tensor([0] + [prompts[owner].num_image_tokens for owner in pictured]).cumsum(0).tolist()
    first_feature = dict(zip(pictured, feature_starts, strict=False))

    input_ids, position_ids, loss_rows, targets, feature_rows = [], [], [], [], []
    lengths, loss_lengths = [], []
    start = 0
    for index, owner in zip(sequence_ids, owners, strict=True):
        prompt, completion = prompts[owner], completions[index]
        prompt_length, length = len(prompt.input_ids), len(completion)
        input_ids += [prompt.input_ids, completion]
        position_ids += [prompt.position_ids, (prompt.next_position + torch.arange(length)).expand(3, -1)]
        # The last prompt token predicts the first completion token; the last completion token predicts nothing.
        loss_rows.append(start + prompt_length - 1 + torch.arange(length))
        targets.append(completion)
        if prompt.num_image_tokens:
            feature_rows.append(first_feature[owner] + torch.arange(prompt.num_image_tokens))
        lengths.append(prompt_length + length)
        loss_lengths.append(length)
        start += prompt_length + length

    return PackedBatch(
        input_ids=torch.cat(input_ids),
        position_ids=torch.cat(position_ids, dim=1),
        cu_seqlens=_cumulative(lengths),
        max_seqlen=max(lengths),
        loss_rows=torch.cat(loss_rows),
        targets=torch.cat(targets),
        loss_cu_seqlens=_cumulative(loss_lengths),
        sequence_ids=list(sequence_ids),
        feature_rows=torch.cat(feature_rows) if feature_rows else None,
        pixel_values=torch.cat([prompts[owner].pixel_values for owner in pictured]) if pictured else None,
        image_grid_thw=torch.cat([prompts[owner].image_grid_thw for owner in pictured]) if pictured else None,
    )


def _owner(index: int, prompts: list[Prompt], completions: list[torch.Tensor]) -> int:
    return index * len(prompts) // len(completions)


def _cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
