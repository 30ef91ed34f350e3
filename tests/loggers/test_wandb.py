"""What Weights & Biases records offline, read from its own file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ..data.logged import HOSTILE, log_steps, metrics_of
from ..data.servers import silent_server

wandb = pytest.importorskip("wandb")


def whole_records(path):
    """The records of a .wandb file, which is a log of LevelDB's format: blocks of 32 KiB that hold
    pieces with a checksum of 4 bytes, a length of 2, and a type (1 whole, 2 first, 3, 4 last)."""
    data, position, record = path.read_bytes(), 7, b""  # 7 bytes name the format
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def read_back(folder):
    """What the files of a run hold: history, run ids, settings, and files of tables by name."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, ids, config, tables = [], set(), {}, []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in map(Record.FromString, whole_records(path)):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: item.value_json for item in record.run.config.update}
            elif record.HasField("history"):
                items = record.history.item
                history.append({"".join(i.nested_key): json.loads(i.value_json) for i in items})
            elif record.HasField("artifact"):
                files = record.artifact.manifest.contents
                tables.append({each.path: Path(each.local_path) for each in files})
    return history, ids, config, tables


def test_history_tables_and_settings_of_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder = tmp_path / "run"
    log_steps(folder, "wandb", 0, 3, seed=7)
    log_steps(folder, "wandb", 2, 4, seed=7)
    wandb.teardown()  # its service writes on for a moment
    history, ids, config, tables = read_back(folder)
    # Step 2 was done twice, and is there once.
    assert [row["_step"] for row in history] == [0, 1, 2, 3]
    for row in history:
        assert metrics_of(row["_step"]).items() <= row.items()
    assert len(ids) == 1 and config["seed"] == "7" and "resume" not in config

    assert len(tables) == 4
    table = json.loads(tables[0]["samples.table.json"].read_text(encoding="utf-8"))
    column = table["columns"].index("completion")
    assert [row[column] for row in table["data"]][1] == HOSTILE
    pictures = {row[0]["path"] for row in table["data"]}
    assert len(pictures) == 2  # one for each prompt
    assert all(Image.open(tables[0][path]).size == (84, 84) for path in pictures)


UNREACHABLE = """
import sys
from pathlib import Path

from mr1_fast.loggers import background, wandb
from tests.data.logged import log_steps

wandb.INIT_SECONDS = wandb.FINISH_SECONDS = 1.0
background.CLOSE_SECONDS = 1.0
log_steps(Path(sys.argv[1]), "wandb", 0, 4)
"""


@pytest.mark.slow  # W&B waits for the server, and not by a setting of ours alone
def test_a_process_ends_though_the_server_never_answers(tmp_path):
    with silent_server() as address:
        done = subprocess.run(
            [sys.executable, "-c", UNREACHABLE, str(tmp_path / "run")],
            env=os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    assert b"logger wandb" in done.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 4
