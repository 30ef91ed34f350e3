"""Cells of an experiment that processes share: the files of one process, and its failures."""

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest

from mr1_fast.errors import UserError
from mr1_fast.experiment.__main__ import main
from mr1_fast.experiment.command import make_experiment
from mr1_fast.experiment.scales import SCALES
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.experiment.studies import GRPO_D, SFT_SOLUTION, STUDIES, Study, Variant
from mr1_fast.experiment.workers import at_a_time
from mr1_fast.report import plots
from tests.data.cells import lasting_files
from tests.data.gang import gang

FAULT = """
from pathlib import Path

from mr1_fast.rewards import reward


@reward("fragile")
def fragile(completion, example):
    with Path(__file__).with_name("attempts").open("a") as attempts:
        attempts.write("once ")
    raise RuntimeError("the reward broke")
"""


def test_a_cell_needs_no_more_prompts_than_one_process(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    cells = make_experiment(ExperimentConfig(preset="tiny")).cells()
    assert cells  # each of whose settings has been checked


def test_under_torchrun_no_further_processes_are_asked_for(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="processes is 3, but torchrun has started 2, which share"):
        make_experiment(ExperimentConfig(processes=3))
    assert at_a_time(make_experiment(ExperimentConfig())) == 1


def run_experiment(world, output, model, plugin):
    """What a process prints of an experiment of a few short cells, one of which fails."""
    fragile = {"plugin": str(plugin), "extra_rewards": {"fragile": 0.1}}
    variants = (Variant("fragile", "fragile", fragile), GRPO_D, SFT_SOLUTION)
    shared = dict(steps=2, prompts_per_step=2, num_generations=3, max_new_tokens=6, device="cpu")
    SCALES["quick"] = replace(
        SCALES["tiny"],
        model=str(model),
        settings={**SCALES["tiny"].settings, **shared},
        seeds=(0,),
        curve_every=2,
        curve_items=3,
    )
    STUDIES["method"] = Study("method", "Method", variants, trained=("counting",))
    plots.plot_element = lambda *_: ""
    said, failed = StringIO(), ""
    with redirect_stdout(said):
        try:
            main(["--preset", "quick", "--output", str(output), "--test-items", "5"])
        except UserError as error:
            failed = str(error)
    return said.getvalue(), failed


@pytest.mark.slow
def test_cells_are_shared_and_leave_the_files_of_one_process(tiny_folder, tmp_path):
    plugin = tmp_path / "fault.py"
    plugin.write_text(FAULT)
    seen = {}
    for size in (1, 2):
        output = tmp_path / f"of-{size}"
        (said, failed), *others = gang(size, run_experiment, output, tiny_folder, plugin)
        assert others == [("", "")] * (size - 1)
        assert (tmp_path / "attempts").read_text() == "once " * len(seen | {size: ""})
        assert failed.startswith("1 cell failed (fragile · counting · seed 0: The reward 'fragile'")
        lines = said.splitlines()
        assert sorted(line[:5] for line in lines[:4]) == [f"[{n}/4]" for n in (1, 2, 3, 4)]
        assert lines[4].startswith("report ")
        cells = [json.loads(path.read_text()) for path in sorted(output.rglob("cell.json"))]
        seen[size] = lasting_files(output), [(cell["variant"], cell["correct"]) for cell in cells]
    assert seen[1] == seen[2] and len(seen[1][1]) == 3
