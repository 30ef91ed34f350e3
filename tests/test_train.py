"""Whole runs of an untrained tiny model, each a second or two, and the default run (slow)."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import datasets
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from mr1_fast.checkpoint import fingerprint, load_checkpoint
from mr1_fast.command_line import parse_train_config
from mr1_fast.distributed.sharding import Sharding
from mr1_fast.errors import UserError
from mr1_fast.kl_schedule import DynamicKL, TargetKL
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import load_pretrained
from mr1_fast.model.processor import ImageTextProcessor
from mr1_fast.optim import make_optimizer
from mr1_fast.plan import run_memory
from mr1_fast.plan.choice import MARGIN
from mr1_fast.plan.plan import make_plan
from mr1_fast.sft import solution_batches
from mr1_fast.start import load_policy, supervised_start
from mr1_fast.tasks import format_problem
from mr1_fast.tasks.data import load_examples
from mr1_fast.train import train

from .data.models import tiny_policy
from .data.runs import run

KEYS = {
    "reward",
    "reward_min",
    "reward_max",
    "accuracy",
    "format",
    "letters",
    "zero_variance",
    "completion_length",
    "finished",
    "beta",
    "loss",
}
KEYS |= {
    "entropy",
    "kl",
    "clip_fraction",
    "kl_limited",
    "kl_pull",
    "reward_pull",
    "grad_norm",
    "learning_rate",
    "skipped",
    "step",
}
KEYS |= {"rollout_gap_mean", "rollout_gap_max"}
KEYS |= {"completion_length_p10", "completion_length_p50", "completion_length_p90"}
KEYS |= {"seconds_data", "seconds_rollout", "seconds_reward", "seconds_reference", "seconds_update"}
KEYS |= {"tflops_reference", "tflops_update"}
SFT_KEYS = {"step", "loss", "entropy", "grad_norm", "learning_rate", "skipped", "seconds_update"}
SFT_KEYS |= {"seconds_data"}
SFT_KEYS |= {"tflops_update"}
if torch.cuda.is_available():
    KEYS |= {"peak_gib_rollout", "peak_gib_reward", "peak_gib_reference", "peak_gib_update"}
    SFT_KEYS |= {"peak_gib_update"}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(folder):
    """What a run measured, but for times, memory and speed."""
    measured = ("seconds", "peak", "tflops", "mfu")
    return [
        {k: v for k, v in record.items() if not k.startswith(measured)}
        for record in lines(folder / "metrics.jsonl")
    ]


def column(folder, name):
    return [record[name] for record in metrics(folder)]


def trained_policy(argv, folder):
    """The policy at the end of a run, from its last checkpoint."""
    config = parse_train_config(argv)
    policy = load_policy(config)
    optimizer = make_optimizer(policy.model, config)
    assert (
        load_checkpoint(
            folder / "checkpoints", Sharding(policy.model), optimizer, fingerprint(policy.model)
        )
        == config.steps
    )
    return policy


@torch.no_grad()
def logits(model, processor):
    """Logits of a prompt with an image, by transformers' own forward."""
    example = load_examples("counting", "drawn", "test", 0).all(1)[0]
    content = [{"type": "image"}, {"type": "text", "text": format_problem(example)}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=list(example.images), return_tensors="pt")
    return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def finished(run_args, tmp_path_factory):
    """Arguments and folder of a finished GRPO-D run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = run_args(folder, updates_per_batch=2, save_every=2, eval_samples=14)
    run(argv, figures=True)
    return argv, folder


def test_a_run_leaves_a_complete_folder(finished):
    argv, folder = finished
    names = {
        "config.yaml",
        "metrics.jsonl",
        "completions.jsonl",
        "evaluation.json",
        "images",
        "checkpoints",
        "final",
        "finished.json",
    }
    pages = {"report.html", "completions.html"}
    assert {path.name for path in folder.iterdir()} == names | pages
    assert parse_train_config(["--config", str(folder / "config.yaml")]) == parse_train_config(argv)
    assert [record["step"] for record in lines(folder / "metrics.jsonl")] == [0, 1, 2]
    for record in lines(folder / "metrics.jsonl"):
        assert record.keys() == KEYS and all(math.isfinite(value) for value in record.values())
        lengths = [record[f"completion_length_p{share}"] for share in (10, 50, 90)]
        assert 1 <= lengths[0] <= lengths[1] <= lengths[2] <= 6
        assert record["skipped"] == 0 and all(
            record[key] > 0 for key in KEYS if key.startswith(("seconds", "tflops"))
        )
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-000002",
        "step-000003",
    }
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "<html" in report and report.count('<svg role="img"') >= 8
    card = (folder / "final" / "README.md").read_text(encoding="utf-8")
    assert "Trained for 3 of 3 steps." in card and str(folder.parent) not in card


def test_every_completion_is_recorded_with_its_rewards(finished):
    _, folder = finished
    records = lines(folder / "completions.jsonl")
    assert [record["step"] for record in records] == [0, 0, 1, 1, 2, 2]
    expected = load_examples("counting", "drawn", "train", 0).all(6)
    assert [(r["key"], r["problem"], r["solution"]) for r in records] == [
        (e.key, e.problem, e.solution) for e in expected
    ]
    for record in records:
        assert len(record["completions"]) == 3
        for sample in record["completions"]:
            letters = sum(map(str.isalpha, sample["text"])) / (1 + len(sample["text"]))
            assert sample["letters"] == pytest.approx(letters) and sample["reason"] in (
                "eos",
                "length",
            )
            total = sample["accuracy"] + sample["format"] + sample["letters"]
            assert sample["reward"] == pytest.approx(total)
    for step, mean in enumerate(column(folder, "reward")):
        rewards = [s["reward"] for r in records if r["step"] == step for s in r["completions"]]
        assert mean == pytest.approx(sum(rewards) / 6) and 0.1 < mean < 1


def test_both_evaluations_are_recorded(finished):
    _, folder = finished
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["task"], result["split"]) == ("counting", "test")
    for when in ("before", "after"):
        for mode in ("greedy", "sampled"):
            summary = result[when][mode]
            assert summary["count"] == 14 and summary["accuracy"] == summary["correct"] / 14
            assert 0 <= summary["interval"][0] <= summary["accuracy"] <= summary["interval"][1] <= 1
    assert len(result["examples"]) == 12
    for shown, example in zip(
        result["examples"], load_examples("counting", "drawn", "test", 0).all(12), strict=True
    ):
        assert (shown["problem"], shown["solution"]) == (example.problem, example.solution)
        assert Image.open(folder / shown["images"][0]).tobytes() == example.images[0].tobytes()
        assert isinstance(shown["before"]["text"], str) and isinstance(
            shown["after"]["correct"], bool
        )


@pytest.mark.parametrize(
    "settings, low, high",
    [
        ({}, 0.04, 0.1),
        ({"task": "geometry"}, 0.0, 0.02),
        ({"algo": "grpo"}, 0.04, 0.04),
        ({"beta_max": 0.3}, 0.04, 0.3),
    ],
)
def test_beta_of_every_step_is_that_of_the_schedule(settings, low, high, run_args, tmp_path):
    run(run_args(tmp_path / "run", eval_samples=0, **settings))
    schedule = DynamicKL(low, high, total_steps=3, explore_fraction=0.3)
    assert column(tmp_path / "run", "beta") == [schedule(0), schedule(1), schedule(2)]
    assert column(tmp_path / "run", "kl")[0] == 0 < column(tmp_path / "run", "kl")[1]


def test_float16_that_auto_has_chosen_is_for_adapters_alone(run_args, tmp_path, monkeypatch):
    monkeypatch.setattr("mr1_fast.preparing.resolve_dtype", lambda config: torch.float16)
    with pytest.raises(UserError, match=r"dtype is auto, here float16, in which .* add --lora"):
        run(run_args(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_with_two_updates_the_schedule_counts_both(finished):
    _, folder = finished
    schedule = DynamicKL(0.04, 0.1, total_steps=6, explore_fraction=0.3)
    assert column(folder, "beta") == [
        schedule(1),
        schedule(3),
        schedule(5),
    ]  # that of a step's second update
    assert min(column(folder, "kl")) > 0  # the first update has moved the policy


def test_beta_follows_the_accuracy_of_its_own_step(tiny_folder, run_args, tmp_path):
    """A model that answers 3 to everything is right wherever 3 is the solution."""
    rows = [{"problem": f"How many? {i}", "solution": str(3 + i % 2)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(task="free", data=tmp_path / "rows.jsonl", max_new_tokens=1, eval_samples=0)
    settings |= dict(model=silent_model(tiny_folder, tmp_path / "three", says="3"), beta_min=0.01)
    run(run_args(tmp_path / "run", beta_shape="accuracy", steps=4, **settings))
    accuracy, betas = column(tmp_path / "run", "accuracy"), column(tmp_path / "run", "beta")
    assert sum(accuracy) == 2 and len(set(accuracy)) > 1  # 8 prompts, once each
    expected = [0.01 + 0.09 * math.tanh(a) / math.tanh(1) for a in accuracy]
    assert betas == pytest.approx(expected)


def test_beta_follows_the_kl_of_the_optimizer_steps_before(run_args, tmp_path):
    settings = dict(eval_samples=0, steps=5, target_kl=0.002)
    run(run_args(tmp_path / "run", beta_shape="target-kl", **settings))
    expected = TargetKL(0.04, 0.1, target=0.002)
    kls, betas = column(tmp_path / "run", "kl"), column(tmp_path / "run", "beta")
    for kl, beta in zip(kls, betas, strict=True):
        assert beta == expected(0)
        expected.observe_kl(kl)
    assert len(set(betas)) == 5


def test_without_kl_there_is_no_reference(run_args, tmp_path):
    run(run_args(tmp_path / "run", eval_samples=0, beta_min=0, beta_max=0))
    assert column(tmp_path / "run", "beta") == [0, 0, 0]
    assert all(
        "kl" not in line for line in lines(tmp_path / "run" / "metrics.jsonl")
    )  # unknown, not 0
    assert min(column(tmp_path / "run", "grad_norm")) > 0


@pytest.mark.parametrize("algo", ["dr-grpo", "dapo", "gspo", "cispo"])
def test_an_algorithm_without_kl_trains(algo, run_args, tmp_path):
    settings = {"algo": algo, "updates_per_batch": 2, "entropy_coefficient": 0.01}
    run(run_args(tmp_path / "run", eval_samples=0, steps=2, **settings))
    for record in metrics(tmp_path / "run"):
        own = {"overlong", "groups_sampled", "groups_learnt"} if algo == "dapo" else set()
        expected = KEYS - {"kl", "kl_limited", "kl_pull", "reward_pull"} | own
        assert record.keys() == {k for k in expected if not k.startswith(("seconds", "tflops"))}
        assert all(map(math.isfinite, record.values()))
        assert record["beta"] == record["skipped"] == 0 < record["grad_norm"]
    if algo == "dapo":
        for line in lines(tmp_path / "run" / "completions.jsonl"):
            for sample in line["completions"]:
                parts = ("accuracy", "format", "letters", "overlong")
                assert sample["reward"] == pytest.approx(sum(sample[name] for name in parts))
                assert sample["overlong"] == (-1 if sample["reason"] == "length" else 0)


def test_the_reward_that_is_trained_rises(run_args, tmp_path):
    settings = dict(
        steps=25, prompts_per_step=4, num_generations=8, lr_schedule="constant", learning_rate=3e-3
    )
    run(
        run_args(tmp_path / "run", eval_samples=0, save_every=0, beta_min=0, beta_max=0, **settings)
    )
    reward = column(tmp_path / "run", "letters")
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.15
    assert (
        not (tmp_path / "run" / "checkpoints").exists()
        and not (tmp_path / "run" / "evaluation.json").exists()
    )


def test_sft_learns_its_solutions(run_args, tmp_path):
    settings = dict(
        algo="sft",
        num_generations=1,
        train_samples=4,
        prompts_per_step=4,
        steps=20,
        lr_schedule="constant",
    )
    run(run_args(tmp_path / "run", eval_samples=0, save_every=0, max_new_tokens=24, **settings))
    assert all(record.keys() == SFT_KEYS for record in lines(tmp_path / "run" / "metrics.jsonl"))
    losses = column(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(math.log(430), abs=0.3) and losses[-1] < losses[0] / 3
    assert not (tmp_path / "run" / "completions.jsonl").exists()


def test_train_samples_limits_what_is_seen(run_args, tmp_path):
    run(run_args(tmp_path / "run", eval_samples=0, train_samples=3))
    keys = [record["key"] for record in lines(tmp_path / "run" / "completions.jsonl")]
    expected = [example.key for example in load_examples("counting", "drawn", "train", 0).all(3)]
    assert len(keys) == 6 and sorted(keys[:3]) == sorted(keys[3:]) == sorted(expected)


@pytest.mark.parametrize(
    "settings", [{"updates_per_batch": 2, "eval_samples": 14, "save_every": 2}, {"lora": True}]
)
def test_the_same_seed_gives_the_same_numbers(settings, finished, run_args, tmp_path):
    first = finished[1]
    if "lora" in settings:  # adapters start at random values, which must come from the seed
        run(run_args(first := tmp_path / "first", **settings))
    torch.rand(7)
    run(run_args(tmp_path / "second", **settings))
    run(run_args(tmp_path / "other", seed=1, **settings))
    assert metrics(tmp_path / "second") == metrics(first)
    for name in ("completions.jsonl", "evaluation.json", "final/model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (first / name).read_bytes(), name
    for name in ("reward", "grad_norm"):
        assert not set(column(tmp_path / "other", name)) & set(column(first, name))


def test_micro_batches_do_not_change_the_update(run_args, tmp_path):
    settings = dict(steps=2, num_generations=4, updates_per_batch=2, eval_samples=0, beta_max=0.5)
    for name, tokens in (("one", 16_384), ("many", 80)):
        run(
            run_args(
                tmp_path / name, tokens_per_microbatch=tokens, max_prompt_tokens=74, **settings
            )
        )
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    for left, right in zip(one, many, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert one[0][name] == pytest.approx(many[0][name], rel=1e-5, abs=1e-7) and one[0][name]


@pytest.mark.parametrize(
    "settings", [{}, {"lora": True}, {"lora": True, "load_in_4bit": True}], ids=["", "lora", "4bit"]
)
def test_recomputation_does_not_change_the_update(settings, run_args, tmp_path):
    pytest.importorskip("bitsandbytes")
    for value in ("all", "none"):
        run(run_args(tmp_path / value, recompute=value, eval_samples=0, steps=2, **settings))
    for left, right in zip(metrics(tmp_path / "all"), metrics(tmp_path / "none"), strict=True):
        assert left == pytest.approx(right, rel=1e-6, abs=1e-9)
    assert min(column(tmp_path / "all", "grad_norm")) > 0


def test_what_is_left_to_the_plan_is_chosen_at_the_start(run_args, tmp_path, capsys):
    run(run_args(tmp_path, tokens_per_microbatch="auto", recompute="auto", eval_samples=0, steps=1))
    assert "packs of 4,096 tokens" in capsys.readouterr().out
    written = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "tokens_per_microbatch: auto\n" in written and "recompute: auto\n" in written


def test_layers_run_as_the_memory_plan_says(run_args, tmp_path, monkeypatch, capsys):
    settings = dict(recompute="auto", eval_samples=0, steps=1, tokens_per_microbatch=4096)
    config = parse_train_config(run_args(tmp_path, **settings))
    model_config = find_model_config(config.model)
    most, least = (
        make_plan(replace(config, recompute=value), model_config).total("update")
        for value in ("none", "all")
    )
    limit = (least + most) / 2 / (1 - MARGIN)
    limited = partial(make_plan, usable=limit)  # a CPU has no limit of its own
    monkeypatch.setattr(
        run_memory, "make_plan", lambda *args, usable, **named: limited(*args, **named)
    )
    seen = []
    train(config, watch=lambda policy, _: seen.append(replace(policy.layers)))
    run_again = seen[0].recompute_text, seen[0].recompute_vision
    assert seen[0] == seen[1] and (0, 0) < run_again < (3, 2)
    said = "recomputed: {} of 3 text layers, {} of 2 vision blocks; packs of 4,096 tokens"
    assert said.format(*run_again) in capsys.readouterr().out


def test_a_frozen_vision_tower_stays_as_it_is(tiny_folder, run_args, tmp_path):
    argv = run_args(tmp_path, freeze_vision=True, eval_samples=0, save_every=2, steps=2)
    run(argv)
    start, final = (
        Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (tiny_folder, tmp_path / "final")
    )
    moved = {name for name, value in final.items() if not torch.equal(value, start[name])}
    assert moved and not [name for name in moved if ".visual." in name]
    assert {name for name in start if ".visual." not in name} == moved
    trained_policy(argv, tmp_path)
    with pytest.raises(UserError, match="resume with the --model, --lora, --freeze-vision"):
        trained_policy([*argv, "--freeze-vision=false"], tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": True}, {"algo": "sft", "lora": True, "save": "both"}],
    ids=["", "lora", "sft lora"],
)
def test_the_final_model_is_the_trained_policy(settings, tiny_folder, run_args, tmp_path):
    folder, argv = tmp_path / "run", run_args(tmp_path / "run", eval_samples=0, **settings)
    run(argv)
    policy = trained_policy(argv, folder)
    final = Qwen2VLForConditionalGeneration.from_pretrained(folder / "final")
    processor = ImageTextProcessor.load(folder / "final")
    assert (folder / "final" / "adapter").is_dir() == ("save" in settings)
    torch.testing.assert_close(
        logits(final, processor), logits(policy.model, policy.processor), rtol=1e-5, atol=1e-5
    )
    assert processor.tokenizer.get_vocab() == policy.processor.tokenizer.get_vocab()

    start = Qwen2VLForConditionalGeneration.from_pretrained(tiny_folder)
    assert (logits(start, processor) - logits(final, processor)).abs().max() > 0.01
    moved = {
        name
        for name, value in final.state_dict().items()
        if not torch.equal(value, start.state_dict()[name])
    }
    if "lora" in settings:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        expected = {f"model.language_model.layers.{i}" for i in range(3)}
        assert {name.rsplit(".", 3)[0] for name in moved} == expected and len(moved) == 3 * len(
            names
        )
        assert {name.split(".")[-2] for name in moved} == set(names) and all(
            "weight" in name for name in moved
        )
    else:
        assert (
            any("visual" in name for name in moved)
            and "model.language_model.embed_tokens.weight" in moved
        )


def test_four_bit_weights_stay_as_they_are_and_adapters_learn(run_args, tmp_path):
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    folder, settings = (
        tmp_path / "run",
        dict(lora=True, load_in_4bit=True, optimizer="adamw8bit", updates_per_batch=2),
    )
    run(argv := run_args(folder, **settings))
    assert all(record.keys() == KEYS for record in lines(folder / "metrics.jsonl"))
    assert min(column(folder, "kl")) > 0
    policy = trained_policy(argv, folder)
    small = {
        name
        for name, layer in policy.model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }
    assert len(small) == 3 * 7 and not any("visual" in name or "lm_head" in name for name in small)
    adapted = peft.PeftModel.from_pretrained(
        load_pretrained(parse_train_config(argv))[0], folder / "final" / "adapter"
    )
    torch.testing.assert_close(
        logits(adapted, policy.processor), logits(policy.model, policy.processor)
    )
    saved = load_pretrained(parse_train_config([*argv, "--model", str(folder / "final")]))[0]
    torch.testing.assert_close(
        logits(saved, policy.processor), logits(policy.model, policy.processor)
    )


def test_eight_bit_states_learn(run_args, tmp_path):
    pytest.importorskip("bitsandbytes")
    run(run_args(tmp_path / "run", eval_samples=0, optimizer="adamw8bit"))
    run(run_args(tmp_path / "plain", eval_samples=0))
    assert column(tmp_path / "run", "loss")[0] == column(tmp_path / "plain", "loss")[0]
    assert column(tmp_path / "run", "kl")[1] == pytest.approx(
        column(tmp_path / "plain", "kl")[1], rel=0.3
    )


@pytest.mark.parametrize(
    "algo, sft_target", [("grpo-d", "solution"), ("sft", "solution"), ("sft", "answer")]
)
def test_training_data_from_parquet_in_the_columns_of_r1v(
    algo, sft_target, run_args, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    drawn = load_examples("geometry", "drawn", "train", 0).all(5)
    for split in ("train", "test"):
        rows = {
            "image": [item.images[0] for item in drawn],
            "problem": [f"{split} {item.problem}" for item in drawn],
            "solution": [f"<answer> {item.solution} </answer>" for item in drawn],
            "thinking": [f"<think> {item.thinking} </think>" for item in drawn],
        }
        if sft_target == "answer":
            del rows["thinking"]
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "data" / f"{split}.parquet")
    run(
        run_args(
            tmp_path / "run",
            task="geometry",
            data=str(tmp_path / "data"),
            algo=algo,
            sft_target=sft_target,
        )
    )
    shown = json.loads((tmp_path / "run" / "evaluation.json").read_text())["examples"]
    assert [item["problem"] for item in shown] == [f"test {item.problem}" for item in drawn[:4]]
    if algo == "sft":
        assert column(tmp_path / "run", "loss")[-1] < column(tmp_path / "run", "loss")[0] - 0.2
    else:
        seen = {
            (r["problem"], r["solution"]) for r in lines(tmp_path / "run" / "completions.jsonl")
        }
        assert seen == {(f"train {item.problem}", item.solution) for item in drawn}


def test_sft_imitates_reasoning_and_answer_or_the_answer_alone(processor):
    policy, example = tiny_policy(), load_examples("counting", "drawn", "train", 0).all(1)[0]
    for target, text in (("solution", f"<think>{example.thinking}</think>"), ("answer", "")):
        (batch,) = solution_batches(policy, [example], 4096, target)
        written = processor.tokenizer.decode(batch.targets)
        assert written == f"{text}<answer> {example.solution} </answer><|im_end|>"


def silent_model(folder, target, says="<|im_end|>"):
    """A copy of the tiny model whose last layer writes a token's embedding: by default it ends."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    processor = ImageTextProcessor.load(folder)
    layer, width = model.model.language_model.layers[-1], model.config.text_config.hidden_size
    with torch.no_grad():
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.v_proj.bias.fill_(1)
        layer.self_attn.o_proj.weight.fill_(1)
        layer.mlp.down_proj.weight.zero_()
        token = processor.tokenizer.convert_tokens_to_ids(says)
        model.get_input_embeddings().weight[token] = torch.ones(width)
    model.save_pretrained(target)
    processor.save_pretrained(target, "qwen2_vl")
    return target


