"""What MLflow's client finds in the database of the run folder, and a server that never answers."""

import json

import pytest

from mr1_fast.loggers import background

from ..data.logged import HOSTILE, log_steps, metrics_of
from ..data.servers import silent_server

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")


def test_metrics_parameters_and_tables_of_a_resumed_run(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    log_steps(folder, "mlflow", 0, 3, seed=7)
    log_steps(folder, "mlflow", 2, 4, seed=7)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mr1_fast").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["seed"] == "7" and "resume" not in run.data.params
    for name, allowed in zip(metrics_of(0), ("loss", "home/me/_/mine.py:brief"), strict=True):
        found = client.get_metric_history(run.info.run_id, allowed)
        logged = sorted((item.step, item.value) for item in found)
        assert logged == [(step, metrics_of(step)[name]) for step in range(4)]

    files = folder / "mlartifacts" / run.info.run_id / "artifacts"
    tables = sorted((files / "samples").glob("*.json"))
    assert [path.stem for path in tables] == [f"step-{step:06d}" for step in range(4)]
    table = json.loads(tables[3].read_text(encoding="utf-8"))
    row = dict(zip(table["columns"], table["data"][1], strict=True))
    assert row["completion"] == HOSTILE and row["reward"] == 0
    assert (files / row["image"]["filepath"]).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing beside the run folder


def test_a_server_that_never_answers_holds_nothing_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with silent_server() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        log_steps(tmp_path / "run", "mlflow", 0, 4)
    assert "logger mlflow did not end in time" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
