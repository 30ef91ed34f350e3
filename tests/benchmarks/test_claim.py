"""From cells to pages: the archive, the fixed comparisons, the blocks and the figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from claim.__main__ import main
from claim.archive import (
    Archived,
    Record,
    block_means,
    collect,
    read_archive,
    write_archive,
)
from claim.blocks import blocks, screening
from claim.figures import write_figures
from claim.outcomes import findings, late, pull_ratio
from claim.pages import fill, pages
from claim.questions import PLANNED, QUESTIONS
from claim.words import points, ranges, short
from scipy import stats

from mr1_fast.errors import UserError
from mr1_fast.experiment.presets import find_preset
from mr1_fast.experiment.statistics import holm
from mr1_fast.experiment.studies import MULTIPLES, STRONG, STRONG_KL
from mr1_fast.experiment.tables import interval

from ..data.experiment import cell_folder, describe, write_cell, write_curves

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "docs" / "experiment" / "cells.json"
TRANSFER, LEVER, LONG, FEW = QUESTIONS


def experiment(folder, seeds=(0, 1), **changed):
    describe(
        folder,
        seeds=list(seeds),
        command="python -m mr1_fast.experiment --preset tiny --seeds '[0, 1]' --output /far/away",
        **changed,
    )
    for seed in seeds:
        write_cell(folder, "base", None, seed)
        for variant in ("grpo", "grpo-d"):
            write_cell(folder, variant, "counting", seed)
            write_curves(folder, variant, "counting", seed)
    return folder


def archived(question, shares, items=1000, seeds=None):
    """An archive with the cells of one question.

    `shares` gives the right answers in own and other task, from variant, task trained and seed.
    """
    found = Archived("tiny", {"counting": items, "geometry": items}, {}, {}, dates=["2026-11-28"])
    for seed in question.seeds if seeds is None else seeds:
        for variant in question.variants:
            for trained in (None,) if variant == "base" else question.trained:
                own, other = shares(variant, trained, seed)
                task = trained or "counting"
                rest = "geometry" if task == "counting" else "counting"
                right = {
                    task: {"greedy": own, "sampled": own // 2},
                    rest: {"greedy": other, "sampled": other // 2},
                }
                curve = {"step": [0, 90, 100, 300, 1000], task: [0.3, 0.4, 0.4, 0.5, own / items]}
                curve[rest] = [0.3, 0.3, 0.3, 0.3, other / items]
                record = Record(variant, trained, seed, {"train": 60.0, "evaluate": 12.0}, right)
                found.cells.append(replace(record, curve=curve) if trained else record)
    return {question.preset: found}


def scattered(variant, trained, seed):
    """Right answers that differ by variant and seed, as the cells of a real experiment do."""
    drawn = np.random.default_rng([seed, sum(map(ord, variant + (trained or "")))])
    own = {"base": 300, "sft-answer": 550, "sft-solution": 800}.get(variant, 500)
    other = 60 if variant == "sft-answer" else 330
    return int(own + drawn.normal(0, 30)), int(other + drawn.normal(0, 15))


def test_collected_cells_are_what_was_measured(tmp_path):
    folder, archive = experiment(tmp_path / "tiny"), {}
    said = collect(archive, folder)
    assert said == f"tiny: 6 of 14 cells of {folder} are finished, 6 of them new"

    found = archive["tiny"]
    assert found.commands == ["python -m mr1_fast.experiment --preset tiny --seeds '[0, 1]'"]
    assert found.items == {"counting": 200, "geometry": 200}
    place = cell_folder(folder, "grpo", "counting", 1)
    written = json.loads((place / "cell.json").read_text())["correct"]
    cell = found.by_name()["grpo", "counting", 1]
    assert cell.right == {
        task: {mode: bits.count("1") for mode, bits in modes.items()}
        for task, modes in written.items()
    }
    lines = [json.loads(line) for line in (place / "curve.jsonl").read_text().splitlines()]
    assert cell.curve["step"] == [0, 20, 40, 60, 80]
    assert cell.curve["geometry"] == pytest.approx([line["geometry"] for line in lines], rel=1e-3)

    steps = [
        json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert cell.every == 4 and len(cell.metrics["kl"]) == 25
    expected = np.mean([step["kl"] for step in steps[8:12]])
    assert cell.metrics["kl"][2] == pytest.approx(expected, rel=1e-2)
    assert "entropy" not in cell.metrics and "loss" not in cell.metrics


def test_an_archive_is_read_back_and_written_alike(tmp_path):
    archive = {}
    collect(archive, experiment(tmp_path / "tiny"))
    path = tmp_path / "cells.json"
    write_archive(path, archive)
    source = path.read_text()
    again = read_archive(path)
    archive["tiny"].cells.sort(key=lambda cell: (cell.trained or "", cell.variant, cell.seed))
    assert again == archive
    write_archive(path, again)
    assert path.read_text() == source
    assert sum('"seed":' in line for line in source.splitlines()) == 6  # a cell a line
    assert len(source) < 6 * 2000


def test_cells_outlive_their_folder_and_others_join_them(tmp_path):
    archive = {}
    collect(archive, experiment(tmp_path / "tiny"))
    shutil.rmtree(tmp_path / "tiny")
    more = experiment(tmp_path / "more", seeds=(1, 2), hardware="another machine")
    assert "3 of them new" in collect(archive, more)
    found = archive["tiny"]
    assert {cell.seed for cell in found.cells} == {0, 1, 2} and len(found.cells) == 9
    assert found.hardware == ["2 × Intel Xeon", "another machine"]


def test_other_results_of_a_cell_are_refused_unless_they_replace_it(tmp_path):
    archive = {}
    folder = experiment(tmp_path / "tiny")
    collect(archive, folder)
    before = archive["tiny"].by_name()["grpo", "counting", 1]
    write_cell(folder, "grpo", "counting", 1, chances=(0.9, 0.9))
    with pytest.raises(UserError, match="other results of the cell grpo · counting · 1"):
        collect(archive, folder)
    assert archive["tiny"].by_name()["grpo", "counting", 1] == before
    collect(archive, folder, replace=True)
    after = archive["tiny"].by_name()["grpo", "counting", 1]
    assert after.right["counting"]["greedy"] > before.right["counting"]["greedy"]


def test_an_experiment_with_other_settings_is_refused_unless_it_replaces_the_cells(tmp_path):
    archive = {}
    collect(archive, experiment(tmp_path / "tiny"))
    other = experiment(
        tmp_path / "other", seeds=(5,), settings={"steps": 50, "learning_rate": 2e-4}
    )
    with pytest.raises(UserError, match="has another steps than the cells of tiny"):
        collect(archive, other)
    collect(archive, other, replace=True)
    assert {cell.seed for cell in archive["tiny"].cells} == {5}


def test_cells_of_a_seed_that_begin_from_another_model_are_refused(tmp_path):
    archive = {}
    collect(archive, experiment(tmp_path / "tiny"))
    before = list(archive["tiny"].cells)
    other = tmp_path / "other"
    describe(other, seeds=[1], settings=archive["tiny"].settings)
    write_cell(other, "sft", "counting", 1)
    write_curves(other, "sft", "counting", 1)
    assert "1 of them new" in collect(archive, other)  # it begins where the others do
    archive["tiny"].cells = before
    curve = cell_folder(other, "sft", "counting", 1) / "curve.jsonl"
    first, *rest = curve.read_text().splitlines()
    curve.write_text("\n".join([json.dumps(json.loads(first) | {"counting": 0.9}), *rest, ""]))
    for forced in (False, True):
        with pytest.raises(UserError, match="cells of seed 1 that begin from another model"):
            collect(archive, other, replace=forced)
        assert archive["tiny"].cells == before


@pytest.mark.parametrize("content", ["", "[]", '{"tiny": {}}', '{"tiny": {"cells": [{}]}}'])
def test_a_damaged_archive_is_named(tmp_path, content):
    path = tmp_path / "cells.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"cells\.json is damaged"):
        read_archive(path)


def test_blocks_of_a_metric_leave_out_steps_without_a_value():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, 12345.6])
    assert block_means(values, 2) == [1.0, 3.0, 12300.0]
    assert block_means(values, 1) == [1.0, None, 3.0, None, None, 12300.0]


def test_the_pull_is_a_ratio_of_means_and_late_is_the_last_fifth():
    metrics = {
        "kl_pull": [0.1, None, 0.3],
        "reward_pull": [0.5, 0.5, 0.5],
        "kl": [*[0.0] * 8, 1, 3],
    }
    cell = Record("grpo", "counting", 0, {}, {}, metrics=metrics)
    assert pull_ratio(cell) == pytest.approx(0.4)
    assert late(cell, "kl") == 2.0 and late(cell, "entropy") is None


def test_the_fixed_comparisons_can_be_made_from_their_presets():
    """Their variants, tasks and steps are those that the presets run."""
    assert [len(question.comparisons) for question in QUESTIONS] == [32, 32, 20, 20]
    assert len({planned.name for planned in PLANNED}) == len(PLANNED) == 104
    sides = {(p.name[0], p.first, p.second, p.outcome, p.trained, p.mode) for p in PLANNED}
    assert len(sides) == len(PLANNED)
    for question in QUESTIONS:
        scale, study = find_preset(question.preset)
        steps = {**scale.settings, **study.settings}["steps"]
        every = study.curve_every or scale.curve_every
        assert set(question.variants) == {"base", *(each.name for each in study.variants)}
        for planned in question.comparisons:
            assert set(planned.trained) <= set(study.trained)
            for side in (planned.first, planned.second):
                assert side.variant in question.variants
                assert side.step is None or (side.step % every == 0 and side.step <= steps)


def test_findings_are_paired_t_tests_with_one_correction_for_all_that_are_planned():
    archive = archived(TRANSFER, scattered)
    archive |= archived(LEVER, scattered, seeds=range(4))  # not complete
    found = findings(archive)
    shares = {
        variant: [scattered(variant, "geometry", seed)[1] / 1000 for seed in TRANSFER.seeds]
        for variant in ("grpo-d", "sft-answer")
    }
    (finding,) = (each for each in found if each.planned.name == "1.11")
    expected = stats.ttest_rel(shares["grpo-d"], shares["sft-answer"])
    assert finding.test.p == pytest.approx(expected.pvalue)
    assert finding.test.difference.value == pytest.approx(
        np.mean(shares["grpo-d"]) - np.mean(shares["sft-answer"])
    )

    assert finding.first_above == np.sum(
        np.array(shares["grpo-d"]) > np.array(shares["sft-answer"])
    )

    (sampled,) = (each for each in found if each.planned.name == "1.11s")
    halves = [np.floor(1000 * np.array(each) / 2 + 1e-6) / 1000 for each in shares.values()]
    assert sampled.test.p == pytest.approx(stats.ttest_rel(*halves).pvalue)

    complete = [each for each in found if each.complete]
    assert [each.planned.name[0] for each in complete] == ["1"] * 32
    missing = [1.0] * (len(PLANNED) - len(complete))
    assert [each.holm for each in complete] == holm([e.test.p for e in complete] + missing)[:32]
    partial = [each for each in found if each.planned.name[0] == "2"]
    assert all(each.holm is None and len(each.differences) == 4 for each in partial)


def test_what_is_shown_stays_shown_when_more_cells_are_there():
    some = archived(TRANSFER, scattered)
    more = some | archived(LEVER, scattered) | archived(FEW, scattered)
    before, after = ({e.planned.name: e for e in findings(each)} for each in (some, more))
    shown = [name for name, finding in before.items() if finding.shown]
    assert len(shown) > 5
    assert all(after[name].shown for name in shown)
    assert all(after[name].holm <= before[name].holm for name in before if before[name].complete)


def test_the_mean_of_both_trainings_is_taken_seed_by_seed():
    archive = archived(FEW, scattered)
    archive["tiny_few"].cells = [
        cell for cell in archive["tiny_few"].cells if cell.name != ("grpo", "geometry", 3)
    ]
    finding = next(each for each in findings(archive) if each.planned.name == "4.9")
    assert sorted(finding.differences) == [seed for seed in FEW.seeds if seed != 3]
    own = {
        variant: np.mean([scattered(variant, role, 5)[0] for role in ("counting", "geometry")])
        for variant in ("grpo-d", "grpo")
    }
    assert finding.differences[5] == pytest.approx((own["grpo-d"] - own["grpo"]) / 1000)


def test_findings_in_words():
    by_name = {each.planned.name: each for each in findings(archived(TRANSFER, scattered))}
    lost, same = by_name["1.1"], by_name["1.6"]
    difference = lost.test.difference
    said = f"{points(difference.value)} points {interval(difference)}"
    assert said.startswith("−") and short(lost) == f"{said}, shown"
    assert short(replace(lost, holm=0.6)) == f"{said}, p < 0.001, not shown after correction"
    by_chance = replace(lost, test=replace(lost.test, p=0.012), holm=0.6)
    assert short(by_chance) == f"{said}, p = 0.012, not shown after correction"
    assert same.test.p >= 0.05
    assert short(same).endswith(f"], not shown, at most {100 * same.test.bound:.1f}")
    assert short(by_name["4.5"]) == "not run"
    partial = {e.planned.name: e for e in findings(archived(FEW, scattered, seeds=(0, 1)))}
    assert short(partial["4.5"]) == f"2 of {len(FEW.seeds)} seeds"


def test_ranges_of_seeds():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8" and ranges([3]) == "3"


def test_every_block_can_be_made_from_no_cells_and_from_all():
    archive = {}
    for question in QUESTIONS:
        archive |= archived(question, scattered)
    for made in (blocks({}), blocks(archive)):
        texts = {name: make() for name, make in made.items()}
        for name, text in texts.items():
            rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
            assert text and len(set(rows)) <= 1 and "nan" not in text.split(), name
    assert texts["progress"].startswith("104 of 104 comparisons are complete; ")
    shown = sum(texts[f"difference {each.name}"].endswith(", shown") for each in PLANNED)
    assert 5 < shown < 104 and f"; {shown} of them show a difference" in texts["progress"]

    cells = archive[TRANSFER.preset]
    cells.cells += [replace(cell, seed=100 + cell.seed, right={}) for cell in cells.cells]
    others = {name: make() for name, make in blocks(archive).items()}
    assert {name for name in texts if others[name] != texts[name]} == {"cells"}  # lists them all


def test_the_screening_shows_pull_and_best_accuracy():
    curve = {"step": [0, 20, 40], "geometry": [0.3, 0.6, 0.5], "counting": [0.3, 0.2, 0.1]}
    metrics = {"beta": [0.2, 0.3], "kl": [0.5] * 5, "kl_pull": [0.05] * 5, "reward_pull": [0.5] * 5}
    right = {
        "geometry": {"greedy": 510, "sampled": 400},
        "counting": {"greedy": 120, "sampled": 100},
    }
    cell = Record("constant-x30", "geometry", 100, {}, right, curve, metrics=metrics)
    cells = Archived("tiny", {"counting": 1000, "geometry": 1000}, {}, {}, cells=[cell])
    rows = screening({"tiny_lever": cells}).splitlines()
    row = "| constant β × 30 | 1 | 0.25 | 0.1 | 0.5 | — | 51.0% | 40.0% | 60.0% | 12.0% |"
    assert rows.count(row) == 1
    assert sum("not run" in row for row in rows) == len(rows) - 3
    made = blocks({LEVER.preset: replace(cells, cells=[replace(cell, seed=LEVER.seeds[0])])})
    assert made["pull lever constant-x30 geometry"]() == "10.0%"
    assert made["pull lever no-kl geometry"]() == "—"


def test_pages_get_their_blocks_and_nothing_else_changes(tmp_path):
    made = blocks(archived(TRANSFER, scattered))
    page = tmp_path / "docs" / "deep" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text(
        "# Title\n\n<!-- claim: transfer-comparisons -->\nold\n<!-- /claim -->\n\nSo "
        "<!-- claim: difference 1.1 --><!-- /claim --> it is.\n"
    )
    (tmp_path / "README.md").write_text("nothing is generated here\n")
    assert pages(tmp_path) == [page] == fill(tmp_path, made)
    source = page.read_text()
    assert source == (
        f"# Title\n\n<!-- claim: transfer-comparisons -->\n\n{made['transfer-comparisons']()}\n\n"
        f"<!-- /claim -->\n\nSo <!-- claim: difference 1.1 -->{made['difference 1.1']()}"
        "<!-- /claim --> it is.\n"
    )
    assert fill(tmp_path, made) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- claim: no such -->\n<!-- /claim -->", "line 1 has the block 'no such'"),
        ("a\n<!-- claim: power -->\n", "does not end the block 'power'"),
        ("a\n<!-- claim: power -->\n<!-- claim: cells -->", "line 3 begins one in another"),
        ("a\nb <!-- /claim -->", "line 2 ends a block that has not begun"),
    ],
)
def test_wrong_marks_are_named_and_no_page_is_written(tmp_path, text, said):
    first, second = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    second.parent.mkdir()
    first.write_text("<!-- claim: progress -->old<!-- /claim -->")
    second.write_text(text)
    with pytest.raises(UserError, match=said):
        fill(tmp_path, blocks({}))
    assert "old" in first.read_text()


def test_figures_are_the_same_each_time_and_name_their_variants(tmp_path):
    archive = archived(TRANSFER, scattered)
    (path,) = write_figures(archive, tmp_path)
    shown = {q.name for q in QUESTIONS if "](experiment/" in blocks(archive)[f"{q.name}-figure"]()}
    assert shown == {"transfer"}
    drawn = path.read_text()
    texts = {each.text for each in ElementTree.fromstring(drawn).iter() if each.text}
    assert path.name == "transfer.svg"
    assert {"Trained on counting", "SFT on answers", "other task, geometry"} <= texts
    write_figures(archive, tmp_path)
    assert path.read_text() == drawn


def test_what_kind_of_text_the_answers_are(tmp_path):
    folder, archive = experiment(tmp_path / "tiny"), {}
    texts = [  # how many of them, the answer, and what the judge reads in it
        (1, "<think>4 items</think><answer> 4 </answer>", 4),
        (2, "<think>4 items</think><answer> </answer>", None),
        (3, "<answer> 7 </answer>", 7),
    ]
    for seed, times in ((0, 5), (1, 15)):
        place = cell_folder(folder, "grpo", "counting", seed)
        answers = [
            {"model_output": text, "extracted_answer": found}
            for number, text, found in texts
            for _ in range(number * times)
        ]
        (place / "geometry-greedy.json").write_text(json.dumps({"results": answers}))
    collect(archive, folder)
    found = archive["tiny"].by_name()
    assert found["grpo", "counting", 1].form == {"geometry": {"reasoned": 45, "answered": 60}}
    assert found["grpo-d", "counting", 1].form == {}
    path = tmp_path / "cells.json"
    write_archive(path, archive)
    made = blocks(read_archive(path))["transfer-form"]()
    row = next(line for line in made.splitlines() if line.startswith("| GRPO |"))
    assert row.split(" | ")[1:3] == ["15.0%", "20.0%"]  # of 200 items, in the mean
    assert row.split(" | ")[4:6] == ["—", "—"]
    assert made.count("%") == 2 + 2 + 1 + 1  # those, and what is right of base, GRPO and GRPO-D


def test_the_command_goes_from_a_folder_to_pages(tmp_path, capsys):
    folder = experiment(tmp_path / "tiny")
    root, cells = tmp_path / "root", tmp_path / "root" / "docs" / "experiment" / "cells.json"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(
        "<!-- claim: accuracy transfer grpo counting own --><!-- /claim -->"
    )
    main(["collect", str(folder), "--cells", str(cells)])
    main(["write", "--root", str(root)])
    right = [
        cell.right["counting"]["greedy"]
        for cell in read_archive(cells)["tiny"].of("grpo", "counting").values()
    ]
    mean = f"{np.mean(right) / 2:.1f}%"
    assert f"-->{mean} [" in (root / "README.md").read_text()
    seeds = f"(2 of {len(TRANSFER.seeds)} seeds)"
    assert f"{seeds}<!--" in (root / "README.md").read_text()
    assert cells.with_name("transfer.svg").exists() and not cells.with_name("long.svg").exists()
    capsys.readouterr()
    main(["show", "accuracy transfer grpo counting own", "--cells", str(cells)])
    assert capsys.readouterr().out.startswith(mean)
    with pytest.raises(UserError, match="no block 'powers'"):
        main(["show", "powers", "--cells", str(cells)])
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        main(["write", "--root", str(root), "--cells", str(tmp_path / "none.json")])


@pytest.fixture
def own_archive():
    if not CELLS.exists():
        pytest.skip("no cells have been collected yet")
    return read_archive(CELLS)


def test_the_repositorys_own_pages_are_those_of_its_cells(own_archive, tmp_path):
    """So no block of the documentation can say another thing than the cells."""
    generated = pages(ROOT)
    assert ROOT / "docs" / "experiment.md" in generated
    for page in generated:
        copy = tmp_path / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, copy)
    write_archive(tmp_path / "cells.json", own_archive)
    assert (tmp_path / "cells.json").read_bytes() == CELLS.read_bytes()
    assert fill(tmp_path, blocks(own_archive)) == []


def test_the_strong_beta_is_chosen_by_the_rule_of_the_design(own_archive):
    """The largest multiple that leaves half of what β = 0 gains in sampled answers, and its KL."""
    cells = own_archive["tiny_lever"]
    base, free, *held = (
        cells.of(variant, trained)[100]
        for variant, trained in (
            ("base", None),
            ("no-kl", "geometry"),
            *((f"constant-x{times}", "geometry") for times in MULTIPLES),
        )
    )
    before, after, *others = (cell.right["geometry"]["sampled"] for cell in (base, free, *held))
    half = before + (after - before) / 2
    assert max(n for n, right in zip(MULTIPLES, others, strict=True) if right >= half) == STRONG
    assert late(held[MULTIPLES.index(STRONG)], "kl") == pytest.approx(STRONG_KL, abs=0.0005)


@pytest.mark.slow
def test_the_repositorys_own_figures_are_those_of_its_cells(own_archive, tmp_path):
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another version of Matplotlib may draw the same numbers otherwise")
    for figure in write_figures(own_archive, tmp_path):
        assert figure.read_bytes() == (CELLS.parent / figure.name).read_bytes()