def test_completions_that_say_nothing(tiny_folder, run_args, tmp_path):
    model = silent_model(tiny_folder, tmp_path / "silent")
    run(run_args(tmp_path / "run", model=str(model), updates_per_batch=2))
    texts = [
        s["text"] for r in lines(tmp_path / "run" / "completions.jsonl") for s in r["completions"]
    ]
    assert texts == [""] * 18
    for record in metrics(tmp_path / "run"):
        assert (record["completion_length"], record["finished"], record["zero_variance"]) == (
            1,
            1,
            1,
        )
        assert (
            record["reward"] == 0
            and record["skipped"] == 0
            and all(map(math.isfinite, record.values()))
        )


def test_completions_that_are_cut(run_args, tmp_path):
    run(run_args(tmp_path / "run", max_new_tokens=1, updates_per_batch=2))
    for record in metrics(tmp_path / "run"):
        assert (
            record["completion_length"] == record["completion_length_p90"] == 1
            and record["finished"] <= 0.2
            and record["skipped"] == 0
        )
        assert all(map(math.isfinite, record.values()))


def test_tensorboard_gets_every_number(run_args, tmp_path):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(run_args(tmp_path / "run", eval_samples=0, loggers=["tensorboard"]))
    events = event.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in KEYS - {"step"}:
        logged = [(item.step, item.value) for item in events.Scalars(name)]
        assert logged == [
            (r["step"], pytest.approx(r[name])) for r in lines(tmp_path / "run" / "metrics.jsonl")
        ]


