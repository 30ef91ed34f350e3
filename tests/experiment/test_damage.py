"""Hostile and damaged files of an experiment: text stays text in the reports, damage is named."""

import json
import random
import re
from xml.etree import ElementTree

import pytest

from mr1_fast.errors import UserError
from mr1_fast.experiment import markdown
from mr1_fast.experiment.report import write_report
from mr1_fast.experiment.results import read_cell, read_results
from mr1_fast.experiment.run_cell import _evidence
from mr1_fast.integrity import sealed

from ..data.experiment import METHODS, cell_folder, describe, write_experiment, write_samples
from ..report.test_run_report import HOSTILE, Page

pytestmark = pytest.mark.filterwarnings("error")


def outside_of_code(source):
    """The Markdown outside of fenced blocks, which end by CommonMark's rule, and the blocks."""
    rest, blocks, fence = [], [], None
    for line in source.split("\n"):
        if fence is None and (opening := re.match(r" {0,3}(`{3,})[^`]*$", line)):
            fence = opening[1]
            blocks.append("")
        elif fence is None:
            rest.append(line)
        elif re.fullmatch(rf" {{0,3}}{fence}`*\s*", line):
            fence = None
        else:
            blocks[-1] += line + "\n"
    assert fence is None
    return "\n".join(rest), blocks


def test_hostile_text_is_shown_as_text(tmp_path):
    fence_breakers = "```\n# heading\n<script>alert(2)</script>\n``````\n~~~\n[a](http://evil.example)\n\x1b\u202e"
    folder = write_experiment(
        tmp_path, seeds=[0], notes=[HOSTILE + " 1", "| a | b |\n# c"], hardware=HOSTILE + " 2"
    )
    changed = {
        "problem": HOSTILE + " 3",
        "solution": HOSTILE + " 4",
        "text": HOSTILE + fence_breakers,
    }
    for variant in METHODS:
        write_samples(
            folder,
            variant,
            None if variant == "base" else "counting",
            0,
            **changed,
            image="../../../x.png",
        )
    cell_folder(folder, "sft", "geometry", 0).joinpath("cell.json").unlink()
    failed = json.dumps({"error": HOSTILE + " 5 `|` [a](http://evil.example) ![b](c) *d*"})
    cell_folder(folder, "sft", "geometry", 0).joinpath("failed.json").write_text(failed)
    page, source = Page(write_report(folder)), (folder / "report.md").read_text()
    for digit in "12345":
        assert f"{HOSTILE} {digit}" in page.text
    assert "script" not in {tag for tag, _ in page.tags} and not page.attributes("onerror")
    assert all(source.startswith("data:image/png;base64,") for source in page.attributes("src"))
    assert "image ../../../x.png cannot be shown" in page.text
    rest, blocks = outside_of_code(source)
    picture = "![Greedy accuracy on both tasks after training on one of them.](report.svg)"
    assert rest.count(picture) == 1
    rest = rest.replace(picture, "")
    assert any(
        block.startswith(HOSTILE + "```\n# heading\n<script>alert(2)</script>\n``````\n~~~\n")
        for block in blocks
    )
    assert all(piece in source for piece in ("␛", "\ufffd")) and "\x1b" not in source
    assert (
        "<" not in rest.replace("< 0.001", "")
        and "[a]" not in rest
        and "![" not in rest
        and "`" not in rest
    )
    lines = [line for line in rest.splitlines() if line.startswith("|")]
    assert all(re.fullmatch(r"(\| [^|]* )+\|", line) for line in lines)
    assert "# c" not in rest.splitlines()


def test_the_picture_stays_xml_whatever_the_labels_are(tmp_path):
    label = HOSTILE + "\x1b]]>&"
    axis = {"name": "alpha", "label": label, "numeric": False}
    write_report(write_experiment(tmp_path, seeds=[0], axis=axis))
    root = ElementTree.parse(tmp_path / "report.svg").getroot()
    assert not {"script", "img"} & {element.tag.split("}")[1] for element in root.iter()}
    assert "accuracy" in [element.text for element in root.iter() if element.text]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("61.2% [58.1, 64.0]", "61.2% [58.1, 64.0]"),
        ("< 0.001", "< 0.001"),
        ("[1](x)", "&#91;1&#93;(x)"),
        ("a|b\\|c", "a&#124;b&#92;&#124;c"),
        ("two\n\nlines", "two lines"),
        ("at https://x.org, WWW.x.org: a/b", "at https&#58;//x.org, WWW&#46;x.org: a/b"),
        ("GRPO-D → α = 0.25", "GRPO-D → α = 0.25"),
    ],
)
def test_inline_markdown(text, result):
    assert markdown.inline(text) == result


