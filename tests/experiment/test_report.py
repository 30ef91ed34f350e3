"""The report of finished, unfinished and failed experiments, as a page and as Markdown."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mr1_fast.experiment import paper
from mr1_fast.experiment.plots import by_value, learning_curves, numbers, training_curves
from mr1_fast.experiment.report import write_markdown, write_report
from mr1_fast.experiment.results import read_results
from mr1_fast.experiment.tables import cross_task, headline, paired, same_task
from mr1_fast.integrity import sealed
from mr1_fast.report.svg import LIGHT

from ..data.experiment import TASKS, cell_folder, describe, write_cell, write_experiment
from ..report.test_run_report import Page

pytestmark = pytest.mark.filterwarnings("error")
HEADINGS = [
    "Accuracy",
    "Gain and transfer",
    "Held-out accuracy during training",
    "Training",
    "Test items and greedy answers",
    "Accuracy of sampled answers",
    "Cells",
    "How this was measured",
]
ALPHA = {
    "preset": "tiny_alpha",
    "paper": None,
    "axis": {"name": "alpha", "label": "Format weight α", "numeric": True},
    "variants": [{"name": "base", "label": "base model"}]
    + [
        {"name": f"alpha-{value}", "label": f"α = {value}", "value": value} for value in (0, 0.5, 1)
    ],
    "trained": ["geometry"],
}
SCHEDULES = {
    "axis": {"name": "schedule", "label": "KL schedule", "numeric": False},
    "variants": [
        {"name": name, "label": name} for name in ("base", "constant", "linear-up", "grpo-d")
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_experiment(tmp_path_factory.mktemp("finished"))
    write_report(folder)
    return folder


def row(right, count=100):
    return "1" * right + "0" * (count - right)


def small(folder, shares, seeds=(0, 1, 2), **changed):
    """An experiment with 100 items of each task.

    `shares` is (variant, trained) → for each seed, the right answers in counting and geometry.
    """
    tasks = {task: {**about, "items": 100} for task, about in TASKS.items()}
    describe(folder, seeds=list(seeds), tasks=tasks, **changed)
    for (variant, trained), by_seed in shares.items():
        for seed, (counting, geometry) in zip(seeds, by_seed, strict=False):
            correct = {"counting": row(counting), "geometry": row(geometry)}
            modes = {task: {"greedy": bits, "sampled": bits} for task, bits in correct.items()}
            write_cell(folder, variant, trained, seed, correct=modes)
    return read_results(folder)


def cells_of(source, title):
    """The rows of the Markdown table below a title, as lists of cells."""
    lines = source.split(f"**{title}**\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_finished_experiment_has_everything_in_order(finished):
    page, source = Page(finished / "report.html"), (finished / "report.md").read_text()
    assert page.headings() == HEADINGS
    assert re.findall("^## (.*)", source, re.MULTILINE) == HEADINGS
    for mode in ("greedy", "sampled"):
        for title in (f"Same task, {mode}", f"Other task, {mode}", f"Paired tests, {mode}"):
            assert title in page.plots() and f"**{title}**" in source
    for trained in TASKS:
        for title in [
            *(f"Trained on {trained}, tested on {tested}" for tested in TASKS),
            f"Trained on {trained}",
        ]:
            assert title in page.plots()
        for kind in ("reward", "accuracy", "KL weight β(s)", "KL to the reference"):
            assert f"Training on {trained}: {kind}" in page.plots()
    assert "21 of 21 cells finished" in page.text and "21 of 21 cells finished" in source
    assert "The base model is tiny after a supervised start." in page.text
    assert (
        "All 2 settings" in page.text and "python -m mr1_fast.experiment --preset tiny" in page.text
    )
    assert not [left for left in finished.iterdir() if "partial" in left.name]


def test_page_needs_nothing_from_elsewhere_and_is_small(finished):
    page = Page(finished / "report.html")
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for name in ("src", "href", "xlink:href", "srcset", "action"):
        assert all(value.startswith(("data:", "#")) for value in page.attributes(name))
    policy = dict(
        (attrs.get("http-equiv"), attrs.get("content")) for tag, attrs in page.tags if tag == "meta"
    )
    assert "default-src 'none'" in policy["Content-Security-Policy"]
    ids = page.attributes("id")
    assert ids and len(ids) == len(set(ids))
    assert (finished / "report.html").stat().st_size < 1_000_000


def test_same_experiment_gives_the_same_report(finished):
    names = ("report.html", "report.md", "report.svg")
    first = [(finished / name).read_bytes() for name in names]
    assert write_report(finished) == finished / "report.html"
    assert [(finished / name).read_bytes() for name in names] == first


def test_markdown_shows_the_main_plots_in_a_file_of_their_own(finished, tmp_path):
    """They are the page's first two, in colours that need no page."""
    path = write_markdown(finished, tmp_path / "docs" / "tiny.md")
    assert {file.name for file in path.parent.iterdir()} == {"tiny.md", "tiny.svg"}
    source, page = path.read_text(), Page(finished / "report.html")
    assert source.count("![") == 1
    about = "Greedy accuracy on both tasks after training on one of them."
    assert source.split("\n\n")[1:3] == [f"![{about}](tiny.svg)", about]
    assert source == (finished / "report.md").read_text().replace("report.svg", "tiny.svg")

    root = ElementTree.parse(path.with_suffix(".svg")).getroot()
    drawn = path.with_suffix(".svg").read_text()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root[0].attrib == {"width": "100%", "height": "100%", "fill": "#ffffff"}
    assert "var(" not in drawn and LIGHT["--line0"] in drawn and LIGHT["--ink"] in drawn
    first, second = (part.split("</svg>")[0] for part in page.source.split("<svg")[1:3])
    for tag in ("<path", "<use", "<text"):
        titles = 2 if tag == "<text" else 0
        assert drawn.count(tag) == first.count(tag) + second.count(tag) + titles
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Trained on counting", "Trained on geometry", "accuracy on counting"} <= set(texts)


