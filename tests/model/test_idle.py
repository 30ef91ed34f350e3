"""Packs without loss: what is computed beside them, and of them, stays as it is."""

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.distributed import SINGLE
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.idle import aligned, idle_pack
from mr1_fast.packing import pack
from mr1_fast.stages import grpo_batch_loss
from tests.data.models import VISION_FAMILIES, examples_for, tiny_policy


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_idle_image_beside_a_pack_of_text_changes_nothing(family):
    policy = tiny_policy(family=family)
    without, image = (idle_pack(policy.model, with_image=has) for has in (False, True))
    text, square, *_ = policy.encode.many(examples_for(policy))
    completions = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    of_text, of_square = (pack([each], completions, [0, 1]) for each in (text, square))

    (alone,) = aligned(SINGLE, [of_text], without, image)
    beside, as_it_is = aligned(SINGLE, [of_text, of_square], without, image)
    assert alone is of_text
    assert as_it_is is of_square
    assert len(beside.input_ids) == len(of_text.input_ids) + 1
    assert beside.image_grid_thw is image.image_grid_thw
    torch.testing.assert_close(policy.hidden(beside), policy.hidden(alone), rtol=1e-5, atol=1e-6)
    policy.hidden(beside).sum().backward()
    tower = [p.grad for n, p in policy.model.named_parameters() if "visual" in n]
    assert all(gradient is not None and not gradient.any() for gradient in tower)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_idle_pack_has_no_rows_and_gradients_of_zero(family):
    policy = tiny_policy(family=family, recompute="all")
    idle = idle_pack(policy.model, with_image=family in VISION_FAMILIES)
    names = ("advantages", "token_weights", "rollout_logp", "ref_logp")
    idle.row_data = {name: torch.zeros(0) for name in names}
    loss, metrics = grpo_batch_loss(policy, idle, 0.1, TrainConfig())
    loss.backward()
    assert loss == 0
    assert [len(metric.values) for metric in metrics.values()] == [0] * len(metrics)
    gradients = [p.grad for p in policy.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
