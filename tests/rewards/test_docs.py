"""The examples of docs/rewards.md: each file is written down, found by its name, and run."""

import json
import re
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mr1_fast.command_line import parse_train_config
from mr1_fast.errors import UserError
from mr1_fast.rewards import require_rewards, score

from .conftest import row

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def written(registry, tmp_path, monkeypatch):
    """The current folder, which holds the files of the page."""
    monkeypatch.chdir(tmp_path)
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    yield tmp_path
    for name in FILES:
        sys.modules.pop(f"mr1_fast_plugin:{tmp_path / name}", None)


def test_the_commands_name_rewards_that_are_found(written):
    assert PAGE.count("```python") == len(FILES) == 3 and len(COMMANDS) == 2
    for command in COMMANDS:
        flags = shlex.split(command.replace("\\\n", " ").partition("mr1_fast.train")[2])
        config = parse_train_config(flags)
        assert config.extra_rewards
        require_rewards(config.extra_rewards)


def test_long_completions_are_penalised(written):
    lengths = [0, 1000, 1500, 2000, 9000]
    texts = ["x" * length for length in lengths]
    scores = score(texts, [row(1)], {"rewards.py:brief": 0.5})
    assert scores.total.tolist() == [[0.0, 0.0, -0.25, -0.5, -0.5]]

    ids = [[1] * length for length in (0, 384, 416, 512, 513)]
    scores = score(texts, [row(1)], {"overlong.py:overlong": 1.0}, completion_ids=ids)
    assert scores.total.tolist() == [[0.0, 0.0, -0.25, -1.0, -1.0]]


class Judge(BaseHTTPRequestHandler):
    """Counts the solution in the answer, times the row; an empty answer has no score."""

    together: threading.Barrier | None = None
    """Where requests wait for each other before they are answered."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.together:
            self.together.wait(60)
        answer, failing = asked["answer"], asked["answer"] == "fail"
        number = int(asked["question"].split()[1][:-1])
        value = number * answer.count(asked["solution"]) if answer else None
        self.send_response(500 if failing else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"score": value}).encode())

    def log_message(self, *arguments):
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch):
    """A judge that listens on a free port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/judge")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_local_http_judge_is_asked_about_all_completions_at_once(written, server, monkeypatch):
    monkeypatch.setattr(Judge, "together", threading.Barrier(4))
    name = "http_judge.py:judged"
    rows = [row(1, "4"), row(2, "5", prompt=[{"role": "user", "content": "Problem 2?"}])]
    scores = score(["4 or 4", "", "it is 5", "6"], rows, {name: 1.0})
    assert scores.parts == {name: [2.0, None, 2.0, 0.0]}


def test_a_failing_http_judge_is_told_with_its_row(written, server):
    weights = {"http_judge.py:judged": 1.0}
    with pytest.raises(UserError, match=r"raised HTTPError: HTTP Error 500.* at row 2 of data"):
        score(["4", "5", "fail", "6"], [row(1), row(2)], weights)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"raised URLError: .*refused.* at row 1 of data"):
        score(["4", "5", "fail", "6"], [row(1), row(2)], weights)
