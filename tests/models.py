"""Small models and prompts that several test files share."""

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mr1_fast.config import ModelConfig
from mr1_fast.model.load import Policy, make_policy
from mr1_fast.model.tiny import tiny_config, tiny_model, tiny_processor
from mr1_fast.types import Example


def tiny_policy(dtype: torch.dtype = torch.float32, family: str = "qwen2_vl", **settings) -> Policy:
    """A fresh tiny policy with seeded weights, large enough to make every token's distribution uneven."""
    processor = tiny_processor()
    torch.manual_seed(0)
    model = tiny_model(processor) if family == "qwen2_vl" else tiny_qwen2_5(processor)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    config = ModelConfig(device="cpu", **{"gradient_checkpointing": False, **settings})
    return make_policy(model.to(dtype), processor, config)


def tiny_qwen2_5(processor) -> torch.nn.Module:
    """A Qwen2.5-VL of the tiny model's sizes, whose vision tower attends within windows in its first layer."""
    base = tiny_config(processor).to_dict()
    vision = dict(
        depth=2,
        hidden_size=64,
        out_hidden_size=128,
        intermediate_size=128,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=56,
        fullatt_block_indexes=[1],
    )
    text = {k: v for k, v in base["text_config"].items() if k != "model_type"}
    ids = {k: base[k] for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def mixed_examples() -> list[Example]:
    """No image, one square image, one wide image, and two images of different sizes; prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)

    def image(width: int, height: int) -> Image.Image:
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    return [
        Example("How many?", (), "3", key="text"),
        Example("How many items are there in the image?", (image(84, 84),), "4", key="square"),
        Example("What is the angle?", (image(140, 56),), "70°", key="wide"),
        Example(
            "How many items are there in the first image, and in the second?", (image(56, 84), image(112, 84)), "5"
        ),
    ]


def plain_inputs(policy: Policy, example: Example) -> dict[str, torch.Tensor]:
    """What transformers' own processor call gives for one example."""
    from mr1_fast.tasks import format_problem

    content = [{"type": "image"} for _ in example.images] + [{"type": "text", "text": format_problem(example)}]
    text = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return dict(policy.processor(text=[text], images=list(example.images) or None, return_tensors="pt"))
