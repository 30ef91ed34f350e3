"""The report of a run that goes on: its processes, its end, and that it never ends a run."""

import re
import sys

import pytest

from mr1_fast import train
from mr1_fast.command_line import parse_train_config
from mr1_fast.errors import Stopped
from mr1_fast.report.live import LivePage

from .test_run_report import Page, grpo_step, make_run


@pytest.fixture
def going_on(tmp_path):
    return make_run(tmp_path / "run", [grpo_step(step) for step in range(10)])


@pytest.fixture
def live(going_on):
    """A live page that renews itself at each step, and what it has said."""
    said = []
    page = LivePage(going_on, said.append, first=0, every=0)
    page.said = said
    yield page
    page._stop_writer()


def refreshes(path):
    return [
        attrs["content"] for _, attrs in Page(path).tags if attrs.get("http-equiv") == "refresh"
    ]


def test_page_is_renewed_by_one_process_at_a_time_until_the_end(live, going_on):
    live.renew()
    writer = live._writer
    live.renew()
    assert live._writer is writer  # it is still at work
    writer.wait(60)
    assert refreshes(live.path) == ["60"]
    text = Page(live.path).text
    assert "Time left" in text and "10 of 40 steps done" in text
    assert re.search(r"written \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; renewed every minute", text)

    live.renew()
    second = live._writer
    assert second is not writer and writer.returncode == 0
    live.finish()
    assert second.returncode is not None and live._writer is None  # no process is left behind
    assert refreshes(live.path) == [] and "Time left" not in Page(live.path).text
    assert not list(going_on.glob(".*")) and live.said == []


def test_second_signal_waits_for_no_page(going_on):
    with pytest.raises(Stopped), LivePage(going_on, print, first=0, every=0) as live:
        live.renew()
        raise Stopped(2, "stopped at once", at_once=True)
    assert live._writer.wait(60) and not live.path.exists()
    live._writer.stderr.close()


def test_short_run_starts_no_process(going_on):
    live = LivePage(going_on, print)
    live.renew()
    assert live._writer is None
    live.finish()
    assert refreshes(live.path) == []


def test_page_that_fails_is_said_in_one_sentence_and_tried_again(live, going_on):
    metrics = (going_on / "metrics.jsonl").read_text()
    (going_on / "metrics.jsonl").write_text('{"step": 0\n')
    for whole in (metrics, metrics):
        live.renew()
        live._writer.wait(60)
        live._collect()
        assert len(live.said) == 1
        (going_on / "metrics.jsonl").write_text(whole)
        (going_on / "report.html").mkdir(exist_ok=True)
    assert live.said[0].startswith("the report is not renewed: ")
    assert live.said[0].endswith("metrics.jsonl line 1 is no JSON object: remove it.")
    live.finish()
    assert len(live.said) == 2 and "report.html cannot be written" in live.said[1]


def test_no_process_can_be_started(live, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/none/python")
    live.renew()
    live.renew()
    assert len(live.said) == 1 and "no process can be started" in live.said[0]


def test_open_shows_the_page_in_the_browser(live, tmp_path, monkeypatch):
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" >{opened}\ntest -e "${{1#file://}}"\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    live.open()
    assert live._browser.wait(60) == 0  # the page was there
    assert opened.read_text().strip() == live.path.resolve().as_uri()
    live._collect()
    assert live._browser is None and live.said == []


def test_open_without_a_browser_says_so_and_goes_on(live, tmp_path, monkeypatch):
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    live.open()
    live._browser.wait(60)
    live._collect()
    assert live.said == [f"open: no browser was found here, so open {live.path} yourself."]


def test_report_that_cannot_be_written_does_not_end_a_run(run_args, tmp_path, capsys):
    folder = tmp_path / "run"

    def spoil(policy, steps_done):
        (folder / "report.html").mkdir(exist_ok=True)

    config = parse_train_config(run_args(folder, eval_samples=0))
    assert train.train(config, spoil) == folder
    assert (folder / "final").is_dir()
    assert capsys.readouterr().out.count("report.html cannot be written") == 1


def test_run_that_fails_leaves_a_page_that_no_longer_renews_itself(run_args, tmp_path):
    folder = tmp_path / "run"

    def fail(policy, steps_done):
        if steps_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(parse_train_config(run_args(folder, eval_samples=0)), fail)
    assert "2 of 3 training steps recorded" in Page(folder / "report.html").text
    assert refreshes(folder / "report.html") == []
    assert (folder / "completions.html").exists()