def test_the_terminal_shows_both_accuracies_and_where_the_results_are(run_args, tmp_path, capsys):
    run(run_args(tmp_path / "run"))
    shown = capsys.readouterr().out.splitlines()
    table = shown.index(
        f"{'accuracy on held-out counting':<34}{'before':>8}{'after':>8}{'points':>8}"
    )
    assert [line.split()[0] for line in shown[table + 1 :]] == ["greedy", "sampled", "run"]
    assert str(tmp_path / "run" / "report.html") in shown[-1]


def test_the_terminal_shows_what_was_chosen_and_the_memory_plan(run_args, tmp_path, capsys):
    run(run_args(tmp_path / "run", optimizer="adamw_stochastic", reference="8bit"))
    shown = capsys.readouterr().out
    # On a CPU nothing is said of MFU between the two.
    chosen = (
        "optimizer LowMemoryAdamW · reference 8bit · packed attention sdpa\ndecoding attention: "
    )
    assert re.search(rf"{chosen}\w+ · q, k, v: one product · .*\nMiB ", shown)
    assert re.search(r"^total +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", shown, re.MULTILINE)


@pytest.mark.slow
def test_the_default_run_learns_to_count_and_its_start_is_made_once(tmp_path, monkeypatch):
    # By default there are 400 steps and 400 items.
    run(["--output", str(tmp_path / "run"), "--steps", "160", "--eval-samples", "120"])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    gain = {
        m: result["after"][m]["accuracy"] - result["before"][m]["accuracy"]
        for m in ("greedy", "sampled")
    }
    assert result["after"]["sampled"]["count"] == 120
    assert gain["sampled"] >= 0.2 and gain["greedy"] >= 0.1

    def made_again(*_):
        raise AssertionError("the start is in the cache")

    monkeypatch.setattr("mr1_fast.start._train_start", made_again)
    folder = supervised_start("tiny", [parse_train_config([])], 0)
    assert (folder / "model.safetensors").exists()
