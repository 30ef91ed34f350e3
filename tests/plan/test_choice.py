"""What is chosen where the settings say `auto`: the size of packs, and which layers run again."""

from dataclasses import replace

import pytest
from torch import nn

from mr1_fast.config import TrainConfig
from mr1_fast.model.forward import LayerRun
from mr1_fast.model.known import find_model_config
from mr1_fast.plan.choice import MARGIN, MOST_USEFUL, UNPLANNED, Choice, pack_sizes
from mr1_fast.plan.meta_model import Recomputed
from mr1_fast.plan.plan import Plan, make_plan, usable_bytes
from mr1_fast.plan.planned_run import planned_run
from mr1_fast.plan.workload import Workload, patches_of

QWEN_2B = "Qwen/Qwen2-VL-2B-Instruct"
ONE_GROUP = 1024 + 8 * 512
"""Tokens of the longest prompt with its completions, as the settings are by default."""
FULL = TrainConfig(
    model=QWEN_2B, optimizer="adamw_exact", reference="offload", device="cuda", eval_samples=0
)
"""Full fine-tuning in bf16, as the recipes for 24 GB have it."""


def sizes(device: str = "cuda", **settings) -> list[list[int]]:
    return list(pack_sizes(TrainConfig(**settings), device))


def test_sizes_of_packs():
    assert sizes(tokens_per_microbatch=6144) == sizes("cpu", tokens_per_microbatch=6144) == [[6144]]
    whole, *parts = sizes()
    assert whole == [3 * ONE_GROUP, ONE_GROUP] and whole[0] <= MOST_USEFUL
    halves, thirds, quarters, single = (1024 + count * 512 for count in (4, 3, 2, 1))
    assert parts == [[halves], [thirds], [quarters], [single]], "no prompt without a completion"
    assert sizes(prompts_per_step=2)[0] == [2 * ONE_GROUP, ONE_GROUP]
    assert sizes(algo="sft")[0] == [10 * 1536, 5 * 1536, 2 * 1536, 1536]
    long = sizes(max_new_tokens=4096)
    assert long[0] == [1024 + 8 * 4096] and long[-1] == [1024 + 4096]


def test_a_cpu_has_one_size():
    assert sizes("cpu") == [[UNPLANNED]]
    assert sizes("cpu", max_new_tokens=4096) == [[5120]]


def plan(vram: float, **settings) -> Plan:
    config = replace(FULL, **settings)
    return make_plan(config, find_model_config(config.model), usable=usable_bytes(vram))


def test_results_are_kept_as_far_as_memory_allows():
    for vram in (20, 24, 28):
        limit = (1 - MARGIN) * usable_bytes(vram)
        chosen = plan(vram)
        again, layers = chosen.choice.recomputed, chosen.choice.layers
        assert chosen.total("update") <= limit
        assert 0 < again.text <= layers.text == 28 and again.vision <= layers.vision == 32
        # One more text layer, or one more vision block, would be too much.
        if again.text < 28:
            assert limit - chosen.total("update") < 2**30
    assert plan(20).choice.recomputed.text > plan(28).choice.recomputed.text


def test_where_there_is_room_packs_are_large_and_nothing_is_run_again():
    choice = plan(80).choice
    assert choice == Choice(3 * ONE_GROUP, Recomputed(0, 0), Recomputed(28, 32))
    assert plan(80, recompute="all").choice.recomputed == Recomputed(28, 32)
    assert plan(24, recompute="none").choice.recomputed == Recomputed(0, 0)
    assert plan(80, recompute="none", tokens_per_microbatch=6144).choice.tokens == 6144


def test_a_byte_saves_as_much_work_in_text_as_in_vision():
    """The numbers of docs/memory.md, of a pack with one group."""
    run = planned_run(FULL, find_model_config(QWEN_2B))
    model = run.policy
    [batch] = Workload.largest(FULL, run.model_config, 8, 1).packs(ONE_GROUP)
    images, tokens = patches_of(batch), batch.input_ids.numel()
    text = model.decoder(batch.segments, run.training)
    vision = model.vision_tower(images, run.training).blocks
    patches = int(images.sum())

    def products(layer: nn.Module) -> int:
        linears = (m for m in layer.modules() if isinstance(m, nn.Linear))
        return 2 * sum(m.in_features * m.out_features for m in linears)

    attention = 4 * patches * model.vision_width
    for stack, rows, flop, kept, again, saves in (
        (text, tokens, products(model.text.layers[0]), 50.8, 3.1, 2.0),
        (vision, patches, products(model.vision.blocks[0]) + attention, 25.7, 2.6, 2.2),
    ):
        assert stack.stored.saved / rows / 1e3 == pytest.approx(kept, abs=0.06)
        assert stack.again.saved / rows / 1e3 == pytest.approx(again, abs=0.06)
        saved = stack.stored.saved - stack.again.saved
        assert rows * flop / saved / 1e3 == pytest.approx(saves, abs=0.06)


def test_a_group_is_split_only_where_it_does_not_fit():
    assert plan(24).choice.tokens == ONE_GROUP
    split = plan(20.5)
    assert split.choice.tokens == 1024 + 4 * 512, "half of the completions"
    assert not split.excess(usable_bytes(20.5))
    tight = plan(19.2)  # three sizes fit, but none with the margin: the smallest takes the least
    assert tight.choice.tokens == 1536 and not tight.excess(usable_bytes(19.2))
    hopeless = plan(12)
    assert hopeless.choice.recomputed == hopeless.choice.layers
    assert hopeless.choice.tokens == 1536 and hopeless.excess(usable_bytes(12))


def test_without_a_limit_all_results_are_kept():
    chosen = make_plan(FULL, find_model_config(QWEN_2B)).choice
    assert (chosen.tokens, chosen.recomputed) == (3 * ONE_GROUP, Recomputed(0, 0))


@pytest.mark.parametrize(
    "recompute, is_cuda, again",
    [("auto", True, 5), ("auto", False, 0), ("all", False, 5), ("none", True, 0)],
)
def test_without_a_plan_the_choice_is_careful(recompute, is_cuda, again):
    layers = Recomputed(5, 5)
    choice = Choice.without_plan(TrainConfig(recompute=recompute), layers, is_cuda)
    assert choice.recomputed == Recomputed(again, again)
    assert choice.tokens == UNPLANNED
    run = LayerRun()
    choice.apply(run)
    assert (run.recompute_text, run.recompute_vision) == (again, again)


def test_the_line_that_says_what_was_chosen():
    choice = Choice(6144, Recomputed(20, 32), Recomputed(28, 32))
    line = "recomputed: 20 of 28 text layers, 32 of 32 vision blocks; packs of 6,144 tokens"
    assert str(choice) == line
    frozen = Choice(6144, Recomputed(20, 0), Recomputed(28, 0))
    assert str(frozen) == "recomputed: 20 of 28 text layers; packs of 6,144 tokens"
