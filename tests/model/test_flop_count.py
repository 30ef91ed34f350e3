"""The formula of model FLOP, against what torch counts while the model runs."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.families import (
    FAMILIES,
    base_model,
    text_model,
    text_positions,
    vision_tower,
)
from mr1_fast.model.flop_count import (
    BLOCKS,
    EMBEDDING,
    FROZEN,
    HEAD,
    LAYERS,
    MERGERS,
    PATCH_EMBEDDING,
    POSITIONS,
    Trained,
    causal_pairs,
    count_flop,
    image_pairs,
    window_pairs,
)
from mr1_fast.model.forward import lm_head_weight
from mr1_fast.packing import packs

from ..data.models import mixed_examples, tiny_policy

WITH_IMAGES = [name for name, family in FAMILIES.items() if family.vision]


def one_query_at_a_time(module, query, key, value, mask, scaling=None, segments=None, **_):
    """Packed attention by its definition: no query multiplies a key that it does not see."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x[0].repeat_interleave(groups, dim=0) for x in (key, value))
    bounds_q, bounds_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    outputs = []
    for segment, (start, end) in enumerate(pairwise(bounds_q)):
        keys = segments.key_rows[bounds_k[segment] : bounds_k[segment + 1]]
        for token in range(start, end):
            seen = keys[: len(keys) - (end - 1 - token)]
            scores = query[0, :, token : token + 1] @ key[:, seen].transpose(1, 2) * scaling
            outputs.append(scores.softmax(dim=-1) @ value[:, seen])
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register("one_query_at_a_time", one_query_at_a_time)


@contextmanager
def nothing_masked(policy):
    """Use attention that makes no product which a mask would hide, in text and images."""
    model = base_model(policy.model)
    text_model(model).config._attn_implementation = "one_query_at_a_time"
    if (tower := vision_tower(model)) is not None:
        tower.config._attn_implementation = "eager"  # a loop over images or windows
    try:
        yield
    finally:
        use_packed_attention(model)


def whole(features):
    """Features of all images, which versions of transformers give as one tensor or one for each."""
    return features if isinstance(features, torch.Tensor) else torch.cat(features)


def hidden_states(policy, batch):
    """The packed forward pass through transformers' own modules."""
    inner, text = base_model(policy.model).model, text_model(policy.model)
    embeddings, deep = inner.get_input_embeddings()(batch.input_ids), {}
    if batch.pixel_values is not None:
        images = inner.get_image_features(
            batch.pixel_values, batch.image_grid_thw, return_dict=True
        )
        places = batch.input_ids == inner.config.image_token_id
        features = whole(images.pooler_output)
        embeddings = embeddings.masked_scatter(places[:, None], features)
        if (layers := getattr(images, "deepstack_features", None)) is not None:
            deep = dict(
                visual_pos_masks=places[None], deepstack_visual_embeds=list(map(whole, layers))
            )
    output = text(
        inputs_embeds=embeddings[None],
        position_ids=text_positions(text, batch.position_ids),
        attention_mask=embeddings.new_empty(1, 1, 0, 0),  # the segments say what is seen
        use_cache=False,
        segments=batch.segments,
        **deep,
    )
    return output.last_hidden_state[0, batch.loss_rows]


def short(prompt, image_id, keep=8):
    """The prompt without what follows its images: the attention of these tests is slow."""
    end = max([keep, *(1 + (prompt.input_ids == image_id).nonzero()[:, 0])])
    ids, positions = prompt.input_ids[:end], prompt.position_ids[:, :end]
    return replace(prompt, input_ids=ids, position_ids=positions)


def examples_for(config):
    """Examples with no, one and two images, or without any for a model of text alone."""
    examples = mixed_examples()
    if config.model_type in WITH_IMAGES:
        return examples
    return [replace(example, images=()) for example in examples[:2]]


def make_batch(policy, examples=None):
    """One pack of prompts with no, one and two images, and completions of 0 to 6 ids."""
    config = base_model(policy.model).config
    image_id = getattr(config, "image_token_id", -1)
    examples = examples_for(config) if examples is None else examples
    prompts = [short(prompt, image_id) for prompt in policy.encode.many(examples)]
    generator = torch.Generator().manual_seed(3)
    completions = [
        torch.randint(0, 256, (length,), generator=generator)
        for length in (4, 1, 6, 0, 3, 5, 2, 4)[: 2 * len(prompts)]
    ]
    (batch,) = packs(prompts, completions, 10**6)
    return batch


def counted(policy, batch):
    """What torch counts in a forward pass over the batch, and in the backward pass after it."""
    with nothing_masked(policy):
        with FlopCounterMode(display=False) as forward:
            logits = hidden_states(policy, batch) @ lm_head_weight(policy.model).T
        with FlopCounterMode(display=False) as backward:
            if logits.requires_grad:
                logits.logsumexp(dim=-1).sum().backward()
    return matrix_products(forward), matrix_products(backward)


def matrix_products(counter):
    """The FLOP that torch counted, but for angles, which transformers 5.17 makes by a product."""
    angles = [
        sum(counts.values())
        for module, counts in counter.get_flop_counts().items()
        if module.endswith(".rotary_emb")
    ]
    return counter.get_total_flops() - sum(angles)


