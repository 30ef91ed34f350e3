"""Small models and prompts that several test files share."""

import copy
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from mr1_fast.config import ModelConfig
from mr1_fast.model import attention
from mr1_fast.model.families import FAMILIES, auto_class, base_model, text_model
from mr1_fast.model.load import make_policy
from mr1_fast.model.policy import Policy
from mr1_fast.model.tiny import family_config, family_processor
from mr1_fast.types import Example

VISION_FAMILIES = [name for name, family in FAMILIES.items() if family.vision]
"""The families whose models see images."""


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


def wide_policy(dtype: torch.dtype, family: str = "qwen2_vl", vocabulary: int = 2048) -> Policy:
    """Make a policy of two layers with the widths of a family's smallest published model.

    Its vocabulary is small. Only the second vision block of Qwen2.5-VL sees all of an image. The
    first one of Qwen3-VL gives a deepstack feature; that of a second would have no gradient, as
    no layer follows to mix it into the rows with loss.
    """
    processor = family_processor(FAMILIES[family])
    with no_init_weights():
        config = _wide_config(processor, family, vocabulary)
        model = auto_class(config).from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    # Drawing every weight anew takes seconds.
    pool = torch.randn(1_000_003, generator=generator, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            for part in parameter.view(-1).split(len(pool)):
                torch.mul(pool[: len(part)], scale, out=part)
            if is_scale:
                parameter.add_(1.0)
    return make_policy(model, processor, ModelConfig(device="cpu", recompute="none"))


def _wide_config(processor, family: str, vocabulary: int) -> PretrainedConfig:
    """Cut the settings of a family's smallest published model, for `wide_policy`."""
    tiny = family_config(processor, FAMILIES[family]).to_dict()
    settings = copy.deepcopy(next(iter(FAMILIES[family].sizes.values())))
    text = settings.get("text_config", settings)
    text.update(num_hidden_layers=2, vocab_size=vocabulary)
    for name in ("eos_token_id", "pad_token_id"):
        text[name] = tiny.get("text_config", tiny)[name]
    if FAMILIES[family].vision:
        settings |= {name: value for name, value in tiny.items() if name.endswith("_token_id")}
        vision = settings["vision_config"]
        vision["depth"] = 2
        cut = {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
        vision.update((name, value) for name, value in cut.items() if name in vision)
    return FAMILIES[family].config(settings)


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


def mixed_examples(family: str = "qwen2_vl") -> list[Example]:
    """Make examples with no image, a square one, a wide one, and two of different sizes.

    Their prompts have different lengths. Those for a family of text alone have no images.
    """
    generator = torch.Generator().manual_seed(1)

    def images(*sizes: tuple[int, int]) -> tuple[Image.Image, ...]:
        if family not in VISION_FAMILIES:
            return ()
        shapes = [(height, width, 3) for width, height in sizes]
        draw = partial(torch.randint, 256, generator=generator, dtype=torch.uint8)
        return tuple(Image.fromarray(draw(shape).numpy()) for shape in shapes)

    return [
        Example("How many?", (), "3", key="text"),
        Example("How many items are there in the image?", images((84, 84)), "4", key="square"),
        Example("What is the angle?", images((140, 56)), "70°", key="wide"),
        Example(
            "How many items are there in the first image, and in the second?",
            images((56, 84), (112, 84)),
            "5",
        ),
    ]


def examples_for(policy: Policy) -> list[Example]:
    """Return the mixed examples of a policy's family."""
    return mixed_examples(base_model(policy.model).config.model_type)


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

    A row holds an example, its images and one completion. A model that sees images computes its own
    positions.
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
        # Models of text alone count the padding; angles of other positions are rounded otherwise.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
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
