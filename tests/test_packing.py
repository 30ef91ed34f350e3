import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.packing import pack, packs
from mr1_fast.types import Prompt


def prompt(ids: list[int], images: int = 0) -> Prompt:
    """A prompt of these ids whose last `images` tokens are image tokens, each of its own 28×28 image."""
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
    batch = pack([prompt([1, 2, 3], images=1)], [torch.tensor([7, 8]), torch.tensor([9])], [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8, 1, 2, 3, 9]
    assert batch.cu_seqlens.tolist() == [0, 5, 9]
    assert batch.loss_rows.tolist() == [2, 3, 7]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.loss_cu_seqlens.tolist() == [0, 2, 3]
    assert batch.feature_rows.tolist() == [0, 0]
    assert len(batch.image_grid_thw) == 1, "the image is stored once for both completions"
    assert batch.position_ids[:, 3:5].tolist() == [[100, 101]] * 3, "completions continue after the prompt"
    assert batch.position_ids[:, 5].tolist() == [0, 0, 0], "and positions restart with every sequence"


def test_two_prompts_of_two_images_and_none_and_an_empty_completion():
    prompts = [prompt([1, 2, 3], images=2), prompt([4]), prompt([5, 6], images=1)]
    completions = [torch.tensor(ids, dtype=torch.int64) for ids in ([7], [], [8], [9, 9], [], [7, 7, 7])]
    batch = pack(prompts, completions, [1, 2, 4, 5])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 8, 5, 6, 5, 6, 7, 7, 7]
    assert batch.loss_cu_seqlens.tolist() == [0, 0, 1, 1, 4]
    assert batch.loss_rows.tolist() == [3, 8, 9, 10]
    assert batch.feature_rows.tolist() == [0, 1, 2, 2]
    assert batch.pixel_values[:, 0].tolist() == [1.0] * 8 + [5.0] * 4
    assert batch.max_seqlen == 5


@pytest.mark.parametrize("budget", [9, 10, 17, 25, 1000])
def test_every_completion_lands_in_one_pack_within_the_budget(budget):
    prompts = [prompt([i, i, i]) for i in range(1, 6)]
    completions = [torch.full((1 + i % 6,), 9) for i in range(20)]
    batches = list(packs(prompts, completions, budget))
    assert [i for batch in batches for i in batch.sequence_ids] == list(range(20))
    assert all(len(batch.input_ids) <= budget for batch in batches)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.cat(completions))


def test_a_sequence_beyond_the_budget_is_an_error_that_names_the_flag():
    with pytest.raises(UserError, match="tokens_per_microbatch = 4: raise --tokens-per-microbatch to at least 5"):
        list(packs([prompt([1, 2, 3])], [torch.tensor([4, 5])], 4))