def test_the_main_plots_of_an_ablation_are_over_its_values(tmp_path):
    write_report(write_experiment(tmp_path, **ALPHA))
    about = "Accuracy over what varies (Format weight α), with 95% intervals."
    assert f"![{about}](report.svg)" in (tmp_path / "report.md").read_text()
    drawn = (tmp_path / "report.svg").read_text()
    assert drawn.count("Format weight α") == 2 and "tested on counting" in drawn


PLAIN = {
    ("base", None): [(40, 20), (40, 20), (40, 20)],
    ("sft", "counting"): [(60, 5), (62, 6), (64, 4)],
    ("sft", "geometry"): [(30, 33), (32, 30), (28, 36)],
    ("grpo", "counting"): [(60, 22), (61, 20), (65, 24)],
    ("grpo", "geometry"): [(41, 31), (44, 30), (45, 32)],
    ("grpo-d", "counting"): [(70, 25), (73, 21), (76, 26)],
    ("grpo-d", "geometry"): [(45, 36), (48, 33), (42, 39)],
}


def test_same_task_table_has_the_papers_layout_and_numbers(tmp_path):
    results = small(tmp_path, PLAIN)
    write_report(tmp_path)
    assert cells_of((tmp_path / "report.md").read_text(), "Same task, greedy") == [
        ["Model", "counting (VC)", "the paper's", "geometry (GR)", "the paper's"],
        ["---"] * 5,
        [
            "base model",
            "40.0% [30.9, 49.8]",
            "42.50%",
            "20.0% [13.3, 28.9]",
            "15.52%",
        ],  # Wilson's: the same model
        ["+ GRPO", "62.0% [55.4, 68.6]", "64.50%", "31.0% [28.5, 33.5]", "30.24%"],
        ["+ SFT", "62.0% [57.0, 67.0]", "68.50%", "33.0% [25.5, 40.5]", "32.49%"],
        ["+ GRPO-D", "73.0% [65.5, 80.5]", "76.50%", "36.0% [28.5, 43.5]", "34.35%"],
    ]
    assert len(same_task(results, "sampled").head) == 3  # the paper has greedy answers only
    page = Page(tmp_path / "report.html")
    assert "73.0%" in page.source and "[65.5, 80.5]" in page.text and "76.50%" in page.text


