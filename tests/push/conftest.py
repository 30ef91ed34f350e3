"""A finished run that no training made, and a Hub on this machine that is the one to be asked."""

import json

import pytest
from huggingface_hub import constants

from mr1_fast.config import TrainConfig
from mr1_fast.resuming import write_config

from ..data.hub_server import TOKEN, hub_server


def made_run(folder, **settings):
    """Write the folder of a finished run of three steps; returns the run's settings."""
    final = folder / "final"
    (final / "adapter").mkdir(parents=True)
    (final / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (final / "preprocessor_config.json").write_text("{}")
    (final / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    (final / "adapter" / "adapter_config.json").write_text("{}")
    (final / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter" * 999)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights.safetensors").write_bytes(b"checkpoint")
    (folder / "completions.jsonl").write_text('{"text": "a completion"}\n')
    lines = [{"step": s, "reward": 0.1 * s, "beta": 0.07 - 0.01 * s, "loss": 1.0} for s in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    share = {"accuracy": 0.25, "interval": [0.1, 0.5], "correct": 5, "count": 20}
    better = {"accuracy": 0.75, "interval": [0.5, 0.9], "correct": 15, "count": 20}
    evaluation = {"task": "counting", "split": "test", "judge": "strict", "examples": []}
    evaluation |= {"before": {"greedy": share}, "after": {"greedy": better}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    config = TrainConfig(**{"steps": 3, "output": str(folder), **settings})
    write_config(config, folder / "config.yaml")
    return config


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process and those that it starts ask, logged in."""
    with hub_server() as server:
        environment = {
            "HF_ENDPOINT": server.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        yield server