def test_long_answers_are_cut_with_a_note():
    source = markdown.fence("`" * 5000)
    assert source.split("\n")[0] == "`" * 2001 + "text"
    assert "cut: 2,000 of 5,000 characters shown" in source


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cell.json", "{", "cell.json is no JSON"),
        ("cell.json", "[" * 100_000, "cell.json is no JSON"),
        ("cell.json", "[1]", "cell.json is damaged"),
        ("cell.json", '{"seconds": {"train": 1}}', "cell.json is damaged"),
        ("cell.json", "bits", "counting.* is damaged .*not 200 times 0 or 1"),
        ("cell.json", "short", "cell.json is damaged .*not 200 times 0 or 1"),
        ("samples.json", '{"a": 1}', "samples.json holds no list"),
        ("samples.json", "[1]", "samples.json holds no list"),
        ("curve.jsonl", "{\n", "curve.jsonl line 1 is no JSON object"),
        ("run/metrics.jsonl", '{"step": 0}\n7\n', "metrics.jsonl line 2 is no JSON object"),
        ("../../../../experiment.json", "{}", "experiment.json is damaged"),
        ("../../../../experiment.json", '{"tasks": []}', "experiment.json is damaged"),
        ("../../../../experiment.json", "hello", "experiment.json is no JSON"),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content, says):
    folder = write_experiment(tmp_path, seeds=[0])
    path = cell_folder(folder, "grpo", "counting", 0) / name
    if content in ("bits", "short"):
        record = json.loads(path.read_text())
        record["correct"]["geometry"]["sampled"] = "2" * 200 if content == "bits" else "01"
        content = json.dumps(record)
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_folder_without_experiment_and_page_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"experiment\.json does not exist"):
        write_report(tmp_path)
    describe(tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        write_report(tmp_path)


def sealed_cell(folder):
    """The folder of a finished cell whose files have checksums, as cells have them now."""
    place = cell_folder(folder, "grpo", "counting", 0)
    record = json.loads((place / "cell.json").read_text())
    record["files"] = _evidence(place)
    (place / "cell.json").write_text(sealed(record))
    return place


def read(folder):
    return read_cell(folder, "grpo", "counting", 0, {"counting": 200, "geometry": 200})


def test_no_byte_of_a_finished_cell_can_be_another(tmp_path):
    folder = write_experiment(tmp_path, seeds=[0])
    place, draw = sealed_cell(folder), random.Random(0)
    sound = read(folder)
    assert sound.state == "finished"
    paths = [place / name for name in ("cell.json", "samples.json", "curve.jsonl")]
    paths.append(place / "run" / "metrics.jsonl")
    for number in range(200):
        path = paths[number % 4]
        data = path.read_bytes()
        at = draw.randrange(len(data))
        changed = data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]
        path.write_bytes(changed if number % 3 else data[:at])
        with pytest.raises(UserError, match=rf"{path.name} .*remove it, and run the experiment"):
            read(folder)
        path.write_bytes(data)
    assert (read(folder).correct["geometry"]["greedy"] == sound.correct["geometry"]["greedy"]).all()


def test_what_a_killed_process_had_begun_to_write_is_no_part_of_a_cell(tmp_path):
    place = sealed_cell(write_experiment(tmp_path, seeds=[0]))
    before = _evidence(place)
    (place / ".cell.json.0123456789ab.partial").touch()
    assert _evidence(place) == before and "curve.jsonl" in before


def test_the_record_of_another_cell_is_refused(tmp_path):
    folder = write_experiment(tmp_path, seeds=[0])
    place = sealed_cell(folder)
    other = cell_folder(folder, "grpo-d", "counting", 0)
    (place / "cell.json").write_bytes((other / "cell.json").read_bytes())
    with pytest.raises(UserError, match=r"cell\.json is damaged \(it is that of another cell"):
        read(folder)


VALUES = [None, "", "7", [], [[1]], {}, {"train": "x"}, True, 10**400, -1, float("nan")]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("name", ["seconds", "peak_memory", "correct"])
def test_no_value_of_another_form_ends_in_a_traceback(name, value, tmp_path):
    """Checksums hold here, or there are none, as in earlier versions."""
    folder = write_experiment(tmp_path, seeds=[0])
    path = cell_folder(folder, "grpo", "counting", 0) / "cell.json"
    record = json.loads(path.read_text()) | {name: value}
    for text in (json.dumps(record), sealed(record)):
        path.write_text(text)
        if name == "peak_memory" and value is None:
            assert read(folder).state == "finished"
            continue
        with pytest.raises(
            UserError, match=r"cell\.json is damaged .*remove it, and run the"
        ) as told:
            read(folder)
        assert "\n" not in str(told.value)


def test_the_description_of_an_experiment_is_whole(tmp_path):
    folder = write_experiment(tmp_path, seeds=[0])
    path, draw = folder / "experiment.json", random.Random(0)
    data = sealed(json.loads(path.read_text())).encode()
    path.write_bytes(data)
    assert len(read_results(folder).cells) == 7
    for _ in range(200):
        at = draw.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"experiment\.json is damaged"):
            read_results(folder)