def test_other_task_table_has_relative_changes_beside_the_papers(tmp_path):
    small(tmp_path, PLAIN)
    write_report(tmp_path)
    rows = cells_of((tmp_path / "report.md").read_text(), "Other task, greedy")
    assert rows[0][1:4] == ["counting (VC) → geometry (GR)", "to base", "to SFT"]
    assert rows[0][4:] == ["geometry (GR) → counting (VC)", "to base", "to SFT"]
    values = {
        line[0]: [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in line[1:]] for line in rows[2:]
    }
    assert values["base model"] == ["20.0% [13.3, 28.9]", "—", "—", "40.0% [30.9, 49.8]", "—", "—"]
    assert values["+ SFT"][1:3] == ["−75.0% paper −77.77%", "—"]
    assert values["+ SFT"][4:] == ["−25.0% paper +1.18%", "—"]
    assert values["+ GRPO-D"][1:3] == ["+20.0% paper +4.25%", "+380.0% paper +368.99%"]
    assert values["+ GRPO-D"][4:] == ["+12.5% paper +63.53%", "+50.0% paper +61.63%"]
    assert values["+ GRPO"][4:] == ["+8.3%", "+44.4%"]


BOTH_TARGETS = {
    "axis": {"name": "method", "label": "Method", "numeric": False},
    "variants": [
        {"name": "base", "label": "base model"},
        {"name": "sft-answer", "label": "SFT on answers", "trained": ["counting", "geometry"]},
        {"name": "sft-solution", "label": "SFT on worked solutions", "trained": ["counting"]},
        {"name": "grpo-d", "label": "GRPO-D", "trained": ["counting", "geometry"]},
    ],
}


def test_named_data_are_counted_by_two_judges_and_published_figures_stand_beside_r1v(tmp_path):
    """Both SFT targets, one of which geometry cannot have; R1-V's rule calls 5 more answers right.

    A cell of an earlier version has the verdicts of one judge.
    """
    shares = {
        ("base", None): (40, 20),
        ("sft-answer", "counting"): (60, 5),
        ("sft-answer", "geometry"): (30, 33),
        ("sft-solution", "counting"): (64, 10),
        ("grpo-d", "counting"): (70, 25),
        ("grpo-d", "geometry"): (45, 36),
    }
    results = small(
        tmp_path, {cell: [right] for cell, right in shares.items()}, [0], **BOTH_TARGETS
    )
    assert results.judges("counting") == ["strict"] and len(results.cells) == 6
    for (variant, trained), right in shares.items():
        if variant == "sft-solution":
            continue
        path = cell_folder(tmp_path, variant, trained, 0) / "cell.json"
        modes = {
            task: dict.fromkeys(("greedy", "sampled"), row(count + 5))
            for task, count in zip(TASKS, right, strict=True)
        }
        path.write_text(sealed(json.loads(path.read_text()) | {"other_judges": {"r1v": modes}}))
    write_report(tmp_path)
    page, source = Page(tmp_path / "report.html"), (tmp_path / "report.md").read_text()
    assert "6 of 6 cells finished" in page.text and "missing" not in source
    assert "counted by the strict judge and by R1-V's rule" in page.text

    def table(title):
        rows = cells_of(source, title)
        plain = [
            [re.sub(r" \[.*\]", "", cell.replace("\xa0", " ")) for cell in line] for line in rows
        ]
        return plain[0], {line[0]: line[1:] for line in plain[2:]}

    head, rows = table("Same task, greedy")
    assert head[1:4] == [
        "counting (VC), the strict judge",
        "counting (VC), R1-V's rule",
        "the paper's",
    ]
    assert rows["base model"] == ["40.0%", "45.0%", "42.50%", "20.0%", "25.0%", "15.52%"]
    assert rows["+ SFT on answers"] == ["60.0%", "65.0%", "68.50%", "33.0%", "38.0%", "32.49%"]
    assert rows["+ SFT on worked solutions"] == ["64.0%", "—", "—", "—", "—", "—"]
    assert rows["+ GRPO-D"][:3] == ["70.0%", "75.0%", "76.50%"]

    head, rows = table("Other task, greedy")
    assert head[3] == head[6] == "to SFT on answers" and head[4].endswith("R1-V's rule")
    strict, by_r1v = rows["+ SFT on answers"][:3], rows["+ SFT on answers"][3:6]
    assert strict == ["5.0%", "−75.0%", "—"]
    assert by_r1v == ["10.0%", "−60.0% paper −77.77%", "—"]
    assert rows["+ GRPO-D"][2] == "+400.0%" and rows["+ GRPO-D"][5].startswith("+200.0% paper")

    assert {tuple(line[:2]) for line in paired(read_results(tmp_path), "greedy").rows} >= {
        ("counting → counting", f"GRPO-D − {label}")
        for label in ("SFT on answers", "SFT on worked solutions")
    }
    assert len(cells_of(source, "Greedy accuracy, time and memory")[0]) == 9


