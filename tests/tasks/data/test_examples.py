"""Examples from every source by name, and one clear sentence for every fault."""

import datasets
import pytest
from PIL import Image

from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import DrawnExamples, configured_examples, load_examples

from ...data.pictures import (
    ROW,
    colour,
    contents,
    encoded,
    folder_of_lines,
    table,
    write_lines,
)


def test_load_examples_draws():
    examples = load_examples("geometry", "drawn", "test", 3, difficulty=2, limit=9)
    assert contents(examples.all(99)) == contents(
        DrawnExamples(get_task("geometry"), "test", 3, 2, 9).all(9)
    )
    examples.require_thinking()
    assert all(example.thinking for example in examples.all(9))


@pytest.mark.parametrize("form", ["file", "folder", "saved", "list"])
def test_embedded_images_load(form, tmp_path):
    rows, path = table(), tmp_path / "data"
    path.mkdir()
    if form == "list":
        rows = rows.map(lambda row: {"images": [row["image"]] * 2}, remove_columns="image")
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(str(path)) if form == "saved" else rows.to_parquet(path / "rows.parquet")
    examples = load_examples(
        "counting", str(path / "rows.parquet" if form == "file" else path), "train", 0
    )
    assert len(examples) == 5
    for index, example in enumerate(examples.all(9)):
        assert example.problem == f"How many? {index}" and example.solution == str(index)
        assert [image.mode for image in example.images] == ["RGB"] * (2 if form == "list" else 1)
        assert all(image.getpixel((3, 3)) == colour(index) for image in example.images)
    assert contents(examples.take(3, 4)) == contents(
        load_examples("counting", str(path), "train", 0).take(3, 4)
    )


@pytest.mark.parametrize("as_folder", [True, False])
def test_json_lines_beside_image_files(as_folder, tmp_path):
    folder = folder_of_lines(
        tmp_path / "set", problem="<image>How many?", solution=3, thinking="<think> 1+2 </think>"
    )
    examples = load_examples(
        "counting", str(folder if as_folder else folder / "train.jsonl"), "train", 0
    )
    examples.require_thinking()
    second = examples.all(3)[1]
    assert (second.problem, second.solution, second.thinking) == ("How many?", "3", "1+2")
    assert second.key == "1.png" and second.images[0].getpixel((0, 0)) == colour(1)


BROKEN = encoded(Image.effect_noise((64, 64), 50))[:900]
FAULTS = {
    "not JSON": ("rows.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3 of .*rows.jsonl is not JSON"),
    "not text": ("rows.jsonl", b'{"a": 1}\n\xff\xfe\n', "line 2 of .*rows.jsonl is not UTF-8 text"),
    "not an object": ("rows.jsonl", b"[1, 2]\n", "line 1 of .*rows.jsonl is not a JSON object"),
    "empty list": ("rows.jsonl", b"", "rows.jsonl is empty: give data with at least one row"),
    "empty folder": (".", None, "set is empty: give a folder or file that holds rows"),
    "no rows": (
        "rows.parquet",
        table(0),
        "parquet is empty: give a folder or file that holds rows",
    ),
    "unknown format": (
        "rows.xlsx",
        b"?",
        "rows.xlsx has an unknown format: give one of .jsonl, .json, .csv, .tsv, .parquet",
    ),
    "broken table": ("rows.parquet", b"?", "rows.parquet could not be loaded"),
    "no such file": ("x.jsonl", None, "x.jsonl is missing: check the path"),
    "no problem column": (
        "rows.jsonl",
        [{"img": "1.png"}],
        r"no column 'problem', 'question', .* \(found: img\): rename .* that holds the problem",
    ),
    "image column of another name": (
        "rows.jsonl",
        [{"picture": "1.PNG", "problem": "?", "solution": "1"}],
        r"no column 'image', .*but 'picture' looks like images: .*{\"images\": \"picture\"}",
    ),
    "no solution": (
        "rows.parquet",
        table(solution=None),
        r"no column 'solution', .* \(found: image, problem\)",
    ),
    "empty cell": (
        "rows.jsonl",
        [ROW | {"problem": None}],
        "row 1 of .* has no 'problem': fill it in",
    ),
    "missing image": (
        "rows.jsonl",
        [ROW],
        r"image file .*1.png \(row 1 of .*rows.jsonl\) is missing.*image_root",
    ),
    "number as image": (
        "rows.jsonl",
        [ROW | {"image": 7}],
        "the image in row 1 of .* is neither a path nor encoded bytes",
    ),
    "no content": (
        "rows.jsonl",
        [ROW | {"image": {}}],
        "the image in row 1 of .* is neither a path nor encoded",
    ),
    "broken image": (
        "rows.parquet",
        table(1, image=[{"bytes": BROKEN}]),
        "image in row 1 of .* cannot be decoded",
    ),
}


