"""What `make_policy` prepares: which weights are trained, and which layers are run again."""

import pytest
import torch

from mr1_fast.model.forward import LayerRun

from ..data.models import gradients, tiny_policy
from .test_forward import packed_logprobs, weighted


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_frozen_vision_tower_leaves_all_other_gradients_as_they_are(family, recompute):
    found = []
    for frozen in (False, True):
        policy = tiny_policy(family=family, freeze_vision=frozen, recompute=recompute)
        loss = weighted(packed_logprobs(policy))
        found.append((loss.detach(), gradients(policy, loss)))
    (loss, whole), (same, others) = found
    assert torch.equal(loss, same)
    assert others.keys() == {name for name in whole if ".visual." not in name} < whole.keys()
    assert all(torch.equal(gradient, whole[name]) for name, gradient in others.items())


def test_frozen_images_keep_nothing_for_a_backward_pass():
    policy = tiny_policy(freeze_vision=True, recompute="all")
    seen = []

    def watch(*_) -> None:
        seen.append(torch.is_grad_enabled())

    policy.model.model.visual.merger.register_forward_pre_hook(watch)
    packed_logprobs(policy)
    assert seen == [False]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"recompute": "none"}, LayerRun()),
        ({"recompute": "auto"}, LayerRun(recompute_text=3, recompute_vision=2)),
        ({"recompute": "all"}, LayerRun(recompute_text=3, recompute_vision=2)),
        ({"recompute": "all", "lora": True}, LayerRun(recompute_text=3)),
        ({"recompute": "all", "freeze_vision": True}, LayerRun(recompute_text=3)),
        (
            {"recompute": "all", "fused_layers": False, "offload_checkpoints": True},
            LayerRun(False, recompute_text=3, recompute_vision=2, offload=True),
        ),
    ],
    ids=str,
)
def test_how_layers_are_computed(settings, expected):
    assert tiny_policy(**settings).layers == expected
