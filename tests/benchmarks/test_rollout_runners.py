"""The rollout's benchmark: its models, its orders of rows, its runners on a small work."""

import numpy as np
import pytest
import torch
from random_models import RANK, model_config, random_model
from rollout_runners import (
    OursApart,
    OursInBatches,
    OursMerged,
    OursStreamed,
    Prescribed,
    Reordered,
    apart,
)
from rollout_work import BATCH, WORKS, scale_bytes

from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.model.families import text_model
from mr1_fast.model.tiny import tiny_processor
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.rollout.table import Columns


def test_rows_apart_take_one_row_of_each_prefix_in_turn():
    prefixes = np.array([5, 5, 5, 9, 9, 2])
    order = apart(prefixes)
    assert sorted(order) == list(range(6))
    assert prefixes[order].tolist() == [2, 5, 9, 5, 9, 5]


def test_reordered_rows_give_the_same_results_in_the_order_of_the_host():
    launched = []

    def launch(table, uniform):
        launched.append(Columns(*table.T))
        return lambda: (table[:, 7].copy(), uniform.copy())

    step = Reordered(launch)
    table = np.zeros((4, 8), dtype=np.int32)
    columns = Columns(*table.T)
    columns.prefix_start[:] = [1, 1, 7, 7]
    columns.span[:] = [10, 11, 12, 13]
    first = step(table, np.arange(4.0))()
    columns.source[:] = range(4)
    second = step(table, np.arange(4.0))()
    for tokens, uniform in (first, second):
        assert tokens.tolist() == [10, 11, 12, 13] and uniform.tolist() == [0, 1, 2, 3]
    assert launched[0].prefix_start.tolist() == [1, 7, 1, 7]
    # Each row goes on from where the device had it in the step before.
    assert launched[0].span[launched[1].source].tolist() == launched[1].span.tolist()


def test_runners_of_ours_give_the_lengths_that_are_prescribed_and_the_same_tokens():
    work = WORKS["prefix"](True, "cpu")
    lengths = [1 + i % 8 for i in range(len(work.lengths))]
    assert OursApart(work)(lengths) == lengths
    tokens = []
    for runner in (OursApart(work), OursMerged(work)):
        runner.engine.lengths = work.lengths
        sampling = Sampling(max_new_tokens=8)
        rollout = runner.engine.generate(work.examples, 8, sampling, prompts=work.prompts)
        tokens.append([ids.tolist() for ids in rollout.completions])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("kind", [OursInBatches, OursStreamed])
def test_batches_give_the_lengths_that_are_prescribed(kind):
    work = WORKS["stream"](True, "cpu")
    assert len(work.prompts) == 2 * BATCH
    lengths = [1 + i % 5 for i in range(len(work.lengths))]
    assert kind(work)(lengths) == lengths


@pytest.mark.parametrize("name, lora", [("tiny", False), ("tiny-qwen3vl", True)])
def test_a_random_model_in_4_bits_is_as_bitsandbytes_loads_it(name, lora):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    processor = tiny_processor(name)
    config = model_config(name, processor, 1)
    model = random_model(config, "cpu", torch.bfloat16, lora=lora, four_bit=True)
    layers = text_model(model).layers
    small = [each for each in layers.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 1 and len(small) == 7
    for each in small:
        weight = FourBitWeight.of(each)
        assert weight.code.dtype == torch.float32 and weight.absmax.dtype == torch.uint8
        assert each.bias is None or each.bias.dtype == torch.bfloat16
        state = each.weight.quant_state
        dense = bitsandbytes.functional.dequantize_4bit(each.weight.data, state)
        assert 0.01 < dense.float().std() < 0.03
    packed = sum(each.weight.numel() for each in small)
    assert scale_bytes(layers) == pytest.approx(packed / 32, rel=0.05)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 14 * lora and all(p.shape[0] == RANK for p in adapters[::2])
    assert all(p.abs().max() > 0 for p in adapters)


def test_parts_have_the_works_that_they_compare():
    from bench_rollout import OURS, PARTS

    assert set(PARTS) == set(WORKS)
    for part in PARTS.values():
        assert next(iter(part.runners)) == OURS
        assert set(part.targets) <= {*part.runners, "limit"}
        kinds = [kind for name, kind in part.runners.items() if name.startswith("ours")]
        assert all(issubclass(kind.kind, Prescribed) for kind in kinds)
