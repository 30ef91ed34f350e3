"""The page about finished, unfinished, supervised and damaged runs, read with an HTML parser."""

import base64
import html.parser
import io
import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from mr1_fast.errors import UserError
from mr1_fast.report.run_report import write_report

CONFIG = {
    "model": "Qwen/Qwen2-VL-2B-Instruct",
    "task": "counting",
    "algo": "grpo-d",
    "seed": 7,
    "steps": 40,
}
CONFIG |= {"learning_rate": 1e-6, "extra_rewards": {}}
BEFORE = {
    "greedy": {"accuracy": 0.62, "interval": [0.5716, 0.6662], "correct": 248, "count": 400},
    "sampled": {"accuracy": 0.5, "interval": [0.4513, 0.5487], "correct": 200, "count": 400},
}
AFTER = {
    "greedy": {"accuracy": 0.945, "interval": [0.9181, 0.9634], "correct": 378, "count": 400},
    "sampled": {"accuracy": 0.475, "interval": [0.4265, 0.5239], "correct": 190, "count": 400},
}
GRPO_PLOTS = [
    "Reward",
    "Accuracy",
    "KL to the reference",
    "KL weight β(s)",
    "Completion length",
    "Entropy",
]
VOID = {"meta", "link", "img", "br"}
pytestmark = pytest.mark.filterwarnings("error")


class Page(html.parser.HTMLParser):
    """What a browser would make of the page; an unbalanced tag is an error."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text, self.by_tag = [], [], "", {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
            self.by_tag.setdefault(self.open[-1], []).append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def headings(self):
        return self.by_tag.get("h2", [])

    def plots(self):
        return self.by_tag.get("figcaption", [])

    def markers(self):
        return [
            attrs
            for tag, attrs in self.tags
            if tag == "use" and "var(--line" in attrs.get("style", "")
        ]

    def curves(self):
        """Path data of every curve of every plot, by the plot's title."""
        result = {}
        for svg in self.source.split("<svg")[1:]:
            root = ElementTree.fromstring("<svg" + svg[: svg.index("</svg>")] + "</svg>")
            name = root.get("aria-label").removesuffix(" over steps")
            paths = [
                path
                for path in root.iter("{http://www.w3.org/2000/svg}path")
                if path.get("clip-path")
            ]
            result[name] = [path.get("d") for path in paths if "var(--line" in path.get("style")]
        return result


def grpo_step(step, **changed):
    done = step / 40
    return {
        "step": step,
        "reward": 1.3 + 0.6 * done + 0.05 * math.sin(step),
        "accuracy": 0.5 + 0.4 * done + 0.05 * math.sin(step),
        "format": 0.8 + 0.2 * done,
        "zero_variance": 0.25,
        "completion_length": 120 + 60 * done + math.cos(step),
        "finished": 1.0,
        "beta": 0.07 - 0.03 * done,
        "loss": 0.01,
        "entropy": 0.9 - 0.6 * done,
        "kl": 0.02 * done,
        "clip_fraction": 0.0,
        "grad_norm": 0.7,
        "learning_rate": 1e-6,
        "seconds_rollout": (14.0, 15.0, 30.0)[step % 3],
        "seconds_reward": 0.05,
        "seconds_reference": 3.1,
        "seconds_update": 9.25,
        **changed,
    }


def sft_step(step):
    return {
        "step": step,
        "loss": 2.0 * 0.95**step,
        "grad_norm": 1.2,
        "learning_rate": 2e-5,
        "seconds_update": 4.25,
    }


def sample(index=0, before="<think>1+1</think><answer> 2 </answer>", after=None, **changed):
    example = {
        "problem": "How many items are there in the image?",
        "solution": "3",
        "images": [f"images/{index}.png"],
    }
    example["before"] = {"text": before, "correct": False}
    if after is not None:
        example["after"] = {"text": after, "correct": True}
    return example | changed


