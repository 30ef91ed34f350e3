"""Small models and prompts that several test files share."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from mr1_fast.config import ModelConfig
from mr1_fast.model import attention
from mr1_fast.model.families import FAMILIES, auto_class, base_model, text_model
from mr1_fast.model.load import make_policy
from mr1_fast.model.policy import Policy
from mr1_fast.model.tiny import family_config, family_processor, tiny_config, tiny_processor
from mr1_fast.types import Example


def tiny_policy(dtype: torch.dtype = torch.float32, family: str = "qwen2_vl", **settings) -> Policy:
    """Make a fresh tiny policy with seeded weights.

    They are large enough to make every token's distribution uneven.
    """
    processor = family_processor(FAMILIES[family])
    torch.manual_seed(0)
    model = family_model(processor, family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    config = ModelConfig(device="cpu", **{"recompute": "none", **settings})
    return make_policy(model.to(dtype), processor, config)


def family_model(processor, family: str) -> torch.nn.Module:
    """Make a fresh tiny model of a family, by its `model_type`."""
    config = family_config(processor, FAMILIES[family])
    return auto_class(config).from_config(config)


def small_text_model(vocabulary: int, **settings) -> Qwen2ForCausalLM:
    """Make a Qwen2 of two layers with seeded weights.

    They are large enough to make every token's distribution uneven.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    defaults = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **sizes, **defaults | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def wide_policy(dtype: torch.dtype, vocabulary: int = 2048) -> Policy:
    """Make a policy of two layers with Qwen2-VL-2B's widths in text and vision.

    Its LM head is tied and has a small vocabulary.
    """
    processor = tiny_processor()
    config = tiny_config(processor)
    text = dict(
        hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2
    )
    vision = dict(embed_dim=1280, hidden_size=1536, num_heads=16, depth=2)
    for part, sizes in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.vocab_size, config.text_config.num_hidden_layers = vocabulary, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    with no_init_weights():
        model = Qwen2VLForConditionalGeneration(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(
        1_000_003, generator=generator, dtype=dtype
    )  # drawing every weight anew takes seconds
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(
                pool.repeat(parameter.numel() // len(pool) + 1)[: parameter.numel()].view_as(
                    parameter
                )
            )
            parameter.mul_(scale).add_(1.0 if is_scale else 0.0)
    return make_policy(model, processor, ModelConfig(device="cpu", recompute="none"))


def fill_adapters(policy: Policy, dtype: torch.dtype) -> None:
    """Fill the adapters in `dtype`; a lora_B of zeros would hide every gradient of lora_A."""
    for name, parameter in policy.model.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def quantise(policy: Policy, dtype: torch.dtype) -> None:
    """Put the linear layers of the text model into nf4 with double quantisation, under adapters."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in text_model(policy.model).layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in [*part.named_children()]:
                base = getattr(module, "base_layer", module)
                if not isinstance(base, torch.nn.Linear):
                    continue
                sizes = base.in_features, base.out_features, base.bias is not None
                small = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                # bitsandbytes quantises as a weight moves to its device, but not on the way to it.
                packed, state = quantize_4bit(
                    base.weight.data, quant_type="nf4", compress_statistics=True
                )
                small.weight = Params4bit(
                    packed, requires_grad=False, quant_state=state, bnb_quantized=True
                )
                small.bias = base.bias
                if base is module:
                    setattr(part, name, small)
                else:
                    module.base_layer = small


def given_policy(hidden: Tensor, head: torch.nn.Linear, lengths: list[int]) -> SimpleNamespace:
    """Make a policy of given hidden states (N, D): those of completions of these lengths, in order.

    It has what `grpo_batch_loss` asks for.
    """
    parts = hidden.split(list(lengths))
    return SimpleNamespace(
        model=SimpleNamespace(lm_head=head),
        hidden=lambda batch: torch.cat([parts[i] for i in batch.sequence_ids]),
    )


def mixed_examples() -> list[Example]:
    """Make examples with no image, a square one, a wide one, and two of different sizes.

    Their prompts have different lengths.
    """
    generator = torch.Generator().manual_seed(1)

    def image(width: int, height: int) -> Image.Image:
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    return [
        Example("How many?", (), "3", key="text"),
        Example("How many items are there in the image?", (image(84, 84),), "4", key="square"),
        Example("What is the angle?", (image(140, 56),), "70°", key="wide"),
        Example(
            "How many items are there in the first image, and in the second?",
            (image(56, 84), image(112, 84)),
            "5",
        ),
    ]


def plain_inputs(policy: Policy, example: Example) -> dict[str, torch.Tensor]:
    """Return what transformers' own call of the processor gives for one example."""
    from mr1_fast.tasks import format_problem

    content = [{"type": "image"} for _ in example.images] + [
        {"type": "text", "text": format_problem(example)}
    ]
    text = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if policy.processor.image_processor is None:
        inputs = dict(policy.processor.tokenizer([text], return_tensors="pt"))
        return inputs | {"mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}
    return dict(
        policy.processor(text=[text], images=list(example.images) or None, return_tensors="pt")
    )


# --- transformers' own forward --------------------------------------------------------------------


@contextmanager
def own_attention(policy: Policy):
    """Use transformers' SDPA and its loop over images in this context.

    That holds also while the backward pass recomputes checkpointed layers.
    """
    model = base_model(policy.model)
    model.set_attn_implementation("sdpa")  # eager would round its softmax to fp32
    try:
        yield
    finally:
        attention.use_packed_attention(model)


def own_logprobs(
    policy: Policy, examples: list[Example], completions: list[Tensor], temperature: float
) -> Tensor:
    """Return log-probabilities (N,) by the model's own forward pass over padded rows.

    A row holds an example, its images and one completion. The model computes its own positions.
    Prompts are padded on the left, completions on the right.
    """
    model = base_model(policy.model)
    rows = [plain_inputs(policy, example) for example in examples]
    start, length = max(row["input_ids"].shape[1] for row in rows), max(map(len, completions))
    inputs = {
        name: torch.zeros(len(rows), start + length, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        for name, values in inputs.items():
            values[index, start - row[name].shape[1] : start] = row[name][0]
        inputs["input_ids"][index, start : start + len(completion)] = completion
        inputs["attention_mask"][index, start : start + len(completion)] = 1
    for name in ("pixel_values", "image_grid_thw"):
        parts = [row[name] for row in rows if name in row]
        if parts:
            inputs[name] = torch.cat(parts)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if policy.processor.image_processor is None:
        del inputs["mm_token_type_ids"]
    logits = model(**inputs, use_cache=False).logits[:, start - 1 : -1] if length else None
    logp = [
        torch.log_softmax(logits[i, : len(ids)] / temperature, dim=-1).gather(1, ids[:, None])[:, 0]
        for i, ids in enumerate(completions)
        if len(ids)
    ]
    return torch.cat(logp)


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every trained parameter that the loss reaches, by name."""
    policy.model.zero_grad()
    loss.backward()
    return {
        name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(
    ours: dict[str, Tensor], expected: dict[str, Tensor], relative: float
) -> None:
    """Assert that each gradient is within `relative` of its largest expected entry.

    That entry must not be zero.
    """
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, f"{name} has no gradient: nothing is compared"
        difference = (ours[name] - gradient).abs().max()
        assert difference <= relative * scale, f"{name}: {difference} of {scale}"
