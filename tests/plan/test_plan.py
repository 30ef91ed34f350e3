"""The memory plan: it equals what real steps allocate, counts by hand, and its advice works."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import make_policy
from mr1_fast.model.reference import Reference
from mr1_fast.optim import make_optimizer, update
from mr1_fast.plan.advice import advice
from mr1_fast.plan.choice import MARGIN, Choice
from mr1_fast.plan.command import print_plan
from mr1_fast.plan.layers import nbytes
from mr1_fast.plan.plan import Plan, make_plan, usable_bytes
from mr1_fast.plan.planned_run import PlannedRun, planned_run
from mr1_fast.plan.resident import resident
from mr1_fast.plan.run_memory import RunMemory
from mr1_fast.plan.settings import PlanConfig, parse
from mr1_fast.plan.stand_ins import FourBitLinear
from mr1_fast.plan.workload import Workload
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.stages import grpo_batch_loss, pack_rollout
from mr1_fast.types import Prompt, Rollout

from ..data.memory_trace import peak_bytes
from ..data.models import tiny_policy

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
QWEN_2B, QWEN_7B = "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"
PARAMETERS = {QWEN_2B: 2_208_985_600, QWEN_7B: 8_291_375_616}
IMAGE = 1
"""Id of the image token of `small_config`."""


def small_config(vocab_size: int = 6000, tied: bool = True) -> Qwen2VLConfig:
    """A model that is large enough for layers, logits and caches to count beside the weights."""
    return Qwen2VLConfig(
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        vision_config=dict(depth=4, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=4),
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=tied,
    )


def random_prompt(length: int, height: int, width: int) -> Prompt:
    """A prompt of `length` tokens with an image of height × width patches."""
    ids = torch.randint(20, 200, (length,))
    ids[2 : 2 + height * width // 4] = IMAGE
    grid = torch.tensor([[1, height, width]])
    positions = torch.arange(length).expand(3, -1).contiguous()
    return Prompt(
        ids, positions, length, torch.randn(height * width, 1176), grid, height * width // 4
    )


def held(value) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return held(tuple(value.values()))
    return sum(map(held, value)) if isinstance(value, list | tuple) else 0


def measure(
    config: TrainConfig, model_config: Qwen2VLConfig, grids, lengths, choice: Choice
) -> tuple[int, dict[str, int]]:
    """Measure a step: bytes between phases, and bytes that each phase adds at its peak."""
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(model_config).to(getattr(torch, config.dtype))
    policy = make_policy(model, SimpleNamespace(), config)
    choice.apply(policy.layers)
    optimizer, reference = make_optimizer(policy.model, config), Reference(policy, config.reference)
    prompts = [random_prompt(*grid) for grid in grids]
    completions = [torch.randint(20, 200, (length,)) for length in lengths]
    logprobs = [torch.zeros(len(ids)) for ids in completions]
    rollout = Rollout([], prompts, completions, [], [], logprobs, config.num_generations)
    batches = pack_rollout(
        rollout, torch.randn(len(prompts), config.num_generations), choice.tokens, config
    )
    for batch in batches:
        batch.row_data["ref_logp"] = torch.zeros(len(batch.targets))
    batch_loss = partial(grpo_batch_loss, beta=0.04, config=config)
    learn = partial(update, policy, optimizer, batches, batch_loss, 0, 10, config)
    learn()  # makes the optimizer's state
    always = nbytes(policy.model) + held(list(optimizer.state.values()))
    if not reference.has_adapter:
        ours, frozen = policy.model, reference.policy.model
        shared = {p.data_ptr() for p in ours.parameters()}
        own = [t for t in (*frozen.parameters(), *frozen.buffers()) if t.data_ptr() not in shared]
        always += held(own)

    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=-1, batch_decode=lambda ids, **_: [])
    )
    sampling = Sampling(max(lengths), top_p=config.top_p)

    def sample():  # an engine of its own, as a training step has
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


def workload(grids, lengths) -> Workload:
    """The prompts and completions that `measure` is given."""
    return Workload([g[0] for g in grids], [g[1] * g[2] for g in grids], list(lengths))


IMAGES = dict(grids=((200, 16, 16), (150, 8, 16)), lengths=(32, 24) * 4)
LONG = dict(grids=((120, 8, 8), (100, 4, 8)), lengths=(32, 24) * 8)
CASES = {
    "recomputed": (IMAGES, dict(recompute="all"), {}),
    "stored": (IMAGES, dict(recompute="none"), {}),
    "transformers' layers, recomputed": (IMAGES, dict(recompute="all", fused_layers=False), {}),
    "transformers' layers, stored": (IMAGES, dict(recompute="none", fused_layers=False), {}),
    "frozen vision": (IMAGES, dict(freeze_vision=True), {}),
    "stored, 8-bit reference": (IMAGES, dict(recompute="none", reference="8bit"), {}),
    "lora, stored": (IMAGES, dict(lora=True, recompute="none"), {}),
    "lora bf16": (IMAGES, dict(lora=True, dtype="bfloat16", recompute="all"), {}),
    "exact bf16, several packs": (
        IMAGES,
        dict(tokens_per_microbatch=320, dtype="bfloat16", recompute="all"),
        dict(vocab_size=3000),
    ),
    "stochastic bf16, cache": (
        LONG,
        dict(optimizer="adamw_stochastic", dtype="bfloat16", recompute="all"),
        dict(vocab_size=8_000),
    ),
    "top_p, untied": (
        LONG,
        dict(top_p=0.9, recompute="none"),
        dict(vocab_size=8_000, tied=False),
    ),
    "a loss in two passes": (
        LONG,
        dict(ratio="sequence", entropy_coefficient=0.1, recompute="none"),
        dict(vocab_size=8_000),
    ),
}


def bounded(config: TrainConfig, shapes: dict, sizes: dict, plan: Plan) -> None:
    """Assert that a plan is what a step allocates that does as the plan has chosen."""
    always, measured = measure(config, small_config(**sizes), **shapes, choice=plan.choice)
    errors = {phase: plan.total(phase) / (always + measured[phase]) - 1 for phase in measured}
    beside = {phase: (plan.total(phase) - always) / measured[phase] - 1 for phase in measured}
    print(
        {
            phase: (measured[phase], f"{errors[phase]:+.1%}", f"{beside[phase]:+.1%}")
            for phase in measured
        }
    )
    assert max(map(abs, errors.values())) < 0.05, errors
    work_space = 0.25 if config.dtype == "bfloat16" else 0.06  # oneDNN lays 16-bit numbers out anew
    assert max(map(abs, beside.values())) < work_space, beside


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_allocates(case):
    shapes, settings, sizes = CASES[case]
    generations = len(shapes["lengths"]) // len(shapes["grids"])
    fixed = dict(device="cpu", dtype="float32", num_generations=generations, eval_samples=0)
    config = TrainConfig(**{**fixed, **settings})
    plan = make_plan(config, small_config(**sizes), workload(**shapes))
    bounded(config, shapes, sizes, plan)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_auto_keeps_what_fits_and_the_plan_is_what_a_step_allocates(share, fused):
    config = TrainConfig(
        device="cpu", dtype="float32", num_generations=4, eval_samples=0, fused_layers=fused
    )
    work = workload(**IMAGES)
    most, least = (
        make_plan(replace(config, recompute=value), small_config(), work).total("update")
        for value in ("none", "all")
    )
    limit = least + share * (most - least)
    plan = make_plan(config, small_config(), work, usable=limit / (1 - MARGIN))
    recomputed = plan.choice.recomputed
    assert 0 < recomputed.text + recomputed.vision < 8
    assert least < plan.total("update") <= limit
    bounded(config, IMAGES, {}, plan)


def test_a_frozen_vision_tower_takes_less():
    config = TrainConfig(device="cpu", num_generations=4, eval_samples=0)
    before, after = (
        make_plan(replace(config, freeze_vision=frozen), small_config(), workload(**IMAGES))
        for frozen in (False, True)
    )
    vision = Qwen2VLForConditionalGeneration(small_config()).model.visual
    size = nbytes(vision, trainable=True)
    states = [plan.phases["update"]["optimizer"] for plan in (before, after)]
    assert states[0] - states[1] == 2 * size
    assert after.choice.layers.vision == 0 and "vision" not in str(after.choice)
    assert after.total("update") < before.total("update") - 2 * size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings", [{}, {"lora": True}, {"reference": "offload", "offload_checkpoints": True}], ids=str
)
def test_the_plan_is_what_cuda_allocates(settings):
    config = TrainConfig(
        **{
            "device": "cuda",
            "dtype": "bfloat16",
            "num_generations": 4,
            "eval_samples": 0,
            **settings,
        }
    )
    plan = make_plan(config, small_config(), workload(**IMAGES))
    always, measured = measure(config, small_config(), **IMAGES, choice=plan.choice)
    tensors = {phase: plan.total(phase) - plan.phases[phase]["workspace"] for phase in measured}
    if config.reference == "offload":  # measured in host memory, where the plan has nothing
        always = sum(
            plan.phases["rollout"].get(name, 0) for name in ("weights", "remainder", "optimizer")
        )
    errors = {phase: tensors[phase] / (always + measured[phase]) - 1 for phase in measured}
    assert max(map(abs, errors.values())) < 0.07, errors


def planned(model: str, **settings) -> PlannedRun:
    return planned_run(TrainConfig(model=model, **settings), find_model_config(model))


@pytest.mark.parametrize("model", PARAMETERS)
def test_weights_remainder_and_optimizer_by_hand(model):
    run = planned(model, reference="offload")
    count = PARAMETERS[model]
    assert sum(p.numel() for p in run.policy.model.parameters()) == count
    always = resident(run)
    assert always["weights"] - 2 * count < 4096  # rotary frequencies
    assert always["remainder"] == 2 * count
    assert (
        2 * count <= always["optimizer"] - 2 * count // 64 < 2 * count + 8 * 1000
    )  # a part of a block per parameter
    assert always["reference"] == 0


def test_four_bits_by_hand():
    linear = FourBitLinear(torch.nn.Linear(1536, 8960, bias=False, device="meta"))
    count = 1536 * 8960
    assert nbytes(linear) == count // 2 + count // 64 + 4 * count // (64 * 256)
    policy = planned(QWEN_7B, lora=True, load_in_4bit=True).policy
    adapters = sum(p.numel() for p in policy.trained)
    assert adapters == 28 * 32 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert {p.dtype for p in policy.trained} == {torch.float32}
    kept = 2 * (152064 * 3584 * 2 + sum(p.numel() for p in policy.vision.parameters()))
    layers = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    small = 2 * (28 * (3584 + 2 * 512 + 2 * 3584) + 3584)  # biases and norms
    by_hand = kept + layers / 2 + layers / 64 + layers / (64 * 64) + small + 4 * adapters
    assert policy.weights == pytest.approx(by_hand, rel=1e-4)


def test_advice_makes_it_fit():
    config = TrainConfig(model=QWEN_2B, optimizer="adamw", prompts_per_step=4, eval_samples=0)
    model_config, usable = find_model_config(QWEN_2B), usable_bytes(21)
    lines = advice(config, model_config, usable)
    assert 1 < len(lines) <= 3 and lines[0].startswith("--optimizer adamw_exact: update")
    flags = " ".join(line.partition(":")[0] for line in lines).split()
    settings = {
        f"--{name}={value}" for name, value in vars(config).items() if value not in (None, {}, [])
    }
    changed = parse_train_config([*settings, *flags])
    before, after = (make_plan(each, model_config, usable=usable) for each in (config, changed))
    assert before.peak > usable >= after.peak
    assert before.choice.recomputed == before.choice.layers
    assert advice(changed, model_config, usable) == []


def test_advice_goes_from_what_changes_no_number_to_what_makes_another_run():
    config = TrainConfig(
        model=QWEN_2B,
        optimizer="adamw_stochastic",
        reference="offload",
        prompts_per_step=4,
        eval_samples=0,
        recompute="none",
        tokens_per_microbatch=6144,
    )
    model_config = find_model_config(QWEN_2B)
    assert advice(config, model_config, usable_bytes(23))[0].startswith("--recompute auto: update")
    flags = [line.split()[0] for line in advice(config, model_config, usable_bytes(12))]
    assert flags == ["--recompute", "--tokens-per-microbatch", "--freeze-vision"]


def test_advice_shows_a_phase_that_took_too_much():
    """`auto` uses in the update what the change frees, so that more is saved elsewhere."""
    settings = dict(optimizer="adamw_exact", reference="offload", prompts_per_step=4)
    config = TrainConfig(model=QWEN_2B, eval_samples=0, **settings)
    model_config, usable = find_model_config(QWEN_2B), usable_bytes(16)
    before = make_plan(config, model_config, usable=usable)
    assert [phase for phase in before.phases if before.total(phase) > usable] == ["update"]
    [line] = advice(config, model_config, usable)
    assert line.startswith("--optimizer adamw_stochastic: update 18.")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_their_card(recipe):
    config = parse_train_config(["--config", str(recipe)])
    # CUDA reports 14.6 GiB on a T4, which is sold as one of 16 GB.
    usable = usable_bytes(14.6 if recipe.stem.endswith("16gb") else 24)
    plan = make_plan(config, find_model_config(config.model), usable=usable)
    assert plan.total("update") <= (1 - MARGIN) * usable and not plan.excess(usable)
    groups = config.max_prompt_tokens + config.num_generations * config.max_new_tokens
    assert plan.choice.tokens >= groups, "no group is split"
    assert str(plan.choice) == plan.render(usable).splitlines()[-1]


def test_a_run_shows_its_plan_and_what_was_measured_beside_it():
    policy = tiny_policy()
    memory = RunMemory(
        policy, TrainConfig(max_prompt_tokens=64, max_new_tokens=8, prompts_per_step=2)
    )
    assert "measured" not in memory.render() and memory.render().startswith("MiB ")
    for peak in (0.25, 0.5, 0.125):
        memory.record({"peak_gib_update": peak, "loss": 1.0})
    *_, measured, chosen = memory.render().splitlines()
    assert chosen == "recomputed: 0 of 3 text layers, 0 of 2 vision blocks; packs of 4,096 tokens"
    assert measured.split() == ["measured", "–", "–", "512.00", "–"]


def test_the_kv_cache_takes_what_is_left_and_no_more_than_is_of_use():
    settings = dict(tokens_per_microbatch=4096, recompute="all", prompts_per_step=32)
    config = TrainConfig(model=QWEN_2B, device="cuda", **settings)
    model_config = find_model_config(QWEN_2B)
    whole = make_plan(config, model_config)
    rows = whole.cache_tokens
    assert (
        rows["rollout"] == 1 + 32 * 1024 + 256 * 512
        and rows["evaluation"] == 1 + 64 * 1024 + 64 * 512
    )
    usable = whole.total("rollout") - whole.phases["rollout"]["KV cache"] / 2
    tight = make_plan(config, model_config, usable=usable)
    assert usable - 2**27 < tight.total("rollout") <= usable
    assert tight.cache_tokens["rollout"] < 0.6 * rows["rollout"]
    assert tight.cache_tokens["evaluation"] <= rows["evaluation"]
    least = make_plan(config, model_config, usable=0.0)
    assert least.cache_tokens["rollout"] == 1 + 1024 + 8 * 512 and least.excess(0.0) > 0


def test_a_pass_before_the_update_is_planned_where_there_is_one():
    settings = dict(model=QWEN_2B, device="cuda", algo="grpo", beta=0.0)
    for change, phases in (
        ({}, False),
        ({"updates_per_batch": 2}, False),
        ({"importance_cap": 2.0}, True),
    ):
        plan = make_plan(TrainConfig(**settings, **change), find_model_config(QWEN_2B))
        assert ("reference" in plan.phases) == phases


def test_after_memory_ran_out_there_is_advice_even_where_the_plan_fits():
    memory = RunMemory(
        tiny_policy(), TrainConfig(max_prompt_tokens=64, max_new_tokens=8, prompts_per_step=2)
    )
    said = memory.advise()
    assert (
        said.startswith("To make room: lower --tokens-per-microbatch")
        and said.endswith(".")
        and "\n" not in said
    )


def test_a_model_that_cannot_be_planned_is_trained_all_the_same(monkeypatch):
    def fail(*_):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr("mr1_fast.plan.plan.planned_run", fail)
    memory = RunMemory(tiny_policy(), TrainConfig())
    memory.record({"peak_gib_update": 1.0})
    problem, chosen = memory.render().splitlines()
    assert problem == "no memory plan could be made (NotImplementedError: no meta kernel)"
    assert chosen == "recomputed: 0 of 3 text layers, 0 of 2 vision blocks; packs of 4,096 tokens"
    assert memory.amounts()["tokens_per_microbatch"] == 4096
    assert (
        memory.advise()
        == "To make room: lower --tokens-per-microbatch, --prompts-per-step or --max-pixels."
    )


def test_command(capsys):
    print_plan(parse(["--model", "tiny", "--vram", "1.2", "--eval-samples", "0"]))
    printed = capsys.readouterr().out
    assert "too much" in printed and "to make it fit:" in printed
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_a_cpu_has_no_limit(capsys):
    print_plan(parse(["--model", "tiny", "--vram", "0.1", "--device", "cpu"]))
    printed = capsys.readouterr().out
    assert "on cpu in float32" in printed and "usable" not in printed and "fit" not in printed


def test_bad_input():
    with pytest.raises(
        UserError, match=r"model no/such-name has no configuration.*pass a local folder"
    ):
        find_model_config("no/such-name")
    with pytest.raises(UserError, match="vram is -1"):
        PlanConfig(vram=-1).check()