@pytest.mark.parametrize("name, content, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_in_one_sentence(name, content, message, tmp_path):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list):
        write_lines(path, content)
    elif content is not None:
        content.to_parquet(path)
    with pytest.raises(UserError, match=message) as raised:
        load_examples("counting", str(path), "train", 0).all(1)
    assert "\n" not in str(raised.value)


def test_a_broken_image_file_is_named(tmp_path):
    folder = folder_of_lines(tmp_path / "set")
    (folder / "1.png").write_bytes(BROKEN)
    examples = load_examples("counting", str(folder), "train", 0)
    examples.all(1)
    with pytest.raises(UserError, match=r"image file .*1.png \(row 2 of .*\) cannot be decoded"):
        examples.all(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("chess", "drawn", "train", 0), "the known tasks are counting, geometry"),
        (
            ("counting", "drawn", "testmini", 0),
            "drawn data has only the splits train, validation, test: for testmini, pass other",
        ),
        (("free", "drawn", "train", 0), "task free draws no items: name data with --data"),
        (("counting", "drawn", "train", 0, 0), "difficulty is 0"),
        (("counting", "drawn", "train", 0, 1, 0), "limit is 0: set it to 1 or more"),
        (
            ("geometry", "geoqa", "test", 0),
            "needs image_root: the folder with geoqa_test_prompts.jsonl",
        ),
        (
            ("geometry", "geoqa", "test", 0, 1, None, "/nowhere"),
            "/nowhere/geoqa_test_prompts.jsonl is missing: put R1-V's list of geoqa there .from https://github.com/.*eval",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        load_examples(*arguments)


def lines(folder, **files):
    """Write files with one row each, whose solution is the name of the file."""
    folder.mkdir(exist_ok=True)
    for name in files:
        write_lines(folder / f"{name}.jsonl", [{"problem": "?", "solution": name} | files[name]])
    return folder


def of_run(split="test", **settings):
    """Return the solution of the one example that a run with these settings has."""
    config = TrainConfig(task="free", **{name: str(value) for name, value in settings.items()})
    (item,) = configured_examples(config, split, config.eval_data if split == "test" else None).all(
        9
    )
    return item.solution


def test_a_run_trains_on_one_split_and_evaluates_another(tmp_path):
    folder = lines(tmp_path / "set", train={}, val={}, test={})
    assert of_run("train", data=folder) == "train"
    assert of_run("train", data=folder, data_split="dev") == "val"
    assert of_run(data=folder) == "test"
    assert of_run(data=folder, eval_split="validation") == "val"
    assert of_run(data=folder, data_split="test") == "val"
    (folder / "test.jsonl").unlink()
    assert of_run(data=folder) == "val"
    with pytest.raises(UserError, match=r"the splits train, val, and val is trained on: for test"):
        of_run(data=folder, data_split="val")
    with pytest.raises(
        UserError, match=r"has only the splits train, validation: for test.*--eval-split"
    ):
        of_run(data=folder, eval_split="test")


def test_a_file_may_have_the_name_of_the_split_that_is_wanted(tmp_path):
    folder = lines(tmp_path / "set", testmini={}, test={})
    assert of_run("train", data=folder, data_split="testmini") == "testmini"
    assert of_run(data=folder, data_split="testmini") == "test"
    assert of_run(data=folder, data_split="test", eval_split="testmini") == "testmini"
    with pytest.raises(UserError, match=r"testmini is trained on: for test, name another with"):
        of_run(data=folder, data_split="testmini", eval_split="testmini")


@pytest.mark.parametrize("name", ["val", "my_eval", "rows", "train"])
def test_a_file_for_evaluation_is_held_out_whatever_its_name(name, tmp_path):
    folder = lines(tmp_path / "set", data={}, **{name: {}})
    file = folder / f"{name}.jsonl"
    assert of_run(data=folder / "data.jsonl", eval_data=file) == name
    assert of_run("train", data=file) == name
    with pytest.raises(UserError, match=r"jsonl has only the split .*: for test, pass other data"):
        of_run(data=file)


def test_drawn_items_that_are_trained_on_are_not_held_out():
    for settings, split in (({}, "test"), ({"data_split": "test"}, "validation")):
        config = TrainConfig(**settings)
        assert configured_examples(config, "test").split == split
    config = TrainConfig(data_split="testing", eval_split="test")
    assert configured_examples(config, "train").split == "test"
    with pytest.raises(UserError, match=r"drawn data has the splits .*, and test is trained on"):
        configured_examples(config, "test")


def test_columns_of_the_training_data_need_not_fit_other_held_out_data(tmp_path):
    row = {"problem": None, "query": "?", "solution": "a"}
    folder = lines(tmp_path / "set", train=row, other={})
    config = TrainConfig(
        task="free", data=str(folder / "train.jsonl"), columns={"problem": "query"}
    )
    assert configured_examples(config, "train").all(1)[0].problem == "?"
    assert configured_examples(config, "test", str(folder / "other.jsonl")).all(1)[0].problem == "?"
    config.data = str(folder / "other.jsonl")
    with pytest.raises(UserError, match=r"no column 'query' for the problem \(found: problem, sol"):
        configured_examples(config, "train")


def test_the_papers_test_sets_are_not_trained_on(tmp_path):
    name = "geoqa_test_prompts.jsonl"
    write_lines(tmp_path / name, [{"image_path": None, "question": "?", "ground_truth": 4}])
    for data in ("geoqa", str(tmp_path / name)):
        with pytest.raises(UserError, match=r"is a test set of the paper: for train, pass other"):
            load_examples("geometry", data, "train", 0, image_root=str(tmp_path))
        assert load_examples("geometry", data, "test", 0, image_root=str(tmp_path)).all(1)
