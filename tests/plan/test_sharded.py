"""Bytes of one of several processes, by kind of sharding, against counts by hand and real parts."""

import re
from dataclasses import replace

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.distributed.sharding import Part
from mr1_fast.errors import UserError
from mr1_fast.kernels.adamw.state import BLOCK
from mr1_fast.model.known import find_model_config
from mr1_fast.optim import make_optimizer
from mr1_fast.plan.advice import advice
from mr1_fast.plan.command import print_plan
from mr1_fast.plan.plan import GIB, Plan, make_plan
from mr1_fast.plan.planned_run import PlannedRun, planned_run
from mr1_fast.plan.resident import resident
from mr1_fast.plan.settings import PlanConfig, parse
from mr1_fast.plan.sharded import ONE_CARD, Sharded, groups_of
from mr1_fast.plan.update import PackUpdate

from .real_steps import held, small_config, small_model, workload

SMALL = TrainConfig(device="cpu", dtype="float32", num_generations=4, eval_samples=0)
STEP = dict(grids=((200, 16, 16), (150, 8, 16)), lengths=(32, 24) * 4)
QWEN_2B = "Qwen/Qwen2-VL-2B-Instruct"
CARD = TrainConfig(
    model=QWEN_2B,
    device="cuda",
    recompute="all",
    tokens_per_microbatch=5120,
    eval_samples=0,
)
"""Full fine-tuning with nothing left to be chosen but the kind of sharding."""


def planned(kind: str, processes: int, **settings) -> PlannedRun:
    return planned_run(replace(SMALL, sharding=kind, **settings), small_config(), processes)


def planned_2b(kind: str, processes: int = 8, usable: float | None = None, **settings) -> Plan:
    config = replace(CARD, sharding=kind, **settings)
    return make_plan(config, find_model_config(QWEN_2B), usable=usable, processes=processes)


def test_one_process_has_everything():
    run = planned("full", 1)
    assert run.sharded == ONE_CARD and ONE_CARD.gradients(run.policy) == run.policy.gradients
    assert ONE_CARD.weights(run.policy) == run.policy.weights
    assert ONE_CARD.pass_weights(run.policy) == ONE_CARD.whole_weights(run.policy) == 0
    assert ONE_CARD.pass_sums(run.policy) == ONE_CARD.summed_buckets(run.policy) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_exact"])
