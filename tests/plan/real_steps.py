"""Small models of each family, and what steps of training allocate with them."""

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PretrainedConfig

from mr1_fast.config import TrainConfig
from mr1_fast.distributed import SINGLE, World
from mr1_fast.distributed.sharding import local
from mr1_fast.model.families import FAMILIES, auto_class, patches_per_token
from mr1_fast.model.load import make_policy
from mr1_fast.model.reference import Reference
from mr1_fast.model.spread import spread
from mr1_fast.optim import make_optimizer, state_block, update
from mr1_fast.plan.choice import Choice
from mr1_fast.plan.workload import Workload
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.stages import grpo_batch_loss, pack_rollout
from mr1_fast.types import Prompt, Rollout

from ..data.memory_trace import peak_bytes

IMAGE = 1
"""Id of the image token of `small_config`."""
TEXT = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WIDER_HEADS = dict(head_dim=48)
"""Heads that are wider together than the hidden states, as in Qwen3-VL-4B."""
SECTIONS = dict(rope_parameters=ROPE | {"mrope_section": [4, 6, 6]})
TEXTS = {
    "qwen2_vl": SECTIONS,
    "qwen2_5_vl": SECTIONS,
    "qwen3_vl": dict(
        rope_parameters=ROPE | {"mrope_section": [8, 8, 8], "mrope_interleaved": True},
        **WIDER_HEADS,
    ),
    "qwen2": dict(rope_parameters=ROPE),
    "qwen3": dict(rope_parameters=ROPE, **WIDER_HEADS),
}
"""What language models have beside TEXT, by family."""
TOWERS = {
    "qwen2_vl": dict(depth=4, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=4),
    "qwen2_5_vl": dict(
        depth=4,
        hidden_size=128,
        intermediate_size=384,
        out_hidden_size=256,
        num_heads=4,
        window_size=56,
        fullatt_block_indexes=[3],
    ),
    "qwen3_vl": dict(
        depth=4,
        hidden_size=128,
        intermediate_size=512,
        out_hidden_size=256,
        num_heads=4,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 2],
    ),
}


def small_config(
    vocab_size: int = 6000, tied: bool = True, family: str = "qwen2_vl"
) -> PretrainedConfig:
    """A model that is large enough for layers, logits and caches to count beside the weights."""
    text = TEXT | TEXTS[family] | dict(vocab_size=vocab_size, tie_word_embeddings=tied)
    if family not in TOWERS:
        return FAMILIES[family].config(text)
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return FAMILIES[family].config(
        dict(
            text_config=text,
            vision_config=TOWERS[family],
            tie_word_embeddings=tied,
            **{name: IMAGE + index for index, name in enumerate(ids)},
        )
    )


def small_model(config: PretrainedConfig) -> nn.Module:
    """A model of this configuration with fresh weights."""
    return auto_class(config).from_config(config)


def random_prompt(config: PretrainedConfig, length: int, height: int, width: int) -> Prompt:
    """A prompt of `length` tokens with an image of height × width patches, if the model has any."""
    ids = torch.randint(20, 200, (length,))
    positions = torch.arange(length).expand(3, -1).contiguous()
    if not patches_per_token(config):
        return Prompt(ids, positions, length)
    vision, count = config.vision_config, height * width // patches_per_token(config)
    ids[2 : 2 + count] = IMAGE
    numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, height, width]])
    return Prompt(ids, positions, length, torch.randn(height * width, numbers), grid, count)


def held(value) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return held(tuple(value.values()))
    return sum(map(held, value)) if isinstance(value, list | tuple) else 0


def tensors_of(*models: nn.Module) -> dict[int, int]:
    """Bytes that this process has of the models' parameters and buffers, by their address."""
    tensors = [local(t.detach()) for m in models for t in (*m.parameters(), *m.buffers())]
    return {t.data_ptr(): t.nbytes for t in tensors}


def measure(
    config: TrainConfig,
    model_config: PretrainedConfig,
    grids,
    lengths,
    choice: Choice,
    world: World = SINGLE,
) -> tuple[int, dict[str, int]]:
    """Measure a step: bytes between phases, and bytes that each phase adds at its peak.

    Several processes are sharded as `config` says; each has the prompts that are given here.
    """
    torch.manual_seed(0)
    model = small_model(model_config).to(getattr(torch, config.dtype))
    policy = make_policy(model, SimpleNamespace(), config)
    choice.apply(policy.layers)
    reference, block = Reference(policy, config.reference), state_block(policy.model, config)
    sharding = spread(policy, reference, config.sharding, world, block=block)
    optimizer = make_optimizer(policy.model, config, parts=sharding.parts)
    prompts = [random_prompt(model_config, *grid) for grid in grids]
    completions = [torch.randint(20, 200, (length,)) for length in lengths]
    logprobs = [torch.zeros(len(ids)) for ids in completions]
    rollout = Rollout([], prompts, completions, [], [], logprobs, config.num_generations)
    batches = pack_rollout(
        rollout, torch.randn(len(prompts), config.num_generations), choice.tokens, config
    )
    for batch in batches:
        batch.row_data["ref_logp"] = torch.zeros(len(batch.targets))
    batch_loss = partial(grpo_batch_loss, beta=0.04, config=config)
    learn = partial(
        update, policy, optimizer, batches, batch_loss, 0, 10, config, sharding=sharding
    )
    learn()  # makes the optimizer's state
    always = held(list(optimizer.state.values()))
    always += sum(tensors_of(policy.model, reference.policy.model).values())

    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=-1, batch_decode=lambda ids, **_: [""] * len(ids))
    )
    sampling = Sampling(max(lengths), top_p=config.top_p)

    def sample():  # an engine of its own, as a training step has
        with sharding.whole_weights():
            engine = Engine(policy.model, processor, len, policy.layers)
            at_once = choice.tokens
            engine.generate(
                [], config.num_generations, sampling, prompts=prompts, prefill_tokens=at_once
            )

    if config.device == "cuda":  # work space of cuBLAS for the stream of captures
        sample()
    phases = {
        "rollout": sample,
        "reference": lambda: reference.logprobs(batches, 1.0),
        "update": learn,
    }
    # Without bf16 instructions oneDNN multiplies fp32 copies that it makes in each product.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    with torch.backends.mkldnn.flags(enabled=config.dtype != "bfloat16" or has_bf16):
        peaks = {phase: peak_bytes(call, config.device) for phase, call in phases.items()}
    return always, peaks


def workload(grids, lengths, has_images: bool = True) -> Workload:
    """The prompts and completions that `measure` is given."""
    patches = [height * width * has_images for _, height, width in grids]
    return Workload([length for length, *_ in grids], patches, list(lengths))