def test_changes_are_of_the_seeds_in_common_and_not_of_zero(tmp_path):
    results = small(
        tmp_path, PLAIN | {("base", None): [(40, 0)], ("sft", "counting"): [(60, 10), (60, 30)]}
    )
    rows = {line[0]: line for line in cross_task(results, "greedy").rows}
    assert rows["+ GRPO-D"][2].main == "—"  # no change relative to nothing right
    assert rows["+ GRPO-D"][3].main == "+15.0%"  # 25 and 21 against 10 and 30
    assert rows["+ SFT"][1].detail.endswith("], 2 of 3 seeds")
    assert rows["+ GRPO"][1].detail.endswith("]")


def test_paired_tests_say_both_questions_and_how_many(tmp_path):
    results = small(tmp_path, PLAIN)
    table = paired(results, "greedy")
    assert len(table.rows) == 12 and table.note.startswith(
        "12 comparisons: p values are uncorrected"
    )
    line = next(line for line in table.rows if line[:2] == ["counting → counting", "GRPO-D − GRPO"])
    assert (line[2].main, line[2].detail) == ("+11.0", "[8.5, 13.5]")
    assert (line[3].main, line[3].detail) == ("0.003", "Holm 0.027")
    assert line[4].main == "< 0.001"
    assert [line[:2] for line in table.rows][::3] == [
        ["counting → counting", "GRPO-D − GRPO"],
        ["geometry → geometry", "GRPO-D − GRPO"],
        ["counting → geometry", "GRPO-D − GRPO"],
        ["geometry → counting", "GRPO-D − GRPO"],
    ]


def test_headline_names_a_leader_only_beyond_noise(tmp_path):
    first, details = headline(small(tmp_path / "plain", PLAIN))
    assert first == "Same task: GRPO-D leads. Other task: GRPO-D leads, but within noise of GRPO."
    assert "GRPO-D 54.5%, SFT 47.5%, GRPO 46.5%, base model 30.0%" in details[0]
    assert "GRPO-D − SFT: +7.0 points" in details[0] and "over 3 seeds" in details[0]
    assert details[-1] == "21 of 21 cells finished."

    level = {
        cell: [(40 + 9 * seed, 30 - 9 * seed) for seed in order]
        for cell, order in zip(
            PLAIN,
            ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2), (0, 1, 2)),
            strict=True,
        )
    }
    assert headline(small(tmp_path / "level", level))[0].count("no lead beyond noise") == 2

    worse = PLAIN | {cell: [(20, 3), (22, 5), (21, 4)] for cell in PLAIN if cell[1]}
    assert headline(small(tmp_path / "worse", worse))[0].startswith("Same task: base model leads.")


def test_headline_of_one_seed_says_so(tmp_path):
    first, details = headline(small(tmp_path, PLAIN, seeds=[0]))
    assert first.startswith("Same task: GRPO-D leads (one seed).")
    assert "over items" in details[0] and "seeds" not in details[0]