def make_run(folder, steps=(), evaluation=None, **changed):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(3):
        Image.new("RGB", (84, 56), (200, 40 * index, 90)).save(folder / f"images/{index}.png")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changed, sort_keys=False))
    if steps:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if evaluation is not None:
        results = {"task": "counting", "split": "test", **evaluation}
        (folder / "evaluation.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def finished(tmp_path):
    examples = [sample(index, after="<think>1+2</think><answer> 3 </answer>") for index in range(3)]
    evaluation = {"before": BEFORE, "after": AFTER, "examples": examples}
    return make_run(tmp_path, [grpo_step(step) for step in range(40)], evaluation)


def test_finished_run_has_everything_in_order(finished):
    path = write_report(finished)
    assert path == finished / "report.html"
    page = Page(path)
    assert page.text.count("Greedy accuracy 62.0% → 94.5%") == 1
    assert "".join(page.by_tag["title"]) == "Qwen/Qwen2-VL-2B-Instruct · counting · GRPO-D · seed 7"
    assert page.headings() == [
        "Accuracy on held-out items",
        "Training",
        "Time per step",
        "Held-out items and greedy answers",
        "Configuration",
    ]
    assert page.plots() == GRPO_PLOTS
    assert "40 of 40 training steps" in page.text
    assert {"0%", "80%", "% of completions right", "nats per token", "step"} <= set(
        page.by_tag["text"]
    )
    assert not [leftover for leftover in finished.iterdir() if "partial" in leftover.name]


def test_table_shows_intervals_and_differences_in_points(finished):
    text = Page(write_report(finished)).text
    for shown in (
        "62.0%",
        "57.2–66.6%",
        "248 of 400",
        "94.5%",
        "91.8–96.3%",
        "+32.5 points",
        "−2.5 points",
    ):
        assert shown in text


def test_timing_shows_medians(finished):
    page = Page(write_report(finished))
    seconds = [cell for cell in page.by_tag["td"] if cell.endswith(" s")]
    assert seconds == ["15 s", "0.05 s", "3.1 s", "9.25 s"]  # rollouts take 14, 15 and 30 s in turn
    assert page.by_tag["th"][-4 - len(CONFIG) : -len(CONFIG)] == [
        "Rollout",
        "Reward",
        "Reference",
        "Update",
    ]
    assert "together 27.4 s" in page.text


def test_samples_show_image_question_answers_and_verdicts(finished):
    page = Page(write_report(finished))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3
    for index, attrs in enumerate(images):
        kind, data = attrs["src"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert (picture.size, picture.getpixel((0, 0))) == ((84, 56), (200, 40 * index, 90))
    assert page.text.count("How many items are there in the image?") == 3
    assert page.text.count("✗ wrong") == page.text.count("✓ right") == 3
    assert page.text.count("<think>1+2</think><answer> 3 </answer>") == 3


def test_page_needs_nothing_from_elsewhere(finished):
    page = Page(write_report(finished))
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for name in ("src", "href", "xlink:href", "srcset", "action"):
        assert all(value.startswith(("data:", "#")) for value in page.attributes(name))
    assert "@import" not in page.source
    assert all(
        value.startswith("#") for value in page.source.replace("url(", "\nurl(").split("\nurl(")[1:]
    )
    policy = dict(
        (attrs.get("http-equiv"), attrs.get("content")) for tag, attrs in page.tags if tag == "meta"
    )
    assert "default-src 'none'" in policy["Content-Security-Policy"]


def test_ids_are_unique_and_references_resolve(finished):
    page = Page(write_report(finished))
    ids = page.attributes("id")
    assert ids and len(ids) == len(set(ids))
    referred = {part[: part.index(")")] for part in page.source.split("url(#")[1:]}
    referred |= {value[1:] for value in page.attributes("xlink:href")}
    assert referred and referred <= set(ids)


def test_long_runs_get_a_moving_average_and_short_ones_markers(tmp_path):
    long = Page(write_report(make_run(tmp_path / "long", [grpo_step(step) for step in range(40)])))
    short = Page(
        write_report(make_run(tmp_path / "short", [grpo_step(step) for step in range(20)]))
    )
    assert "mean of the last 5 steps" in long.text and "mean of the last" not in short.text
    assert {title: len(paths) for title, paths in long.curves().items()} == {
        title: {"Reward": 6, "KL weight β(s)": 1}.get(title, 2) for title in GRPO_PLOTS
    }
    assert [len(paths) for paths in short.curves().values()] == [3, 1, 1, 1, 1, 1]
    assert len(short.markers()) == 20 * 8 + 3 and not long.markers()  # 3 in the legend


def test_moving_average_is_flatter_than_the_raw_curve(tmp_path):
    steps = [grpo_step(step, kl=float(step % 2)) for step in range(40)]
    raw, mean = Page(write_report(make_run(tmp_path, steps))).curves()["KL to the reference"]

    def heights(path):
        numbers = [float(word) for word in path.replace("M", " ").replace("L", " ").split()]
        return numbers[11::2]  # from the sixth point on, where the window of 5 is full

    def spread(values):
        return max(values) - min(values)

    assert spread(heights(mean)) == pytest.approx(spread(heights(raw)) / 5, rel=0.01)


def test_run_without_steps(tmp_path):
    page = Page(write_report(make_run(tmp_path)))
    assert "No steps yet" in page.text and "0 of 40 training steps" in page.text
    assert page.headings() == ["Configuration"]


@pytest.mark.parametrize("steps", [1, 3])
def test_run_in_progress(tmp_path, steps):
    evaluation = {"before": BEFORE, "examples": [sample()]}
    run = make_run(tmp_path, [grpo_step(step) for step in range(steps)], evaluation)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    page = Page(write_report(run))
    assert "Greedy accuracy 62.0% before training" in page.text
    assert f"{steps} of 40 training steps" in page.text
    assert "Not yet evaluated after training" in page.text and "After" not in page.by_tag["th"]
    assert "✗ wrong" in page.text and "✓ right" not in page.text
    assert page.plots() == GRPO_PLOTS and set(page.curves()) == set(GRPO_PLOTS)


def test_the_processes_of_a_run_are_named_where_there_are_several(tmp_path):
    run = make_run(tmp_path)
    path = run / "processes.json"
    assert "processes" not in Page(write_report(run)).text
    path.write_text('{"processes": 2, "sharding": "<none>"}')
    told = "training steps recorded · 2 processes, sharding <none>"
    assert told in Page(write_report(run)).text
    path.write_text("[")
    with pytest.raises(UserError, match=r"processes\.json is no JSON object"):
        write_report(run)


def test_run_without_evaluation_is_headed_by_its_steps(tmp_path):
    page = Page(write_report(make_run(tmp_path, [grpo_step(step) for step in range(12)])))
    assert "Step 12 of 40" in page.text
    assert page.headings() == ["Training", "Time per step", "Configuration"]


def test_supervised_run_shows_loss_and_accuracy_only(tmp_path):
    steps = [sft_step(step) for step in range(30)]
    page = Page(
        write_report(
            make_run(tmp_path / "a", steps, {"before": BEFORE, "after": AFTER}, algo="sft")
        )
    )
    assert "counting · SFT · seed 7" in page.text and "62.0% → 94.5%" in page.text
    assert page.plots() == ["Loss"]
    assert "Update" in page.by_tag["th"] and "Rollout" not in page.by_tag["th"]
    steps = [step | {"entropy": 0.9} for step in steps]
    assert Page(write_report(make_run(tmp_path / "b", steps, algo="sft"))).plots() == [
        "Loss",
        "Entropy",
    ]


def test_constant_beta_of_zero_draws(tmp_path):
    steps = [{**grpo_step(step), "beta": 0.0} for step in range(5)]
    for step in steps:
        del step["kl"]  # no reference, no KL
    page = Page(write_report(make_run(tmp_path, steps, algo="grpo")))
    assert "KL to the reference" not in page.plots() and len(page.curves()["KL weight β(s)"]) == 1


def test_metrics_that_are_no_plottable_numbers(tmp_path):
    bad = [math.nan, math.inf, -math.inf, 1.7e308, None, "NaN", [1]]
    steps = [grpo_step(step) for step in range(25)]
    for step, value in zip(steps[3:], bad, strict=False):
        step["kl"] = step["format"] = step["seconds_rollout"] = value
    del steps[20]["kl"]
    page = Page(write_report(make_run(tmp_path, steps)))
    assert (
        "kl: no value in 8 of 25 steps" in page.text
        and "format: no value in 7 of 25 steps" in page.text
    )
    assert "15 s" in page.by_tag["td"]
    curves = page.curves()
    assert [len(paths) for paths in curves.values()] == [6, 2, 2, 1, 2, 2]
    assert all(
        "nan" not in path and "inf" not in path for paths in curves.values() for path in paths
    )


def test_speed_and_utilisation_are_shown_where_a_run_has_them(tmp_path):
    speed = {"tflops_update": 70.0, "mfu_update": 0.42}
    both = {**speed, "tflops_reference": 90.0, "mfu_reference": 0.55}
    page = Page(write_report(make_run(tmp_path / "grpo", [grpo_step(i, **both) for i in range(4)])))
    titles = ["Model FLOP utilisation", "Model FLOP per second"]
    assert page.plots() == GRPO_PLOTS + titles
    assert [len(page.curves()[title]) for title in titles] == [2, 2]
    assert {"mfu_update", "mfu_reference", "% of peak", "TFLOP/s"} <= set(page.by_tag["text"])

    # A card without a known peak, and supervised training, which has no reference.
    steps = [{**sft_step(i), "tflops_update": 70.0} for i in range(4)]
    page = Page(write_report(make_run(tmp_path / "sft", steps)))
    assert page.plots()[-1] == titles[1] and titles[0] not in page.plots()
    assert len(page.curves()[titles[1]]) == 1


def test_metric_that_is_never_finite_is_said_so(tmp_path):
    page = Page(
        write_report(make_run(tmp_path, [grpo_step(step, kl=math.nan) for step in range(4)]))
    )
    assert "kl: no value in 4 of 4 steps" in page.text
    assert page.plots() == GRPO_PLOTS and "KL to the reference" not in page.curves()


HOSTILE = (
    "</div></main><script>alert(1)</script><img src=http://evil.example/x onerror='a()'>"
    "&lt; $headline ${model} \"'"
)


def test_hostile_text_is_shown_as_text(tmp_path):
    example = sample(
        before=HOSTILE + " 1", after=HOSTILE + " 2", problem=HOSTILE + " 3", solution=HOSTILE + " 4"
    )
    example["images"] = [HOSTILE + " 5"]
    evaluation = {"before": BEFORE, "after": AFTER, "examples": [example], "task": HOSTILE + " 6"}
    changed = {"model": HOSTILE + " 7", "algo": "<b>'", "plugin": HOSTILE + " 8", HOSTILE + " 9": 1}
    page = Page(write_report(make_run(tmp_path, [grpo_step(0)], evaluation, **changed)))
    for digit in "123456789":
        assert f"{HOSTILE} {digit}" in page.text
    assert "· <B>' · seed" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not page.attributes("onerror")


def test_unprintable_text_is_replaced_visibly(tmp_path):
    example = sample(before="a\x00b\x1bc\ud800d\u202ee\x9ff\r\ng\th\uffff😀")
    path = write_report(make_run(tmp_path, evaluation={"before": BEFORE, "examples": [example]}))
    assert "a␀b␛c�d�e�f\ng\th�😀" in Page(path).text
    assert b"\x00" not in path.read_bytes()


def test_long_output_is_cut_with_a_note_and_a_fitting_one_is_not(tmp_path):
    examples = [sample(before="<" * 5000), sample(before=">" * 2000), sample(before="")]
    page = Page(
        write_report(make_run(tmp_path, evaluation={"before": BEFORE, "examples": examples}))
    )
    assert page.text.count("<") == 2000 and "cut: 2,000 of 5,000 characters shown" in page.text
    assert page.text.count(">") == 2000 and page.text.count("cut:") == 1
    assert "(empty)" in page.text


def test_images_that_cannot_be_shown_leave_a_note(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    run = make_run(tmp_path / "run")
    whole = (run / "images/0.png").read_bytes()
    (run / "images/broken.png").write_bytes(whole[: len(whole) // 2])
    data = whole.index(b"IDAT")
    (run / "images/lost.png").write_bytes(
        whole[: data - 1] + bytes([whole[data - 1] // 2]) + whole[data:]
    )
    (run / "images/text.png").write_text("not an image")
    names = [
        "images/none.png",
        "images/broken.png",
        "images/lost.png",
        "images/text.png",
        "../outside.png",
        "images",
        "a\x00b",
    ]
    names += [str(tmp_path / "outside.png"), "images/1.png"]
    examples = [sample(images=names), sample(images=[])]
    page = Page(write_report(make_run(run, evaluation={"before": BEFORE, "examples": examples})))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert page.text.count("cannot be shown") == 8


def test_large_images_are_scaled_down(tmp_path):
    run = make_run(tmp_path, evaluation={"before": BEFORE, "examples": [sample()]})
    Image.new("L", (1344, 672), 80).save(run / "images/0.png")
    page = Page(write_report(run))
    assert [(a["width"], a["height"]) for tag, a in page.tags if tag == "img"] == [("448", "224")]


def test_configuration_lists_every_setting(finished):
    page = Page(write_report(finished))
    assert "All 7 settings" in page.text
    assert set(CONFIG) <= set(page.by_tag["th"]) and "1e-06" in page.by_tag["td"]
    assert [attrs for tag, attrs in page.tags if tag == "details"] == [
        {"class": "card"}
    ]  # closed at first


def test_same_run_gives_the_same_page(finished):
    first = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.yaml", "model: [", "config.yaml is not YAML"),
        ("config.yaml", "just words", "config.yaml holds no settings"),
        ("metrics.jsonl", '{"step": 0}\n{"step": 1\n{"step": 2}\n', "metrics.jsonl line 2 "),
        ("metrics.jsonl", "7\n", "metrics.jsonl line 1 "),
        ("evaluation.json", '{"before": ', "evaluation.json is no JSON object"),
        (
            "evaluation.json",
            '{"before": {"greedy": {"accuracy": 1}}}',
            "evaluation.json is damaged",
        ),
        ("evaluation.json", '{"after": {"sampled": {}}}', "evaluation.json is damaged"),
        ("evaluation.json", '{"before": [1]}', "evaluation.json is damaged"),
        ("evaluation.json", '{"examples": [{"problem": 1}]}', "evaluation.json is damaged"),
        ("completions.jsonl", '{"step": 0, "completions": 5}\n', "completions.jsonl has no compl"),
    ],
)
def test_damaged_file_is_named(finished, name, content, says):
    (finished / name).write_text(content)
    with pytest.raises(UserError, match=says):
        write_report(finished)


def test_an_integer_beyond_floats_is_shown_as_missing(finished):
    huge = 10**400
    records = [{"step": huge, "completions": [{"text": "a", "reward": huge, "accuracy": huge}]}]
    (finished / "completions.jsonl").write_text(json.dumps(records[0]) + "\n")
    (finished / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward": huge}) + "\n")
    write_report(finished)
    assert "0" * 50 not in (finished / "completions.html").read_text()


def test_report_that_cannot_be_written(finished):
    (finished / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        write_report(finished)
    assert not list(finished.glob(".report*"))


def test_command_writes_the_page_or_names_the_missing_file(finished, tmp_path):
    def run(folder):
        command = [sys.executable, "-m", "mr1_fast.report", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    (finished / "report.html").write_text("old")
    done = run(finished)
    assert (done.returncode, done.stdout) == (0, f"wrote {finished / 'report.html'}\n")
    assert "94.5%" in Page(finished / "report.html").text

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none", finished / "config.yaml"):
        failed = run(folder)
        assert failed.returncode == 2
        assert failed.stderr.startswith(f"error: {folder / 'config.yaml'} does not exist")
        assert failed.stderr.count("\n") == 1
