"""Whole runs of TRL's GRPOTrainer with our loss: in two processes under DDP, and resumed."""

import os

import pytest
import torch

pytest.importorskip("trl")

from transformers import Qwen2ForCausalLM
from trl import GRPOTrainer

from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer
from mr1_fast.model.tiny import tiny_processor

from .test_integrations_trl import make, text_model

NOT_COMPARED = ("time", "runtime", "per_second")


def steps(trainer) -> list[dict]:
    """What was logged of each step, without times."""
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(NOT_COMPARED)} for entry in logged]


def assert_same_steps(ours: list[dict], theirs: list[dict]) -> None:
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.keys() == right.keys()
        for name in mine:
            assert mine[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5, nan_ok=True), name


def process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}  # accelerate wants them; the file below is what meets
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    runs = []
    for cls in (FusedGRPOTrainer, GRPOTrainer):
        model = Qwen2ForCausalLM.from_pretrained(folder)
        options = {"max_steps": 3, "learning_rate": 1e-3, "num_iterations": 2, "gradient_checkpointing": False}
        trainer = make(cls, model, tiny_processor().tokenizer, f"{folder}/runs", **options)
        trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.04, beta_max=0.1))
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert getattr(trainer, "fused", True)
        runs.append(steps(trainer))
    torch.save(runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_trl_does(tmp_path):
    text_model(len(tiny_processor().tokenizer)).save_pretrained(tmp_path)
    torch.multiprocessing.spawn(process, (str(tmp_path),), 2)
    ours, theirs = torch.load(tmp_path / "0.pt")
    assert len(theirs) == 3 and theirs[-1]["grad_norm"] > 1e-3
    assert_same_steps(ours, theirs)


def test_a_resumed_run_goes_on_with_its_beta(tmp_path):
    processor = tiny_processor()
    runs = []
    for resumed in (False, True):
        model = text_model(len(processor.tokenizer))
        options = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
        trainer = make(FusedGRPOTrainer, model, processor.tokenizer, tmp_path, **options)
        trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.0, beta_max=0.1))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        runs.append(steps(trainer))
    assert [entry["beta"] for entry in runs[1]] == pytest.approx([0.05, 1 / 120, 1 / 35, 9 / 140])
    assert_same_steps(runs[1], runs[0])