@pytest.mark.parametrize("processes", [2, 3])
def test_states_of_a_part_are_those_that_the_optimizer_allocates(optimizer, processes):
    """Of the first process, which has ⌈blocks/N⌉ blocks of every parameter."""
    settings = dict(optimizer=optimizer, dtype="bfloat16", lr_schedule="constant")
    model = small_model(small_config()).to(torch.bfloat16)
    parts = []
    for name, p in model.named_parameters():
        blocks = -(-p.numel() // BLOCK)
        flat = p.detach().view(-1)[: -(-blocks // processes) * BLOCK]
        parts.append(Part(name, torch.nn.Parameter(flat), 0, p.shape))
    real = make_optimizer(model, replace(SMALL, **settings), parts=parts)
    for part in parts:
        part.weight.grad = torch.zeros_like(part.weight)
    real.step()
    counts = [state["step"].nbytes for state in real.state.values()]  # in host memory
    planned_use = resident(planned("optimizer", processes, **settings))
    assert planned_use["optimizer"] + planned_use["remainder"] == (
        held(list(real.state.values())) - sum(counts)
    )


def test_the_parts_of_all_processes_are_the_whole():
    for shape in ((1,), (256,), (257,), (5, 100), (7, 512), (300, 3)):
        p = torch.nn.Parameter(torch.empty(shape, device="meta"))
        for processes in (2, 3, 8):
            optimizer, full = (Sharded(kind, processes) for kind in ("optimizer", "full"))
            assert optimizer.updated(p) * processes >= p.numel()
            assert full.held(p) == torch.chunk(p, processes)[0].numel()


@pytest.mark.parametrize("processes", [2, 3])
def test_full_holds_the_rows_of_each_matrix(processes):
    run = planned("full", processes, optimizer="adamw_exact", dtype="bfloat16")
    model, sharded = run.policy.model, run.sharded
    by_hand = 0
    for p in model.parameters():
        rows = torch.chunk(p, processes)[0]
        by_hand += rows.nbytes if rows.numel() % BLOCK == 0 else p.nbytes
    buffers = sum(b.nbytes for b in model.buffers())
    always = resident(run)
    assert always["weights"] == by_hand + buffers
    assert sharded.gradients(run.policy) == by_hand
    # The reference has no optimizer whose blocks a cut could part.
    chunks = sum(torch.chunk(p, processes)[0].nbytes for p in model.parameters())
    assert always["reference"] == chunks + buffers

    groups = groups_of(sharded, run.policy)
    layers = [*model.model.visual.blocks, *model.model.language_model.layers]
    assert len(groups.layers) == len(layers) and len(groups.decoder) == 4
    assert sum(each.size for each in groups.all) == sum(
        p.nbytes for p in model.parameters() if sharded.splits(p)
    )
    head = model.lm_head.weight
    assert groups.root.size >= head.nbytes > groups.largest.size


def test_adapters_and_4_bits_stay_whole():
    run = planned("full", 2, lora=True)
    assert not any(run.sharded.splits(p) for p in run.policy.trained)
    assert run.sharded.gradients(run.policy) == run.policy.gradients
    assert run.sharded.weights(run.policy) < 0.6 * run.policy.weights
    run = planned("full", 2, lora=True, load_in_4bit=True)
    split = [p for p in run.policy.model.parameters() if run.sharded.splits(p)]
    assert split and all(p.is_floating_point() for p in split)


def test_phases_hold_what_is_gathered():
    """The same step on one process and, as one of two, with its weights in parts."""
    steps = {
        kind: make_plan(
            replace(SMALL, sharding=kind, recompute="all"),
            small_config(),
            workload(**STEP),
            processes=size,
        )
        for kind, size in (("none", 1), ("optimizer", 2), ("full", 2))
    }
    model = planned("full", 2).policy
    sharded = Sharded("full", 2)
    whole = sharded.whole_weights(model)
    assert whole == sum(p.nbytes for p in model.model.parameters())
    alone, full = steps["none"].phases, steps["full"].phases
    parts = sum(sharded.held(p) * p.itemsize for p in model.model.parameters())
    assert full["rollout"]["exchange"] == whole - parts > 0
    assert full["reference"]["exchange"] == sharded.pass_weights(model) < whole
    for phase in alone:
        assert "exchange" not in alone[phase] or not alone[phase]["exchange"]
        for same in ("KV cache", "activations", "loss head"):
            assert full["rollout"].get(same) == alone["rollout"].get(same)
    optimizer = steps["optimizer"].phases["update"]
    assert alone["update"]["optimizer"] / 2 <= optimizer["optimizer"]
    assert optimizer["optimizer"] < 0.51 * alone["update"]["optimizer"]
    assert optimizer["weights"] == alone["update"]["weights"]


def test_a_pass_of_full_keeps_parts_of_layers_gradients_and_the_roots_whole():
    run = planned("full", 2, recompute="all")
    groups = groups_of(run.sharded, run.policy)
    first, second = (
        PackUpdate.of(run, batch, is_first)
        for batch in workload(**STEP).packs(4096)
        for is_first in (True, False)
    )
    layers = sum(each.part for each in groups.layers)
    at_end, later = (each.uses(run.policy.layers)[-1] for each in (first, second))
    assert at_end["gradients"] == layers + groups.root.gradients
    assert later["gradients"] == run.sharded.gradients(run.policy) + groups.root.gradients
    assert at_end["exchange"] == (4 + 4 // 2) * groups.root.trained
    # Somewhere in the backward pass two layers are whole, and the gradients of one are summed: in
    # fp32, beside the sums' half.
    most = max(use["exchange"] for use in first.uses(run.policy.layers)[:-1])
    assert most == groups.root.whole + 2 * groups.largest.whole + 6 * groups.largest.trained


def test_auto_is_the_first_kind_that_fits_where_work_is_the_same():
    peaks = {kind: planned_2b(kind).peak for kind in ("none", "optimizer", "full")}
    assert peaks["none"] > peaks["optimizer"] > peaks["full"]
    for kind, peak in peaks.items():
        plan = planned_2b("auto", usable=1.06 * peak)
        assert (plan.sharded.kind, plan.sharded.processes) == (kind, 8)
    assert planned_2b("auto", usable=0.5 * peaks["full"]).sharded.kind == "full"
    assert planned_2b("auto", usable=0.0, reference="offload").sharded.kind == "optimizer"
    assert planned_2b("auto", processes=1, usable=0.0).sharded == ONE_CARD
    on_cpu = make_plan(replace(SMALL, sharding="auto"), small_config(), processes=2)
    assert on_cpu.sharded == Sharded("none", 2, block=1)


def test_auto_takes_the_optimizers_parts_where_they_save_work():
    """Layers are recomputed where memory is short: more of them with all states on each card."""

    def auto(kind: str, usable: float) -> Plan:
        return planned_2b(kind, usable=usable, recompute="auto")

    for usable, chosen in (
        (1.06 * planned_2b("none").peak, "optimizer"),
        (4 * planned_2b("none", recompute="none").peak, "none"),
        (1.06 * planned_2b("optimizer").peak, "optimizer"),
        (1.06 * planned_2b("full").peak, "full"),
    ):
        assert auto("auto", usable).sharded.kind == chosen
    tight = 1.06 * planned_2b("none").peak
    none, optimizer, full = (auto(kind, tight) for kind in ("none", "optimizer", "full"))
    assert max(none.peak, optimizer.peak, full.peak) <= tight
    assert none.work > optimizer.work > full.work


def test_a_card_has_the_prompts_of_the_process_with_the_most():
    step = planned_2b("none", processes=3, prompts_per_step=8)
    alone = planned_2b("none", processes=1, prompts_per_step=3)
    assert step.cache_tokens == alone.cache_tokens and step.work == alone.work


def test_advice_shards_before_anything_else():
    config = replace(CARD, sharding="none")
    model_config = find_model_config(QWEN_2B)
    usable = planned_2b("optimizer").peak + GIB // 4
    [line] = advice(config, model_config, usable, 8)
    assert line.startswith("--sharding optimizer: update ")
    assert "sharding" not in " ".join(advice(config, model_config, usable))


def test_command(capsys):
    flags = ["--model", "tiny", "--eval-samples", "0", "--gpus", "4", "--sharding", "full"]
    fixed = ["--recompute", "all", "--tokens-per-microbatch", "6144"]
    print_plan(parse([*flags, *fixed]))
    first, kind, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny on 4 × cuda in bfloat16")
    assert kind == "bytes per card, of the fullest of 4 (sharding full)"
    number = re.fullmatch(r"each card sends (\d+\.\d\d) MiB per step", last).group(1)
    assert float(number) > 0
    print_plan(parse([*flags[:4], "--device", "cpu"]))
    assert "each card sends" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "excluded",
    [["--reference", "offload"], ["--reference", "8bit"], ["--load-in-4bit", "--lora"]],
    ids=" ".join,
)
def test_full_cannot_have(excluded):
    with pytest.raises(UserError, match="sharding"):
        print_plan(parse(["--model", "tiny", "--gpus", "2", "--sharding", "full", *excluded]))


@pytest.mark.parametrize("gpus, told", [(0, "gpus is 0"), (17, "each of 17 GPUs needs a prompt")])
def test_bad_input(gpus, told):
    with pytest.raises(UserError, match=told):
        PlanConfig(gpus=gpus).check()
