"""The benchmark of several processes: its efficiencies, and the bytes that it counts."""

import os
import socket

import pytest
from bench_distributed import STAGES, Case, print_rows, rows_of, sent_bytes


def test_efficiency_is_the_time_of_one_process_by_that_of_all_together(capsys):
    alone = {"seconds": 10.0, "cpu_seconds": 9.0, "sent": 0, **dict.fromkeys(STAGES, 2.0)}
    two = {"seconds": 6.25, "cpu_seconds": 10.0, "sent": 2**21, **dict.fromkeys(STAGES, 1.0)}
    slow = {**two, "seconds": 60.0}
    cases = [Case(1, "none"), Case(2, "full")]
    steps = {cases[0]: [alone] * 3, cases[1]: [two, slow, two]}
    rows = rows_of(steps, {cases[0]: 0, cases[1]: None})
    assert [row["efficiency"]["seconds"] for row in rows] == pytest.approx([1.0, 0.8])
    assert rows[1]["efficiency"]["update"] == pytest.approx(1.0)
    assert rows[1]["efficiency"]["cpu_seconds"] == pytest.approx(0.9)
    print_rows("A step", rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| 2 | full | 6.25 (80%) | 1.00 (100%) |")
    assert last.endswith("| 10.00 (90%) | 2.0 | – |")


def test_bytes_are_those_that_this_process_has_sent():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as mine,
        server.accept()[0] as other,
    ):
        before = sent_bytes()
        mine.sendall(b"x" * 3000)
        assert len(other.recv(3000, socket.MSG_WAITALL)) == 3000
        opened = len(os.listdir("/proc/self/fd"))
        assert sent_bytes() - before == 3000
        assert len(os.listdir("/proc/self/fd")) == opened
