"""Whole runs of TRL's GRPOTrainer with our loss: in two processes under DDP, and resumed."""

import copy
import os

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Qwen2ForCausalLM
from trl import GRPOTrainer

from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.tiny import family_processor, tiny_processor

from ..data.models import family_model, small_text_model
from ..data.trl import make_trainer


def logged(trainer) -> list[dict]:
    """What the trainer logged, without times."""
    entries = trainer.state.log_history
    return [
        {k: v for k, v in entry.items() if "time" not in k and "per_second" not in k}
        for entry in entries
    ]


def steps(entries: list[dict]) -> list[dict]:
    """Those of training steps."""
    return [entry for entry in entries if "grad_norm" in entry]


def assert_same_logs(
    ours: list[dict], theirs: list[dict], rel: float = 1e-3, abs: float = 1e-5
) -> None:
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.keys() == right.keys()
        for name in mine:
            assert mine[name] == pytest.approx(right[name], rel=rel, abs=abs, nan_ok=True), name


RUNS = {
    "lora": {"peft": ["q_proj", "v_proj"], "beta": 0.1},
    "lora, trained head": {
        "peft": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "tie_word_embeddings": False,
    },
    "checkpointing, evaluation": {
        "gradient_checkpointing": True,
        "beta": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "autocast": {"bf16": True, "beta": 0.1},
    "fp32 head of a bf16 model": {"cast_lm_head_to_fp32": True, "dtype": torch.bfloat16},
    "untied head, per sequence": {
        "tie_word_embeddings": False,
        "importance_sampling_level": "sequence",
    },
    "compiled": {
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "beta": 0.1,
        "max_steps": 2,  # one more batch would be compiled for its lengths once more
    },
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "compiled")) for c in RUNS]
)
def test_steps_of_training_are_trls(case, tmp_path):
    """Same rollouts, rewards, losses, metrics, weights; every second step is off policy."""
    settings = dict(RUNS[case])
    processor = tiny_processor()
    dtype, tied = settings.pop("dtype", torch.float32), settings.pop("tie_word_embeddings", True)
    small_text_model(len(processor.tokenizer), tie_word_embeddings=tied).to(dtype).save_pretrained(
        tmp_path
    )
    targets, saved, runs = settings.pop("peft", None), settings.pop("modules_to_save", None), []
    for cls in (FusedGRPOTrainer, GRPOTrainer):
        torch._dynamo.reset()
        model = str(tmp_path)
        if targets or dtype != torch.float32:
            model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        if targets:
            torch.manual_seed(0)
            model = get_peft_model(
                model, LoraConfig(r=4, target_modules=targets, modules_to_save=saved)
            )
        options = {
            "gradient_checkpointing": False,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "num_iterations": 2,
        }
        trainer = make_trainer(
            cls, model, processor.tokenizer, tmp_path / "runs", **options | settings
        )
        assert getattr(trainer, "fused", True), trainer._why_not_fused()
        trainer.train()
        runs.append(
            (
                logged(trainer),
                {n: p for n, p in trainer.model.named_parameters() if p.requires_grad},
            )
        )
    (ours, weights), (theirs, right_weights) = runs
    _, second, *_ = entries = steps(theirs)
    assert abs(second["loss"]) > 1e-3 and entries[-1]["grad_norm"] > 1e-3
    exact = dtype == torch.float32 and not settings.get("bf16")
    assert_same_logs(ours, theirs, **{} if exact else {"rel": 0.03, "abs": 0.03})
    for name, right in right_weights.items():
        assert torch.allclose(weights[name], right, rtol=0.02, atol=5e-3), name


