"""The plan of the pass before the update, with a reference in host memory, is what it allocates."""

import copy
from types import SimpleNamespace

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.model import reference as reference_module
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import make_policy
from mr1_fast.model.reference import Reference
from mr1_fast.packing import packs
from mr1_fast.plan import reference as planned_module
from mr1_fast.plan.layers import nbytes
from mr1_fast.plan.memory_use import total
from mr1_fast.plan.meta_model import MetaModel
from mr1_fast.plan.planned_run import PlannedRun, planned_run
from mr1_fast.plan.reference import reference_pass, streamed_reference
from mr1_fast.plan.resident import resident_reference
from mr1_fast.plan.workload import Workload

from ..data.memory_trace import peak_bytes
from .real_steps import random_prompt, small_config, small_model

QWEN_2B = "Qwen/Qwen2-VL-2B-Instruct"
GRIDS = ((200, 16, 16), (150, 8, 16), (120, 8, 8), (180, 16, 8))
"""Tokens of a prompt, and the patches of its image: height and width."""
LENGTHS = (32, 24) * 8
"""Tokens of four completions of each prompt."""


def offloading(**settings) -> TrainConfig:
    fixed = dict(device="cpu", dtype="float32", reference="offload", num_generations=4)
    return TrainConfig(**fixed | settings)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("budget", [320, 640, 2000])
@pytest.mark.parametrize("waits_on_device", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_plan_is_what_a_pass_by_layers_allocates(
    family, budget, waits_on_device, fused, monkeypatch
):
    for module in (reference_module, planned_module):
        monkeypatch.setattr(module, "states_wait_on_device", lambda *_: waits_on_device)
    config = offloading(tokens_per_microbatch=budget, fused_layers=fused)
    torch.manual_seed(0)
    model_config = small_config(family=family)
    policy = make_policy(small_model(model_config), SimpleNamespace(), config)
    reference = Reference(policy, "offload")
    prompts = [random_prompt(model_config, *grid) for grid in GRIDS]
    completions = [torch.randint(20, 200, (length,)) for length in LENGTHS]
    batches = list(packs(prompts, completions, budget))
    measured = peak_bytes(lambda: reference.logprobs(batches, 1.0))

    work = Workload([g[0] for g in GRIDS], [g[1] * g[2] for g in GRIDS], list(LENGTHS))
    planned = work.packs(budget)
    assert len(planned) == len(batches)
    uses = reference_pass(planned_run(config, model_config), planned, planned)
    error = max(map(total, uses)) / measured - 1
    print(f"{len(batches)} packs, {measured} bytes, {error:+.1%}")
    assert abs(error) < 0.02


def planned(**settings) -> PlannedRun:
    config = TrainConfig(model=QWEN_2B, **settings)
    return planned_run(config, find_model_config(QWEN_2B))


def test_streamed_reference_by_hand():
    run = planned(reference="offload")
    text, vision = nbytes(run.policy.text.layers[0]), nbytes(run.policy.vision.blocks[0])
    weights = sum(p.nbytes for p in run.policy.model.parameters())
    others = weights - 28 * text - 32 * vision
    assert streamed_reference(run) == 2 * text + 2 * vision + others
    assert resident_reference(run) == 0


def with_frozen_vision(run: PlannedRun) -> PlannedRun:
    """The same run with a vision tower that is not trained; models are shared between plans."""
    model = copy.deepcopy(run.policy.model)
    model.model.visual.requires_grad_(False)
    run.policy = MetaModel(model, run.device)
    return run


def test_what_the_policy_does_not_train_has_no_second_copy():
    run = with_frozen_vision(planned(reference="offload"))
    layer, ends = nbytes(run.policy.text.layers[0]), run.policy.text
    assert (
        streamed_reference(run)
        == 2 * layer + ends.embed_tokens.weight.nbytes + ends.norm.weight.nbytes
    )
    run = with_frozen_vision(planned(reference="resident"))
    vision = sum(p.nbytes for p in run.policy.vision.parameters())
    assert resident_reference(run) == run.policy.weights - vision


def test_hidden_states_wait_in_host_memory_where_the_gradients_would_not_have_room_for_them():
    """The update's gradients are 4.1 GiB, and the reference's own weights 0.75 GiB of them."""
    for prompts, on_device in ((16, True), (64, True), (256, False)):
        config = TrainConfig(model=QWEN_2B, reference="offload", prompts_per_step=prompts)
        run = planned_run(config, find_model_config(QWEN_2B))
        step = Workload.largest(config, run.model_config, 8, prompts).packs(8192)
        states = sum(2 * 1536 * batch.input_ids.numel() for batch in step)
        assert (states + streamed_reference(run) <= run.policy.gradients) == on_device
        activations = reference_pass(run, step, step[:1])[0]["activations"]
        assert (activations > states) == on_device
