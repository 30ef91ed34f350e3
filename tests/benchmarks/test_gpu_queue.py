"""The queue of what needs a GPU: its clock, items that fail or hang, and what is kept."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from gpu_items import ITEMS, Item
from gpu_queue import GPU, Queue, start
from sources import TABLE, digest

DOCUMENT = 'print("""{"benchmark": "toy", "sources": "%s", "figure": 1}""")'
PRESENT = digest("limits", None)
"""The digest of an item whose sources are those of `limits`: they never change."""


def item(name: str, code: str, seconds: int = 2, **fields) -> Item:
    """An item that runs some Python, without the seconds that site-packages take."""
    return Item(name, ("python", "-I", "-S", "-c", code), (), seconds, **fields)


@pytest.fixture
def queue(tmp_path):
    """Return a function that makes a queue of items in a folder of its own."""

    def make(*items: Item, seconds: float = 30, **options) -> Queue:
        root = tmp_path
        table = root / "tuned.json"
        table.write_text("{}")
        folders = root / "results", root / "out"
        background = options.pop("background", ())
        gpu = GPU("toy", None)
        return Queue(items, background, seconds, gpu, *folders, root=root, table=table, **options)

    return make


def whats(queue: Queue) -> dict[str, str]:
    """What became of each item."""
    return {outcome.name: outcome.what for outcome in queue.outcomes}


def document(queue: Queue, name: str) -> dict:
    return json.loads((queue.results / f"{name}.json").read_text())


def test_what_does_not_fit_is_skipped_and_named_and_what_follows_may_fit(queue):
    q = queue(item("long", "", seconds=1000), item("short", "print(7)"))
    assert q.run()
    assert whats(q)["long"].startswith("skipped: expected 1000 s, ")
    assert whats(q)["short"].startswith("done")
    summary = (q.out / "summary.txt").read_text()
    assert "long" in summary and "skipped: expected 1000 s" in summary
    assert document(q, "short")["output"] == ["7"]


def test_the_document_that_an_item_prints_is_its_result(queue):
    q = queue(item("toy", "print('a table');" + DOCUMENT % PRESENT + ";print('a warning')"))
    assert q.run()
    assert document(q, "toy") == {"benchmark": "toy", "sources": PRESENT, "figure": 1}


def test_a_failing_item_does_not_end_the_queue_and_is_no_result(queue):
    fails = item("fails", "print('before'); raise SystemExit(3)", sources="limits")
    q = queue(fails, item("next", "print(1)"))
    assert not q.run()
    assert whats(q)["fails"].startswith("failed: exit 3") and whats(q)["next"].startswith("done")
    assert document(q, "fails")["exit"] == 3
    assert not q.has_result(fails)
    assert "before" in (q.out / "log.txt").read_text()


def test_an_item_that_hangs_is_stopped_with_all_it_has_started(queue, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import os, time\n"
        f"child = os.fork()\nif child: open({str(pid)!r}, 'w').write(str(child))\n"
        "print('begun', flush=True)\ntime.sleep(60)"
    )
    q = queue(item("hangs", code, seconds=1), item("next", "print(1)"))
    began = time.monotonic()
    assert not q.run()
    assert time.monotonic() - began < 30
    assert whats(q)["hangs"].startswith("stopped after") and whats(q)["next"].startswith("done")
    assert "begun" in (q.out / "log.txt").read_text()
    assert not alive(int(pid.read_text()))
    assert not (q.results / "hangs.json").exists()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_result_of_these_sources_is_not_measured_again_unless_it_is_named(queue):
    toy = item("toy", DOCUMENT % PRESENT, sources="limits")
    assert queue(toy).run()
    again, named = queue(toy), queue(toy, chosen=["toy"])
    assert again.run() and named.run()
    assert whats(again)["toy"] == "skipped: has a result"
    assert whats(named)["toy"].startswith("done")


@pytest.mark.parametrize("kept", ['{"benchmark": "toy"}', '{"sources": "0123"}', "not JSON"])
def test_a_result_without_this_digest_counts_as_none(queue, kept):
    q = queue(item("toy", DOCUMENT % PRESENT, sources="limits"))
    q.results.mkdir()
    (q.results / "toy.json").write_text(kept)
    assert q.run()
    assert whats(q)["toy"].startswith("done") and document(q, "toy")["figure"] == 1


def test_names_choose_and_a_missing_program_is_named(queue):
    q = queue(
        item("a", "", needs="no-such-program"), item("b", "print(1)"), item("c", ""),
        chosen=["a", "b"],
    )  # fmt: skip
    assert q.run()
    assert whats(q)["a"] == "skipped: needs no-such-program"
    assert whats(q)["c"] == "skipped: not chosen"
    assert "c " not in q.summary()


def test_what_has_ended_is_kept_if_the_queue_is_killed(queue):
    def begin(command, log, environment):
        if "second" in command[-1]:
            raise SystemExit("stopped")
        return start(command, log, environment)

    q = queue(item("first", "print(1)"), item("second", "'second'"), begin=begin)
    with pytest.raises(SystemExit):
        q.run()
    summary = json.loads((q.out / "summary.json").read_text())
    assert [each["name"] for each in summary["items"]] == ["first"]
    with tarfile.open(q.out / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"results/first.json", "tuned.json"}
    assert (q.out / "tuned.json").exists()
    assert len(list(q.out.iterdir())) <= 8  # as many files as some machines give back


def test_items_wait_for_the_background_and_it_ends_with_the_queue(queue, tmp_path):
    ready, pid = tmp_path / "ready", tmp_path / "pid"
    build = item("build", f"import time; time.sleep(0.5); open({str(ready)!r}, 'w')")
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    first = item("first", f"open({str(ready)!r})", after=("build",))
    idle = item("unused", f"open({str(tmp_path / 'unused')!r}, 'w')")
    q = queue(first, item("other", "", after=("slow",)), background=[build, idle])
    assert q.run() and ready.exists() and not (tmp_path / "unused").exists()

    q = queue(item("a", f"while not __import__('os').path.exists({str(pid)!r}): pass"),
              item("b", "", after=("slow",), seconds=8), seconds=12,
              background=[item("slow", code)])  # fmt: skip
    assert q.run()
    assert not alive(int(pid.read_text()))


def test_a_plan_names_what_would_run_and_its_seconds(queue):
    q = queue(item("a", "", seconds=10), item("b", "", seconds=100), item("c", "", seconds=15))
    lines = [line.split() for line in q.plan().splitlines()]
    assert lines[0] == ["a", "10"] and lines[2] == ["c", "15"]
    assert lines[1][:2] == ["b", "skipped:"]
    assert lines[3] == ["in", "all", "25", "of", "30", "s"]


@pytest.mark.slow
def test_every_item_runs_on_a_cpu_with_tiny_sizes(tmp_path):
    before = TABLE.read_bytes()
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_queue.py"
    ran = subprocess.run(
        [sys.executable, script, "--tiny", "3600"],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "log.txt").read_text()
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}{log[-3000:]}"
    summary = json.loads((tmp_path / "summary.json").read_text())
    what = {each["name"]: each["what"] for each in summary["items"]}
    needs_gpu = {each.name for each in ITEMS if each.tiny is None}
    assert {name for name, words in what.items() if words == "skipped: needs a GPU"} == needs_gpu
    assert all(what[name].startswith("done") for name in what.keys() - needs_gpu), what
    for each in ITEMS:
        if each.tiny is not None and each.name != "decode_step":  # which only says so on a CPU
            result = json.loads((tmp_path / "results" / f"{each.name}.json").read_text())
            assert result["sources"] == digest(each.sources, None)
    assert TABLE.read_bytes() == before
