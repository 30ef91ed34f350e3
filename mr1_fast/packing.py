"""Packing groups without padding: a prompt once, and then its completions.

A pack holds several groups, up to a budget of tokens. A completion's last token predicts nothing,
so it is a target but never an input.
"""

from collections.abc import Iterator

import torch

from .errors import UserError
from .segments import Segments, cumulative
from .types import PackedBatch, Prompt


class MicroBatches(list[PackedBatch]):
    """The packs of a step's completions, in order; another budget packs them again."""

    def __init__(
        self, prompts: list[Prompt], completions: list[torch.Tensor], tokens_per_pack: int
    ):
        """Pack the completions; arguments and errors are those of `packs`."""
        self.prompts = prompts
        self.completions = completions
        self.tokens_per_pack = tokens_per_pack
        super().__init__(packs(prompts, completions, tokens_per_pack))

    def repack(self, tokens_per_pack: int) -> None:
        """Pack the same completions under another budget; every row keeps its `row_data`."""
        if tokens_per_pack == self.tokens_per_pack:
            return
        repacked = list(packs(self.prompts, self.completions, tokens_per_pack))
        names = self[0].row_data if self else ()
        rows = {name: torch.cat([batch.row_data[name] for batch in self]) for name in names}
        self[:] = repacked
        self.tokens_per_pack = tokens_per_pack
        self.add_row_data(rows)

    def add_row_data(self, values: dict[str, torch.Tensor]) -> None:
        """Give each pack its part of the values, (N,) each of all rows of the step, by name."""
        counts = [len(batch.targets) for batch in self]
        for name, of_all in values.items():
            for batch, part in zip(self, of_all.split(counts), strict=True):
                batch.row_data[name] = part


def packs(
    prompts: list[Prompt], completions: list[torch.Tensor], tokens_per_pack: int
) -> Iterator[PackedBatch]:
    """Pack B prompts and their B·G completions, in order, into batches of at most `tokens_per_pack`
    tokens.

    Completion i belongs to prompt i // G. Every completion lands in exactly one pack. A group that
    fits into a pack of its own is not split; a longer one is, and its prompt is repeated. Raises
    UserError if a prompt and one of its completions exceed the budget.
    """
    chosen: list[int] = []  # the completions of the pack that is being filled, and its tokens
    tokens = 0
    for group in _groups(prompts, completions):
        prompt_length = len(prompts[_owner(group[0], prompts, completions)].input_ids)
        lengths = [_input_length(completions[index]) for index in group]
        longest = prompt_length + max(lengths)
        if longest > tokens_per_pack:
            raise UserError(
                f"a prompt with its completion has {longest} tokens, more than "
                f"tokens_per_microbatch = {tokens_per_pack}: raise --tokens-per-microbatch to at "
                f"least {longest}."
            )

        group_tokens = prompt_length + sum(lengths)
        if chosen and tokens + group_tokens > tokens_per_pack:
            yield pack(prompts, completions, chosen)
            chosen, tokens = [], 0

        tokens += prompt_length
        for index, length in zip(group, lengths, strict=True):
            if tokens + length > tokens_per_pack:
                yield pack(prompts, completions, chosen)
                chosen, tokens = [], prompt_length
            chosen.append(index)
            tokens += length
    if chosen:
        yield pack(prompts, completions, chosen)


def pack(
    prompts: list[Prompt], completions: list[torch.Tensor], sequence_ids: list[int]
) -> PackedBatch:
    """Pack the completions with these indices, in ascending order, each group behind its prompt."""
    owners = [_owner(index, prompts, completions) for index in sequence_ids]
    input_ids, position_ids, loss_rows, segments = [], [], [], []
    start = 0
    for number, (index, owner) in enumerate(zip(sequence_ids, owners, strict=True)):
        prompt, completion = prompts[owner], completions[index]
        if number == 0 or owner != owners[number - 1]:
            prefix = start + torch.arange(len(prompt.input_ids))
            input_ids.append(prompt.input_ids)
            position_ids.append(prompt.position_ids)
            segments.append((prefix, len(prefix)))
            start += len(prefix)

        own = start + torch.arange(_input_length(completion))
        if len(own):
            input_ids.append(completion[:-1])
            position_ids.append((prompt.next_position + torch.arange(len(own))).expand(3, -1))
            segments.append((torch.cat([prefix, own]), len(own)))
            start += len(own)

        # The prompt's last token predicts the first token of each completion.
        loss_rows.append(torch.cat([prefix[-1:], own])[: len(completion)])

    packed_prompts = [prompts[owner] for owner in dict.fromkeys(owners)]
    with_images = [prompt for prompt in packed_prompts if prompt.num_image_tokens]
    pixel_values = image_grid_thw = None
    if with_images:
        pixel_values = torch.cat([prompt.pixel_values for prompt in with_images])
        image_grid_thw = torch.cat([prompt.image_grid_thw for prompt in with_images])
    return PackedBatch(
        input_ids=torch.cat(input_ids),
        position_ids=torch.cat(position_ids, dim=1),
        segments=Segments.build(segments),
        loss_rows=torch.cat(loss_rows),
        targets=torch.cat([completions[index] for index in sequence_ids]),
        loss_cu_seqlens=cumulative([len(completions[index]) for index in sequence_ids]),
        sequence_ids=list(sequence_ids),
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw,
    )


def _input_length(completion: torch.Tensor) -> int:
    """Return how many of a completion's tokens are inputs: all but the last."""
    return max(0, len(completion) - 1)


def _groups(prompts: list[Prompt], completions: list[torch.Tensor]) -> list[range]:
    """Return the indices of each prompt's completions."""
    size = len(completions) // max(1, len(prompts))
    return [range(first, first + size) for first in range(0, len(completions), max(1, size))]


def _owner(index: int, prompts: list[Prompt], completions: list[torch.Tensor]) -> int:
    """Return the index of a completion's prompt."""
    return index * len(prompts) // len(completions)