def test_steps_of_training_with_images_are_trls(tmp_path):
    """Qwen3-VL, whose deepstack features come from TRL's own call of the model."""
    processor = family_processor(FAMILIES["qwen3_vl"])
    start, runs = family_model(processor, "qwen3_vl"), []
    start.save_pretrained(tmp_path)
    start = start.state_dict()
    images = [[Image.effect_noise((64 + 32 * i, 64), 80).convert("RGB")] for i in range(8)]
    options = {"max_steps": 2, "num_iterations": 2, "learning_rate": 1e-3, "beta": 0.1}
    for cls in (FusedGRPOTrainer, GRPOTrainer):
        trainer = make_trainer(cls, str(tmp_path), processor, tmp_path / "runs", images, **options)
        assert getattr(trainer, "fused", True), trainer._why_not_fused()
        trainer.train()
        runs.append((logged(trainer), dict(trainer.model.named_parameters())))
    (ours, weights), (theirs, right_weights) = runs
    assert_same_logs(ours, theirs)
    for name, right in right_weights.items():
        assert not torch.equal(right, start[name]), name
        assert torch.allclose(weights[name], right, rtol=0.02, atol=5e-3), name


@pytest.mark.parametrize("cls", [GRPOTrainer, FusedGRPOTrainer])
@pytest.mark.parametrize("lora", [False, True])
def test_the_schedule_reaches_a_trainer_that_began_at_beta_0(cls, lora, tmp_path):
    processor = tiny_processor()
    model = small_text_model(len(processor.tokenizer))
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "own"
        )
    start = copy.deepcopy(model)
    options = {
        "max_steps": 10,
        "learning_rate": 1e-2,
        "steps_per_generation": 2,
        "num_iterations": 2,
    }
    trainer = make_trainer(cls, model, processor.tokenizer, tmp_path, **options)
    assert trainer.beta == 0 and trainer.ref_model is None
    trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.0, beta_max=0.02))
    trainer.train()
    entries = steps(logged(trainer))
    betas = [
        0.01,
        0.01 * 2 / 3,
        0.01 / 3,
        0.0,
        *(0.02 * k / 7 for k in range(1, 7)),
    ]  # w = 3 of t = 10 steps
    assert [entry["beta"] for entry in entries] == pytest.approx(betas, abs=1e-12)
    assert all("kl" in entry for entry in entries) and entries[-1]["kl"] > 1e-3

    # The reference is the model as it was.
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if lora:
            trainer.model.set_adapter("ref")
        reference = trainer.model if lora else trainer.ref_model
        arguments = (ids, torch.ones_like(ids), 4)
        logp, *_ = trainer._get_per_token_logps_and_entropies(reference, *arguments)
        expected = (
            start(input_ids=ids)
            .logits[:, -5:-1]
            .log_softmax(-1)
            .gather(-1, ids[:, -4:, None])[..., 0]
        )
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)


def process(rank: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ |= {
        "MASTER_ADDR": "unused",
        "MASTER_PORT": "0",
    }  # accelerate wants them; the file below is what meets
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    runs = []
    for cls in (FusedGRPOTrainer, GRPOTrainer):
        model = Qwen2ForCausalLM.from_pretrained(folder)
        options = {
            "max_steps": 3,
            "learning_rate": 1e-3,
            "num_iterations": 2,
            "gradient_checkpointing": False,
        }
        trainer = make_trainer(cls, model, tiny_processor().tokenizer, f"{folder}/runs", **options)
        trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.04, beta_max=0.1))
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert getattr(trainer, "fused", True)
        runs.append(steps(logged(trainer)))
    torch.save(runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_trl_does(tmp_path):
    small_text_model(len(tiny_processor().tokenizer)).save_pretrained(tmp_path)
    torch.multiprocessing.spawn(process, (str(tmp_path),), 2)
    ours, theirs = torch.load(tmp_path / "0.pt")
    assert len(theirs) == 3 and theirs[-1]["grad_norm"] > 1e-3
    assert_same_logs(ours, theirs)


def test_a_resumed_run_goes_on_with_its_beta(tmp_path):
    processor = tiny_processor()
    runs = []
    for resumed in (False, True):
        model = small_text_model(len(processor.tokenizer))
        options = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(FusedGRPOTrainer, model, processor.tokenizer, tmp_path, **options)
        trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.0, beta_max=0.1))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        runs.append(steps(logged(trainer)))
    assert [entry["beta"] for entry in runs[1]] == pytest.approx([0.05, 1 / 120, 1 / 35, 9 / 140])
    assert_same_logs(runs[1], runs[0])