def test_seeds_that_are_all_alike_give_no_p_over_seeds(tmp_path):
    results = small(tmp_path, {cell: values[:1] * 3 for cell, values in PLAIN.items()})
    assert {line[3] for line in paired(results, "greedy").rows} == {"—"}
    write_report(tmp_path)
    assert "nan" not in Page(tmp_path / "report.html").text + (tmp_path / "report.md").read_text()


def test_experiment_without_cells(tmp_path):
    describe(tmp_path)
    page = Page(write_report(tmp_path))
    assert "0 of 21 cells finished" in page.text and page.text.count("missing") == 21
    assert page.headings() == [
        "Accuracy",
        "Accuracy of sampled answers",
        "Cells",
        "How this was measured",
    ]
    source = (tmp_path / "report.md").read_text()
    assert "## Cells" in source and "![" not in source and not (tmp_path / "report.svg").exists()
    assert cells_of(source, "Same task, greedy")[2][0] == "base model"


def test_unfinished_and_failed_cells(tmp_path):
    folder = write_experiment(tmp_path, seeds=[0, 1])
    for name in ("grpo", "grpo-d"):
        (cell_folder(folder, name, "counting", 1) / "cell.json").unlink()
    failed = cell_folder(folder, "grpo-d", "counting", 1)
    (failed / "failed.json").write_text(json.dumps({"error": "CUDA out of | memory <b>"}))
    with (cell_folder(folder, "grpo", "counting", 1) / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "rew')
    cell_folder(folder, "sft", "geometry", 0).joinpath("curve.jsonl").unlink()
    cell_folder(folder, "sft", "geometry", 0).joinpath("samples.json").unlink()
    page, source = Page(write_report(folder)), (folder / "report.md").read_text()
    assert "12 of 14 cells finished" in page.text
    assert "failed CUDA out of | memory <b>" in page.text
    assert "| failed CUDA out of &#124; memory &#60;b&#62; | — | — |" in source
    assert (
        page.text.count("1 of 2 seeds") == 8
    )  # GRPO and GRPO-D trained on counting, on both tasks, in both modes
    assert page.headings() == HEADINGS


def test_cells_table_has_accuracies_times_and_memory(finished):
    cells = {
        line[0]: line[1:]
        for line in cells_of(
            (finished / "report.md").read_text(), "Greedy accuracy, time and memory"
        )
    }
    assert cells["base model · seed 0"][-3:] == ["31 s", "10 s", "0.75 GiB"]
    assert cells["GRPO-D · geometry · seed 2"][0] == "finished"
    assert cells["GRPO-D · geometry · seed 2"][-3:] == ["31 s", "10 s", "0.75 GiB"]
    results = read_results(finished)
    cell = next(cell for cell in results.of("grpo-d", "geometry") if cell.seed == 2)
    expected = f"{100 * cell.correct['geometry']['greedy'].mean():.1f}%"
    assert cells["GRPO-D · geometry · seed 2"][2] == expected


def test_curves_are_means_of_seeds_as_far_as_all_have_come(tmp_path):
    describe(tmp_path, seeds=[0, 1])
    for seed, lines in enumerate([[(0, 0.2), (20, 0.4), (40, 0.6)], [(0, 0.4), (20, 0.5)]]):
        place = cell_folder(tmp_path, "sft", "counting", seed)
        place.mkdir(parents=True)
        rows = [
            json.dumps({"step": step, "counting": share, "geometry": "none"})
            for step, share in lines
        ]
        (place / "curve.jsonl").write_text("\n".join(rows) + "\n")
    (plot,) = learning_curves(
        read_results(tmp_path)
    )  # geometry has no number, other methods no file
    (series,) = plot.series
    assert plot.title == "Trained on counting, tested on counting" and plot.percent
    assert series.points == pytest.approx({0: 0.3, 20: 0.45})
    assert series.seeds[0] == {0: 0.2, 20: 0.4, 40: 0.6}
    assert numbers(plot).rows == [["0", "30.0%"], ["20", "45.0%"]]


def test_long_runs_are_averaged_in_blocks(tmp_path):
    describe(tmp_path, seeds=[0])
    run = cell_folder(tmp_path, "grpo", "geometry", 0) / "run"
    run.mkdir(parents=True)
    rows = [
        {"step": step, "reward": float(step), "kl": math}
        for step, math in enumerate([None, "NaN", 1e300] * 50)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (plot,) = training_curves(read_results(tmp_path))
    assert plot.note == "Each point is the mean of 3 steps."
    assert (
        list(plot.series[0].points.items())[:2] == [(1.0, 1.0), (4.0, 4.0)]
        and len(plot.series[0].points) == 50
    )
    table = numbers(plot)
    assert (
        len(table.rows) == 11 and table.rows[0] == ["1", "1"] and table.rows[-1] == ["148", "148"]
    )
    assert "Training on geometry: reward" in Page(write_report(tmp_path)).plots()


def test_numeric_ablation_has_a_table_and_a_plot_over_its_values(tmp_path):
    folder = write_experiment(tmp_path, **ALPHA)
    page, source = Page(write_report(folder)), (folder / "report.md").read_text()
    rows = cells_of(source, "Trained on geometry, greedy")
    assert rows[0] == ["Format weight α", "counting (VC)", "geometry (GR)"]
    assert [line[0] for line in rows[2:]] == ["base model", "α = 0", "α = 0.5", "α = 1"]
    assert "Paired tests" not in source and "the paper's" not in source
    assert re.findall(r"^\*\*(.*)\*\*$", source, re.MULTILINE)[1] == "Trained on geometry, greedy"
    results = read_results(folder)
    own, other = by_value(results)
    assert (own.title, own.kind) == ("Trained on geometry, tested on geometry", "values")
    greedy, sampled = own.series
    assert list(greedy.points) == list(sampled.points) == [0, 0.5, 1]
    runs = results.runs("alpha-0.5", ("geometry", "geometry"), "greedy")
    assert greedy.points[0.5] == pytest.approx(np.mean(list(runs.values())))
    assert greedy.base == pytest.approx(
        np.mean(list(results.runs("base", ("", "geometry"), "greedy").values()))
    )
    assert {"base, greedy", "base, sampled", "Format weight α"} <= set(page.by_tag["text"])
    assert other.title == "Trained on geometry, tested on counting"
    assert "α = 1" in headline(results)[0]


def test_ablation_of_names_has_a_plot_of_names(tmp_path):
    folder = write_experiment(tmp_path, **SCHEDULES, seeds=[0])
    page = Page(write_report(folder))
    assert {"constant", "linear-up", "KL schedule"} <= set(page.by_tag["text"] + page.by_tag["th"])
    plots = by_value(read_results(folder))
    assert [plot.kind for plot in plots] == ["names"] * 4 and plots[0].names == [
        "constant",
        "linear-up",
        "grpo-d",
    ]
    assert "experiment tiny · KL schedule" in page.text


def test_samples_show_before_and_after_on_the_task_trained(finished):
    page, source = Page(finished / "report.html"), (finished / "report.md").read_text()
    cards = page.source.split("<article")[1:]
    assert len(cards) == 4 and all(card.count('class="output"') == 4 for card in cards)
    assert [tag for tag, _ in page.tags].count("img") == 4
    assert page.text.count("before: base model") == 4
    assert page.text.count("✓ right") == 4 + 3 and page.text.count("✗ wrong") == 16 - 7
    assert source.count("\nbefore: base model") == 4 and source.count("✓ right") == 7
    assert (
        source.count("```text\n<think>5 shapes</think><answer> 5 </answer>\n```") == 1
    )  # of GRPO-D alone
    assert source.count("```text\n<think>3 shapes</think><answer> 3 </answer>\n```") == 4


def test_published_numbers_fit_together():
    """The paper's relative changes for SFT and GRPO-D agree with each other."""
    for changes in paper.CROSS_TASK["2B"].values():
        sft, ours = (1 + changes[method]["base"] / 100 for method in ("sft", "grpo-d"))
        assert 100 * (ours / sft - 1) == pytest.approx(changes["grpo-d"]["sft"], abs=0.1)
    assert all(
        max(rows, key=lambda name: rows[name][task]) == "grpo-d"
        for rows in paper.ACCURACY.values()
        for task in TASKS
    )
