import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.packing import MicroBatches, pack, packs
from mr1_fast.types import Prompt


def prompt(ids: list[int], images: int = 0) -> Prompt:
    """Make a prompt whose last `images` tokens are image tokens, each of a 28×28 image."""
    length = len(ids)
    return Prompt(
        input_ids=torch.tensor(ids),
        position_ids=torch.arange(length).expand(3, -1),
        next_position=100 * ids[0],
        pixel_values=torch.full((4 * images, 3), float(ids[0])) if images else None,
        image_grid_thw=torch.tensor([[1, 2, 2]]).repeat(images, 1) if images else None,
        num_image_tokens=images,
    )


def test_the_documented_example():
    batch = pack(
        [prompt([1, 2, 3], images=1)], [torch.tensor([7, 8, 9]), torch.tensor([10])], [0, 1]
    )
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8], "the prompt once; last tokens are no inputs"
    assert batch.loss_rows.tolist() == [2, 3, 4, 2]
    assert batch.targets.tolist() == [7, 8, 9, 10]
    assert batch.loss_cu_seqlens.tolist() == [0, 3, 4]
    assert len(batch.image_grid_thw) == 1, "the image is stored once for both completions"
    assert batch.position_ids[:, 3:].tolist() == [[100, 101]] * 3, (
        "completions continue after the prompt"
    )


def test_completions_see_their_prompt_and_themselves():
    completions = [torch.tensor(ids) for ids in ([7, 7, 7], [8, 8], [9], [9, 9])]
    segments = pack([prompt([1, 2, 3]), prompt([4])], completions, [0, 1, 2, 3]).segments
    assert segments.cu_seqlens_q.tolist() == [0, 3, 5, 6, 7, 8]
    assert segments.cu_seqlens_k.tolist() == [0, 3, 8, 12, 13, 15]
    assert segments.key_rows.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 6, 7]
    assert (segments.max_q, segments.max_k) == (3, 5)


def test_two_prompts_of_two_images_and_none_and_an_empty_completion():
    prompts = [prompt([1, 2, 3], images=2), prompt([4]), prompt([5, 6], images=1)]
    completions = [
        torch.tensor(ids, dtype=torch.int64) for ids in ([7], [], [8], [9, 9], [], [7, 6, 5])
    ]
    batch = pack(prompts, completions, [1, 2, 4, 5])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 6]
    assert batch.loss_cu_seqlens.tolist() == [0, 0, 1, 1, 4]
    assert batch.loss_rows.tolist() == [3, 5, 6, 7]
    assert batch.targets.tolist() == [8, 7, 6, 5]
    assert batch.pixel_values[:, 0].tolist() == [1.0] * 8 + [5.0] * 4


@pytest.mark.parametrize("budget", [8, 10, 17, 25, 1000])
def test_every_completion_lands_in_one_pack_within_the_budget(budget):
    prompts = [prompt([i, i, i]) for i in range(1, 6)]
    completions = [torch.full((1 + i % 6,), 9) for i in range(20)]
    batches = list(packs(prompts, completions, budget))
    assert [i for batch in batches for i in batch.sequence_ids] == list(range(20))
    assert all(len(batch.input_ids) <= budget for batch in batches)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.cat(completions))


def test_a_group_is_split_only_where_no_pack_holds_it():
    prompts = [prompt([i, i, i]) for i in (1, 2, 3)]
    completions = [torch.full((3,), 9)] * 6 + [
        torch.full((7,), 9)
    ] * 3  # groups of 9, 9 and 21 tokens
    batches = list(packs(prompts, completions, 17))
    assert [batch.sequence_ids for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    assert batches[2].input_ids.tolist().count(3) == batches[3].input_ids.tolist().count(3) == 3, (
        "its prompt again"
    )


def test_a_budget_that_is_met_exactly_splits_nothing():
    prompts, completions = [prompt([i, i, i]) for i in (1, 2, 3)], [torch.full((3,), 9)] * 9

    def filled(budget):  # by groups of 9 tokens: 3 of the prompt, 2 of each completion
        return [batch.sequence_ids for batch in packs(prompts, completions, budget)]

    assert filled(9) == filled(17) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert filled(18) == filled(26) == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    assert filled(27) == [list(range(9))]
    assert filled(8) == [[0, 1], [2], [3, 4], [5], [6, 7], [8]]
    assert filled(7) == [[0, 1], [2], [3, 4], [5], [6, 7], [8]] and filled(5) == [
        [i] for i in range(9)
    ]


def test_packs_remember_the_budget_that_they_were_packed_under_last():
    prompts, completions = [prompt([i, i, i]) for i in (1, 2)], [torch.full((3,), 9)] * 6
    batches = MicroBatches(prompts, completions, 18)
    batches.add_row_data({"number": torch.arange(18)})
    for budget, count in ((9, 2), (18, 1), (9, 2), (5, 6)):
        batches.repack(budget)
        assert (batches.tokens_per_pack, len(batches)) == (budget, count)
        assert torch.cat([batch.row_data["number"] for batch in batches]).tolist() == [*range(18)]
    before = list(batches)
    batches.repack(5)
    assert all(pack is same for pack, same in zip(batches, before, strict=True))


def test_a_sequence_beyond_the_budget_is_an_error_that_names_the_flag():
    with pytest.raises(
        UserError, match="tokens_per_microbatch = 3: raise --tokens-per-microbatch to at least 4"
    ):
        list(packs([prompt([1, 2, 3])], [torch.tensor([4, 5])], 3))
