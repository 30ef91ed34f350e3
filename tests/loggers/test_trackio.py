"""What trackio records, read from its database."""

import json
import sqlite3

import pytest

from mr1_fast.loggers.logger import installed

from ..data.logged import log_steps, metrics_of

# No importorskip: trackio reads TRACKIO_DIR when it is imported.
pytestmark = pytest.mark.skipif(not installed("trackio"), reason="needs trackio")


def test_rows_and_pictures_of_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", "set, so that it is taken back after this test")
    monkeypatch.delenv("TRACKIO_DIR")
    folder = tmp_path / "run"
    log_steps(folder, "trackio", 0, 3)
    log_steps(folder, "trackio", 2, 4)
    with sqlite3.connect(folder / "trackio" / "mr1_fast.db") as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    logged: dict[int, dict] = {}
    for step, text in rows:
        found = json.loads(text)
        assert not found.keys() & logged.get(step, {}).keys()  # nothing is there twice
        logged.setdefault(step, {}).update(found)
    assert logged.keys() == {0, 1, 2, 3}
    for step, found in logged.items():
        assert metrics_of(step).items() <= found.items()
        first = found["samples"]["_value"][1]
        assert first["completion"].startswith("&lt;script&gt;")
        assert (folder / "trackio" / "media" / first["image"]["file_path"]).is_file()
