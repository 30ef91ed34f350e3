"""A whole rollout by the Triton kernels: prompts, decode steps and draws."""

import pytest
import torch

from mr1_fast.model.families import text_model
from mr1_fast.packing import pack
from mr1_fast.rollout.engine import Engine, describe_decoding
from mr1_fast.rollout.sampling import Sampling

from ..data.models import fill_adapters, mixed_examples, quantise, tiny_policy

WAYS = {
    "full": ("one kernel, 16 bits", 2),  # PyTorch computes o and down
    "nf4 and lora": ("one kernel, 4 bits with LoRA", 4),
}
"""How the linear layers are computed, and how many of four."""


@pytest.mark.parametrize("kind", WAYS)
def test_a_rollouts_logprobs_are_close_to_trainings(device, kind):
    policy = tiny_policy(torch.bfloat16, lora="lora" in kind)
    if "lora" in kind:
        fill_adapters(policy, torch.bfloat16)
    if "nf4" in kind:
        pytest.importorskip("bitsandbytes")
        quantise(policy, torch.bfloat16)
    text = text_model(policy.model)
    text.layers = text.layers[:1]  # an interpreted layer takes seconds
    text.config.num_hidden_layers = 1
    policy.model.to(device)
    told = describe_decoding(policy.model)
    way, count = WAYS[kind]
    assert told.startswith("attention: Triton") and told.count(way) == count

    engine = Engine(policy.model, policy.processor, policy.encode)
    rollout = engine.generate(mixed_examples()[:1], 9, Sampling(3), seed=1)
    batch = pack(rollout.prompts, rollout.completions, list(range(9)))
    with torch.no_grad():
        expected = policy.logprobs(batch.to(device), 1.0)[0].cpu()
    gap = (torch.cat(rollout.logprobs) - expected).abs()
    assert gap.mean() < 0.03 and gap.max() < 0.3
