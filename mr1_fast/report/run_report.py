"""The page about a training run, from what the run has recorded so far."""

import time
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from ..settings_file import Unusable, read_yaml_file
from .completions import LIVE_BYTES, PAGE, RECORDS, write_completions
from .page import html_page, section, settings_table, text
from .records import (
    PROCESSES,
    read_evaluation,
    read_evaluations,
    read_json_object,
    read_last_step,
    read_metrics,
)
from .sections import (
    about,
    accuracy_section,
    headline,
    last_step_section,
    plots_section,
    samples_section,
    speed_tiles,
    timing_section,
)

REFRESH = 60
"""Seconds after which a browser loads the page of a run that goes on again."""
WAY_OUT = "check the folder and its disk"


def write_report(run: Path, live: bool = False) -> Path:
    """Write `run`/report.html and completions.html from the run's files; returns the former's path.

    The files are config.yaml, processes.json, metrics.jsonl, completions.jsonl, evaluation.json and
    evaluations.jsonl. Only the first must exist, so a run can be looked at while it goes on. A
    `live` page says what time is left and renews itself; its completions.html is written only while
    that is cheap. Raises UserError for a folder that holds no run, for a damaged file, and where a
    page cannot be written.
    """
    config = read_config(run)
    completions = run / RECORDS
    sampled = completions.exists()
    renews_completions = sampled and not (live and completions.stat().st_size > LIVE_BYTES)
    page = _page(run, config, live, linked=renews_completions or (run / PAGE).exists())
    write_text(run / "report.html", page, WAY_OUT)
    if renews_completions:
        write_completions(run, config)
    return run / "report.html"


def _page(run: Path, config: dict, live: bool, linked: bool) -> str:
    columns = read_metrics(run / "metrics.jsonl")
    evaluations = read_evaluations(run / "evaluations.jsonl")
    evaluation = read_evaluation(run / "evaluation.json")
    link = f'<a href="{PAGE}">Search and filter completions</a>' if linked else ""

    steps, total = len(columns["step"]), text(config.get("steps", "?"))
    sections = (
        speed_tiles(columns, evaluations, config, live),
        accuracy_section(evaluation),
        plots_section(columns, evaluations, config),
        last_step_section(read_last_step(run / RECORDS), link),
        timing_section(columns),
        samples_section(evaluation.get("examples") or [], run),
        section("Configuration", settings_table(config)),
    )
    progress = f"{steps} of {total} training steps recorded"
    if (run / PROCESSES).exists():
        spread = read_json_object(run / PROCESSES)
        kind = text(spread.get("sharding"))
        progress += f" · {text(spread.get('processes'))} processes, sharding {kind}"
    if live:
        progress += f" · written {time.strftime('%Y-%m-%d %H:%M:%S')}; renewed every minute"
    return html_page(
        model=text(config.get("model")),
        about=about(config),
        headline=headline(evaluation) or (f"Step {steps} of {total}" if steps else "No steps yet"),
        progress=progress,
        sections="\n".join(filter(None, sections)),
        refresh=REFRESH if live else 0,
    )


def read_config(run: Path) -> dict:
    """The settings of the run in a folder; UserError where there are none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a run.")
    try:
        config = read_yaml_file(path)
    except Unusable as error:
        raise UserError(f"{path} {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: name the folder of a run.")
    return config