def freeze(policy, *parts):
    for name, parameter in policy.model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)


SETTINGS = {
    "all weights": ({}, ()),
    "frozen embedding": ({}, ("embed_tokens.",)),
    "adapters": ({"lora": True, "lora_rank": 4}, ()),
    "nothing": ({}, ("",)),
}
BEFORE_MERGERS = ("visual.patch_embed", "visual.pos_embed", "visual.blocks")
IMAGE_SETTINGS = {
    "frozen vision tower": ({}, ("visual.",)),
    "frozen vision tower and embedding": ({}, ("visual.", "embed_tokens.")),
    "mergers and text": ({}, (*BEFORE_MERGERS, "embed_tokens.")),
    "vision tower alone": ({}, ("embed_tokens.", "language_model.")),
}
CASES = [(family, name) for family in FAMILIES for name in SETTINGS] + [
    (family, name) for family in WITH_IMAGES for name in IMAGE_SETTINGS
]


@pytest.mark.parametrize("family, settings", CASES)
def test_both_passes_have_the_flop_that_torch_counts(family, settings):
    options, frozen = (SETTINGS | IMAGE_SETTINGS)[settings]
    if options:
        pytest.importorskip("peft")
    policy = tiny_policy(family=family, **options)
    freeze(policy, *frozen)
    batch, config = make_batch(policy), base_model(policy.model).config
    flop = count_flop(config, batch, Trained.of(policy.model))
    assert flop == counted(policy, batch)
    assert (flop.backward == 0) == (settings == "nothing")


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_a_batch_without_images_and_one_without_loss(family):
    policy = tiny_policy(family=family)
    config, trained = base_model(policy.model).config, Trained.of(policy.model)
    text = make_batch(policy, mixed_examples()[:1])
    assert text.image_grid_thw is None
    assert count_flop(config, text, trained) == counted(policy, text)
    (silent,) = packs(policy.encode.many(mixed_examples()[1:2]), [torch.zeros(0).long()], 10**6)
    assert len(silent.targets) == 0
    assert count_flop(config, silent) == (counted(policy, silent)[0], 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_that_torch_counts_is_the_packed_attention(family):
    policy = tiny_policy(family=family)
    batch = make_batch(policy)
    with torch.no_grad():
        with nothing_masked(policy):
            expected = hidden_states(policy, batch)
        assert torch.allclose(policy.hidden(batch), expected, rtol=1e-4, atol=1e-4)


def test_the_reference_of_adapters_is_the_model_without_them():
    pytest.importorskip("peft")
    policy = tiny_policy(lora=True, lora_rank=4)
    batch, config = make_batch(policy), base_model(policy.model).config
    adapted = count_flop(config, batch, Trained.of(policy.model))
    with policy.model.disable_adapter(), torch.no_grad():
        assert count_flop(config, batch, FROZEN) == counted(policy, batch)
    assert adapted.forward > count_flop(config, batch).forward
    # Frozen weights have no gradients of their own, so that the backward pass costs less than 2 ×.
    assert adapted.backward < 1.5 * adapted.forward


def test_what_is_trained_is_read_from_the_model():
    policy = tiny_policy()
    parts = {PATCH_EMBEDDING, BLOCKS, MERGERS, EMBEDDING, LAYERS, HEAD}
    assert Trained.of(policy.model) == Trained(frozenset(parts))
    freeze(policy, "visual.")
    assert Trained.of(policy.model) == Trained(frozenset({EMBEDDING, LAYERS, HEAD}))
    policy = tiny_policy()
    freeze(policy, "embed_tokens.")  # which is the head, too
    assert Trained.of(policy.model).parts == {PATCH_EMBEDDING, BLOCKS, MERGERS, LAYERS}
    policy = tiny_policy(family="qwen3_vl")
    assert Trained.of(policy.model).parts == parts | {POSITIONS}
    policy = tiny_policy(family="qwen3")
    assert Trained.of(policy.model).parts == {EMBEDDING, LAYERS, HEAD}


def test_pairs_of_a_prompt_and_its_completions():
    policy = tiny_policy()
    (prompt,) = policy.encode.many(mixed_examples()[:1])
    length = len(prompt.input_ids)
    (batch,) = packs([prompt], [torch.zeros(n, dtype=torch.int64) for n in (4, 1, 3)], 10**6)
    # The last token of a completion is no input, so 3, 0 and 2 tokens follow the prompt.
    own = sum(length + i for i in (1, 2, 3)) + sum(length + i for i in (1, 2))
    assert causal_pairs(batch.segments) == length * (length + 1) // 2 + own


def test_windows_at_the_edges_are_smaller():
    vision = base_model(tiny_policy(family="qwen2_5_vl").model).config.vision_config
    assert (vision.window_size, vision.patch_size, vision.spatial_merge_size) == (56, 14, 2)
    # 6 × 10 patches in windows of 4 × 4: rows of 4 and 2, columns of 4, 4 and 2.
    sides = [(down, across) for down in (4, 2) for across in (4, 4, 2)]
    assert window_pairs([[1, 6, 10]], vision) == sum((a * b) ** 2 for a, b in sides)
    assert window_pairs([[2, 4, 4]], vision) == image_pairs([[2, 4, 4]]) == 2 * 16**2
