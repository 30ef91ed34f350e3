"""`model(..., head=f)` gives the numbers of the model's own logits, whatever wraps the model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from mr1_fast import GRPOLoss
from mr1_fast.integrations.head import add_head
from mr1_fast.kernels.grpo.reference import grpo_loss_ref
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.tiny import family_processor

from ..data.head import batch, loss_of, text_model
from ..data.models import family_model, mixed_examples, plain_inputs

FORMS = ["one pass", "two passes"]


def run(model, inputs, head) -> tuple[GRPOLoss, dict[str, torch.Tensor]]:
    """The loss that f makes inside the model, and the gradients of all that is trained."""
    model.zero_grad()
    result = model(**inputs, head=head)
    result.loss.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_on_logits(model, inputs, data, num_tokens) -> tuple[GRPOLoss, dict[str, torch.Tensor]]:
    """The same from the model's own logits, as a trainer without `head` computes it."""
    model.zero_grad()
    rows = [data[name][data["mask"]] for name in ("targets", "advantages")]
    weights = torch.full_like(rows[1], 1 / num_tokens)
    logits = model(**inputs).logits[data["mask"]]
    result = grpo_loss_ref(
        logits, *rows, weights, beta=0.1, ref_logp=data["ref_logp"][data["mask"]]
    )
    result.loss.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, expected, **tolerance):
    for name in GRPOLoss._fields:
        torch.testing.assert_close(getattr(ours[0], name), getattr(expected[0], name), **tolerance)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0, f"{name} has no gradient: nothing is compared"
        torch.testing.assert_close(
            ours[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def adapted(model, **settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj", "up_proj"], **settings}
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide every gradient of lora_A
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model.train()


VARIANTS = {
    "untied": lambda: text_model(),
    "tied": lambda: text_model(tied=True),
    "checkpointing": lambda: checkpointed(text_model()),
    "LoRA": lambda: adapted(text_model()),
    "LoRA, checkpointing": lambda: checkpointed(adapted(text_model())),
    "LoRA, trained head": lambda: adapted(text_model(), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loss_of_the_models_own_logits(variant):
    model, data = VARIANTS[variant]().double(), batch(dtype=torch.float64)
    inputs = {"input_ids": data["ids"], "attention_mask": torch.ones_like(data["ids"])}
    expected = run_on_logits(model, inputs, data, 16)
    for form in FORMS:
        assert_same(run(model, inputs, loss_of(form, data, 16)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_products_are_bf16_and_the_rest_fp32(form):
    model, data = text_model(), batch()
    inputs = {"input_ids": data["ids"]}
    _, exact = run_on_logits(model, inputs, data, 16)
    exact = {name: gradient.clone() for name, gradient in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        _, eager = run_on_logits(model, inputs, data, 16)
        eager = {name: gradient.clone() for name, gradient in eager.items()}
        result, ours = run(model, inputs, loss_of(form, data, 16))
    assert (result.logp.dtype, ours["lm_head.weight"].dtype) == (torch.float32, torch.float32)
    assert not torch.equal(ours["lm_head.weight"], exact["lm_head.weight"])
    for name, gradient in exact.items():
        assert (ours[name] - gradient).norm() <= 2 * (eager[name] - gradient).norm(), name


def prompt(family: str):
    """A fresh model of a family, and its inputs: two images of different sizes, where it sees."""
    processor = family_processor(FAMILIES[family])
    example = mixed_examples()[3 if processor.image_processor else 0]
    inputs = plain_inputs(SimpleNamespace(processor=processor), example)
    if not processor.image_processor:
        del inputs["mm_token_type_ids"]
    return family_model(processor, family), inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_its_images(family):
    model, inputs = prompt(family)
    model.double()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    ids = inputs["input_ids"]
    data = batch(ids.shape, torch.float64) | {"targets": ids.roll(-1, dims=1)}
    expected = run_on_logits(model, inputs, data, 16)
    add_head(model)
    for form in FORMS:
        ours = run(model, inputs, loss_of(form, data, 16))
        assert {name for name, _ in model.named_parameters()} == ours[1].keys()
        assert_same(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family):
    model, inputs = prompt(family)

    def generate(policy):
        return policy.generate(**inputs, max_new_tokens=8, do_sample=False)

    expected, data = generate(model), batch(inputs["input_ids"].shape)
    add_head(model)
    assert torch.equal(generate(model), expected)
    run(model, inputs, loss_of("one pass", data, 16))  # leaves nothing behind
    assert torch.equal(generate(model), expected)
    policy = adapted(model)
    with policy.disable_adapter():
        assert torch.equal(generate(policy), expected)
    assert expected.shape[1] > inputs["input_ids"].shape[1]


def test_a_deep_copy_reads_its_own_weights():
    model, data = text_model(), batch()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    pairs = [
        (each(data["ids"], head=lambda h, w, b: h @ w.T), each(data["ids"]).logits)
        for each in (model, reference)
    ]
    for through_head, logits in pairs:
        torch.testing.assert_close(through_head, logits)
    assert not torch.allclose(pairs[0][1], pairs[1][1], atol=0.1)


def test_a_head_that_does_not_make_the_logits_alone_is_refused():
    sizes = dict(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(TypeError, match="final_logit_softcapping"):
        add_head(Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8)))
    router = dict(num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    with pytest.raises(TypeError, match="output_router_logits"):
        add_head(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **router, output_router_logits=True)))
    with pytest.raises(TypeError, match="without adapters"):
        add_head(adapted(text_model(), target_modules=["lm_head"]).base_model.model)
    late = adapted(text_model(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match="leave it out of the adapter"):
        late(batch()["ids"], head=lambda *_: None)
